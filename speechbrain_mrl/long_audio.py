"""One embedding of a recording of any length, in bounded memory."""

from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_mrl.redimnet import ASTP, SAMPLE_RATE, ReDimNet, check_wavs


@torch.inference_mode()
def embed_long(
    model: ReDimNet, wav: Tensor, window_seconds: float = 30.0, margin_seconds: float = 6.0
) -> Tensor:
    """Embedding of one recording, its network run window by window.

    Features are normalised by the whole recording, and frames of all windows are pooled as one
    sequence, so nothing is averaged over windows: the result differs from the whole recording's
    only by what self-attention and convolutions see beyond a window and its margins.

    Arguments
    ---------
    model : ReDimNet
        Or a subclass, or a copy by ``optimize_for_inference``; in eval mode.
    wav : torch.Tensor
        Float, 16 kHz, in [-1, 1]; (T,) or (1, T), at least 257 samples.
    window_seconds : float
        Of the frames that a window yields. Memory and attention grow with it.
    margin_seconds : float
        Heard on either side of a window, and not kept.

    Returns
    -------
    torch.Tensor
        (1, embed_dim), not length-normalised.

    Raises
    ------
    ValueError
        If ``model`` trains, the windows are empty, or ``wav`` is more than one recording.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> model = ReDimNetMRL(backbone="b0").eval()
    >>> embed_long(model, torch.rand(32000), window_seconds=1.0).shape
    torch.Size([1, 256])
    """
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    if not window_seconds > 0 or not margin_seconds >= 0:
        raise ValueError(
            f"window_seconds must be positive and margin_seconds at least 0, got "
            f"{window_seconds} and {margin_seconds}"
        )
    wav = check_wavs(wav)
    if len(wav) != 1:
        raise ValueError(f"wav must be one recording, got {len(wav)}; embed them one by one")
    feats, _ = model.spec(wav)  # (1, F, frames)
    per_second = SAMPLE_RATE / model.spec.hop_length
    window = max(1, round(window_seconds * per_second))
    margin = round(margin_seconds * per_second)
    frames: Any = None
    for start in range(0, feats.shape[-1], window):
        first = max(0, start - margin)
        part = model.backbone(feats[:, None, :, first : start + window + margin])
        part = part[..., start - first : start - first + window]  # (1, C, window)
        if frames is None:
            frames = part.new_empty(1, part.shape[1], feats.shape[-1])
        frames[..., start : start + window] = part
    embeddings = model.linear(model.bn(_pool(model.pool, frames, window)))
    return (embeddings if model.bn2 is None else model.bn2(embeddings)).clone()


def _pool(pool: nn.Module, frames: Tensor, window: int) -> Tensor:
    """``pool(frames)`` with attentive weights of one window at a time, merged exactly."""
    if not isinstance(pool, ASTP):
        return pool(frames)
    parts, bias = frames.split(window, dim=-1), None
    if pool.global_context_att:
        mean = frames.mean(dim=-1, keepdim=True)
        squares = [((part - mean) ** 2).sum(-1, keepdim=True) for part in parts]
        bias = pool.context_bias(mean, sum(squares) / (frames.shape[-1] - 1))
    peak = torch.full_like(frames[..., 0], -torch.inf)
    total = first = second = torch.zeros_like(peak)
    for part in parts:
        logits = pool.logits(part, bias)  # (1, C, window)
        higher = logits.amax(dim=2).maximum(peak)  # (1, C)
        old, weights = (peak - higher).exp(), (logits - higher.unsqueeze(2)).exp()
        total = total * old + weights.sum(dim=2)
        first = first * old + (weights * part).sum(dim=2)
        second = second * old + (weights * part.square()).sum(dim=2)
        peak = higher
    mean = first / total
    variance = second / total - mean.square()
    return torch.cat([mean, variance.clamp_min(1e-7).sqrt()], dim=1)
