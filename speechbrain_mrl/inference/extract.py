"""Embeds utterances and long recordings with one or several encoders, reading each file once."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from speechbrain_mrl.dataio.audio import read_sound
from speechbrain_mrl.dataio.clips import Clip
from speechbrain_mrl.inference.optimize import arrange
from speechbrain_mrl.models.redimnet import ASTP, SAMPLE_RATE, ReDimNet, check_wavs

LONG_SECONDS = (
    150.0  # a longer utterance goes through a network window by window; VoxCeleb has 145 s
)

Encoder = Callable[[Tensor, Tensor], Tensor]  # wavs (B, T) and wav_lens (B,) to embeddings (B, D)


class _Batches(torch.utils.data.Dataset[Any]):
    """Padded batches of utterances, their relative lengths and their indices."""

    def __init__(
        self, clips: Sequence[Clip], batches: Sequence[list[int]], lengths: Sequence[int]
    ) -> None:
        self.clips, self.batches, self.lengths = clips, batches, lengths

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        wavs = []
        for index in self.batches[i]:
            clip = self.clips[index]
            wavs.append(read_sound(clip.wav, clip.start, clip.stop, self.lengths[index]))
        lengths = torch.tensor([len(wav) for wav in wavs])
        padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True)  # (B, T)
        return padded, lengths / padded.shape[1], self.batches[i]


def embed_clips(
    encoders: Mapping[str, Encoder],
    clips: Sequence[Clip],
    device: str = "cpu",
    batch_seconds: float = 60.0,
    max_seconds: float | None = 30.0,
    num_workers: int = 0,
    progress: tqdm | None = None,
) -> dict[str, Tensor]:
    """Embeddings of all utterances by all encoders; each file is read and decoded once.

    Arguments
    ---------
    encoders : dict of str to torch.nn.Module or callable
        Called as ``encoder(wavs (B, T), wav_lens (B,))``, to give (B, D). A module is put into
        eval mode for the time of the call. On a CPU a ReDimNet runs as ``optimize_for_inference``
        arranges it.
    clips : sequence of Clip
        N utterances.
    device : str
        Where the encoders are.
    batch_seconds : float
        Seconds of audio in a batch, padding included. Clips of like length travel together.
    max_seconds : float or None
        Only that much of an utterance is read, from its beginning or, where that is silent, from
        its first sound; None: all of it. What is longer than 150 s a ReDimNet embeds by
        ``embed_long``, in bounded memory; any other encoder reads it whole.
    num_workers : int
        Processes that read and decode; 0: this one.
    progress : tqdm, optional
        A bar that is moved on by the number of utterances done.

    Returns
    -------
    dict of str to torch.Tensor
        (N, D) float32 on the CPU for each encoder, in the order of ``clips``.

    Raises
    ------
    ValueError
        If a file cannot be decoded or holds only zeros, or an embedding is not finite; names the
        utterance.
    """
    lengths = [clip.num_frames for clip in clips]
    if max_seconds is not None:
        lengths = [min(length, int(max_seconds * SAMPLE_RATE)) for length in lengths]
    batches = _batches_by_length(lengths, batch_seconds * SAMPLE_RATE)
    loader = DataLoader(_Batches(clips, batches, lengths), batch_size=None, num_workers=num_workers)
    with _evaluating(encoders.values()):
        encoders = arrange(encoders, device)
        results: dict[str, Tensor] = {}
        for wavs, wav_lens, indices in loader:
            wavs, wav_lens = wavs.to(device), wav_lens.to(device)
            for name, encoder in encoders.items():
                with torch.inference_mode():
                    one = len(wavs) == 1
                    found = embed_recording(encoder, wavs) if one else encoder(wavs, wav_lens)
                    embeddings = found.float().cpu()  # (B, D)
                broken = ~embeddings.isfinite().all(dim=1)
                if broken.any():
                    clip = clips[indices[broken.int().argmax().item()]]
                    raise ValueError(f"{name} gives an embedding that is not finite for {clip.wav}")
                if name not in results:
                    results[name] = torch.empty(len(clips), embeddings.shape[1])
                results[name][indices] = embeddings
            if progress is not None:
                progress.update(len(indices))
    return results


def embed_recording(encoder: Any, wav: Tensor) -> Tensor:
    """One recording (1, T) to its embedding (1, D); a ReDimNet embeds a long one by ``embed_long``."""
    if wav.shape[1] > LONG_SECONDS * SAMPLE_RATE:
        own = getattr(encoder, "embed_long", None)
        if own is not None:
            return own(wav)
        if isinstance(encoder, ReDimNet):
            return embed_long(encoder, wav)
    return encoder(wav, torch.ones(1, device=wav.device))


@contextlib.contextmanager
def _evaluating(encoders: Iterable[Encoder]) -> Iterator[None]:
    """Eval mode for the modules among the encoders; afterwards each part has the mode that it had."""
    modules = [encoder for encoder in encoders if isinstance(encoder, nn.Module)]
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _batches_by_length(lengths: Sequence[int], max_samples: float) -> list[list[int]]:
    """Lists of indices, longest utterances first, each list at most ``max_samples`` when padded.

    No utterance is padded by more than a quarter: that costs more than another batch saves. Long
    utterances are alone.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = len(batches[-1]) + 1 if batches else 0
        if (
            not count
            or count * longest > max_samples
            or lengths[index] < 0.8 * longest
            or longest > LONG_SECONDS * SAMPLE_RATE
        ):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def embed_long(
    model: ReDimNet, wav: Tensor, window_seconds: float = 30.0, margin_seconds: float = 6.0
) -> Tensor:
    """Embedding of one recording, its network run window by window.

    Features are normalised by the whole recording, and frames of all windows are pooled as one
    sequence, so nothing is averaged over windows. Only what self-attention, convolutions and a
    ReDimNet2's group normalisation see beyond a window and its margins makes a difference.

    Arguments
    ---------
    model : ReDimNet
        Or a subclass, or a copy by ``optimize_for_inference``; in eval mode.
    wav : torch.Tensor
        Float, 16 kHz, in [-1, 1]; (T,) or (1, T), at least ``model.min_samples``.
    window_seconds : float
        Of the frames that a window yields. Memory and attention grow with it.
    margin_seconds : float
        Context on either side of a window, which is not kept.

    Returns
    -------
    torch.Tensor
        (1, embed_dim), not length-normalised.

    Raises
    ------
    ValueError
        If ``model`` trains or leaves out frames before pooling, the windows are empty, or ``wav``
        is more than one recording.

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
    if offset := model.model_config.get("before_pool_offset"):
        raise ValueError(
            f"model leaves out {offset} frames (before_pool_offset), which windows cannot; embed the "
            "recording as a whole"
        )
    wav = check_wavs(wav, model.min_samples)
    if len(wav) != 1:
        raise ValueError(f"wav must be one recording, got {len(wav)}; embed them one by one")
    with torch.inference_mode():
        embedding = _windowed(model, wav, window_seconds, margin_seconds)
    return embedding.clone()  # a tensor that autograd takes


def _windowed(model: ReDimNet, wav: Tensor, window_seconds: float, margin_seconds: float) -> Tensor:
    """``embed_long`` of what was checked, (1, T)."""
    feats, _ = model.spec(wav)  # (1, F, frames)
    stride = model.spec.time_stride
    per_second = SAMPLE_RATE / model.spec.hop_length / stride
    window = stride * max(1, round(window_seconds * per_second))
    margin = stride * round(margin_seconds * per_second)
    frames: Any = None
    for start in range(0, feats.shape[-1], window):
        first = max(0, start - margin)
        part = model.backbone(feats[:, None, :, first : start + window + margin])
        part = part[..., start - first : start - first + window]  # (1, C, window)
        if frames is None:
            frames = part.new_empty(1, part.shape[1], feats.shape[-1])
        frames[..., start : start + window] = part
    embeddings = model.linear(model.bn(_pool(model.pool, frames, window)))
    return embeddings if model.bn2 is None else model.bn2(embeddings)


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
