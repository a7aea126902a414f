"""Every key of every YAML, mistyped, of a wrong type and out of range: a sentence that names it."""

import copy
import re
from pathlib import Path

import check_yaml
import pytest
import train
import verify
from rules import SUPERVISED, TRAIN, VERIFY, Code

HPARAMS = Path(__file__).parents[2] / "hparams"

# A value of the right type that no key of this name may have. A YAML's key that is not here fails.
OUT_OF_RANGE = {
    "add_noise": Code("!new:no.such.Module", {}),
    "augment_prob": 1.5,
    "augmentations": [],
    "backbone": "b7",
    "batch_seconds": 0.0,
    "batch_size": 0,
    "calibration": "no/such.json",
    "calibration_p_target": 1.0,
    "card_examples": -1,
    "checkpoints_dir": "",
    "chunk_seconds": -3.0,
    "chunks_per_clip": 0,
    "ckpt_interval_minutes": -1.0,
    "cohort": "no/such.txt",
    "cohort_top": 0,
    "compare_to": "no/such/model",
    "cooldown": 1.01,
    "cosine": -1.0,
    "contrastive": float("nan"),
    "aam": float("inf"),
    "csv_file": "",
    "data_folder": "no/such/folder",
    "decay_factor": -0.1,
    "domain": "no/such.txt",
    "cutoff_high": 0.0,
    "cutoff_low": 0.0,
    "embed_dim": 0,
    "freeze": ["spine"],
    "large_margin_epochs": 0,
    "large_margin_lr": 0.0,
    "large_margin_seconds": 0.0,
    "large_margins": 2.0,
    "length_high": -1,
    "length_low": -1,
    "license": " ",
    "limit": 0,
    "lr": 0.0,
    "margin_epochs": -1,
    "margins": {64: -0.2},
    "max_augmentations": 0,
    "max_seconds": float("inf"),
    "max_bands": 0,
    "max_chunks": 0,
    "min_augmentations": 0,
    "model_title": "",
    "mrl_dims": [0, 256],
    "n_bootstrap": -1,
    "n_voices": 0,
    "noise_csv": "no/such.csv",
    "shards": "pipe:cat /net/{000..511}.tar",
    "nonfinite_patience": -1,
    "num_workers": -1,
    "number_of_epochs": 0,
    "output_folder": "",
    "plda": "no/such.txt",
    "push_to_hub": "../name",
    "rir_csv": "no/such.csv",
    "save_file": "",
    "seed": 2**32,
    "snr_high": float("nan"),
    "snr_low": -1000,
    "source": "no/such/model",
    "split_seed": -1,
    "stage": "../stage",
    "stages": [],
    "student_dataset": "vox1",
    "student_train_type": "lm",
    "taught_by": [],
    "teacher_batch_seconds": 0.0,
    "teacher_dataset": "vox1",
    "teacher_map": "some",
    "teacher_store": "",
    "teacher_train_type": "lm",
    "teachers": {"../b0": "b0"},
    "terms": {"sine": 1.0},
    "test_folder": "no/such/folder",
    "test_speakers": 1,
    "train_speakers": "no/such.txt",
    "training_data": "",
    "trials": "no/such.txt",
    "unfreeze": {"backbone": 0.0},
    "valid_speakers": 1,
    "warmup": -0.1,
    "width": 0.0,
    "weight_decay": -0.1,
}
for part in (
    "add_babble add_reverb checkpointer drop_bands drop_chunks epoch_counter low_pass lr_schedule "
    "noise_funct objective opt_class telephone train_logger wav_augment"
).split():
    OUT_OF_RANGE[part] = OUT_OF_RANGE["add_noise"]


def stages_of(name, changes="data_folder: hparams"):
    document = train.read_yaml(HPARAMS / f"{name}.yaml", changes)
    return [check_yaml.parse(text) for text in train.resolve_stages(document)]


def verification():
    text = (HPARAMS / "verify.yaml").read_text().replace("!PLACEHOLDER", "setup.cfg")
    return check_yaml.parse(text)


TREES = {
    name: stages_of(name)[-1]
    for name in ("mrl_distill", "mrl_supervised", "mrl_progressive", "mrl_amalgamate")
} | {"verify": verification()}


