"""KaldiFbank against Kaldi's own C++ code and torchaudio's port of it."""

import pytest
import torch
from kaldi_native import SIXTEEN_BIT, native
from torchaudio.compliance.kaldi import fbank

from speechbrain_mrl import KaldiFbank


def ported(wav):
    """The port of Kaldi that torchaudio has."""
    options = {"num_mel_bins": 80, "high_freq": -400.0, "snip_edges": False, "dither": 0.0}
    return fbank(wav[None] * SIXTEEN_BIT, subtract_mean=True, **options)


@pytest.mark.parametrize("reference", [native, ported])
@pytest.mark.parametrize("samples", [400, 479, 480, 12345, 32000])
def test_features_are_kaldis(voices, reference, samples):
    torch.manual_seed(0)
    wav = voices(3, 2.0)[:samples] + 0.01 * torch.randn(samples)
    torch.testing.assert_close(KaldiFbank()(wav[None])[0], reference(wav), rtol=0, atol=1e-3)


def test_the_band_edges_are_kaldis_too(voices):
    torch.manual_seed(0)
    wav = voices(4, 1.0) + 0.01 * torch.randn(16000)
    found = KaldiFbank(f_max=8000.0)(wav[None])[0]
    # float32 rounds each FFT in its own way, which a narrow low band with little power shows
    torch.testing.assert_close(found, native(wav, high_freq=0.0), rtol=0, atol=3e-3)


def test_a_padded_utterance_has_the_features_that_it_has_alone():
    counts, features = [9000, 8123, 4001], KaldiFbank(n_mels=40)
    wavs = torch.randn(3, 9000)  # padding is noise, so that a sample of it would be seen
    found = features(wavs, torch.tensor(counts) / 9000)
    for row, count in enumerate(counts):
        alone = features(wavs[row : row + 1, :count])[0]
        torch.testing.assert_close(found[row, : len(alone)], alone, rtol=0, atol=1e-5)
        assert not found[row, len(alone) :].any()


def test_features_stay_float32_under_autocast_and_silence_has_gradients():
    features, wavs = KaldiFbank(), torch.randn(2, 4000)
    wavs[1] = 0
    wavs.requires_grad_()
    expected = features(wavs)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(wavs)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    found.square().sum().backward()
    assert wavs.grad.isfinite().all() and wavs.grad[0].any()


def test_it_has_no_state_of_its_own():
    assert not KaldiFbank().state_dict()


@pytest.mark.parametrize("edges", [(-1.0, 7600.0), (20.0, 8001.0), (4000.0, 4000.0)])
def test_bands_outside_the_spectrum_are_refused(edges):
    with pytest.raises(ValueError, match="f_min and f_max must be in 0 ... 8000 Hz"):
        KaldiFbank(80, *edges)
