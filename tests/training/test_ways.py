"""The ways to a Matryoshka model beside plain distillation, from their YAMLs."""

import hashlib
import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train
import yaml
from folder_prepare import prepare_folder
from read_hparams import read_yaml
from ruamel.yaml import YAML
from speechbrain import Stage
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.utils.checkpoints import Checkpointer

from benchmarks import ways
from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNetMRL, expand_model
from speechbrain_mrl.dataio import lists
from speechbrain_mrl.dataio.clips import find_clips, read_clips
from speechbrain_mrl.evaluation.report import agreement
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.resize import resize_model
from speechbrain_mrl.targets import EnsembleRotation
from speechbrain_mrl.training.distill import MRLBrain
from speechbrain_mrl.training.projection import (
    carry_over,
    fit_new_rows,
    pooled_features,
    start_new_dimensions,
)


@pytest.fixture
def run(small_corpus, two_teachers, tmp_path, short_runs):
    """``run(yaml, key=value, ...)`` trains on the small corpus with two tiny teachers; its folder."""

    def call(yaml, **changes):
        options = {
            "data_folder": small_corpus,
            "output_folder": tmp_path / "run",
            "teachers": [str(path) for path in two_teachers],
            "backbone": two_teachers[0],
            "embed_dim": 32,
            "mrl_dims": "[8, 32]",
            "chunk_seconds": 0.3,
            "batch_size": 16,
            "num_workers": 0,
            "number_of_epochs": 1,
            "device": "cpu",
            **({} if yaml == "mrl_amalgamate" else {"valid_speakers": 4, "test_speakers": 6}),
            **changes,
        }
        left_out = {"mrl_supervised": ["teachers"], "mrl_progressive": ["embed_dim", "mrl_dims"]}
        for key in left_out.get(yaml, ()):  # not there, or of the stages
            del options[key]
        student = train.main([f"hparams/{yaml}.yaml", *(f"--{k}={v}" for k, v in options.items())])
        return student, Path(options["output_folder"])

    return call


def logged(folder, *keys):
    """The values of a training log, one tuple a line."""
    rows = []
    for line in (folder / "train_log.txt").read_text().splitlines():
        fields = dict(field.split(": ", 1) for field in line.replace(" - ", ", ").split(", "))
        rows.append(tuple(fields[key] for key in keys))
    return rows


def checkpoint(folder, stage, name):
    path = sorted((folder / "checkpoints" / stage).glob("CKPT*"))[-1]
    return torch.load(path / f"{name}.ckpt", weights_only=True)


# Amalgamation


class PoisonedRow(dict):
    def __getitem__(self, key):
        if key == "spk_id":
            raise AssertionError("a label was read")
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


@pytest.fixture
def poison(monkeypatch):
    """Reading a speaker from a CSV, encoding one or listing speakers' folders fails the test."""
    read = lists.check_row
    monkeypatch.setattr(lists, "check_row", lambda *given: PoisonedRow(read(*given)))

    def refuse(*arguments, **options):
        raise AssertionError("a label was asked for")

    monkeypatch.setattr("corpus.prepare_voxceleb", refuse)
    for name in ("CategoricalEncoder", "enrol"):
        monkeypatch.setattr(train, name, refuse)


def test_amalgamation_reads_no_label_of_a_folder_without_structure(
    run, small_clips, poison, tmp_path
):
    flat = tmp_path / "flat"
    flat.mkdir()
    for clip in small_clips:
        shutil.copy(clip.wav, flat / f"{hashlib.sha256(clip.id.encode()).hexdigest()[:12]}.wav")
    _, folder = run("mrl_amalgamate", data_folder=flat)
    for path in (folder / "lists").glob("*.csv"):
        assert path.read_text().splitlines()[0] == "ID,duration,wav,start,stop"
    assert not (folder / "report.json").exists()
    found = json.loads((folder / "agreement.json").read_text())
    assert found["clips"] == 6 and found["dims"].keys() == {"8", "32"}
    assert all(-1 <= value <= 1 for value in found["dims"].values())
    model = EncoderClassifier.from_hparams(source=str(folder / "model"))
    assert len(model.mods.classifier.weight) == 0
    *_, (error,) = logged(folder, "valid loss")
    (saved,) = (folder / "checkpoints").glob("CKPT*/CKPT.yaml")
    assert f"valid_error: {float(error):.2f}"[:-1] in saved.read_text()