def arguments(value):
    return value.arguments if isinstance(value, Code) else value


def paths(tree, path=(), seen=()):
    """Every key of a YAML, those of mappings and objects inside it too, as the way to it."""
    for key, value in tree.items():
        if not key.startswith("__"):
            yield (*path, key)
            if isinstance(arguments(value), dict) and not any(value is one for one in seen):
                yield from paths(arguments(value), (*path, key), [*tree.values(), *seen])


def check(name, tree):
    if name == "verify":
        check_yaml.check_values(tree, VERIFY)
    else:
        check_yaml.check_values(tree, TRAIN, SUPERVISED)


def with_value(name, path, value, new_key=None):
    """The tree with another value at a path, or under a new key in that place; the old value."""
    tree = node = copy.deepcopy(TREES[name])
    for key in path[:-1]:
        node = arguments(node[key])
    old = node.pop(path[-1])
    node[new_key or path[-1]] = value
    return tree, old


def names_it(path):
    """A sentence about the last key of a path, or about what holds it and what it may hold."""
    return "^(" + "|".join(re.escape(".".join(path[:n])) for n in range(len(path), 0, -1)) + ")[ .]"


# Of the YAMLs with a base, only what the base has not.
BASE = set(paths(TREES["mrl_distill"]))
KEYS = [
    (name, path)
    for name, tree in TREES.items()
    for path in paths(tree)
    if name in ("mrl_distill", "verify") or path not in BASE
]


def value_at(name, path):
    return with_value(name, path, None)[1]


def of_keys(wanted=lambda value: True):
    """Parametrises a test with the keys whose value is ``wanted``."""
    chosen = [(name, path) for name, path in KEYS if wanted(value_at(name, path))]
    ids = [f"{name}-{'.'.join(path)}" for name, path in chosen]
    return pytest.mark.parametrize(("name", "path"), chosen, ids=ids)


@pytest.mark.parametrize("name", TREES)
def test_our_own_yamls_are_accepted(name):
    check(name, TREES[name])
    for tree in [] if name == "verify" else [*stages_of(name), *stages_of(name, "")]:
        check_yaml.check_values(tree, TRAIN, SUPERVISED)
        check_yaml.check_relations(tree)


@of_keys()
@pytest.mark.parametrize("value", [[[[]]], {"wrong": {1: []}}, 3 + 4j], ids=str)
def test_a_value_of_a_wrong_type_is_refused(name, path, value):
    tree, _ = with_value(name, path, value)
    with pytest.raises(ValueError, match=names_it(path)):
        check(name, tree)


@of_keys(lambda value: not isinstance(value, (bool, dict)))
def test_a_value_out_of_range_is_refused(name, path):
    tree, _ = with_value(name, path, OUT_OF_RANGE[path[-1]])
    with pytest.raises(ValueError, match=names_it(path)):
        check(name, tree)


@of_keys(lambda value: isinstance(value, (str, int, float)) and not isinstance(value, bool))
def test_text_for_a_number_and_a_number_for_text_are_refused(name, path):
    tree, old = with_value(name, path, 0.1)
    if not isinstance(old, str):
        tree, _ = with_value(name, path, f"{old} or so")
    with pytest.raises(ValueError, match=names_it(path) + "must be"):
        check(name, tree)


@of_keys()
def test_a_mistyped_key_is_refused_with_the_one_that_was_meant(name, path):
    tree, old = with_value(name, path, None)
    arguments_of_parent = tree
    for key in path[:-1]:
        arguments_of_parent = arguments(arguments_of_parent[key])
    arguments_of_parent[path[-1]] = old
    arguments_of_parent[f"{path[-1]}_x"] = old
    with pytest.raises(ValueError, match=names_it((*path[:-1], f"{path[-1]}_x"))) as error:
        check(name, tree)
    assert path[-1] in str(error.value)


