"""PLDA on prefixes: SpeechBrain's model, scored trial by trial."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from speechbrain.processing.PLDA_LDA import PLDA, StatObject_SB
from torch import Tensor

from speechbrain_mrl.evaluation.verification import TRIALS_PER_CHUNK, Trials

VARIANCE_FLOOR = 1e-6  # of the largest variance; a direction below it counts as constant


def plda_scores(
    embeddings: Tensor,
    trials: Trials,
    fit_embeddings: Tensor,
    fit_speakers: Sequence[str],
    mrl_dims: Sequence[int],
    rank: int = 100,
) -> dict[int, np.ndarray]:
    """Log-likelihood ratio of every trial by a PLDA of its own at every prefix.

    Prefixes are centred by the mean of the fit utterances and L2-normalised. SpeechBrain
    fits the model; its own scoring fills a matrix of all pairs of utterances, so the trials are
    scored here.

    Arguments
    ---------
    embeddings : torch.Tensor
        Of the trials' utterances, (N, D).
    trials : Trials
    fit_embeddings : torch.Tensor
        Of utterances of other speakers, (M, D), more utterances than the largest size.
    fit_speakers : sequence of str
        Speaker of each, (M,); two or more.
    mrl_dims : sequence of int
        Prefix sizes, ascending, 1..D.
    rank : int
        Dimensions in which speakers differ, at most; a size and the number of speakers limit it.

    Returns
    -------
    dict of int to numpy.ndarray
        Size -> scores, (n_trials,).

    Raises
    ------
    ValueError
        If there are too few utterances or speakers to fit.

    Reference
    ---------
    Garcia-Romero and Espy-Wilson, Analysis of i-vector length normalization in speaker recognition
    systems, Interspeech 2011.

    Example
    -------
    >>> import torch
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> speakers = np.repeat(["c", "d", "e"], 10)
    >>> fit = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).repeat_interleave(10, 0)
    >>> fit += 0.1 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    >>> embeddings = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, -1.0]])
    >>> target, impostor = plda_scores(embeddings, trials, fit, speakers, mrl_dims=[2])[2]
    >>> bool(target > 0 > impostor)
    True
    """
    speakers, indices = np.unique(np.asarray(fit_speakers), return_inverse=True)
    if len(fit_embeddings) != len(indices) or len(speakers) < 2:
        raise ValueError(
            "fit_speakers must name the speaker of each fit utterance, two or more in all; got "
            f"{len(speakers)} speakers in {len(indices)} names for {len(fit_embeddings)} utterances"
        )
    if len(fit_embeddings) <= max(mrl_dims):
        raise ValueError(
            f"PLDA of size {max(mrl_dims)} needs more utterances than that, "
            f"got {len(fit_embeddings)}"
        )
    scores = {}
    for size in mrl_dims:
        mean = fit_embeddings[:, :size].mean(0)
        fit, clips = (
            F.normalize(vectors[:, :size] - mean, dim=1).double().numpy()
            for vectors in (fit_embeddings, embeddings)
        )
        axes = _varying_axes(fit)
        model = _fit(fit @ axes, indices, min(rank, axes.shape[1], len(speakers) - 1))
        scores[size] = _score(model, clips @ axes, trials)
    return scores


def _varying_axes(vectors: np.ndarray) -> np.ndarray:
    """Orthonormal (d, varying) axes; dimensions that never vary would have no inverse variance."""
    variances, axes = np.linalg.eigh(np.cov(vectors, rowvar=False))
    return axes[:, variances > VARIANCE_FLOOR * variances.max()]


def _fit(vectors: np.ndarray, speakers: np.ndarray, rank: int) -> PLDA:
    names = np.array([f"{speaker}" for speaker in speakers], dtype=object)
    unused = np.full(len(vectors), None)
    model = PLDA(rank_f=rank)
    model.plda(
        StatObject_SB(
            modelset=names,
            segset=np.arange(len(vectors)).astype(object),
            start=unused,
            stop=unused,
            stat0=np.ones((len(vectors), 1)),
            stat1=vectors,
        )
    )
    return model


def _score(model: PLDA, vectors: np.ndarray, trials: Trials) -> np.ndarray:
    """Log p(both | one speaker) - log p(both | two speakers), for Gaussians of known covariance."""
    between = model.F @ model.F.T
    total = between + model.Sigma
    alone = np.linalg.inv(total)
    given = np.linalg.inv(total - between @ alone @ between)  # of one utterance, the other known
    own, cross = alone - given, alone @ between @ given
    constant = (np.linalg.slogdet(total)[1] + np.linalg.slogdet(given)[1]) / 2
    vectors = vectors - model.mean
    each = np.einsum("nd,nd->n", vectors @ own, vectors) / 2 + constant / 2
    rotated = vectors @ cross
    scores = np.empty(len(trials.labels))
    for start in range(0, len(scores), TRIALS_PER_CHUNK):
        chunk = slice(start, start + TRIALS_PER_CHUNK)
        enrol, test = trials.enrol[chunk], trials.test[chunk]
        pairs = np.einsum("nd,nd->n", rotated[enrol], vectors[test])
        scores[chunk] = pairs + each[enrol] + each[test]
    return scores
