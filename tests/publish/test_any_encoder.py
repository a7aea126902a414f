"""Any SpeechBrain encoder with a Matryoshka head, published: loaded without this package, and safely."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys

import encoders
import pytest
import torch
from huggingface_hub import ModelCard
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_mrl import KaldiFbank, MatryoshkaEncoder, Provenance, export_model, load_published
from speechbrain_mrl.dataio.clips import Clip, find_clips
from speechbrain_mrl.inference.encoders import load_teacher
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.architecture import architecture_of
from speechbrain_mrl.publish.convert import convert_release
from speechbrain_mrl.publish.definition import probe_wavs
from speechbrain_mrl.publish.folder import FILES, model_info
from speechbrain_mrl.publish.hub import push_to_hub

SIZES = (4, 16)
KINDS = (*encoders.ENCODERS, "kaldi")
REPORT = {
    "dims": {str(d): {"eer": 0.1, "min_dcf": 0.5, "threshold": 0.4} for d in SIZES},
    "trials": {"target": 30, "impostor": 150},
    "corpus": "demo",
}
PROVENANCE = Provenance("Toy", "cc0-1.0", "Nothing.", trials="Toy")


def architecture(kind):
    """As a recipe has it, with references; "kaldi" is an ECAPA-TDNN on Kaldi's features."""
    if kind != "kaldi":
        return encoders.hyperparams(kind)
    features = "compute_features: !new:speechbrain_mrl.KaldiFbank\n    n_mels: !ref <n_mels>\n"
    n_mels, emb_dim = encoders.SIZES["ecapa"]
    numbers = f"n_mels: {n_mels}\nemb_dim: {emb_dim}\nout_n_neurons: 2\n"
    return numbers + features + encoders.ENCODERS["ecapa"]


def make(kind):
    torch.manual_seed(0)
    parts = encoders.parts("ecapa" if kind == "kaldi" else kind)
    if kind == "kaldi":
        parts |= {"compute_features": KaldiFbank(n_mels=24), "mean_var_norm": None}
    model = MatryoshkaEncoder(embed_dim=16, mrl_dims=SIZES, **parts).eval()
    model.architecture = architecture_of(architecture(kind))
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    parent = tmp_path_factory.mktemp("published")
    speakers = {name: torch.randn(16) for name in ("ann", "bob")}
    options = {"report": REPORT, "speakers": speakers}
    return {
        kind: export_model(model, parent / kind, PROVENANCE, **options)
        for kind, model in models.items()
    }


ISOLATED = """
import json, sys
sys.modules["speechbrain_mrl"] = None  # as if not installed
import torch
from speechbrain.inference.speaker import SpeakerRecognition

wavs, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[2:]:
    found[folder] = {}
    for size in (4, 16):
        model = SpeakerRecognition.from_hparams(folder, overrides={"target_dim": size})
        embeddings = model.encode_batch(wavs, torch.tensor([1.0, 0.5]))
        posteriors, *_ = model.classify_batch(wavs)
        score, _ = model.verify_batch(wavs, wavs)
        found[folder][size] = {
            "embeddings": embeddings.squeeze(1).tolist(),
            "total": posteriors.exp().sum(dim=-1).flatten().tolist(),
            "score": score.flatten().tolist(),
        }
    try:
        SpeakerRecognition.from_hparams(folder, overrides={"target_dim": 5})
    except ValueError as error:
        found[folder]["refused"] = str(error)
print(json.dumps(found))
"""


def test_it_loads_without_this_package_at_every_size(models, folders, tmp_path):
    wavs = 0.1 * torch.randn(2, 16000)
    torch.save(wavs, tmp_path / "wavs.pt")
    command = [sys.executable, "-c", ISOLATED, tmp_path / "wavs.pt", *folders.values()]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, folder in folders.items():
        answers = found[str(folder)]
        with torch.no_grad():
            alone = [models[kind](wavs[:1]), models[kind](wavs[1:, :8000])]
        for size in SIZES:
            embeddings = torch.tensor(answers[str(size)]["embeddings"])
            expected = torch.cat(alone)[:, :size]
            torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(torch.tensor(answers[str(size)]["total"]), torch.ones(2))
            assert min(answers[str(size)]["score"]) > 0.9999
        assert "target_dim must be one of mrl_dims [4, 16], got 5" in answers["refused"]


