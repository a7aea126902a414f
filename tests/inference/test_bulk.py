import os
import shutil
import signal
import subprocess
import sys

import embed
import pytest
import torch

from speechbrain_mrl import embed_folder, export_model, read_embeddings
from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import find_clips
from speechbrain_mrl.inference import store
from speechbrain_mrl.inference.encoders import load_teacher
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet

KILLED_AFTER_TWO_SHARDS = """
import os, signal, sys
from speechbrain_mrl import embed_folder
from speechbrain_mrl.inference import store
store.SHARD_SIZE = 16
calls = 0
def encoder(wavs, wav_lens):
    global calls
    calls += len(wavs)
    if calls > 32:
        os.kill(os.getpid(), signal.SIGKILL)
    return wavs.abs().sum(dim=1, keepdim=True)
encoder.fingerprint = "sums"
embed_folder(encoder, sys.argv[1], sys.argv[2])
"""


class Sums:
    """Sum of magnitudes; counts the clips that it was asked for."""

    def __init__(self, fingerprint="sums"):
        self.fingerprint, self.clips = fingerprint, 0

    def __call__(self, wavs, wav_lens):
        self.clips += len(wavs)
        return wavs.abs().sum(dim=1, keepdim=True)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_SIZE", 16)


def as_dict(folder):
    return {i: x for ids, found in read_embeddings(folder) for i, x in zip(ids, found, strict=True)}


def test_every_recording_has_its_embedding(small_corpus, small_shards, tmp_path):
    found = as_dict(embed_folder(Sums(), small_corpus, tmp_path, num_workers=1))
    clips = find_clips(small_corpus)
    expected = embed_clips({"sums": Sums()}, clips)["sums"]
    assert found.keys() == {clip.id for clip in clips}
    for clip, embedding in zip(clips, expected):
        torch.testing.assert_close(found[clip.id], embedding)


def test_a_killed_call_goes_on_at_its_shard(small_corpus, small_shards, tmp_path):
    command = [sys.executable, "-c", KILLED_AFTER_TWO_SHARDS, str(small_corpus), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    again = Sums()
    embed_folder(again, small_corpus, tmp_path)
    assert again.clips == len(find_clips(small_corpus)) - 32
    assert len(as_dict(tmp_path)) == again.clips + 32


def test_other_ids_than_were_embedded_are_refused(small_corpus, tmp_path):
    embed_folder(Sums(), small_corpus, tmp_path)
    clips = tmp_path / "clips.csv"
    lines = clips.read_text().splitlines()
    clips.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/embeddings/.*is of other utterances"):
        as_dict(tmp_path)


def test_embeddings_of_another_encoder_are_not_mixed_in(small_corpus, tmp_path):
    embed_folder(Sums(), small_corpus, tmp_path)
    with pytest.raises(ValueError, match="filled with other teacher"):
        embed_folder(Sums("others"), small_corpus, tmp_path)
    with pytest.raises(ValueError, match="attribute fingerprint"):
        embed_folder(lambda wavs, wav_lens: wavs, small_corpus, tmp_path)


@pytest.fixture(scope="module")
def model(random_model, tiny_config):
    """Of the weights of the fixture ``exported``."""
    redimnet = random_model(tiny_config)
    return MatryoshkaReDimNet.from_redimnet(redimnet, embed_dim=32, mrl_dims=(8, 32)).eval()


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """The folder of ``model`` as an EncoderClassifier."""
    return export_model(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model, small_corpus):
    """{id: embedding} of the first clips, each alone through the plain forward."""
    clips = find_clips(small_corpus)[:3]
    with torch.no_grad():
        return {clip.id: model(read_audio(clip.wav))[0] for clip in clips}


def test_a_copy_made_for_inference_embeds_a_folder(model, expected, small_corpus, tmp_path):
    found = as_dict(embed_folder(optimize_for_inference(model), small_corpus, tmp_path))
    for clip_id, embedding in expected.items():
        torch.testing.assert_close(found[clip_id], embedding, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_the_command_embeds_with_a_model_folder(
    engine, published, expected, small_corpus, tmp_path, request, monkeypatch
):
    if engine == "openvino":
        pytest.importorskip("openvino")
        reference, file = request.getfixturevalue("exported")

        def export(model, path):
            for key, value in model.state_dict().items():
                assert torch.equal(value, reference.state_dict()[key]), key
            shutil.copyfile(file, path)

        monkeypatch.setattr(embed, "export_onnx", export)
    arguments = [str(published), str(small_corpus), str(tmp_path), f"--engine={engine}"]
    embed.main([*arguments, "--num_workers=0"])
    found = as_dict(tmp_path)
    assert len(found) == len(find_clips(small_corpus))
    for clip_id, embedding in expected.items():
        torch.testing.assert_close(found[clip_id], embedding, atol=1e-4, rtol=1e-4)


def test_what_embeds_in_another_precision_is_no_part_of_an_interrupted_run(model, published):
    for encoder in (model.eval(), load_teacher(published)):
        weights = fingerprint(encoder)
        exact, seconds = embed.choose_engine(encoder, "torch", "float32", "cpu")
        rough, more = embed.choose_engine(encoder, "torch", "bfloat16", "cpu")
        assert exact.fingerprint == weights != rough.fingerprint
        assert more == 2 * seconds  # maps of half the size


def test_engines_that_cannot_run_an_encoder_are_refused():
    other = torch.nn.Identity()
    assert embed.choose_engine(other, "torch", "float32", "cpu")[0] is other
    with pytest.raises(TypeError, match="needs a ReDimNet, got Identity"):
        embed.choose_engine(other, "torch", "bfloat16", "cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--engine=openvino", "--device=cuda"], "runs on the CPU, got --device=cuda"),
        (["--engine=onnxruntime", "--precision=bfloat16"], "with onnxruntime, got 'bfloat16'"),
    ],
)
def test_an_engine_that_cannot_run_so_is_refused_before_the_model_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        embed.main(["no-such-model", "no-such-folder", "out", *options])
