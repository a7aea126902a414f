"""The recipe end to end: lists, teachers, student, report; from the YAML, as a user runs it."""

import csv
import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
import train
import training_results
import verify
from huggingface_hub import ModelCard
from shards import write_shards
from short_runs import OPTIONS, shorten
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_mrl import (
    MatryoshkaDistillationLoss,
    ReDimNet,
    ReDimNetMRL,
    load_pretrained_redimnet,
)
from speechbrain_mrl.dataio.clips import read_clips, write_clips
from speechbrain_mrl.dataio.dataset import SeededClips
from speechbrain_mrl.evaluation.plots import write_plots
from speechbrain_mrl.evaluation.verification import evaluate, read_trials
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.training.brain import MRLBrain

SIZES = {"embed_dim": 48, "mrl_dims": "[8, 16, 32, 48]"}


def recipe(corpus, checkpoints, *flags, output_folder, yaml="hparams/mrl_distill.yaml", **changes):
    """Train one epoch on the small corpus with two tiny teachers; the student and its folder."""
    options = {
        "data_folder": corpus,
        "output_folder": output_folder,
        "teachers": [str(path) for path in checkpoints],
        "backbone": checkpoints[0],
        **OPTIONS,
        **SIZES,
        **changes,
    }
    given = {key: value for key, value in options.items() if value is not None}
    student = train.main([yaml, *flags, *(f"--{k}={v}" for k, v in given.items())])
    return student, Path(output_folder)


@pytest.fixture
def run(small_corpus, two_teachers, tmp_path, short_runs):
    """``run(key=value, ...)``, another YAML or other keys: the student and its folder."""
    return partial(recipe, small_corpus, two_teachers, output_folder=tmp_path / "run")


@pytest.fixture(scope="module")
def trained(small_corpus, two_teachers, tmp_path_factory):
    """One run that leaves all that a run may leave; it is read, and run again, by many tests."""
    begun, pushed = [], []
    start_student = train.start_student

    def watched(*arguments, **options):
        student = start_student(*arguments, **options)
        begun.append({key: value.clone() for key, value in student.state_dict().items()})
        return student

    def run():
        extra = {"tensorboard": True, "push_to_hub": "org/tiny", "card_examples": 2}
        with pytest.MonkeyPatch.context() as patch:
            shorten(patch.setattr)
            patch.setattr(training_results, "write_plots", write_plots)
            patch.setattr(train, "start_student", watched)
            patch.setattr(train, "push_to_hub", lambda *arguments: pushed.append(arguments))
            return recipe(small_corpus, two_teachers, output_folder=folder, **extra)

    folder = tmp_path_factory.mktemp("trained")
    student, _ = run()
    return SimpleNamespace(student=student, folder=folder, begun=begun[0], pushed=pushed, again=run)


def test_training_ends_in_a_report_of_every_size_and_its_baselines(trained):
    folder = trained.folder
    assert "Target of the validation trials" in (folder / "log.txt").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert sorted(report["dims"], key=int) == ["8", "16", "32", "48"]
    for results in report["dims"].values():
        assert 0 <= results["eer"] <= 1 and 0 <= results["min_dcf"] <= 1
        assert -1 <= results["threshold"] <= 1
    baselines = report["baselines"]
    assert set(baselines["teachers"]) == {"first", "second"}
    best = min(baselines["teachers"], key=lambda name: baselines["teachers"][name]["eer"])
    assert baselines["teacher"] == best
    sizes = {"first": {"8", "16", "32"}, "second": {"8", "16"}}[best]
    assert set(baselines["naive_truncation"]) == set(baselines["pca_truncation"]) == sizes
    assert set(baselines["ensemble"]) == set(baselines["start"]) == set(report["dims"])
    assert baselines["start"]["8"].keys() == report["dims"]["8"].keys()
    for row in ("start", "pca_truncation", "lda_truncation", "ensemble"):
        assert set(report["gain"][row]) == set(report["dims"])
    for row in ("start", "ensemble"):
        for size, found in report["gain"][row].items():
            difference = report["dims"][size]["eer"] - baselines[row][size]["eer"]
            assert found["eer"] == pytest.approx(difference, abs=1e-9)
    assert report["trials"]["target"] > 0 and report["trials"]["impostor"] > 0
    for name in ("eer_by_dim.png", "det.png", "train_log.txt", "hyperparams.yaml"):
        assert (folder / name).stat().st_size > 0