def test_amalgamation_reads_no_label_of_a_csv_and_keeps_the_trials_clips_out(
    run, small_clips, small_corpus, poison, tmp_path
):
    lines = ["ID,wav,start,stop,spk_id"]
    lines += [f"{i},{clip.wav},0,19200,{clip.id[:4]}" for i, clip in enumerate(small_clips)]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    ids = [clip.id for clip in small_clips[:24]]
    trials = [f"{int(a[:4] == b[:4])} {a} {b}" for a in ids[::3] for b in ids[1::3]]
    (tmp_path / "trials.txt").write_text("\n".join(trials) + "\n")
    _, folder = run(
        "mrl_amalgamate",
        data_folder=tmp_path / "clips.csv",
        trials=tmp_path / "trials.txt",
        test_folder=small_corpus,
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["dims"].keys() == {"8", "32"} and report["baselines"]["teachers"]
    used = {id for a in trials for id in a.split()[1:]}
    tested = {clip.wav for clip in small_clips if clip.id in used}
    trained = {clip.wav for clip in read_clips(folder / "lists" / "train.csv")}
    assert len(tested) == 16 and trained and not tested & trained


def test_a_folder_is_split_by_its_seed(small_corpus, tmp_path):
    splits = []
    for number, seed in enumerate((1, 1, 2)):
        corpus = prepare_folder(str(small_corpus), str(tmp_path / str(number)), seed=seed)
        splits.append([{c.id for c in read_clips(p)} for p in (corpus.train_csv, corpus.valid_csv)])
    everything = {clip.id for clip in find_clips(small_corpus / "wav")}
    for train_ids, valid_ids in splits:
        assert train_ids | valid_ids == everything and not train_ids & valid_ids
    assert splits[0] == splits[1] != splits[2]


def test_bad_files_and_missing_trials_are_refused(small_corpus, tmp_path):
    shutil.copytree(small_corpus / "wav" / "id00", tmp_path / "some" / "id00")
    (tmp_path / "some" / "bad.wav").write_text("no audio")
    arguments = {"data_folder": str(tmp_path / "some"), "save_folder": str(tmp_path / "lists")}
    with pytest.raises(ValueError, match="1 of 7 files are bad; skip_bad_files=True"):
        prepare_folder(**arguments)
    assert prepare_folder(**arguments, skip_bad_files=True).counts["train"]["clips"] == 4
    (tmp_path / "trials.txt").write_text("1 id00/s0/0.flac id00/s1/0.wav\n0 id00/s0/0.flac x.wav\n")
    with pytest.raises(ValueError, match="'x.wav' is missing"):
        prepare_folder(**arguments, skip_bad_files=True, trials=str(tmp_path / "trials.txt"))


def test_agreement_is_the_correlation_of_cosines_over_pairs():
    rng = np.random.default_rng(0)
    student, one, two = rng.normal(size=(3, 9, 5))

    def cosines(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return [x[i] @ x[j] for i in range(9) for j in range(i)]

    wanted = np.mean([cosines(x - x.mean(axis=0)) for x in (one, two)], axis=0)
    found = agreement(
        torch.from_numpy(student), {"a": torch.from_numpy(one), "b": torch.from_numpy(two)}, [2, 5]
    )
    for dim in (2, 5):
        expected = np.corrcoef(cosines(student[:, :dim]), wanted)[0, 1]
        assert found[str(dim)] == pytest.approx(expected, abs=1e-9)


# Progressive expansion


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_new_rows_are_the_ridge_regression_of_numpy(ridge):
    """Least squares of centred data, with a row of sqrt(penalty) for each feature."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator) + 2.0
    targets = torch.randn(40, 3, generator=generator) - 1.0
    linear = torch.nn.Linear(6, 5)
    before = linear.weight.detach().clone(), linear.bias.detach().clone()
    fit_new_rows(linear, 2, features, targets, ridge)
    x, y = features.double().numpy(), targets.double().numpy()
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    penalty = ridge * ((x - x_mean) ** 2).sum() / 6
    stacked = np.vstack([x - x_mean, np.sqrt(penalty) * np.eye(6)])
    weight = np.linalg.lstsq(stacked, np.vstack([y - y_mean, np.zeros((6, 3))]), rcond=None)[0].T
    np.testing.assert_allclose(linear.weight[2:].detach(), weight, atol=1e-5)
    np.testing.assert_allclose(linear.bias[2:].detach(), y_mean - weight @ x_mean, atol=1e-5)
    assert torch.equal(linear.weight[:2], before[0][:2])
    assert torch.equal(linear.bias[:2], before[1][:2])


def test_an_aligned_target_goes_on_from_the_prefix_and_keeps_its_cosines():
    """The prefix is the target's, rotated; what remains is PCA of the rest."""
    generator = torch.Generator().manual_seed(0)
    teachers = {"a": torch.randn(60, 6, generator=generator), "b": torch.randn(60, 3)}
    ensemble = EnsembleRotation(dim=12).fit(teachers)  # three more dimensions than there are
    before = ensemble(teachers)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    turn[:, 9:] = 0
    subspace = torch.linalg.qr(turn[:4].T).Q  # (12, 4)
    prefix = before @ subspace
    after = ensemble.align(teachers, 7.0 * prefix)(teachers)
    torch.testing.assert_close(after[:, :4], prefix, rtol=0, atol=0.01)
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5)
    rest = after[:, 4:].T @ after[:, 4:] / 60
    variances = rest.diagonal()
    assert (rest - variances.diag()).abs().max() < 1e-5
    assert (variances.diff() <= 1e-6).all() and variances[5:].max() < 1e-6


@pytest.fixture
def grown(tiny_config, random_model, small_clips):
    """A student of 8 dimensions grown to 24, the new ones started from a teacher of 24."""
    torch.manual_seed(0)
    small = resize_model(ReDimNetMRL.from_redimnet(random_model(tiny_config), 32, (32,)), (8,))
    student = expand_model(small, 24).eval()
    random_start = student.linear.weight.detach().clone()
    teacher = random_model({**tiny_config, "embed_dim": 24}, seed=3)
    clips = small_clips[::2]
    teachers = embed_clips({"a": teacher}, clips)
    objective = MatryoshkaDistillationLoss([8, 24], "all").fit(teachers)
    start_new_dimensions(student, 8, objective, teachers, clips)
    return small.eval(), student, random_start, objective, teacher


def test_new_dimensions_leave_the_old_ones_as_they_were(grown):
    small, student, random_start, _, _ = grown
    for key, value in student.state_dict().items():
        assert torch.equal(
            value[:8] if key.startswith("linear") else value, small.state_dict()[key]
        )
    assert not student.training
    assert not torch.equal(student.linear.weight[8:], random_start[8:])
    wavs = torch.randn(2, 9000)
    with torch.no_grad():
        torch.testing.assert_close(student(wavs)[:, :8], small(wavs), rtol=0, atol=1e-6)


def test_new_dimensions_start_near_the_residual_of_the_next_teacher(grown, small_clips):
    """On clips that the regression did not see, better than zeros, which the random start is near."""
    _, student, _, objective, teacher = grown
    held_out = small_clips[1::2]
    found = embed_clips({"student": student, "teacher": teacher}, held_out)
    target = objective.targets({"a": found["teacher"]})[24]
    prefix = found["student"][:, :8]
    scale = (prefix * target[:, :8]).sum() / target[:, :8].square().sum()
    residual = (scale * target[:, 8:]).double()
    residual = residual - residual.mean(dim=0)
    guess = found["student"][:, 8:].double()
    unexplained = (guess - guess.mean(dim=0) - residual).square().sum() / residual.square().sum()
    assert unexplained < 0.9


def test_pooled_features_are_the_input_of_the_linear_layer(grown, small_clips):
    student = grown[1]
    pooled = pooled_features(student, small_clips[:3])
    with torch.no_grad():
        embeddings = embed_clips({"student": student}, small_clips[:3])["student"]
        torch.testing.assert_close(student.linear(pooled), embeddings)
    assert not student.linear._forward_pre_hooks


STAGES = (
    "[{stage: a, embed_dim: 8, mrl_dims: [8], taught_by: [1]},"
    " {stage: b, embed_dim: 16, mrl_dims: [8, 16], taught_by: [0], number_of_epochs: 2},"
    " {stage: c, embed_dim: 40, mrl_dims: [8, 16, 40], taught_by: [-1, 0]}]"
)


def test_a_killed_progressive_run_resumes_in_its_stage(run, monkeypatch):
    ended = MRLBrain.on_stage_end

    def killed_in_the_second_epoch_of_b(brain, stage, loss, epoch):
        if (brain.hparams.stage, epoch) == ("b", 2):
            raise KeyboardInterrupt
        return ended(brain, stage, loss, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MRLBrain, "on_stage_end", killed_in_the_second_epoch_of_b)
        run("mrl_progressive", stages=STAGES)
    student, folder = run("mrl_progressive", stages=STAGES)
    epochs = [" ".join(row) for row in logged(folder, "stage", "epoch")]
    assert epochs == ["a 0", "a 1", "b 0", "b 1", "b 2", "c 0", "c 1"]
    assert student.mrl_dims == (8, 16, 40)
    sizes = {s: len(checkpoint(folder, s, "student")["linear.weight"]) for s in "abc"}
    assert sizes == {"a": 8, "b": 16, "c": 40}
    report = json.loads((folder / "report.json").read_text())
    assert report["dims"].keys() == {"8", "16", "40"}
    assert report["baselines"]["teachers"].keys() == {"first", "second"}
    teachers = {s: set(checkpoint(folder, s, "objective")) for s in "ac"}
    assert teachers["a"] == {"classifier.weight", "ensembles.0.matrix", "ensembles.0.mean_second"}
    assert teachers["c"] == teachers["a"] | {"ensembles.0.mean_first"}


def test_labels_of_a_folder_without_speakers_are_refused(run):
    with pytest.raises(ValueError, match="labels need speaker_folders"):
        run("mrl_amalgamate", labels=True)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("none", "stages must be null or a list of mappings of changes, got 'none'"),
        ("[{stage: a}, {stage: a}]", "two stages are called 'a'"),
        ("[{stage: a}, {chunk_secs: 3}]", "chunk_secs is not a key"),
        ("[{taught_by: [2]}]", r"positions in the 2 teachers"),
    ],
)
def test_stages_that_make_no_sense_are_refused(run, stages, message):
    with pytest.raises(ValueError, match=message):
        run("mrl_progressive", stages=stages)


