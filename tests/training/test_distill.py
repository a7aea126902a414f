import copy
import itertools
from collections import Counter
from functools import partial
from multiprocessing import forkserver
from types import SimpleNamespace

import numpy as np
import pytest
import speechbrain as sb
import torch
import torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.encoder import CategoricalEncoder
from torch.utils.data import DataLoader

from speechbrain_mrl import (
    MatryoshkaDistillationLoss,
    ReDimNet,
    ReDimNetMRL,
    expand_model,
    train_distilled_mrl,
)
from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import Clip, find_clips, read_clips, speaker_of, write_clips
from speechbrain_mrl.dataio.dataset import train_dataset, valid_dataset
from speechbrain_mrl.evaluation.verification import Trials
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.training import distill as training
from speechbrain_mrl.training import projection
from speechbrain_mrl.training.distill import MRLBrain, finish_head, fit_objective
from speechbrain_mrl.training.teachers import SegmentTeachers


@pytest.fixture
def clips_csv(small_clips, tmp_path):
    path = tmp_path / "clips.csv"
    write_clips(small_clips, path)
    return path


@pytest.fixture
def student_config(tiny_config):
    return {"embed_dim": 48, "mrl_dims": [16, 48], "backbone": tiny_config}


def test_a_chunk_is_a_piece_of_its_clip(clips_csv, small_clips):
    dataset = train_dataset(clips_csv, chunk_seconds=0.25)
    whole = read_audio(small_clips[3].wav, 0, small_clips[3].num_frames)
    windows = whole.unfold(0, 4000, 1)
    chunks = []
    for epoch in range(5):
        dataset.epoch.fill_(epoch)
        chunks.append(dataset[3]["sig"])
    for chunk in chunks:
        assert (windows == chunk).all(dim=1).any()
    assert len({tuple(chunk.tolist()) for chunk in chunks}) > 1


@pytest.mark.parametrize(
    "dataset", [partial(train_dataset, chunk_seconds=0.5), partial(valid_dataset, max_seconds=1)]
)
def test_workers_may_be_new_processes(dataset, clips_csv, monkeypatch):
    """Also of a server that began before this process had its seed."""
    forkserver.ensure_running()
    monkeypatch.setenv("SB_GLOBAL_SEED", "7")
    loader = DataLoader(
        dataset(clips_csv),
        4,
        collate_fn=PaddedBatch,
        num_workers=1,
        multiprocessing_context="forkserver",
    )
    for found, expected in zip(loader, DataLoader(dataset(clips_csv), 4, collate_fn=PaddedBatch)):
        assert found.id == expected.id
        assert torch.equal(found.sig.data, expected.sig.data)


def test_a_clip_shorter_than_a_chunk_is_repeated(clips_csv, small_clips):
    chunk = train_dataset(clips_csv, chunk_seconds=2.0)[0]["sig"]
    whole = read_audio(small_clips[0].wav, 0, small_clips[0].num_frames)
    assert len(chunk) == 32000
    torch.testing.assert_close(chunk, whole.repeat(5)[:32000])


def test_an_epoch_may_hold_several_chunks_of_a_clip(clips_csv, small_clips):
    assert len(train_dataset(clips_csv, 0.5, chunks_per_clip=3)) == 3 * len(small_clips)


def test_without_an_encoder_no_label_is_read(clips_csv, tmp_path):
    """The CSV has no column of speakers at all, and nothing asks for one."""
    assert "spk_id" not in clips_csv.read_text()
    assert train_dataset(clips_csv, 0.5)[0].keys() == {"id", "sig"}
    labelled = tmp_path / "labelled.csv"
    first, *rows = clips_csv.read_text().splitlines()
    lines = [f"{first},spk_id"] + [f"{row},{row[:4]}" for row in rows]
    labelled.write_text("\n".join(lines) + "\n")
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(["id07", "id00"])
    assert train_dataset(labelled, 0.5, 1, encoder)[0]["label"] == 1


def test_validation_clips_come_whole_and_longest_first(clips_csv, small_clips):
    lengths = [len(item["sig"]) for item in valid_dataset(clips_csv, max_seconds=1.0)]
    assert lengths == sorted((min(c.num_frames, 16000) for c in small_clips), reverse=True)