@pytest.mark.parametrize("name", TREES)
def test_a_missing_key_is_named(name):
    for key in (TRAIN, VERIFY)[name == "verify"]:
        tree = {other: value for other, value in TREES[name].items() if other != key}
        with pytest.raises(ValueError, match=rf"the YAML lacks \['{key}'\]"):
            check(name, tree)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("mrl_dims: [64, 256, 128]", r"mrl_dims must be positive.*ascending.*\[64, 256, 128\]"),
        ("mrl_dims: [64, 64, 256]", "mrl_dims must be positive integers in ascending order"),
        ("embed_dim: 512\nmrl_dims: [64, 256]", r"mrl_dims \[64, 256\] must end at embed_dim.*512"),
        ("objective: {mrl_dims: [64, 128]}", "objective.mrl_dims .* must be mrl_dims"),
        ("objective: {n_classes: 9000}", "objective.n_classes is the number of speakers"),
        (
            "objective: {teacher_map: {64: b0, 128: b1, 192: b2, 256: b9}}",
            r"teacher_map names \['b9'\], but the teachers are \['b0', 'b1', 'b2', 'b6'\]",
        ),
        (
            "taught_by: [0, -1]\n"
            "objective: {teacher_map: {64: b0, 128: b0, 192: b6, 256: [b1, b6]}}",
            r"teacher_map names \['b1'\], but the teachers are \['b0', 'b6'\]",
        ),
        ("objective: {teacher_map: {64: b0}}", r"teacher_map must have the sizes .* got \[64\]"),
        ("objective: {teacher_weights: {b9: 2.0}}", r"teacher_weights names \['b9'\]"),
        ("objective: {mrl_weights: [1, 1]}", "objective.mrl_weights must have one entry for each"),
        ("objective: {margins: {64: 0.2}}", "objective.margins must have the sizes"),
        ("labels: False", "labels is False and .* the term aam needs labels"),
        ("objective: {terms: {aam: 0}}", r"labels is True and .*\['contrastive', 'cosine'\]"),
        ("speaker_folders: False", "labels need speaker_folders"),
        (
            "labels: False\nobjective: {terms: {aam: 0}}\nmargin_epochs: 3",
            "margin_epochs is 3, but only the term aam has margins",
        ),
        ("warmup: 0.6\ncooldown: 0.5", "warmup 0.6 and cooldown 0.5 must be 1 at most"),
        ("teachers: null", r"objective.terms \['contrastive', 'cosine'\] need teachers"),
        ("teachers: [a/b0, b/b0]", "share a name; give a mapping"),
        ("taught_by: [4]", r"taught_by \[4\] must be positions in the 4 teachers"),
        ("teacher_dataset: vb2", "teachers names b0, which was not released for .* vb2"),
        ("student_train_type: ft_mix", "backbone names b2, which was not released for .* ft_mix"),
        ("backbone: {F: 72}", "backbone is a model_config, which has no weights"),
        ("backbone: {F: 0}\npretrained: False", "model_config has F=0; it must be a positive"),
        ("backbone: setup.cfg\npretrained: False", "backbone is the file setup.cfg"),
        ("opt_class: !name:torch.optim.SDG", "opt_class names .* there is no torch.optim.SDG"),
        ("opt_class: !name:torch.optim.AdamW [0.1]", "opt_class must be .* arguments by name"),
        ("stages: [{stage: a, lr: -1}]", "lr must be a number above 0"),
        ("stages: [{stage: a, lrr: 1}]", "lrr is not a key of the YAML; did you mean 'lr'"),
        ("lrr: 1", "lrr is not a key of the YAML; did you mean 'lr'"),
        ("objective: {term: {}}", "objective.term is not a key of the YAML; did you mean 'terms'"),
        ("train_loader: {batchsize: 2}", "train_loader.batchsize is not a key"),
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


def test_a_bad_verification_is_refused_before_anything_is_written(tmp_path):
    options = {"output_folder": tmp_path / "out", "source": "b0", "data_folder": "hparams"}
    for key, value, sentence in (
        ("trials", "no/such.txt", "trials must be an existing file"),
        ("trials", "{../x: setup.cfg}", "trials must be an existing file .*'../x'"),
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
    changes = "data_folder: hparams\nopt_class: !name:torch.optim.SGD {lr: 0.1, momentum: 0.9}"
    (tree,) = stages_of("mrl_distill", changes)
    assert tree["opt_class"] == Code("!name:torch.optim.SGD", {"lr": 0.1, "momentum": 0.9})
    check("mrl_distill", tree)
