"""The file of a published folder that sentence-transformers runs, with and without that package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_mrl import ReDimNetMRL, export_model
from speechbrain_mrl.publish import custom_st


@pytest.fixture(scope="module")
def folder(tiny_config, random_model, tmp_path_factory):
    network = ReDimNetMRL.from_redimnet(random_model(tiny_config), embed_dim=32, mrl_dims=(8, 32))
    return export_model(network.eval(), tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def encoder(folder):
    assert (folder / "custom_st.py").read_text() == Path(custom_st.__file__).read_text()
    (module,) = json.loads((folder / "modules.json").read_text())
    name = module["type"].removeprefix("custom_st.")
    load = getattr(custom_st, name).load  # called as the library does
    return load(str(folder), subfolder="", token=None, trust_remote_code=True, backend="torch")


def sounds(*wavs, rate=16000):
    return [{"array": wav, "sampling_rate": rate} for wav in wavs]


def embed(encoder, inputs):
    return encoder.forward(encoder.preprocess(inputs))["sentence_embedding"]


def test_utterances_of_a_batch_have_speechbrains_embeddings(folder, encoder, voices):
    wavs = [voices(0, 1.0), voices(1, 0.6), voices(2, 0.37)]
    model = EncoderClassifier.from_hparams(folder)
    expected = torch.cat([model.encode_batch(wav[None])[:, 0] for wav in wavs])
    found = embed(encoder, sounds(wavs[0].numpy(), wavs[1].double(), wavs[2].tolist()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert encoder.get_embedding_dimension() == 32


def test_an_utterance_that_is_repeated_alone_is_so_in_a_batch(folder, encoder, voices):
    long, short = voices(0, 1.0), voices(1, 0.012)
    expected = EncoderClassifier.from_hparams(folder).encode_batch(short[None])[0, 0]
    found = embed(encoder, sounds(long, short))[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_arrays_and_paths_are_inputs_too(encoder, voices, tmp_path):
    wav, path = voices(0, 0.8), tmp_path / "a.wav"
    soundfile.write(path, torch.stack([wav, wav], 1).numpy(), 16000, subtype="FLOAT")
    found = embed(encoder, [*sounds(wav), wav, wav.numpy(), {"audio": sounds(wav)[0]}, str(path)])
    torch.testing.assert_close(found[1:], found[:1].expand(4, -1), rtol=1e-3, atol=1e-3)


def test_other_rates_are_resampled_and_channels_averaged(encoder, voices):
    wav = torchaudio.functional.resample(voices(0, 1.0), 16000, 8000)
    expected = embed(encoder, sounds(torchaudio.functional.resample(wav, 8000, 16000)))
    stereo = torch.stack([wav + 0.1, wav - 0.1])
    for one in (wav, stereo, stereo.T):
        torch.testing.assert_close(
            embed(encoder, sounds(one, rate=8000)), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"array": np.zeros(9)}, r"keys \['array'\] needs 'array', .* and 'sampling_rate'"),
        (sounds(np.full(9000, np.nan))[0], "array has samples that are not finite"),
        (sounds(np.zeros(9000), rate=0)[0], "sampling_rate must be positive, in hertz, got 0"),
        (sounds(np.zeros(9000, dtype=np.int16))[0], "array must be float .* got torch.int16"),
        (sounds(np.zeros((2, 3, 4)))[0], r"array must be float .* \(2, 3, 4\)"),
        (sounds(np.zeros(0))[0], "not empty"),
        (sounds(np.zeros(9))[0], "at least"),
    ],
)
def test_what_is_no_waveform_is_refused(encoder, given, reason):
    with pytest.raises(ValueError, match=reason):
        embed(encoder, [given])


SCRIPT = """
import json, sys
sys.modules["speechbrain_mrl"] = None  # as if not installed
import numpy as np
from sentence_transformers import SentenceTransformer

folder, sounds, copy = sys.argv[1:]
inputs = [{"array": wav, "sampling_rate": 16000} for wav in np.load(sounds).values()]
found = {}
for size in (8, None):
    model = SentenceTransformer(folder, truncate_dim=size, trust_remote_code=True, device="cpu")
    assert model.get_embedding_dimension() == (size or 32)
    found[size] = model.encode(inputs).tolist()
model.save_pretrained(copy)
again = SentenceTransformer(copy, trust_remote_code=True, device="cpu")
found["again"] = again.encode(inputs).tolist()
print(json.dumps(found))
"""


def test_sentence_transformers_loads_the_folder_without_this_package(folder, voices, tmp_path):
    pytest.importorskip("sentence_transformers")
    wavs = [voices(0, 0.5), voices(1, 1.0)]
    np.savez(tmp_path / "sounds.npz", *(wav.numpy() for wav in wavs))
    model = EncoderClassifier.from_hparams(folder)
    expected = torch.cat([model.encode_batch(wav[None])[:, 0] for wav in wavs])
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    paths = [str(folder), str(tmp_path / "sounds.npz"), str(tmp_path / "copy")]
    command = [sys.executable, "-c", SCRIPT, *paths]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, size in (("8", 8), ("null", 32), ("again", 32)):
        torch.testing.assert_close(
            torch.tensor(found[name]), expected[:, :size], rtol=1e-3, atol=1e-3
        )
