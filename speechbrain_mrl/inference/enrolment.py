"""Enrols speakers by their embeddings, and scores voices against them: all scores are cosines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def enrol(
    speakers: Sequence[str], embeddings: Tensor, target_dim: int | None = None
) -> tuple[list[str], Tensor]:
    """One embedding per speaker: the mean of its L2-normalised utterances, L2-normalised.

    ``speakers`` and ``embeddings``, N and (N, D), belong to the utterances; ``target_dim`` is the
    prefix to keep, default D, which an index wants. Returns the C speakers in order of first
    appearance, and their voices, (C, target_dim).

    Example
    -------
    >>> enrol(["ann", "bob", "ann"], torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]))
    (['ann', 'bob'], tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]]))
    """
    ids, owners, clips = _clips(speakers, embeddings, target_dim)
    sums = clips.new_zeros(len(ids), clips.shape[1]).index_add_(0, owners, clips)
    return ids, F.normalize(sums, dim=1)


def score_speakers(
    embeddings: Tensor,
    speakers: Sequence[str],
    enrolled: Tensor,
    target_dim: int | None = None,
    clips: str = "average",
) -> tuple[list[str], Tensor]:
    """Cosine of every query with every enrolled speaker at one size, in one product.

    Returns the C speakers in order of first appearance, and the scores, (Q, C).

    Arguments
    ---------
    embeddings : torch.Tensor
        Queries, (Q, D).
    speakers, enrolled
        Speaker and embedding of each enrolled utterance, N and (N, D); or what ``enrol`` gave.
    target_dim : int, optional
        Prefix that is compared, 1..D. Default: D.
    clips : str
        Of a speaker with several: ``"average"`` is the score of their mean embedding, ``"mean"``
        the mean and ``"max"`` the best of the utterances' own scores.

    Example
    -------
    >>> clips = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> score_speakers(torch.tensor([[3.0, 4.0]]), ["ann", "ann", "bob"], clips, clips="max")
    (['ann', 'bob'], tensor([[ 0.8000, -0.8000]]))
    """
    if clips not in ("average", "mean", "max"):
        raise ValueError(f"clips must be 'average', 'mean' or 'max', got {clips!r}")
    ids, owners, voices = _clips(speakers, enrolled, target_dim)
    queries = unit_prefixes(check_embeddings(embeddings, enrolled.shape[1]), target_dim)
    if clips == "average":
        voices = enrol(speakers, voices)[1]
    scores = torch.from_numpy(queries) @ voices.T
    if clips != "average":
        how, empty = {"max": "amax"}.get(clips, clips), scores.new_zeros(len(scores), len(ids))
        scores = empty.scatter_reduce(1, owners.expand_as(scores), scores, how, include_self=False)
    return ids, scores


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """ValueError unless the named value lies in low..high."""
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must lie in {low}..{'' if high is None else high}, got {value}")


def check_ids(ids: Sequence[str], known: Container[str] | None = None) -> list[str]:
    """The ids as a list, once they are different strings and all ``known``."""
    if not isinstance(ids, (list, tuple)) or not all(isinstance(name, str) for name in ids):
        raise TypeError(f"ids must be a list of str, got {ids!r}")
    ids = list(ids)
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise ValueError(f"ids must differ within a call, got {name!r} {times} times")
    for name in ids:
        if known is not None and name not in known:
            raise ValueError(f"ids must be in the index, {name!r} is not")
    return ids


def check_embeddings(embeddings: Tensor, dim: int, n: int | None = None) -> np.ndarray:
    """The embeddings as float32, once they are finite and (n, dim)."""
    matrix = torch.as_tensor(embeddings).detach().cpu().float().numpy()
    if matrix.ndim != 2 or matrix.shape[1] != dim or n not in (None, len(matrix)):
        raise ValueError(f"embeddings must be ({n or 'N'}, {dim}), got {matrix.shape}")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise ValueError(f"embeddings must be finite, row {finite.argmin()} is not")
    return matrix


def unit_prefixes(embeddings: np.ndarray, target_dim: int | None = None) -> np.ndarray:
    """Prefixes, truncated first and normalised after, float32; all zero stays all zero."""
    prefixes = embeddings[:, :target_dim].astype(np.float32)
    return F.normalize(torch.from_numpy(prefixes), dim=1).numpy()


def _clips(
    speakers: Sequence[str], embeddings: Tensor, target_dim: int | None
) -> tuple[list[str], Tensor, Tensor]:
    size = embeddings.shape[-1]
    check_range("target_dim", size if target_dim is None else target_dim, 1, size)
    clips = unit_prefixes(check_embeddings(embeddings, size, len(speakers)), target_dim)
    index: dict[str, int] = {}
    owners = [index.setdefault(speaker, len(index)) for speaker in speakers]
    return list(index), torch.tensor(owners, dtype=torch.long), torch.from_numpy(clips)
