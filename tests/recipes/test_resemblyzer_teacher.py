import numpy as np
import pytest
import torch

pytest.importorskip("resemblyzer")

from resemblyzer import VoiceEncoder  # noqa: E402
from resemblyzer_teacher import ResemblyzerTeacher  # noqa: E402


@torch.no_grad()
def test_a_padded_batch_has_the_embeddings_that_the_package_gives_one_by_one():
    generator = np.random.default_rng(0)
    lengths = (40000, 25601, 25600, 1000)
    wavs = [generator.standard_normal(n).astype(np.float32).cumsum() / 1000 for n in lengths]
    padded = np.zeros((len(wavs), max(lengths)), np.float32)
    for row, wav in zip(padded, wavs):
        row[: len(wav)] = wav
    wav_lens = torch.tensor(lengths) / max(lengths)
    found = ResemblyzerTeacher()(torch.from_numpy(padded), wav_lens)
    original = VoiceEncoder(device="cpu", verbose=False)
    expected = np.stack([original.embed_utterance(wav) for wav in wavs])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