def test_an_augmented_copy_learns_the_target_of_the_clean_clip():
    """Two copies of two clips meet the targets of those clips, in the order of the copies."""
    seen = {}

    class Store:
        def targets(self, batch):
            return {"a": torch.tensor([[1.0], [2.0]])}

    class Objective(torch.nn.Module):
        def forward(self, embeddings, targets, labels):
            seen.update(embeddings=embeddings, targets=targets["a"])
            return embeddings.sum(), {}

    def twice(wavs, wav_lens):
        return torch.cat([wavs, -wavs]), torch.cat([wav_lens, wav_lens])

    brain = MRLBrain(
        stores={sb.Stage.TRAIN: Store()},
        valid_trials=None,
        lr_schedule=None,
        modules={"student": PassThrough(), "objective": Objective()},
        hparams={"wav_augment": twice, "labels": False},
        run_opts={"device": "cpu"},
    )
    brain.on_stage_start(sb.Stage.TRAIN)
    batch = PaddedBatch([{"id": "x", "sig": torch.ones(4)}, {"id": "y", "sig": torch.ones(4) * 3}])
    brain.compute_objectives(brain.compute_forward(batch, sb.Stage.TRAIN), batch, sb.Stage.TRAIN)
    assert seen["embeddings"][:, 0].tolist() == [1, 3, -1, -3]
    assert seen["targets"][:, 0].tolist() == [1, 2, 1, 2]


def test_teachers_and_student_hear_the_same_where_teachers_hear_augmentation():
    """Twice as loud for both, then negated for the student alone."""
    heard = []

    class Loud(torch.nn.Module):
        def forward(self, wavs, wav_lens):
            heard.append(wavs)
            return wavs

    class Objective(torch.nn.Module):
        def forward(self, embeddings, targets, labels):
            return (embeddings + targets["a"]).abs().sum(), {}

    store = SegmentTeachers({"a": Loud()}, SimpleNamespace(embeddings={}))
    brain = MRLBrain(
        stores={sb.Stage.TRAIN: store},
        valid_trials=None,
        lr_schedule=None,
        modules={"student": PassThrough(), "objective": Objective()},
        hparams={
            "teacher_augment": lambda wavs, wav_lens: (2 * wavs, wav_lens),
            "wav_augment": lambda wavs, wav_lens: (-wavs, wav_lens),
            "labels": False,
        },
        run_opts={"device": "cpu"},
    )
    brain.on_stage_start(sb.Stage.TRAIN)
    batch = PaddedBatch([{"id": "x", "sig": torch.linspace(-1, 1, 5)}])
    embeddings = brain.compute_forward(batch, sb.Stage.TRAIN)
    assert brain.compute_objectives(embeddings, batch, sb.Stage.TRAIN) == 0
    assert heard[0][0].tolist() == [-2, -1, 0, 1, 2]


def test_augmentation_runs_in_float32_where_the_network_is_in_bfloat16():
    """Its FFTs and products lose 46 dB below the signal otherwise."""
    seen = []

    def mixed(wavs, wav_lens):
        seen.append(wavs @ torch.eye(wavs.shape[1]))  # what autocast would round
        return seen[-1], wav_lens

    brain = MRLBrain(
        stores={},
        valid_trials=None,
        lr_schedule=None,
        modules={"student": PassThrough(), "objective": torch.nn.Identity()},
        hparams={"wav_augment": mixed, "labels": False},
        run_opts={"device": "cpu", "precision": "bf16"},
    )
    wav = torch.linspace(-1, 1, 50)
    with brain.training_ctx:
        brain.compute_forward(PaddedBatch([{"id": "x", "sig": wav}]), sb.Stage.TRAIN)
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0][0], wav)


class PassThrough(torch.nn.Module):
    def forward(self, wavs, wav_lens):
        return wavs


def test_distillation_from_python_brings_the_student_nearer_to_its_teacher(
    small_corpus, random_model, tiny_config, student_config, tmp_path
):
    """On held-out clips, from a folder without any structure being read."""
    teacher = random_model(tiny_config, seed=5)
    torch.manual_seed(0)
    student = train_distilled_mrl(
        {"one": teacher},
        student_config,
        small_corpus,
        epochs=6,
        output_folder=tmp_path / "run",
        batch_size=16,
        chunk_seconds=0.5,
        lr=5e-3,
    )
    assert isinstance(student, ReDimNetMRL) and not student.training
    losses = [
        float(line.split("valid loss: ")[1].split(",")[0])
        for line in (tmp_path / "run" / "train_log.txt").read_text().splitlines()
    ]
    assert len(losses) == 7  # epoch 0 is before the first step
    assert min(losses) < 0.8 * losses[1] < 0.8 * losses[0]
    clips = read_clips(tmp_path / "run" / "train.csv")
    embeddings = embed_clips({"student": student}, clips)["student"]
    assert embeddings.mean(dim=0).norm() < 1e-4 * embeddings.norm(dim=1).mean()


