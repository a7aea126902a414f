"""The recipes' YAMLs: each loads alone, and what one may not say is refused in a sentence."""

import re
import socket
from pathlib import Path

import check_hparams
import pytest
import read_hparams
import torch
import train
import verify
from check_hparams import check_training
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mrl import MatryoshkaEncoder, ReDimNetMRL

HPARAMS = Path(__file__).parents[2] / "hparams"
TRAININGS = (
    "mrl_distill",
    "mrl_distill_ecapa",
    "mrl_supervised",
    "mrl_progressive",
    "mrl_amalgamate",
)
DATA = "data_folder: hparams\n"
VERIFY = "source: b0\ndata_folder: hparams\ntrials: setup.cfg\n"
RUN_OPTIONS = "precision: bf16\ngrad_accumulation_factor: 2\nmax_grad_norm: 3.0\nsorting: random\n"
# What a training's YAML says of its own; everything else is the same wherever it stands.
OWN = {
    "mrl_distill_ecapa": {"student", "freeze", "unfreeze", "model_title"},
    "mrl_supervised": {"labels", "margin_epochs", "objective"},
    "mrl_progressive": {"teachers", "number_of_epochs"},
    "mrl_amalgamate": {"data_folder", "speaker_folders", "trials", "split_seed", "labels"}
    | {"objective", "training_data"},
}

MAY_LACK = {"margin_epochs", "pretrained_encoder"}
BAD_OBJECT = read_hparams.Code("!new:no.such.Module", {})
# A value of the right type that a key may not have. A key that is not here fails the test.
OUT_OF_RANGE = {
    "backbone": "b7",
    "batch_seconds": 0.0,
    "batch_size": 1,
    "calibration": "no/such.json",
    "calibration_p_target": 1.0,
    "card_examples": -1,
    "chunk_seconds": -3.0,
    "chunks_per_clip": 0,
    "ckpt_interval_minutes": -1.0,
    "cohort": "no/such.txt",
    "cohort_top": 0,
    "compare_to": "no/such/model",
    "cooldown": 1.01,
    "data_folder": "no/such/folder",
    "domain": "no/such.txt",
    "embed_dim": 0,
    "freeze": "backbone",
    "license": " ",
    "lr": 0.0,
    "margin_epochs": -1,
    "max_seconds": float("inf"),
    "model_title": "",
    "mrl_dims": [0, 256],
    "n_bootstrap": -1,
    "nonfinite_patience": -1,
    "num_workers": -1,
    "number_of_epochs": 0,
    "output_folder": "",
    "plda": "no/such.txt",
    "pretrained_encoder": "b2",
    "push_to_hub": "../name",
    "seed": 2**32,
    "shards": " ",
    "source": "no/such/model",
    "split_seed": -1,
    "stage": "../stage",
    "student_dataset": "vox1",
    "student_train_type": "pre",
    "taught_by": [],
    "teacher_augment": 3,
    "teacher_dataset": "vox1",
    "teacher_store": " ",
    "teacher_train_type": "pre",
    "teachers": [],
    "test_folder": "no/such/folder",
    "test_speakers": 1,
    "train_speakers": "no/such.txt",
    "training_data": "",
    "trials": "no/such.txt",
    "unfreeze": {"backbone": 0.0},
    "valid_speakers": 1,
    "warmup": -0.1,
    "weight_decay": -0.1,
}
OUT_OF_RANGE |= dict.fromkeys(
    "student objective opt_class lr_schedule epoch_counter wav_augment teacher_augment checkpointer "
    "train_logger".split(),
    BAD_OBJECT,
)


def documents(name, changes=DATA):
    """Each stage of a training, or a verification, with changes as of the command line."""
    if name == "verify":
        return [read_hparams.read_yaml(HPARAMS / "verify.yaml", changes)]
    return read_hparams.split_stages(read_hparams.read_yaml(HPARAMS / f"{name}.yaml", changes))


