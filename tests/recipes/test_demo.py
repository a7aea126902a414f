"""The demo: what runs where no data is given, at toy size, and the teachers that ship for it."""

import json
from functools import partial
from pathlib import Path

import corpus
import pytest
import torch
import train
import train_demo_teachers
from demo_voices import make_demo_corpus

from speechbrain_mrl import ReDimNet

TEACHERS = Path(train.__file__).parent / "demo_teachers"


def test_the_shipped_teachers_are_those_that_the_script_trains():
    names = {f"{name}-demo-ptn" for name in train_demo_teachers.TEACHERS}
    assert {path.stem for path in TEACHERS.glob("*.pt")} == names
    for path in TEACHERS.glob("*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        wanted = {**train_demo_teachers.BACKBONE, "embed_dim": train_demo_teachers.EMBED_DIM}
        assert checkpoint["model_config"] == wanted
        ReDimNet.from_config(wanted).load_state_dict(checkpoint["state_dict"])


def test_no_teacher_hears_a_voice_of_the_demo_or_of_another_teacher():
    voices = train_demo_teachers.TEACHERS.values()
    assert all(one.group != 0 for one in voices)  # groups share no accent and variant
    assert len({(one.group, one.seed) for one in voices}) == len(voices)


def test_a_teacher_is_trained_on_its_voices_and_loads(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    few = train_demo_teachers.Voices(group=1, n_speakers=3, clips_per_speaker=2, seed=0)
    monkeypatch.setattr(train_demo_teachers, "TEACHERS", {"demo_few": few})
    monkeypatch.setattr(train_demo_teachers, "BATCH_SIZE", 2)
    folders = [f"--output_folder={tmp_path}", f"--voices_folder={tmp_path / 'voices'}"]
    train_demo_teachers.main([*folders, "--n_steps=2"])
    checkpoint = torch.load(tmp_path / "demo_few-demo-ptn.pt", weights_only=True)
    teacher = ReDimNet.from_config(checkpoint["model_config"])
    teacher.load_state_dict(checkpoint["state_dict"])
    assert teacher.eval()(torch.randn(1, 16000)).isfinite().all()


def test_the_demo_distils_its_teachers_into_a_student_no_larger_than_one(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    few = partial(make_demo_corpus, n_speakers=14, clips_per_speaker=4, seconds=1.5)
    monkeypatch.setattr(corpus, "make_demo_corpus", few)
    small = {"test_speakers": 4, "valid_speakers": 4, "batch_size": 8, "number_of_epochs": 1}
    small |= {"chunk_seconds": 0.5, "chunks_per_clip": 1, "output_folder": tmp_path}
    train.main(["hparams/mrl_distill.yaml", *(f"--{key}={value}" for key, value in small.items())])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["corpus"] == "demo"
    assert len(report["baselines"]["teachers"]) == 4
    for row in ("ensemble", "start"):
        assert report["baselines"][row].keys() == report["dims"].keys()
    teacher = ReDimNet.from_config({**train_demo_teachers.BACKBONE, "embed_dim": 256})
    assert report["params"] == sum(p.numel() for p in teacher.parameters())