def test_its_yaml_names_speechbrains_own_classes_and_only_the_files_that_it_needs(folders):
    texts = {kind: (folder / "hyperparams.yaml").read_text() for kind, folder in folders.items()}
    before, after = texts["resnet"].split("definition: !apply:builtins.exec")
    for name in ("lobes.features.Fbank", "lobes.models.ResNet.ResNet"):
        assert f"!new:speechbrain.{name}" in before
    assert "    embedding_model: !new:speechbrain.lobes.models.ResNet.ResNet\n" in before
    assert "matryoshka.py: |" in after and "kaldi.py" not in after and "redimnet2.py" not in after
    assert "kaldi.KaldiFbank" in texts["kaldi"] and "kaldi.py: |" in texts["kaldi"]
    assert "speechbrain_mrl.KaldiFbank" not in texts["kaldi"].partition("definition:")[0]
    assert {path.name for path in folders["kaldi"].iterdir()} <= set(FILES)


def test_it_can_be_copied_and_pickled(folders):
    model, wavs = EncoderClassifier.from_hparams(folders["kaldi"]), torch.randn(2, 8000)
    expected = model.encode_batch(wavs)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.encode_batch(wavs), expected)


def test_it_passes_the_check_before_an_upload(folders, capsys):
    push_to_hub(folders["ecapa"], "org/name", dry_run=True)
    assert "would be uploaded" in capsys.readouterr().out
    card = ModelCard.load(folders["ecapa"] / "README.md")
    assert "A speaker encoder (ECAPA_TDNN) for" in card.text and "yakovlev" not in card.text
    assert "redimnet" not in card.data.tags and "matryoshka" in card.data.tags


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_read_back_without_its_code(models, folders, kind, tmp_path):
    again, wavs = load_published(folders[kind]), torch.randn(2, 12000)
    torch.testing.assert_close(again(wavs), models[kind](wavs), rtol=1e-3, atol=1e-4)
    assert again.mrl_dims == SIZES and not again.training
    info = model_info(folders[kind])
    assert info["mrl_dims"] == [4, 16] and info["speakers"] == 2
    assert info["params"] == sum(p.numel() for p in models[kind].parameters())
    smaller = export_model(again, tmp_path / "smaller", target_dim=4, dtype=torch.float16)
    found = load_published(smaller)(wavs)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found, models[kind](wavs)[:, :4], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_a_folder_is_embedded_in_bulk_as_each_of_its_utterances(models, folders, small_clips):
    clips = small_clips[:6]
    found = embed_clips({"model": load_teacher(folders["resnet"])}, clips)["model"]
    for clip, embedding in zip(clips, found):
        alone = models["resnet"](read(clip))[0]
        assert torch.cosine_similarity(alone, embedding, dim=0) > 0.9999


def read(clip: Clip):
    import soundfile

    wav, _ = soundfile.read(clip.wav, dtype="float32", stop=clip.stop)
    return torch.from_numpy(wav)