def test_a_pretrained_student_starts_near_the_target_of_its_teachers(
    small_corpus, random_model, tiny_config, tmp_path, monkeypatch
):
    """Before the first step; rotated only, so that distances are those of the checkpoint."""
    for then in ("train_student", "finish_head"):
        monkeypatch.setattr(training, then, lambda *arguments, **options: None)
    backbone = random_model(tiny_config)
    teachers = {"one": backbone, "two": random_model(tiny_config, seed=3)}
    objective = MatryoshkaDistillationLoss([16, 48], "all", terms={"cosine": 1.0})
    student = train_distilled_mrl(
        teachers,
        {"embed_dim": 48, "mrl_dims": [16, 48], "backbone": backbone},
        small_corpus,
        epochs=1,
        output_folder=tmp_path / "run",
        objective=objective,
    )
    found = embed_clips(
        {"student": student, **teachers}, read_clips(tmp_path / "run" / "train.csv")
    )
    own, k = found.pop("student"), backbone.embed_dim
    target = objective.targets(found)[48][:, :k]
    turn, _ = orthogonal_procrustes(found["one"].double(), target.double())
    torch.testing.assert_close(
        own[:, :k].double(), found["one"].double() @ torch.from_numpy(turn), atol=1e-3, rtol=1e-3
    )


def test_an_output_layer_is_fitted_on_some_utterances_of_speakers_all_over_the_list(monkeypatch):
    monkeypatch.setattr(projection, "HEAD_CLIPS", 50)
    counts = {f"id{i}": 4 if i % 3 else 25 for i in range(40)}
    clips = [
        Clip(f"{speaker}/{session}/0.wav", "", 0, 1)
        for speaker, count in counts.items()
        for session in range(count)
    ]
    found = Counter(speaker_of(clip.id) for clip in projection.spread_speakers(clips))
    assert sum(found.values()) <= 50 and len(found) >= 7
    assert all(n == min(counts[speaker], 9) for speaker, n in found.items())  # 25 by steps of 3
    assert any(int(speaker[2:]) < 10 for speaker in found)
    assert any(int(speaker[2:]) >= 30 for speaker in found)


@pytest.mark.parametrize("channel", [0.01, 3.0])
def test_targets_are_rotated_by_lda_where_validation_trials_gain(channel, tmp_path, caplog):
    """A channel that varies more than voices is what PCA puts first; without one, PCA is as good."""
    generator = torch.Generator().manual_seed(0)

    def store(n_speakers):
        voices = torch.randn(n_speakers, 6, generator=generator).repeat_interleave(8, dim=0)
        noise = channel * torch.randn(len(voices), 6, generator=generator)
        ids = [f"{i // 8}/s/{i % 8}" for i in range(len(voices))]
        stub = TeacherStore(tmp_path)
        stub.rows = {clip_id: row for row, clip_id in enumerate(ids)}
        stub.parts = {"one": [torch.cat([0.5 * voices, noise], dim=1)]}
        return stub

    train, valid = store(40), store(12)
    ids = list(valid.rows)
    pairs = itertools.combinations(ids, 2)
    trials = Trials.parse([f"{int(speaker_of(a) == speaker_of(b))} {a} {b}" for a, b in pairs])
    objective = MatryoshkaDistillationLoss([3, 12], "all", terms={"cosine": 1.0})
    with caplog.at_level("INFO"):
        fit_objective(objective, train, valid, trials)
    speakers = torch.arange(40).repeat_interleave(8)
    fitted = MatryoshkaDistillationLoss([3, 12], "all", terms={"cosine": 1.0})
    fitted.fit(train.embeddings, None if channel < 1 else speakers)
    torch.testing.assert_close(objective.state_dict(), fitted.state_dict())
    assert "by PCA" in caplog.text


