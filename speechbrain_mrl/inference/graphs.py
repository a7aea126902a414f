"""Models as graphs that inference engines run well: what ``export_onnx`` writes."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from speechbrain.lobes.models import ECAPA_TDNN
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from speechbrain_mrl.inference.optimize import prepare
from speechbrain_mrl.models.redimnet import N_FFT, Conv2d, ReDimNet

GROUP_WIDTH = 16  # channels per group for which the engines have fast kernels on AVX-512


class FourierMel(nn.Module):
    """Power mel spectrogram (B, T) -> (B, F, frames) with the Fourier transform as a matrix product.

    Not as a convolution over T samples, which an engine would prepare anew for each length.
    """

    waves: Tensor
    filters: Tensor

    def __init__(self, mel: Any) -> None:
        super().__init__()
        window = mel.spectrogram.window.double()
        start = (N_FFT - len(window)) // 2  # torch.stft centres a window shorter than n_fft
        angles = torch.outer(
            torch.arange(N_FFT // 2 + 1).double(), torch.arange(start, start + len(window)).double()
        ) * (2 * torch.pi / N_FFT)
        waves = torch.cat([angles.cos(), angles.sin()]) * window  # (2 * bins, window)
        self.register_buffer("waves", waves.T.float().contiguous())
        self.register_buffer("filters", mel.mel_scale.fb.clone())  # (bins, F)
        self.start, self.hop = start, mel.spectrogram.hop_length

    def forward(self, wavs: Tensor) -> Tensor:
        firsts = self.hop * torch.arange(1 + (wavs.shape[1] - N_FFT) // self.hop)
        samples = self.start + torch.arange(len(self.waves))
        frames = wavs[:, firsts.unsqueeze(1) + samples]  # (B, frames, window)
        real, imaginary = (frames @ self.waves).chunk(2, dim=2)
        return ((real.square() + imaginary.square()) @ self.filters).transpose(1, 2)


def join_groups(conv: Conv2d) -> None:
    """Make a grouped convolution one of fewer, wider groups, whose further weights are zero."""
    inputs = conv.weight.shape[1]  # of a group
    joined = 1 if inputs == 1 else max(GROUP_WIDTH // inputs, 1)  # depthwise ones are fast
    while conv.groups % joined:
        joined -= 1
    weight = conv.weight.detach().unflatten(0, (conv.groups // joined, joined, -1))
    wide = torch.einsum("gjoixy,jk->gjokixy", weight, torch.eye(joined))
    conv.weight = nn.Parameter(wide.flatten(3, 4).flatten(0, 2))
    conv.groups //= joined


class ReDimNetGraph(nn.Module):
    """The model as the engines run it best; ``model`` itself becomes that."""

    def __init__(self, model: ReDimNet, target_dim: int | None = None) -> None:
        super().__init__()
        self.target_dim = target_dim
        *before, mel = model.spec.torchfbank
        if isinstance(mel, MelSpectrogram):
            model.spec.torchfbank = nn.Sequential(*before, FourierMel(mel))
        for module in model.modules():
            if isinstance(module, Conv2d):
                join_groups(module)
        prepare(model.eval())
        self.model = model

    def forward(self, wavs: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        feats, _ = model.spec._features(wavs, None)
        pooled = model.pool(model.backbone(feats.unsqueeze(1)), None)
        embeddings = model.linear(model.bn(pooled))
        embeddings = embeddings if model.bn2 is None else model.bn2(embeddings)
        return embeddings[:, : self.target_dim], feats


class FeatureGraph(nn.Module):
    """Any encoder with its head, from its features on. Whole utterances have no lengths to tell."""

    def __init__(self, model: nn.Module, target_dim: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.target_dim = target_dim

    def forward(self, feats: Tensor) -> Any:
        model = self.model
        normed = feats if model.mean_var_norm is None else model.mean_var_norm(feats)
        own = model.embedding_model(normed)
        return model.linear(own.squeeze(1) if own.ndim == 3 else own)[:, : self.target_dim]


class EncoderGraph(FeatureGraph):
    """The same from waveforms on."""

    def forward(self, wavs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.compute_features
        feats = wavs if features is None else features(wavs)
        return super().forward(feats), feats


@contextlib.contextmanager
def whole_clips() -> Iterator[None]:
    """SpeechBrain's ECAPA-TDNN with a mask of whole utterances, whose number the graph leaves open.

    Its own mask makes the number of utterances in the example the only one of the graph.
    """

    def whole(lengths: Tensor, max_len: int, device: Any = None) -> Tensor:
        return torch.ones_like(lengths).unsqueeze(1).expand(-1, max_len)

    with patch.object(ECAPA_TDNN, "length_to_mask", whole):
        yield
