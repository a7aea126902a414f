"""Encoders of SpeechBrain through the whole recipe, as students and as teachers of a ReDimNet."""

import json
from pathlib import Path

import encoders
import pytest
import torch
import train
from read_hparams import read_yaml, split_stages
from speechbrain import Stage

from speechbrain_mrl import MatryoshkaEncoder
from speechbrain_mrl.training.brain import MRLBrain

LOBES = "!new:speechbrain.lobes.models"
OBJECTS = {  # the YAML's own object at another size, or another in its place
    "ecapa": "{channels: [16, 16, 16, 16, 48], attention_channels: 8, lin_neurons: 24}",
    "resnet": f"{LOBES}.ResNet.ResNet "
    "{input_size: 16, channels: [4, 4, 8, 8], block_sizes: [1, 1, 1, 1], lin_neurons: 32}",
    "xvect": f"{LOBES}.Xvector.Xvector "
    "{in_channels: 24, tdnn_channels: [16, 16, 16, 16, 24], lin_neurons: 40}",
}


@pytest.fixture
def run(small_corpus, release_file, tiny_config, tmp_path, short_runs):
    """``run(kind, key=value, ...)``: two tiny ReDimNets teach an encoder on the small corpus."""
    teachers = [
        str(release_file({**tiny_config, "embed_dim": size}, name=f"of_{size}", seed=size))
        for size in (32, 24)
    ]

    def call(kind, yaml="mrl_distill_ecapa", **changes):
        options = {
            "data_folder": small_corpus,
            "output_folder": tmp_path / "run",
            "teachers": teachers,
            "n_mels": encoders.SIZES[kind][0],
            "embedding_model": OBJECTS[kind],
            "embed_dim": 24,
            "mrl_dims": "[8, 16, 24]",
            "valid_speakers": 4,
            "test_speakers": 6,
            "chunk_seconds": 0.4,
            "batch_size": 8,
            "num_workers": 0,
            "number_of_epochs": 1,
            "device": "cpu",
            **changes,
        }
        given = {key: value for key, value in options.items() if value is not None}
        student = train.main([f"hparams/{yaml}.yaml", *(f"--{k}={v}" for k, v in given.items())])
        return student, Path(options["output_folder"])

    return call


def weights(student):
    return {key: value.clone() for key, value in student.state_dict().items()}


def check_report(student, folder):
    report = json.loads((folder / "report.json").read_text())
    assert set(report["dims"]) == set(report["baselines"]["start"]) == {"8", "16", "24"}
    assert set(report["baselines"]["teachers"]) == {"of_32", "of_24"}
    assert report["params"] == sum(p.numel() for p in student.parameters())
    start = torch.load(folder / "checkpoints" / "start.ckpt", weights_only=True)
    trained = weights(student)
    moved = {key.split(".")[0] for key, x in start.items() if not torch.equal(x, trained[key])}
    assert moved == {"embedding_model", "linear"}


@pytest.mark.parametrize("kind", ["resnet", "xvect"])
def test_an_encoder_learns_from_redimnets_and_is_reported(run, kind):
    student, folder = run(kind)
    assert isinstance(student, MatryoshkaEncoder)
    check_report(student, folder)


def test_a_killed_training_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    options = {"number_of_epochs": 2, "output_folder": tmp_path / "whole"}
    student, _ = run("ecapa", **options)
    check_report(student, options["output_folder"])
    whole, real, done = weights(student), MRLBrain.on_stage_end, []

    def killed(brain, stage, loss, epoch=None):
        real(brain, stage, loss, epoch)
        if epoch == 1 and stage == Stage.VALID and not done:
            done.append(epoch)
            raise KeyboardInterrupt

    monkeypatch.setattr(MRLBrain, "on_stage_end", killed)
    options["output_folder"] = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run("ecapa", **options)
    again, _ = run("ecapa", **options)
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_an_encoder_grows_stage_by_stage(run):
    stages = [{"stage": "small", "embed_dim": 8, "mrl_dims": [8]}, {"stage": "large"}]
    student, folder = run("ecapa", stages=json.dumps(stages))
    assert student.mrl_dims == (8, 16, 24)
    kept = {}
    for stage in ("small", "large"):
        path = folder / "checkpoints" / stage / "start.ckpt"
        kept[stage] = torch.load(path, weights_only=True)["linear.weight"]
    assert kept["small"].shape == (8, 24) and kept["large"].shape == (24, 24)


def test_a_student_starts_from_a_published_encoder_which_may_stay_as_it_is(run, tmp_path):
    """Its own cosines, in the teachers' axes."""
    published = encoders.write_published(tmp_path / "published", "ecapa")
    changes = {"n_mels": None, "embedding_model": None, "pretrained_encoder": published}
    student, folder = run("ecapa", freeze="[embedding_model]", **changes)
    start = torch.load(folder / "checkpoints" / "start.ckpt", weights_only=True)
    rotation = start["linear.weight"].double()
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-4, rtol=0)
    assert not torch.allclose(rotation, identity, atol=0.1)
    own, trained = MatryoshkaEncoder.from_hparams(published).state_dict(), student.state_dict()
    for key, value in start.items():
        if key.startswith("embedding_model."):  # its statistics, too
            assert torch.equal(value, own[key]) and torch.equal(value, trained[key]), key
    assert not torch.equal(trained["linear.weight"], start["linear.weight"])
    made = train.load_hyperpyyaml(student.architecture)
    made["embedding_model"].load_state_dict(student.embedding_model.state_dict())


def test_a_redimnet_learns_from_a_published_encoder(run, tmp_path, release_file, tiny_config):
    published = encoders.write_published(tmp_path / "ecapa", "ecapa")
    text = (published / "hyperparams.yaml").read_text()
    text = text.replace("speechbrain/spkrec-ecapa-voxceleb", str(published))
    (published / "hyperparams.yaml").write_text(text)
    changes = {"n_mels": None, "embedding_model": None, "teachers": [str(published)]}
    changes["backbone"] = release_file(tiny_config, name="backbone", seed=3)
    _, folder = run("ecapa", yaml="mrl_distill", **changes)
    report = json.loads((folder / "report.json").read_text())
    assert set(report["baselines"]["teachers"]) == {"ecapa"}


def test_the_architecture_of_a_trained_encoder_is_that_of_its_yaml(tmp_path):
    changes = f"data_folder: hparams\noutput_folder: {tmp_path}\nn_mels: 24\n"
    (document,) = split_stages(
        read_yaml(
            "hparams/mrl_distill_ecapa.yaml", f"{changes}embedding_model: {OBJECTS['ecapa']}\n"
        )
    )
    student = train.load_stage(document)["student"]
    made = train.load_hyperpyyaml(student.architecture)
    assert list(made) == ["compute_features", "mean_var_norm", "embedding_model"]
    made["embedding_model"].load_state_dict(student.embedding_model.state_dict())
    assert made["compute_features"].compute_fbanks.n_mels == 24
    assert made["mean_var_norm"].norm_type == "sentence"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedding_model": "{input_size: 40}"}, "one number of features"),
        ({"mrl_dims": "[8, 32]"}, "mrl_dims must end in embed_dim 24"),
        ({"mean_var_norm": "{norm_type: batch}"}, "norm_type='batch'"),
        ({"pretrained_encoder": "no/such/folder"}, "pretrained_encoder must be an existing folder"),
        ({"embedding_model": "{lin_neuron: 3}"}, "lin_neuron is not a key"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(run, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run("ecapa", **{"n_mels": None, "embedding_model": None, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