@pytest.mark.parametrize("winner", ["centred", "principal", "LDA"])
def test_a_finished_head_has_the_axes_with_the_lowest_eer_on_held_out_trials(
    winner, small_corpus, random_model, tiny_config
):
    """Labels are made so that one of the three separates them without an error."""
    clips = find_clips(small_corpus)
    fit, held_out = clips[::2], clips[1::12]
    model = ReDimNetMRL.from_redimnet(random_model(tiny_config), 32, [2, 32])
    before = embed_clips({"model": model}, clips)["model"]
    pca = PCA().fit(before[::2].double())
    speakers = [speaker_of(clip.id) for clip in fit]
    lda = matryoshka_rotation(before[::2], [32], np.unique(speakers, return_inverse=True)[1])
    expected = {
        "LDA": lda(before),
        "centred": before - before[::2].mean(dim=0),
        "principal": torch.from_numpy(pca.transform(before.double())).float(),
    }
    ids = [clip.id for clip in held_out]
    pairs = list(itertools.combinations(range(len(ids)), 2))
    x = F.normalize(expected[winner][1::12, :2], dim=1)
    cosines = np.array([float(x[a] @ x[b]) for a, b in pairs])
    labels = (cosines > np.median(cosines)).astype(int)
    lines = [f"{label} {ids[a]} {ids[b]}" for label, (a, b) in zip(labels, pairs)]
    finish_head(model, fit, held_out, Trials.parse(lines), labelled=True)
    after = embed_clips({"model": model}, clips)["model"]
    signs = torch.sign((after * expected[winner]).sum(dim=0))  # an axis may point either way
    torch.testing.assert_close(after * signs, expected[winner], atol=2e-3, rtol=2e-3)


def test_distillation_takes_a_loader_and_starts_from_a_redimnet(
    clips_csv, random_model, tiny_config, tmp_path
):
    backbone = random_model(tiny_config)
    loader = DataLoader(
        train_dataset(clips_csv, 0.5), batch_size=8, collate_fn=PaddedBatch, shuffle=True
    )
    student = train_distilled_mrl(
        {"one": backbone, "two": random_model(tiny_config, seed=3)},
        {"embed_dim": 32, "mrl_dims": [16, 32], "backbone": backbone},
        loader,
        epochs=1,
        output_folder=tmp_path,
        lr=1e-9,
    )
    # At so small a learning rate the weights are still the backbone's, to rounding.
    torch.testing.assert_close(student.linear.weight, backbone.linear.weight, rtol=0, atol=1e-6)


def test_an_interrupted_call_goes_on_where_it_was(
    small_corpus, random_model, tiny_config, student_config, tmp_path
):
    call = {
        "teachers": {"one": random_model(tiny_config, seed=5)},
        "student_config": student_config,
        "data": small_corpus,
        "output_folder": tmp_path,
        "batch_size": 16,
        "chunk_seconds": 0.5,
    }
    train_distilled_mrl(**call, epochs=1)
    train_distilled_mrl(**call, epochs=2)
    log = (tmp_path / "train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == [f"epoch: {i}" for i in range(3)]


def test_expansion_keeps_the_old_dimensions(tiny_config):
    model = ReDimNetMRL(embed_dim=32, mrl_dims=(16, 32), backbone=tiny_config).eval()
    before = copy.deepcopy(model.state_dict())
    grown = expand_model(model, 64).eval()
    assert grown.mrl_dims == (16, 32, 64)
    for key, value in before.items():
        if key.startswith("linear"):
            assert torch.equal(grown.state_dict()[key][:32], value)
        else:
            assert torch.equal(grown.state_dict()[key], value)
        assert torch.equal(model.state_dict()[key], value)
    wavs = torch.randn(3, 8000)
    with torch.no_grad():
        torch.testing.assert_close(grown(wavs)[:, :32], model(wavs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("new_dim", [32, 16])
def test_expansion_to_no_more_dimensions_is_refused(tiny_config, new_dim):
    model = ReDimNetMRL(embed_dim=32, mrl_dims=(16, 32), backbone=tiny_config)
    with pytest.raises(ValueError, match=f"larger than .* 32, got {new_dim}"):
        expand_model(model, new_dim)


def test_a_student_cannot_be_smaller_than_what_it_starts_from(random_model, tiny_config):
    with pytest.raises(ValueError, match="embed_dim 16 is smaller than the 32"):
        ReDimNetMRL.from_redimnet(random_model(tiny_config), 16, (8, 16))


def test_a_redimnet_is_no_matryoshka_student(random_model, tiny_config):
    assert isinstance(ReDimNetMRL.from_redimnet(random_model(tiny_config), 32, (32,)), ReDimNet)