# Supervised


def test_margins_at_a_fraction_are_those_of_a_loss_made_with_them():
    objectives = [
        MatryoshkaDistillationLoss([2, 4], "all", {"aam": 1.0}, n_classes=3, margins=margins)
        for margins in ({2: 0.4, 4: 0.2}, {2: 0.1, 4: 0.05})
    ]
    objectives[1].load_state_dict(objectives[0].state_dict())
    objectives[0].scale_margins(0.25)
    batch = torch.randn(6, 4), {}, torch.tensor([0, 1, 2, 0, 1, 2])
    assert objectives[0](*batch)[1] == objectives[1](*batch)[1]
    with pytest.raises(ValueError, match="needs the term aam"):
        MatryoshkaDistillationLoss([2, 4], "all").scale_margins(0.5)


def test_margins_rise_from_zero_and_a_second_stage_has_larger_ones(run, monkeypatch):
    """Six steps an epoch, from 10 training speakers; the ramp takes the first one and a half."""
    margins = {"train": [], "large_margin": []}
    forward = MatryoshkaDistillationLoss.forward

    def watched(objective, *arguments):
        if objective.training:
            margins[brain_stage()].append(objective.scaled_margins[8])
        return forward(objective, *arguments)

    started = MRLBrain.on_fit_batch_start
    stages = []
    monkeypatch.setattr(MatryoshkaDistillationLoss, "forward", watched)
    monkeypatch.setattr(
        MRLBrain,
        "on_fit_batch_start",
        lambda brain, *a: (stages.append(brain.hparams.stage), started(brain, *a))[1],
    )

    def brain_stage():
        return stages[-1]

    _, folder = run(
        "mrl_supervised",
        number_of_epochs=2,
        batch_size=10,
        margins="{8: 0.9, 32: 0.2}",
        margin_epochs=1.5,
        large_margin_epochs=1,
        large_margin_seconds=0.5,
    )
    n_ramp = round(1.5 * len(margins["train"]) / 2)
    expected = [0.9 * min(1, step / n_ramp) for step in range(len(margins["train"]))]
    assert margins["train"] == pytest.approx(expected)
    assert set(margins["large_margin"]) == {0.5}
    assert logged(folder, "stage", "epoch")[-1] == ("large_margin", "1")


