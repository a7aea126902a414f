"""A published ReDimNet as a ``pyannote.audio.Model``, whose pooling knows who speaks when.

Needs the extra ``pyannote``.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.models.redimnet import ASTP, SAMPLE_RATE, MatryoshkaReDimNet, check_wavs
from speechbrain_mrl.publish.load import load_published
from speechbrain_mrl.utils import require

try:
    from pyannote.audio import Model
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.core import SlidingWindow
except ImportError:

    class Model:  # type: ignore[no-redef]
        """Says what is missing to whoever makes an embedding."""

        def __init__(self, **_: Any) -> None:
            require("pyannote.audio", "PyannoteEmbedding")


class PyannoteEmbedding(Model):
    """Speaker embeddings for pyannote.audio's pipelines, of a published ReDimNet or ReDimNet2.

    A pipeline takes it where it takes a ``pyannote.audio.Model``: ``SpeakerDiarization(embedding=)``,
    ``PretrainedSpeakerEmbedding``, ``Inference``.

    Weights say how much each frame counts, as a segmentation gives them per speaker. They multiply
    the attention of the pooling, which is renormalised, and weight its statistics; the network
    before it sees the whole waveform. A speaker without a frame has an embedding of NaN, which
    pyannote.audio leaves out.

    Arguments
    ---------
    source : path
        A folder from ``export_model``, or a Hub id.
    target_dim : int, optional
        One of the model's ``mrl_dims``: dimensions to return. None: all.

    Raises
    ------
    ImportError
        If the extra ``pyannote`` is not installed.
    ValueError
        If the model was not trained for ``target_dim``, or is no ReDimNet.
    """

    def __init__(self, source: str | os.PathLike[str], target_dim: int | None = None) -> None:
        super().__init__(sample_rate=SAMPLE_RATE)
        network = load_published(source)
        if not isinstance(network, MatryoshkaReDimNet):
            raise ValueError(
                f"source must be a ReDimNet or ReDimNet2, whose pooling takes weights; {source} is "
                f"another encoder, {type(network.embedding_model).__name__}"
            )
        network.check_target_dim(target_dim)
        self.network: Any = network
        self.dimension: int = target_dim or network.embed_dim
        self.specifications = Specifications(Problem.REPRESENTATION, Resolution.CHUNK, duration=5.0)

    @property
    def receptive_field(self) -> Any:
        """A frame before pooling, on the time axis."""
        step = self.network.spec.hop_length / SAMPLE_RATE
        return SlidingWindow(start=-step / 2, duration=step, step=step)

    def forward(self, waveforms: Tensor, weights: Tensor | None = None) -> Tensor:
        """Embeddings of waveforms, or of each speaker in them; not length-normalised.

        Arguments
        ---------
        waveforms : torch.Tensor
            Float, 16 kHz, in [-1, 1], (B, 1, T).
        weights : torch.Tensor, optional
            At least 0, (B, frames) or (B, speakers, frames), of any number of frames: each frame of
            the pooling takes the nearest. None: all frames count alike.

        Returns
        -------
        torch.Tensor
            (B, dimension) or (B, speakers, dimension).

        Raises
        ------
        ValueError
            For another shape or type, or a negative weight.
        """
        network = self.network
        if weights is None:
            embeddings: Tensor = network(waveforms)[:, : self.dimension]
            return embeddings
        wavs = check_wavs(waveforms, network.min_samples)
        if weights.ndim not in (2, 3) or len(weights) != len(wavs) or not (weights >= 0).all():
            raise ValueError(
                "weights must be at least 0 and (B, frames) or (B, speakers, frames) for waveforms "
                f"{tuple(waveforms.shape)}, got {tuple(weights.shape)}"
            )
        feats, _ = network.spec(wavs)
        frames = network.backbone(feats.unsqueeze(1).to(network.linear.weight.dtype))
        of_speakers = weights.float().reshape(len(wavs), -1, weights.shape[-1])  # (B, S, frames)
        resampled = F.interpolate(of_speakers, size=feats.shape[-1], mode="nearest")
        resampled = resampled[..., -frames.shape[-1] :]
        with torch.autocast(wavs.device.type, enabled=False):
            pooled = [
                weighted_pool(network.pool, frames.float(), one) for one in resampled.unbind(1)
            ]
            stacked = torch.stack(pooled, 1).to(network.linear.weight.dtype)  # (B, S, 2 * channels)
            found = network.linear(network.bn(stacked.flatten(0, 1)))
            found = found if network.bn2 is None else network.bn2(found)
        shape = weights.shape[:-1]
        return found[:, : self.dimension].reshape(*shape, self.dimension)


def weighted_pool(pool: nn.Module, frames: Tensor, weights: Tensor) -> Tensor:
    """``pool`` of frames (B, C, T) that count by their weights (B, T); NaN where none does."""
    weights = weights.unsqueeze(1)
    mean, variance = _moments(frames, weights)
    if not isinstance(pool, ASTP):
        return torch.cat([mean, (variance + 1e-7).sqrt()], dim=1).squeeze(2)
    bias = pool.context_bias(mean, variance) if pool.global_context_att else None
    attention = (pool.logits(frames, bias) + weights.log()).softmax(dim=2)
    mean = (attention * frames).sum(dim=2)
    variance = (attention * frames.square()).sum(dim=2) - mean.square()
    return torch.cat([mean, variance.clamp_min(1e-7).sqrt()], dim=1)


def _moments(frames: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and unbiased variance over time, (B, C, 1) each."""
    total = weights.sum(dim=2, keepdim=True)
    mean = (weights * frames).sum(dim=2, keepdim=True) / total
    squares = (weights * (frames - mean).square()).sum(dim=2, keepdim=True)
    freedom = total - weights.square().sum(dim=2, keepdim=True) / total
    return mean, squares / freedom.clamp_min(1e-8)