def test_training_is_recorded_as_a_table_and_as_curves(trained):
    folder = trained.folder
    with open(folder / "train_log.csv", newline="") as file:
        start, row = csv.DictReader(file)
    assert start["epoch"] == "0" and start["train loss"] == "" and float(start["valid loss"]) > 0
    for size in (8, 16, 32, 48):
        assert float(row[f"train cosine/{size}"]) > 0 and 0 <= float(row[f"valid eer/{size}"]) <= 1
        assert -1 <= float(row[f"valid agreement/{size}"]) <= 1
    assert float(row["train clips_per_second"]) > 0 and row["lr"]
    assert list((folder / "tensorboard").glob("events*"))


def test_lists_and_teachers_embeddings_may_be_made_before_the_training(run, monkeypatch, capsys):
    """So that no other process waits for them; the training then computes none anew."""
    student, folder = run(prepare_only=True)
    assert student is None and "start again without prepare_only" in capsys.readouterr().out
    assert not list(folder.rglob("CKPT*")) and not (folder / "report.json").exists()
    shards = {
        path: path.stat().st_mtime_ns for path in (folder / "teachers").rglob("*.safetensors")
    }
    assert len({path.parent for path in shards}) == 6  # two teachers, three lists
    run()
    assert shards == {path: path.stat().st_mtime_ns for path in shards}
    assert (folder / "report.json").exists()