def test_a_stage_goes_on_with_the_classifier_of_the_last():
    small, large = (
        MatryoshkaDistillationLoss(dims, "all", {"aam": 1.0}, n_classes=5) for dims in ([2], [2, 4])
    )
    tail = large.classifier.weight[:, 2:].detach().clone()
    carry_over(large, small)
    assert torch.equal(large.classifier.weight[:, :2], small.classifier.weight)
    assert torch.equal(large.classifier.weight[:, 2:], tail)


def test_a_frozen_backbone_keeps_every_tensor_until_a_stage_unfreezes_it(run, two_teachers):
    _, folder = run(
        "mrl_supervised",
        lr=0.001,
        freeze="[backbone]",
        stages="[{stage: head}, {stage: all, unfreeze: {backbone: 0.0001}}]",
    )
    released = torch.load(two_teachers[0], weights_only=True)["state_dict"]
    head, whole = (checkpoint(folder, stage, "student") for stage in ("head", "all"))
    backbone = [key for key in head if key.startswith("backbone.")]
    assert any(key.endswith("running_var") for key in backbone)
    for key in backbone:
        assert torch.equal(head[key], released[key]), key
    assert any(not torch.equal(head[k], released[k]) for k in head if k.startswith("bn."))
    changed = [key for key in backbone if not torch.equal(whole[key], head[key])]
    assert any(key.endswith("running_var") for key in changed)
    assert any(key.endswith("weight") for key in changed)
    groups = checkpoint(folder, "all", "optimizer")["param_groups"]
    assert len(groups) == 2 and len(groups[1]["params"]) > len(groups[0]["params"])
    assert groups[1]["highest_lr"] == 0.0001