def check(name, tree):
    if name == "verify":
        check_hparams.check(tree, check_hparams.VERIFICATION)
    else:
        check_training(tree)


TREES = {name: read_hparams.parse(documents(name)[-1]) for name in TRAININGS}
TREES["verify"] = read_hparams.parse(documents("verify", VERIFY)[0])


# Of the other trainings, only what mrl_distill has not.
KEYS = [
    (name, key)
    for name, tree in TREES.items()
    for key in tree
    if name in ("mrl_distill", "verify") or key not in TREES["mrl_distill"]
]


def of_keys(wanted):
    """Parametrises a test with the keys that a set or mapping holds."""
    chosen = [pair for pair in KEYS if pair[1] in wanted]
    return pytest.mark.parametrize(("name", "key"), chosen, ids=["-".join(pair) for pair in chosen])


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", [*TRAININGS, "verify"])
def test_every_yaml_is_plain_hyperpyyaml_with_its_objects_and_downloads_nothing(
    name, offline, tmp_path
):
    overrides = {"output_folder": str(tmp_path)}
    if name == "verify":
        overrides |= dict.fromkeys(("source", "data_folder", "trials"), str(tmp_path))
    with open(HPARAMS / f"{name}.yaml") as file:
        hparams = load_hyperpyyaml(file, overrides)
    assert "base" not in hparams and "demo" not in hparams
    if name != "verify":
        student = hparams["student"]
        of_speechbrain = name == "mrl_distill_ecapa"
        assert isinstance(student, MatryoshkaEncoder if of_speechbrain else ReDimNetMRL)
        assert list(student.mrl_dims) == hparams["mrl_dims"]
        assert student.eval()(torch.zeros(1, 8000)).shape == (1, hparams["embed_dim"])
        assert hparams["checkpointer"].checkpoints_dir.is_relative_to(tmp_path)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("changes", [DATA, ""], ids=["data", "demo"])
def test_our_own_yamls_are_accepted(name, changes):
    for document in documents(name, changes):
        check(name, read_hparams.parse(document))


