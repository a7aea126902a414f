"""What a model is called with: right, or refused in one sentence."""

import numpy as np
import pytest
import torch

from speechbrain_mrl.models.redimnet import (
    EmbeddingModel,
    MatryoshkaReDimNet,
    PrefixSpeakerClassifier,
    WaveformInput,
)


@pytest.fixture(scope="module")
def student(tiny_config, random_model):
    return MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()


@pytest.mark.parametrize("wavs", [np.zeros(16000, np.float32), [0.0] * 16000, None])
def test_what_is_no_tensor_is_refused_in_one_sentence(student, wavs):
    for call in (student, WaveformInput()):
        with pytest.raises(
            TypeError, match=f"wavs must be a torch.Tensor, got {type(wavs).__name__}"
        ):
            call(wavs)


@pytest.mark.parametrize("size", [8.0, "8", 9, True])
def test_a_size_that_is_no_size_is_refused_in_one_sentence(student, tiny_config, size):
    with pytest.raises(ValueError, match=r"target_dim must be one of mrl_dims \[8, 32\]"):
        student(torch.zeros(1, 16000), target_dim=size)
    with pytest.raises(ValueError, match=r"target_dim must be one of mrl_dims \[8, 32\]"):
        EmbeddingModel(tiny_config, (8, 32), target_dim=size)
    if size != 9 and size is not True:
        with pytest.raises(ValueError, match=r"target_dim must be in 1..32"):
            PrefixSpeakerClassifier(32, 2, target_dim=size)


def test_pyannotes_search_finds_the_least_number_of_samples(student, tiny_config):
    """As ``PyannoteAudioPretrainedSpeakerEmbedding``'s sibling for SpeechBrain bisects for it."""
    published = EmbeddingModel(tiny_config, (8, 32)).eval()

    def encode_batch(wavs):
        return published(WaveformInput()(wavs), torch.ones(len(wavs)))

    for call, least in ((student, 257), (encode_batch, 160)):  # 160: for the Hub's widget
        lower, upper = 2, 8000
        while lower + 1 < upper:
            middle = (lower + upper) // 2
            try:
                with torch.no_grad():
                    call(torch.randn(1, middle))
                upper = middle
            except RuntimeError:
                lower = middle
        assert upper == least


def test_no_scrap_of_a_batch_gets_an_embedding(tiny_config):
    published, wavs = EmbeddingModel(tiny_config, (8, 32)).eval(), torch.randn(2, 16000)
    with pytest.raises(ValueError, match=r"wavs\[1\] has 160 samples by its wav_lens"):
        published(wavs, torch.tensor([1.0, 0.01]))
    with pytest.raises(ValueError, match="at least 160 samples"):
        WaveformInput()(torch.zeros(1, 0))