@torch.no_grad()
def test_a_published_encoder_becomes_matryoshka_by_rotation_alone(small_corpus, tmp_path):
    source = encoders.write_published(tmp_path / "theirs", "xvect")
    (source / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [voxceleb]\n---\n")
    clips = find_clips(small_corpus)[:40]
    theirs = MatryoshkaEncoder.from_hparams(source)
    own = embed_clips({"own": theirs}, clips)["own"]

    same = load_published(convert_release(str(source), tmp_path / "same"))
    assert same.mrl_dims == (40,)
    assert torch.cosine_similarity(same(read(clips[0])), own[:1]).item() > 0.999

    folder = convert_release(
        str(source), tmp_path / "rotated", recordings=small_corpus, mrl_dims=[8, 40]
    )
    info = model_info(folder)
    assert info["license"] == "apache-2.0" and info["mrl_dims"] == [8, 40]
    assert "`theirs`" in info["training_data"] and str(tmp_path) not in info["training_data"]
    found = embed_clips({"found": load_published(folder)}, clips)["found"]
    # A rotation about the mean keeps distances; its prefixes hold the most variance, in order.
    torch.testing.assert_close(torch.pdist(found), torch.pdist(own), rtol=0.01, atol=1e-3)
    variances = found.var(dim=0)
    assert variances[:8].sum() > own.var(dim=0).topk(8).values.sum()


# Padding


def test_what_padding_does_to_an_embedding_is_measured_and_said(
    folders, models, tmp_path, monkeypatch
):
    for folder in folders.values():
        assert json.loads((folder / "config.json").read_text())["padding_cosine"] >= 0.9999
        assert "does not depend on the rest of its batch" in card_text(folder)

    def as_speechbrain_does(self, wavs, counts):
        return self._own_embeddings(wavs, counts / wavs.shape[1])

    monkeypatch.setattr(MatryoshkaEncoder, "_by_length", as_speechbrain_does)
    folder = export_model(models["ecapa"], tmp_path / "model")
    wavs, short = probe_wavs().repeat(2, 1), 19200
    wavs[1, short:] = 0
    with torch.no_grad():
        padded = models["ecapa"](wavs, torch.tensor([1.0, short / 32000]))[1]
        expected = torch.cosine_similarity(
            padded, models["ecapa"](wavs[1, :short])[0], dim=0
        ).item()
    assert expected < 0.9999
    found = json.loads((folder / "config.json").read_text())["padding_cosine"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert f"changes with the padding in its batch (cosine {found:.6f}" in card_text(folder)


def card_text(folder):
    return " ".join(ModelCard.load(folder / "README.md").text.split())


# What is refused


def test_without_its_architecture_a_model_is_not_published_and_the_way_out_is_said(tmp_path):
    model = make("resnet")
    model.architecture = None
    with pytest.raises(ValueError, match="this one has none; give architecture="):
        export_model(model, tmp_path / "model")
    folder = export_model(model, tmp_path / "model", architecture=architecture("resnet"))
    assert "ResNet" in (folder / "hyperparams.yaml").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("[16, 16, 16, 16, 48]", "[16, 16, 16, 16, 32]"),
            "another model than this one: {'of another shape",
        ),
        (("norm_type: sentence", "norm_type: global"), "norm_type='global' and no statistics"),
        (("std_norm: False", "std_norm: True"), "its embedding differs by"),
        (("kernel_sizes: [5,", "kernel_sizes: [4, 9,"), "architecture cannot be built"),
        ((encoders.ENCODERS["ecapa"], "classifier: 1"), "architecture lacks embedding_model"),
        (
            ("!new:speechbrain.lobes.features.Fbank", "!apply:builtins.dict"),
            "it may name layers only",
        ),
        (("!ref <emb_dim>", "!ref <nothing>"), "architecture must be HyperPyYAML with the keys"),
    ],
)
def test_an_architecture_that_makes_another_model_is_refused(models, tmp_path, change, message):
    text = architecture("ecapa").partition("mean_var_norm_emb")[0].replace(*change)
    with pytest.raises(ValueError, match=message):
        export_model(models["ecapa"], tmp_path / "model", architecture=text)
    assert not list(tmp_path.iterdir())


def test_a_redimnet_takes_no_architecture(tiny_config, random_model, tmp_path):
    with pytest.raises(ValueError, match="a ReDimNet brings its own"):
        export_model(random_model(tiny_config), tmp_path / "model", architecture="a: 1")


@pytest.mark.parametrize(
    "tag",
    [
        "!new:subprocess.Popen [touch, {mark}]",
        "!apply:os.system [touch {mark}]",
        "!new:speechbrain.lobes.features.torch.utils.data.DataLoader [[1]]",
        "!new:torch.nn.Linear.__class__ [a]",
        "!new:speechbrain_mrl.MultiModelEnsemble {{}}",
        "!name:torch.nn.functional.relu",
        "!include:{mark}",
        "!!python/object/apply:os.system [touch {mark}]",
    ],
)
def test_a_folder_that_names_anything_but_layers_is_not_read(folders, tmp_path, tag):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    for path in folders["ecapa"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "hyperparams.yaml").read_text()
    evil = re.sub("( +std_norm:) false\n", rf"\1 {tag.format(mark=mark)}\n", text, count=1)
    assert evil != text
    (folder / "hyperparams.yaml").write_text(evil)
    with pytest.raises(ValueError, match="hyperparams.yaml is not as export_model wrote it"):
        load_published(folder)
    assert not mark.exists()