def test_teachers_may_embed_augmented_segments(run):
    """Labels then choose the finished axes, but no target; they need not be the objective's."""
    speed = "augmentations: [!new:speechbrain_mrl.training.augment.Speed {}], max_augmentations: 1"
    augment = f"!new:speechbrain_mrl.training.augment.UtteranceAugmenter {{{speed}}}"
    without_aam = "{terms: {aam: 0}}"
    _, folder = run(teacher_augment=augment, objective=without_aam)
    log = (folder / "log.txt").read_text()
    assert "Target of the validation trials" not in log and "Output layer: centred" in log
    with open(folder / "train_log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert 0 < float(last["train cosine/48"]) < 2


def test_the_model_folder_loads_with_speechbrain_and_gives_the_students_embeddings(trained):
    student, folder = trained.student, trained.folder
    wavs, wav_lens = torch.randn(2, 16000) * 0.1, torch.tensor([1.0, 0.6])
    loaded = EncoderClassifier.from_hparams(source=str(folder / "model"))
    with torch.no_grad():
        expected = student.eval()(wavs, wav_lens)
    torch.testing.assert_close(loaded.encode_batch(wavs, wav_lens)[:, 0], expected)
    with open(folder / "lists" / "train.csv", newline="") as file:
        train_speakers = {row["spk_id"] for row in csv.DictReader(file)}
    assert set(loaded.hparams.label_encoder.lab2ind) == train_speakers


def test_training_may_end_with_the_upload_of_a_model_with_examples(trained):
    folder = trained.folder
    assert trained.pushed[0] == (folder / "model", "org/tiny")
    card = ModelCard.load(folder / "model" / "README.md")
    assert [Path(widget["src"]).suffix for widget in card.data.widget] == [".wav", ".wav"]
    assert all(widget["output"] for widget in card.data.widget)
    measured = {result.metric_value for result in card.data.eval_results}
    report = json.loads((folder / "report.json").read_text())
    assert {results["eer"] for results in report["dims"].values()} <= measured


def test_epoch_0_is_the_validation_of_the_student_before_its_first_step(trained, tiny_config):
    folder = trained.folder
    student = ReDimNetMRL(48, [8, 16, 32, 48], tiny_config)
    kept = torch.load(folder / "checkpoints" / "start.ckpt", weights_only=True)
    student.load_state_dict(kept)
    clips = read_clips(folder / "lists" / "valid.csv")
    found = embed_clips({"student": student}, clips)["student"]
    trials = read_trials(folder / "lists" / "valid_trials.txt")
    expected = evaluate(trials.stack(dict(zip((c.id for c in clips), found))), trials, [8, 48])
    with open(folder / "train_log.csv", newline="") as file:
        start, *_ = csv.DictReader(file)
    for size, result in expected.items():
        assert float(start[f"valid eer/{size}"]) == pytest.approx(result["eer"], abs=1e-6)


def test_a_list_has_one_eer_in_training_and_in_verification(
    run, small_corpus, two_teachers, tmp_path
):
    """Utterances of 1.2 s are whole in both, whatever training and validation read of an utterance."""
    _, folder = run(max_seconds=0.6)
    trained = json.loads((folder / "report.json").read_text())
    options = {
        "data_folder": small_corpus,
        "trials": folder / "lists" / "test_trials.txt",
        "n_bootstrap": 0,
        "num_workers": 0,
        "device": "cpu",
    }
    verified = {}
    for name, source in (("student", folder / "model"), ("second", two_teachers[1])):
        options |= {"source": source, "output_folder": tmp_path / name}
        verify.main(["hparams/verify.yaml", *(f"--{k}={v}" for k, v in options.items())])
        verified[name] = json.loads((tmp_path / name / "report.json").read_text())["dims"]
    expected = {**trained["dims"], "second": trained["baselines"]["teachers"]["second"]}
    found = {**verified["student"], "second": verified["second"]["24"]}
    for size, result in found.items():
        assert result["eer"] == pytest.approx(expected[size]["eer"], abs=1e-6)
        assert result["threshold"] == pytest.approx(expected[size]["threshold"], abs=1e-4)


def test_start_is_the_student_before_its_first_step(trained, tiny_config):
    folder = trained.folder
    kept = torch.load(folder / "checkpoints" / "start.ckpt", weights_only=True)
    for key, value in kept.items():
        torch.testing.assert_close(value, trained.begun[key], rtol=0, atol=0)
    student = ReDimNetMRL(48, [8, 16, 32, 48], tiny_config)
    student.load_state_dict(kept)
    clips = read_clips(folder / "lists" / "test.csv")
    found = embed_clips({"student": student}, clips)["student"]
    trials = read_trials(folder / "lists" / "test_trials.txt")
    expected = evaluate(trials.stack(dict(zip((c.id for c in clips), found))), trials, [8, 48])
    start = json.loads((folder / "report.json").read_text())["baselines"]["start"]
    for size, result in expected.items():
        assert start[size]["eer"] == pytest.approx(result["eer"], abs=1e-6)


def test_the_same_command_again_only_reports(trained):
    """With the start of the first run."""
    student, folder = trained.student, trained.folder
    weights = {key: value.clone() for key, value in student.state_dict().items()}
    log = (folder / "train_log.txt").read_text()
    report = json.loads((folder / "report.json").read_text())
    again, _ = trained.again()
    assert (folder / "train_log.txt").read_text() == log
    again_reported = json.loads((folder / "report.json").read_text())
    assert again_reported["baselines"]["start"] == report["baselines"]["start"]
    assert again_reported["gain"] == report["gain"]
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


def test_teachers_are_in_neither_optimizer_nor_checkpoint(trained):
    student, folder = trained.student, trained.folder
    (checkpoint,) = (folder / "checkpoints").glob("CKPT*")
    tensors = torch.load(checkpoint / "student.ckpt", weights_only=True)
    assert tensors.keys() == student.state_dict().keys()
    optimizer = torch.load(checkpoint / "optimizer.ckpt", weights_only=True)
    n_trained = len(list(student.parameters())) + 1  # and the term aam's classifier
    assert len(optimizer["param_groups"][0]["params"]) == n_trained
    names = {path.stem for path in checkpoint.glob("*.ckpt")}
    assert names == {
        "student",
        "objective",
        "optimizer",
        "epoch_counter",
        "brain",
        "dataloader-TRAIN",
    }


def test_debug_runs_two_batches_and_the_same_command_without_it_trains(run, monkeypatch):
    pushed = []
    monkeypatch.setattr(train, "push_to_hub", lambda *arguments: pushed.append(arguments))
    _, folder = run("--debug", push_to_hub="org/tiny")
    assert not list((folder / "checkpoints").glob("CKPT*")) and not pushed
    assert json.loads((folder / "report.json").read_text())["trials"]["target"] <= 8
    run(push_to_hub="org/tiny")
    assert list((folder / "checkpoints").glob("CKPT*")) and pushed
    assert len((folder / "train_log.csv").read_text().splitlines()) == 3  # heads, epochs 0 and 1
    assert json.loads((folder / "report.json").read_text())["trials"]["target"] > 8


def test_labels_train_without_any_teacher(run):
    student, folder = run(yaml="hparams/mrl_supervised.yaml", teachers=None, stages="null")
    assert "train aam/8" in (folder / "train_log.txt").read_text()
    baselines = json.loads((folder / "report.json").read_text())["baselines"]
    assert baselines["teacher"] is None and baselines["teachers"] == baselines["ensemble"] == {}
    assert set(baselines["start"]) == {"8", "16", "32", "48"}


def test_training_from_shards_ends_in_a_report(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="smaller batch_size"):  # the lists are made
        run(batch_size=4000)
    written = write_shards(tmp_path / "run" / "lists" / "train.csv", tmp_path / "shards", 4)
    heard, drawn = [], SeededClips.draw

    def draw(clips, position, row):
        heard.append((row["id"], row["wav"].name))
        return drawn(clips, position, row)

    monkeypatch.setattr(SeededClips, "draw", draw)
    _, folder = run(shards=written)
    assert len(dict(heard)) == len(heard) == 56  # of 60 clips, seven batches of 8
    assert all(".tar/" in name for _, name in heard)
    report = json.loads((folder / "report.json").read_text())
    assert sorted(report["dims"], key=int) == ["8", "16", "32", "48"]


def test_bf16_trains_to_finite_weights(run):
    student, _ = run("--precision=bf16")
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_gradient_checkpointing_changes_no_weight(run, trained):
    student, _ = run(gradient_checkpointing=True)
    torch.testing.assert_close(student.state_dict(), trained.student.state_dict(), rtol=0, atol=0)


def test_two_processes_train_one_student(small_corpus, release_file, tiny_config, tmp_path):
    """With torchrun and gloo; each fills its part of the store, one writes the report."""
    teacher = release_file(tiny_config, name="first")
    options = {
        "data_folder": small_corpus,
        "output_folder": tmp_path / "run",
        "teachers": [str(teacher)],
        "backbone": teacher,
        **OPTIONS,
        "distributed_backend": "gloo",
        **SIZES,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["recipes/voxceleb/train.py", "hparams/mrl_distill.yaml"]
    command += [f"--{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    log = (tmp_path / "run" / "train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch: 0", "epoch: 1"]
    assert done.stdout.count("teachers, at full size") == 1
    assert (tmp_path / "run" / "model" / "hyperparams.yaml").exists()


def test_a_disk_that_is_full_at_the_start_is_named(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sb, "create_experiment_directory", full)
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'run'}: .*No space left"):
        run()


def test_an_unknown_key_is_refused(run):
    with pytest.raises(Exception, match="chunk_secs"):
        run(chunk_secs=2)


def test_a_speaker_in_both_train_and_test_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="smaller batch_size"):  # the lists are made
        run(batch_size=4000)
    train_csv, test_csv = (tmp_path / "run" / "lists" / f"{name}.csv" for name in ("train", "test"))
    with open(train_csv, "a") as file:
        file.write(test_csv.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match=r"speaker 'id\d+' is in .*train.csv and in .*test.csv"):
        run(batch_size=4000)


def test_a_batch_larger_than_the_corpus_is_refused(run):
    with pytest.raises(ValueError, match="smaller batch_size"):
        run(batch_size=4000)


def test_the_untrained_student_verifies_as_its_backbone_does(
    small_corpus, release_file, tiny_config, small_clips
):
    """All cosines of the first 32 dimensions equal the checkpoint's; the other 16 are small."""
    path = release_file(tiny_config, name="first")

    hparams = {
        "backbone": load_pretrained_redimnet(source=path),
        "pretrained": True,
        "embed_dim": 48,
        "mrl_dims": [8, 32, 48],
        "student": ReDimNetMRL(48, [8, 32, 48], tiny_config),
        "checkpointer": SimpleNamespace(find_checkpoint=lambda: None),
    }
    csv_path = path.with_suffix(".csv")
    write_clips(small_clips, csv_path)
    corpus = SimpleNamespace(train_csv=csv_path)
    student = train.start_student(hparams, corpus, None, {}, device="cpu")
    encoders = {"student": student, "backbone": load_pretrained_redimnet(source=path)}
    found = embed_clips(encoders, read_clips(csv_path))
    cosines = {
        name: torch.nn.functional.normalize(embeddings[:, :32].double(), dim=1)
        for name, embeddings in found.items()
    }
    torch.testing.assert_close(
        cosines["student"] @ cosines["student"].T,
        cosines["backbone"] @ cosines["backbone"].T,
        rtol=0,
        atol=1e-5,
    )
    assert found["student"][:, 32:].abs().mean() < 0.05 * found["student"][:, :32].abs().mean()
    # The principal components come first: eight rotated dimensions hold more than the first eight did.
    spread = {n: z - z.mean(0) for n, z in found.items()}
    kept = {n: (z[:, :8].square().sum() / z[:, :32].square().sum()) for n, z in spread.items()}
    assert kept["student"] > kept["backbone"]


def test_the_untrained_student_agrees_with_its_teachers(
    release_file, random_model, tiny_config, small_clips, tmp_path
):
    """Two teachers of one geometry in two unrelated spaces, the backbone one of them: a rotation
    that changes no cosine reaches their common target.
    """
    model = random_model(tiny_config)
    model.linear.bias.data -= embed_clips({"it": model}, small_clips)["it"].mean(0)
    mixing, _ = torch.linalg.qr(torch.randn(32, 32))
    mixed = random_model(tiny_config)
    mixed.linear.weight.data = mixing @ model.linear.weight.data
    mixed.linear.bias.data = mixing @ model.linear.bias.data
    store = TeacherStore(tmp_path / "store")
    store.fill({"one": model, "two": mixed}, small_clips)
    write_clips(small_clips, tmp_path / "train.csv")
    corpus = SimpleNamespace(train_csv=tmp_path / "train.csv")
    hparams = {
        "backbone": model,
        "pretrained": True,
        "embed_dim": 48,
        "mrl_dims": [8, 32, 48],
        "student": ReDimNetMRL(48, [8, 32, 48], tiny_config),
        "checkpointer": SimpleNamespace(find_checkpoint=lambda: None),
    }
    objective = MatryoshkaDistillationLoss((8, 32, 48), "all", terms={"cosine": 1.0})
    targets = store.lookup([clip.id for clip in small_clips])
    objective.fit(targets)
    student = train.start_student(hparams, corpus, objective, {sb.Stage.TRAIN: store}, device="cpu")
    found = embed_clips({"student": student}, small_clips)["student"]
    _, values = objective(found, targets)
    assert max(values.values()) < 0.05  # near 1 between unrelated directions


def test_weights_of_a_student_may_come_through_speechbrains_pretrainer(
    random_model, tiny_config, tmp_path
):
    """As in any recipe of SpeechBrain; not again where there is a checkpoint."""
    model = random_model(tiny_config)
    torch.save(model.state_dict(), tmp_path / "student.ckpt")
    for found in (None, "a checkpoint"):
        student = ReDimNet.from_config(tiny_config)
        hparams = {
            "student": student,
            "mrl_dims": [32],
            "checkpointer": SimpleNamespace(find_checkpoint=lambda found=found: found),
            "pretrainer": Pretrainer(
                tmp_path / "collected", {"it": student}, {"it": str(tmp_path / "student.ckpt")}
            ),
        }
        assert train.start_student(hparams, None, None, {}) is student
        same = torch.equal(student.linear.weight, model.linear.weight)
        assert same == (found is None)


def test_what_a_run_keeps_of_its_yaml_can_be_trained_again(run, tmp_path):
    student, folder = run(stages="[{stage: a}, {stage: b, lr: 0.0001}]")
    before = student.state_dict()
    log = (folder / "train_log.txt").read_text()
    again = train.main([str(folder / "resolved.yaml"), "--device=cpu"])
    assert (folder / "train_log.txt").read_text() == log
    anew = train.main(
        [str(folder / "resolved.yaml"), "--device=cpu", f"--output_folder={tmp_path / 'anew'}"]
    )
    for key, value in before.items():
        assert torch.equal(again.state_dict()[key], value), key
        assert torch.equal(anew.state_dict()[key], value), key


def test_run_options_of_a_yaml_are_those_of_the_training(run, tmp_path, monkeypatch):
    given = []

    def watched(brain, *arguments, **options):
        given.append((brain.max_grad_norm, brain.grad_accumulation_factor, brain.precision))
        raise KeyboardInterrupt

    own = tmp_path / "own.yaml"
    text = Path("hparams/mrl_distill.yaml").read_text()
    own.write_text(text + "max_grad_norm: 3.0\ngrad_accumulation_factor: 2\nprecision: bf16\n")
    for flags in ([], ["--max_grad_norm=2.0"]):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MRLBrain, "fit", watched)
            run(*flags, yaml=str(own))
    assert given == [(3.0, 2, "bf16"), (2.0, 2, "bf16")]
    own.write_text(text + "optimizer_step_limit: 3\ndebug_epochs: 1\n")
    _, folder = run(yaml=str(own), output_folder=tmp_path / "three")
    (checkpoint,) = (folder / "checkpoints").glob("CKPT*")
    optimizer = torch.load(checkpoint / "optimizer.ckpt", weights_only=True)
    assert optimizer["state"][0]["step"].item() == 3


def test_the_students_architecture_is_that_of_its_checkpoint(release_file, tiny_config, tmp_path):
    """Also of a release whose architecture no preset has; its weights come later."""
    path = release_file(tiny_config)
    changes = f"data_folder: {tmp_path}\noutput_folder: {tmp_path}\nbackbone: {path}\n"
    document = train.read_yaml("hparams/mrl_distill.yaml", changes)
    student = train.load_stage(document)["student"]
    assert isinstance(student, ReDimNetMRL)
    assert student.model_config["stages_setup"] == tiny_config["stages_setup"]
