"""One set of defaults: train_distilled_mrl, the objective and the shipped YAML do the same."""

import inspect

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNetMRL, train_distilled_mrl
from speechbrain_mrl.training import distill
from speechbrain_mrl.training.defaults import DEFAULTS, default_augment


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    with open("hparams/mrl_distill.yaml") as file:
        return load_hyperpyyaml(file, {"output_folder": str(tmp_path_factory.mktemp("out"))})


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_a_default_is_the_yaml_s(key, shipped):
    assert shipped[key] == DEFAULTS[key]


def test_the_python_call_has_the_yaml_s_defaults(shipped):
    of_call = {n: p.default for n, p in inspect.signature(train_distilled_mrl).parameters.items()}
    assert of_call["epochs"] == shipped["number_of_epochs"]
    for key in ("batch_size", "chunk_seconds", "max_seconds", "lr"):
        assert of_call[key] == shipped[key]
    terms = inspect.signature(MatryoshkaDistillationLoss).parameters["terms"].default
    of_yaml = dict(shipped["objective"].keywords["terms"])
    assert of_yaml.pop("aam") and terms == of_yaml  # labels are what the call does not read
    student = inspect.signature(ReDimNetMRL.__init__).parameters
    for key in ("embed_dim", "mrl_dims", "backbone"):
        default = student[key].default
        assert (list(default) if key == "mrl_dims" else default) == shipped[key]


def described(thing):
    """A module's class and plain attributes, and those of what it calls; a function's name."""
    thing = getattr(thing, "func", thing)  # of a partial
    if inspect.isfunction(thing):
        return thing.__qualname__
    own = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
    return type(thing).__qualname__, {k: described(v) if callable(v) else v for k, v in own.items()}


def test_the_default_augmentation_is_the_yaml_s(shipped):
    of_yaml, of_python = shipped["wav_augment"], default_augment()
    assert of_yaml.augmentations.keys() == of_python.augmentations.keys()
    for name, augmentation in of_yaml.augmentations.items():
        assert described(augmentation) == described(of_python.augmentations[name]), name
    for key in ("augment_prob", "min_augmentations", "max_augmentations"):
        assert getattr(of_yaml, key) == getattr(of_python, key)
    voices = shipped["add_babble"].noise_funct.keywords["n_voices"]
    assert (
        voices
        == inspect.signature(of_python.augmentations["AddNoise2"].noise_funct)
        .parameters["n_voices"]
        .default
    )


class Stop(Exception):
    pass


@pytest.fixture
def trained_with(monkeypatch):
    """What ``train_distilled_mrl`` would train, and how; the training itself is left out."""
    seen = {}

    def capture(student, objective, train_set, valid_set, hparams, run_opts, stores):
        seen.update(student=student, objective=objective, hparams=hparams, run_opts=run_opts)
        raise Stop

    monkeypatch.setattr(distill, "train_student", capture)
    return seen


def test_a_call_without_options_trains_as_the_recipe_does(
    trained_with, shipped, small_corpus, random_model, tiny_config, tmp_path, monkeypatch
):
    """From released weights, augmented, on a GPU where there is one."""
    asked = []
    release = random_model({**tiny_config, "embed_dim": 192})
    monkeypatch.setattr(distill, "load_released", lambda *a: (asked.append(a), release)[1])
    with pytest.raises(Stop):
        train_distilled_mrl(
            {"one": random_model(tiny_config)}, {}, small_corpus, output_folder=tmp_path
        )
    kinds = shipped["student_train_type"], shipped["student_dataset"]
    assert asked == [(shipped["backbone"], *kinds)]
    student, hparams = trained_with["student"], trained_with["hparams"]
    for key, value in release.backbone.state_dict().items():
        assert torch.equal(student.backbone.state_dict()[key].cpu(), value)
    assert (student.embed_dim, list(student.mrl_dims)) == (256, shipped["mrl_dims"])
    assert trained_with["objective"].terms == {"cosine": 1.0, "contrastive": 0.1}
    assert hparams["wav_augment"].augmentations.keys() == default_augment().augmentations.keys()
    for key in ("opt_class", "lr_schedule"):
        assert hparams[key].func is shipped[key].func
        assert hparams[key].keywords == shipped[key].keywords
    for key in ("shuffle", "drop_last"):
        assert hparams["train_loader"][key] == shipped["train_loader"][key]
    assert hparams["train_loader"]["batch_size"] == 114  # all that this folder has
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert trained_with["run_opts"] == {"device": device}


@pytest.mark.parametrize("given", ["file", "not pretrained", "smaller"])
def test_a_student_starts_from_what_is_named(
    given,
    trained_with,
    small_corpus,
    release_file,
    random_model,
    tiny_config,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(distill, "load_released", lambda *_: pytest.fail("nobody asked for it"))
    file, config = release_file(tiny_config), {"embed_dim": 48, "mrl_dims": [16, 48]}
    config["backbone"] = str(file)
    if given == "not pretrained":
        config |= {"backbone": "b0", "pretrained": False}
    if given == "smaller":
        config |= {"embed_dim": 16, "mrl_dims": [8, 16]}
    with pytest.raises(Stop):
        train_distilled_mrl(
            {"one": random_model(tiny_config)}, config, small_corpus, output_folder=tmp_path / "out"
        )
    student = trained_with["student"]
    assert list(student.mrl_dims) == config["mrl_dims"]
    same = torch.equal(
        student.backbone.stem[0].weight.flatten()[:9].cpu(),
        random_model(tiny_config).backbone.stem[0].weight.flatten()[:9],
    )
    assert same == (given != "not pretrained")


def test_a_misspelt_key_of_a_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got \['backbones'\]"):
        train_distilled_mrl({}, {"backbones": "b2"}, tmp_path, output_folder=tmp_path)