def test_a_part_learns_at_its_share_of_the_schedule(tiny_config, tmp_path):
    """The schedule's 0.02, half of the highest rate, is 0.002 where the highest is a tenth."""

    def schedule(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = 0.02

    student = ReDimNetMRL(16, (16,), tiny_config)
    brain = MRLBrain(
        stores={},
        valid_trials=None,
        lr_schedule=schedule,
        frozen=["bn"],
        part_lrs={"backbone": 0.004},
        modules={"student": student, "objective": torch.nn.Identity()},
        opt_class=partial(torch.optim.SGD, lr=0.04),
        run_opts={"device": "cpu"},
        checkpointer=Checkpointer(tmp_path),
    )
    brain.init_optimizers()
    student.train()
    brain.on_stage_start(Stage.TRAIN, epoch=1)
    brain.on_fit_batch_start(None, True)
    rest, backbone = brain.optimizer.param_groups
    assert rest["lr"] == pytest.approx(0.02) and backbone["lr"] == pytest.approx(0.002)
    assert len(backbone["params"]) == len(list(student.backbone.parameters()))
    assert student.backbone.training and not student.bn.training


def test_a_part_that_is_not_there_cannot_be_frozen(run):
    with pytest.raises(ValueError, match=r"\['spine'\]"):
        run("mrl_distill", freeze="[spine]")


def test_schedules_end_with_the_step_limit(run):
    """Three steps of many: the learning rate has cooled down to zero."""
    _, folder = run("mrl_distill", optimizer_step_limit=3, number_of_epochs=5, lr=0.01)
    assert [(epoch, float(lr)) for epoch, lr in logged(folder, "epoch", "lr")] == [
        ("0", 0.0),  # before the first step
        ("1", 0.0),
    ]


def test_schedules_count_steps_of_the_optimizer_not_batches(run, monkeypatch):
    """Four batches a step: up to the highest rate at once, half of the steps down to zero."""
    rates, steps = [], []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    started = MRLBrain.on_fit_batch_start
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(
        MRLBrain,
        "on_fit_batch_start",
        lambda brain, *a: (steps.append(brain.step), started(brain, *a))[1],
    )
    run("mrl_distill", grad_accumulation_factor=4, batch_size=4, number_of_epochs=2, lr=0.01)
    per_epoch = max(steps) // 4
    assert per_epoch >= 3 and len(rates) == 2 * per_epoch
    cooldown = round(0.5 * len(rates))
    expected = [0.01] * (len(rates) - cooldown)
    expected += [0.01 * (cooldown - 1 - k) / cooldown for k in range(cooldown)]
    assert rates == pytest.approx(expected)


def test_more_batches_for_a_step_than_an_epoch_has_are_refused(run):
    with pytest.raises(ValueError, match="fewer than grad_accumulation_factor 1000"):
        run("mrl_distill", grad_accumulation_factor=1000)


def test_a_student_smaller_than_its_backbone_keeps_what_the_teachers_say_first(run):
    """At a learning rate of 0: a prefix of a head that was rotated to the teachers' components."""
    student, folder = run("mrl_distill", embed_dim=16, mrl_dims="[8, 16]", lr=1e-9)
    assert student.embed_dim == 16
    whole, _ = run("mrl_distill", lr=1e-9, output_folder=folder.with_name("whole"))
    wavs = torch.randn(5, 8000)
    with torch.no_grad():
        cosines = [F.normalize(model.eval()(wavs)[:, :16]) for model in (student, whole)]
    torch.testing.assert_close(
        cosines[0] @ cosines[0].T, cosines[1] @ cosines[1].T, rtol=0, atol=0.2
    )


# Which is best


def test_without_data_the_ways_have_the_demos_options(tmp_path, monkeypatch):
    trials = tmp_path / "demo_trials.txt"
    trials.write_text("1 a b\n")
    monkeypatch.setattr(ways, "prepare", lambda *_, **__: SimpleNamespace(test_trials=trials))
    given, _, _ = ways.common_options({"lr": "0.5"}, tmp_path)
    assert given["data_folder"] == str(tmp_path / "voices") and given["lr"] == "0.5"
    assert (tmp_path / "trials.txt").read_text() == "1 a b\n"
    demo = yaml.safe_load((ways.RECIPE / "demo.yaml").read_text().replace("!ref", ""))
    for key in ("batch_size", "chunk_seconds", "wav_augment", "test_speakers"):
        assert yaml.safe_load(given[key]) == demo[key]


def test_one_command_compares_the_ways(small_corpus, two_teachers, tmp_path, short_runs):
    teachers = [str(path) for path in two_teachers]
    arguments = [
        f"--output_folder={tmp_path / 'ways'}",
        "--ways",
        "progressive",
        "separate",
        "large_margin",
        "best_teacher",
        "--seeds=1",
        "--steps=3",
        "--n_bootstrap=10",
        f"--data_folder={small_corpus}",
        f"--teachers={json.dumps(teachers)}",
        f"--backbone={teachers[0]}",
        "--embed_dim=16",
        "--mrl_dims=[8, 16]",
        "--chunk_seconds=0.3",
        "--batch_size=16",
        "--num_workers=0",
        "--valid_speakers=4",
        "--test_speakers=6",
    ]
    results = ways.main(arguments)
    written = json.loads((tmp_path / "ways" / "ways.json").read_text())
    assert written == results
    assert results["ways"].keys() == {"progressive", "separate", "large_margin", "best_teacher"}
    for found in results["ways"].values():
        assert found.keys() == {"8", "16"}
        for size in found.values():
            assert size["eer_ci"][0] <= size["eer"] <= size["eer_ci"][1]
            assert 0 <= size["min_dcf"] <= 1 and len(size["eer_runs"]) == 1
    assert results["baselines"].keys() == {"first", "second"}
    widths = (("first", "32"), ("second", "24"))
    for name, dim in widths:
        cuts = results["baselines"][name]
        assert cuts["whole"].keys() == {dim}
        for cut in ("truncated", "PCA truncated", "LDA truncated"):
            assert cuts[cut].keys() == {"8", "16"}
    text = (tmp_path / "ways" / "ways.md").read_text()
    assert text.count("| progressive |") == text.count("| second, LDA truncated |") == 2
    # Every training takes four steps, three rounded up for two stages of two.
    runs = dict.fromkeys(results["ways"], ["0"]) | {"separate": ["0", "1"]}
    steps = {}
    for way, numbers in runs.items():
        steps[way] = []
        for number in numbers:
            last = defaultdict(int)  # of each stage: its best checkpoint may be an earlier one
            for path in (tmp_path / "ways" / way / "1986" / number).rglob("optimizer.ckpt"):
                step = torch.load(path, weights_only=True)["state"][0]["step"].item()
                stage = path.parents[1]
                last[stage] = max(last[stage], step)
            steps[way].append(sum(last.values()))
    assert steps == dict.fromkeys(runs, [4]) | {"separate": [4, 4]}
    whole = [results["baselines"][name]["whole"][d]["eer"] for name, d in widths]
    resolved = (tmp_path / "ways" / "best_teacher" / "1986" / "0" / "resolved.yaml").read_text()
    assert YAML().load(resolved)["taught_by"] == [whole.index(min(whole))]
    before = text
    ways.main(arguments)  # nothing is trained again
    assert (tmp_path / "ways" / "ways.md").read_text() == before


def test_the_way_map_gives_small_sizes_to_the_first_teachers():
    hparams = {"mrl_dims": [16, 32, 64, 128, 256], "teachers": ["/a/small.pt", "b6"]}
    (changes,) = ways.options_of("map", None, 10, hparams)
    overrides = f"data_folder: /data\nobjective: {changes['objective']}\n"
    document = read_yaml("hparams/mrl_distill.yaml", overrides)
    assert document["objective"]["teacher_map"] == {
        16: "small",
        32: "small",
        64: "small",
        128: "b6",
        256: "b6",
    }
