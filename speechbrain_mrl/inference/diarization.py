"""Finds who speaks when in a recording, by SpeechBrain's spectral clustering of its windows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechbrain_mrl.dataio.audio import FRAME, read_audio, sound_frames
from speechbrain_mrl.dataio.clips import SAMPLE_RATE
from speechbrain_mrl.inference.encoders import chosen_size
from speechbrain_mrl.inference.optimize import arrange

WINDOW, STEP = 24000, 12000  # samples, 1.5 s every 0.75 s
PRUNING = 0.1  # fraction of each window's similarities that the clustering keeps
MIN_KEPT = 10  # of them, but never more than half
MAX_SPEAKERS = 10  # if their number is estimated
BATCH = 64  # windows

Span = tuple[int, int]  # first sample, and the one after the last


class Turn(NamedTuple):
    """What one speaker says without a break."""

    start: float  # seconds
    end: float
    speaker: int  # from 1, in order of appearance


def diarize(
    encoder: Any,
    recording: str | os.PathLike[str],
    target_dim: int | None = None,
    n_speakers: int | None = None,
    device: str = "cpu",
) -> list[Turn]:
    """Who speaks when. Windows that are silent for more than half are left out.

    Arguments
    ---------
    encoder : torch.nn.Module
        As from ``load_teacher``, on ``device``.
    recording : path
        Of any length.
    target_dim : int, optional
        One of the model's sizes: dimensions that are compared. None: all.
    n_speakers : int, optional
        How many speak. None: 2 to 10, estimated by the largest gap between eigenvalues.

    Raises
    ------
    ValueError
        If the recording holds less than 1.5 s, only silence, or fewer windows than speakers, or the
        model lacks the size.
    """
    wav = read_audio(recording)
    if len(wav) < WINDOW:
        seconds = len(wav) / SAMPLE_RATE
        raise ValueError(f"{recording} lasts {seconds:.2f} s; diarization needs 1.5 s at least")
    sound = sound_frames(wav).float().numpy()
    spans = [
        (start, end)
        for start, end in windows(len(wav))
        if sound[start // FRAME : end // FRAME].mean() >= 0.5
    ]
    if not spans:
        raise ValueError(f"{recording} holds only silence")
    embeddings = embed_windows(encoder, wav, spans, device)
    if not embeddings.isfinite().all():
        raise ValueError(f"the model gives an embedding that is not finite for {recording}")
    size = chosen_size(encoder, embeddings.shape[1], target_dim)
    return cluster(embeddings[:, :size], spans, n_speakers)


def windows(n_samples: int) -> list[Span]:
    """Every window of a signal; the last one ends with it.

    Example
    -------
    >>> windows(40000)
    [(0, 24000), (12000, 36000), (16000, 40000)]
    """
    starts = [*range(0, n_samples - WINDOW, STEP), n_samples - WINDOW]
    return [(start, start + WINDOW) for start in starts]


def embed_windows(encoder: Any, wav: Tensor, spans: Sequence[Span], device: str = "cpu") -> Tensor:
    """Embeddings (N, D) of the windows of a signal (T,), on the CPU."""
    fast, found = arrange({"": encoder}, device)[""], []
    for first in range(0, len(spans), BATCH):
        batch = torch.stack([wav[start:end] for start, end in spans[first : first + BATCH]])
        with torch.inference_mode():
            found.append(
                fast(batch.to(device), torch.ones(len(batch), device=device)).cpu().float()
            )
    return torch.cat(found)


def cluster(embeddings: Tensor, spans: Sequence[Span], n_speakers: int | None = None) -> list[Turn]:
    """Turns out of the windows' embeddings (N, D); an overlap of two speakers is shared equally.

    Example
    -------
    >>> embeddings = torch.eye(2).repeat_interleave(20, dim=0)
    >>> cluster(embeddings, windows(492000), n_speakers=2)
    [Turn(start=0.0, end=15.375, speaker=1), Turn(start=15.375, end=30.75, speaker=2)]
    """
    with warnings.catch_warnings():  # SpeechBrain 1.1 has moved it, 1.0 knows the old place only
        warnings.simplefilter("ignore", DeprecationWarning)
        from speechbrain.processing import diarization

    n_windows = len(spans)
    if n_speakers is not None and not 1 <= n_speakers <= n_windows:
        raise ValueError(f"n_speakers must be in 1..{n_windows}, the windows, got {n_speakers}")
    if n_windows == 1 or n_speakers == 1:
        labels = np.zeros(n_windows, int)
    else:
        clustering = diarization.Spec_Clust_unorm(2, min(MAX_SPEAKERS, n_windows))
        state = np.random.get_state()
        np.random.seed(0)  # the k-means in it draws from numpy's own generator
        pruning = min(0.5, max(PRUNING, MIN_KEPT / n_windows))
        clustering.do_spec_clust(embeddings.numpy(), n_speakers, pruning)
        np.random.set_state(state)
        labels = clustering.labels_
    rows = [
        ["", start / SAMPLE_RATE, end / SAMPLE_RATE, label]
        for (start, end), label in zip(spans, labels.tolist(), strict=True)
    ]
    rows = diarization.merge_ssegs_same_speaker(rows)
    if len(rows) > 1:
        rows = diarization.distribute_overlap(rows)
    numbers: dict[int, int] = {}
    return [
        Turn(start, end, numbers.setdefault(label, len(numbers) + 1))
        for _, start, end, label in rows
    ]