@pytest.mark.parametrize("name", TRAININGS)
def test_run_options_may_stand_in_a_yaml(name, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((HPARAMS / f"{name}.yaml").read_text() + RUN_OPTIONS)
    *_, document = read_hparams.split_stages(read_hparams.read_yaml(own, DATA))
    tree = read_hparams.parse(document)
    check_training(tree)
    with pytest.raises(ValueError, match="precision must be 'fp32', 'fp16' or 'bf16', got 'bf15'"):
        check_training({**tree, "precision": "bf15"})


@pytest.mark.parametrize("name", TRAININGS[1:])
def test_keys_that_mean_one_thing_agree_over_the_trainings(name):
    """Their values, units and ranges: every line, comments included."""
    blocks = []
    for file in ("mrl_distill", name):
        text = (HPARAMS / f"{file}.yaml").read_text()
        text = re.sub(r"^#.*\n|^\n", "", text, flags=re.M).replace(f"/{file}/", "/<name>/")
        found = re.findall(r"^(\w+):(.*\n(?:[ ].*\n)*)", text, flags=re.M)
        blocks.append(dict(found))
    distill, other = blocks
    shared = distill.keys() & other.keys()
    assert len(shared) > 40
    different = {key for key in shared if distill[key] != other[key]}
    assert different - {"stages"} == OWN[name]


def test_what_verification_and_training_both_say_agrees():
    training, verification = (
        read_hparams.round_trip((HPARAMS / f"{name}.yaml").read_text())
        for name in ("mrl_distill", "verify")
    )
    shared = training.keys() & verification.keys()
    assert shared == {"output_folder", "data_folder", "trials"} | {
        "batch_seconds",
        "num_workers",
    }
    for key in ("batch_seconds", "num_workers"):
        assert training[key] == verification[key]


@of_keys(OUT_OF_RANGE)
@pytest.mark.parametrize("value", [[[[]]], {"wrong": {1: []}}, 3 + 4j], ids=str)
def test_a_value_of_a_wrong_type_is_refused(name, key, value):
    with pytest.raises(ValueError, match=rf"^{key}[\[ .]") as error:
        check(name, {**TREES[name], key: value})
    assert "\n" not in str(error.value)


@of_keys(OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(name, key):
    with pytest.raises(ValueError, match=rf"\b{key}\b") as error:
        check(name, {**TREES[name], key: OUT_OF_RANGE[key]})
    assert "\n" not in str(error.value)


def test_every_key_that_a_recipe_reads_has_a_rule():
    """Those that others only refer to are checked where they are used."""
    flags = {"labels", "speaker_folders", "pretrained", "prepare_only", "skip_bad_files"}
    others = {"gradient_checkpointing", "train_loader", "valid_loader"}
    unchecked = {key for _, key in KEYS} - OUT_OF_RANGE.keys() - flags - others
    for name, tree in TREES.items():
        text = (HPARAMS / f"{name}.yaml").read_text()
        for key in unchecked & tree.keys() - {"stages"}:
            assert f"<{key}>" in text, key


@of_keys(OUT_OF_RANGE)
def test_a_mistyped_key_is_refused_with_the_one_that_was_meant(name, key):
    tree = dict(TREES[name])
    tree[f"{key}s"] = tree.pop(key)
    with pytest.raises(ValueError, match=f"^{key}s is not a key of the YAML; did you mean '{key}'"):
        check(name, tree)


@pytest.mark.parametrize("name", TREES)
def test_missing_keys_are_named(name):
    for key in TREES[name].keys() & OUT_OF_RANGE.keys() - MAY_LACK:
        tree = {other: value for other, value in TREES[name].items() if other != key}
        with pytest.raises(ValueError, match=rf"lacks \['{key}'|need {key}|mean '{key}'"):
            check(name, tree)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("mrl_dims: [64, 256, 128]", r"mrl_dims must be .*ascending.*64, 256, 128"),
        ("mrl_dims: [64, 64, 256]", "mrl_dims must be .*ascending"),
        ("embed_dim: 512\nmrl_dims: [64, 256]", r"mrl_dims must end in embed_dim 512"),
        ("objective: {mrl_dims: [64, 128]}", "objective.mrl_dims .* must be mrl_dims"),
        ("student: {mrl_dims: [64, 128]}", "student.mrl_dims .* must be mrl_dims"),
        ("objective: {n_classes: 9000}", "objective.n_classes is the number of speakers"),
        (
            "objective: {teacher_map: {64: b0, 128: b1, 192: b2, 256: b9}}",
            r"objective names \['b9'\], but the teachers are \['b0', 'b1', 'b2', 'b6'\]",
        ),
        (
            "taught_by: [0, -1]\n"
            "objective: {teacher_map: {64: b0, 128: b0, 192: b6, 256: [b1, b6]}}",
            r"objective names \['b1'\], but the teachers are \['b0', 'b6'\]",
        ),
        ("objective: {teacher_map: {64: b0}}", "objective: teacher_map"),
        ("objective: {teacher_weights: 3}", "objective: teacher_weights must be .* got 3"),
        ("objective: {teacher_weights: {b9: 2.0}}", r"teacher_weights.*'b9'|names \['b9'\]"),
        ("objective: {mrl_weights: [1, 1]}", "objective: mrl_weights"),
        ("objective: {margins: {64: 0.2}}", "objective: margins"),
        ("objective: {terms: {sine: 1.0}}", "objective: terms must be some of"),
        ("objective: {terms: {aam: much}}", "finite weights of at least 0, got .*'much'"),
        ("objective: {terms: null}", "objective: terms must be some of .*, got None"),
        ("objective: !name:torch.nn.Identity", "objective: 'Identity' object has no attribute"),
        ("labels: False", "labels is False, but objective.terms has aam, which needs them"),
        (
            "speaker_folders: False",
            r"speaker_folders is False, .* the YAML lacks \['test_folder'\]",
        ),
        (
            "labels: False\nobjective: {terms: {aam: 0}}\nmargin_epochs: 3",
            "margin_epochs is 3, but only the term aam has margins",
        ),
        ("warmup: 0.6\ncooldown: 0.5", "warmup 0.6 and cooldown 0.5 must be 1 at most"),
        ("teachers: null", r"objective.terms \['contrastive', 'cosine'\] need teachers"),
        ("teachers: [a/b0, b/b0]", "share a name; give a mapping"),
        ("taught_by: [4]", r"taught_by \[4\] must be positions in the 4 teachers"),
        ("teacher_dataset: vb2", "teacher_dataset: b0-vb2-ft_lm.* never released"),
        ("teachers: [b2-vox2-ft_mix]", "teacher_dataset: b2-vox2-ft_mix.* never released"),
        ("teachers: [b2-vox2]", "teacher_dataset: a release is named like .* got 'b2-vox2'"),
        ("student_train_type: ft_mix", "student_train_type .*: b2-vox2-ft_mix.* never released"),
        ("backbone: {F: 72}", "backbone is a model_config, which has no weights"),
        (
            "opt_class: !name:torch.optim.SDG",
            "opt_class must name a class .*, got !name:torch.optim.SDG",
        ),
        ("opt_class: !name:torch.optim.AdamW [0.1]", "opt_class must be .* arguments by name"),
        ("opt_class: {weigth_decay: 0.1}", "opt_class.weigth_decay is not .*'weight_decay'"),
        ("add_noise: {snr_low: high}", "add_noise.snr_low must be a valid number, got 'high'"),
        (
            "add_noise: !new:no.such.Module",
            "add_noise must name a class .*, got !new:no.such.Module",
        ),
        (
            "valid_loader: {shuffle: 1, drop_last: 1}",
            "valid_loader.drop_last must be a valid boolean, got 1",
        ),
        ("train_loader: {batchsize: 2}", "train_loader.batchsize is not a key .*'batch_size'"),
        ("train_loader: {num_workers: .nan}", "train_loader.num_workers must be a finite number"),
        ("stages: [{stage: a, lr: -1}]", "lr must be greater than 0, got -1"),
        ("stages: [{stage: a, lrr: 1}]", "lrr is not a key of the YAML; did you mean 'lr'"),
        ("stages: [{stage: a}, {stage: a}]", "two stages are called 'a'"),
        ("stages: none", "stages must be null or a list of mappings of changes, got 'none'"),
        ("stages: [{lr: 0.1}, {lr: 0.2}]\nlr: 0.3", "lr is set by every stage; change it there"),
        ("lrr: 1", "lrr is not a key of the YAML; did you mean 'lr'"),
        ("objective: {term: {}}", "objective.term is not a key of .*; did you mean 'terms'"),
        ("data_folder: []", r"data_folder must be existing files or folders, got \[\]"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    changes = {"data_folder": "hparams", "output_folder": str(tmp_path / "run")} | dict(
        line.split(": ", 1) for line in changes.splitlines()
    )
    with pytest.raises(ValueError, match=sentence) as error:
        train.main(
            ["hparams/mrl_distill.yaml", *(f"--{key}={value}" for key, value in changes.items())]
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["taught_by", "stage"])
def test_an_override_that_every_stage_sets_anew_is_refused(key):
    with pytest.raises(ValueError, match=f"{key} is set by every stage; change it there"):
        documents("mrl_progressive", f"{DATA}{key}: [0]\n")


def test_sizes_given_to_the_progressive_training_are_those_of_its_last_stage():
    *_, last = documents("mrl_progressive", f"{DATA}embed_dim: 512\nmrl_dims: [64, 128, 512]\n")
    tree = read_hparams.parse(last)
    assert tree["embed_dim"] == 512
    assert tree["student"].arguments["mrl_dims"] == [64, 128, 512]


def test_a_bad_verification_is_refused_before_anything_is_written(tmp_path):
    options = {"output_folder": tmp_path / "out", "source": "b0", "data_folder": "hparams"}
    for key, value, sentence in (
        ("trials", "no/such.txt", "trials must be existing files"),
        ("trials", "{x: no/such.txt}", "trials must be existing files"),
        ("data_folder", "{x: hparams}", "data_folder must be existing files or folders"),
        ("batch_second", 1, "batch_second is not a key of the YAML; did you mean 'batch_seconds'"),
    ):
        given = {**options, "trials": "setup.cfg", key: value}
        with pytest.raises(ValueError, match=sentence):
            verify.main(["hparams/verify.yaml", *(f"--{k}={v}" for k, v in given.items())])
    assert not (tmp_path / "out").exists()


def test_only_parts_may_name_code_and_it_does_not_run_before_the_check(tmp_path):
    proof = tmp_path / "ran"
    for key in ("lr", "seed", "trials", "model_title", "mrl_dims"):
        code = f"!apply:subprocess.getoutput ['touch {proof}']"
        with pytest.raises(ValueError, match=f"{key} must be .* got !apply:subprocess.getoutput"):
            train.main(["hparams/mrl_distill.yaml", "--data_folder=hparams", f"--{key}={code}"])
    assert not proof.exists()


def test_an_object_of_another_class_takes_the_place_of_ours():
    changes = f"{DATA}opt_class: !name:torch.optim.SGD {{lr: 0.1, momentum: 0.9}}\n"
    (document,) = documents("mrl_distill", changes)
    check_training(read_hparams.parse(document))
    found = read_hparams.parse(document)["opt_class"]
    assert found == ("!name:torch.optim.SGD", {"lr": 0.1, "momentum": 0.9})


def test_a_teacher_module_without_arguments_survives_the_changes():
    teachers = "{mine: !new:torch.nn.Identity []}"
    (document,) = documents("mrl_distill", f"{DATA}teachers: {teachers}\n")
    assert f"teachers: {teachers}" in read_hparams.dumped(document)


def test_data_named_in_a_yaml_of_ones_own_is_not_the_demo(tmp_path):
    own = tmp_path / "own.yaml"
    text = (HPARAMS / "mrl_distill.yaml").read_text()
    own.write_text(text.replace("data_folder: null", "data_folder: hparams"))
    (document,) = read_hparams.split_stages(read_hparams.read_yaml(own))
    assert not read_hparams.is_demo(read_hparams.parse(document))
    assert document["number_of_epochs"] == 30


def test_the_demo_changes_what_the_command_line_leaves():
    (document,) = documents("mrl_distill", "number_of_epochs: 1\noutput_folder: here\n")
    tree = read_hparams.parse(document)
    assert read_hparams.is_demo(tree) and tree["data_folder"] == "here/voices"
    assert tree["number_of_epochs"] == 1 and tree["batch_size"] == 32
    assert all(Path(path).is_file() for path in [*tree["teachers"], tree["backbone"]])
    assert "teachers" not in documents("mrl_supervised", "")[0]


def test_what_a_run_keeps_is_read_as_what_it_was(tmp_path):
    last = "lr: 0.01\nwav_augment: null\nstages: null\n"
    cases = [("mrl_distill", changes) for changes in ("", f"{DATA}lr: 0.01\n", last)]
    for name, changes in (*cases, *((name, last) for name in TRAININGS[1:])):
        document = read_hparams.read_yaml(HPARAMS / f"{name}.yaml", changes)
        kept = tmp_path / "resolved.yaml"
        kept.write_text(read_hparams.dumped(document))
        again = read_hparams.read_yaml(kept)
        assert read_hparams.parse(again) == read_hparams.parse(document)
        for stage in read_hparams.split_stages(again):
            check_training(read_hparams.parse(stage))
        followed = read_hparams.read_yaml(kept, "lr: 0.5\n")
        assert read_hparams.parse(followed)["opt_class"].arguments["lr"] == 0.5
