"""What a student is measured against: its own start, its teachers truncated, all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from speechbrain_mrl.evaluation.verification import (
    Trials,
    compare,
    evaluate_scores,
    score_trials,
)
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.targets import EnsembleRotation

Scores = dict[int, np.ndarray]  # size -> scores, (n_trials,)


def evaluate_student(
    student: Tensor,
    trials: Trials,
    mrl_dims: Sequence[int],
    start: Tensor | None = None,
    teachers: Mapping[str, Tensor] | None = None,
    fit_embeddings: Mapping[str, Tensor] | None = None,
    n_bootstrap: int = 0,
    fit_labels: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """A report's ``"dims"``, ``"baselines"`` and ``"gain"``: a student, and what it had to surpass.

    Arguments
    ---------
    student : torch.Tensor
        Its embeddings of the trials' utterances, (N, D).
    trials : Trials
    mrl_dims : sequence of int
        Prefix sizes, ascending, 1..D.
    start : torch.Tensor, optional
        Embeddings by the student as it was before its first step, (N, D_s).
    teachers : mapping of str to torch.Tensor, optional
        Embeddings by each teacher, (N, D_t).
    fit_embeddings : mapping of str to torch.Tensor, optional
        The teachers' embeddings of training utterances, never the trials', (M, D_t); means and
        rotations come from them.
    n_bootstrap : int
        Draws of speakers for the 95 % intervals; 0: none.
    fit_labels : torch.Tensor, optional
        The speakers, as numbers, of the training utterances, (M,), for LDA beside PCA.

    Returns
    -------
    dict
        ``baselines`` has ``teachers``, each at its full size ``dim``; ``teacher``, the name of the
        one with the lowest EER; of that one ``naive_truncation`` and ``pca_truncation``;
        ``ensemble``, the principal components of all teachers together; and ``start``. With
        ``fit_labels`` there are ``lda_truncation`` and ``ensemble_lda`` too. ``gain`` is the
        student's EER minus that of each row but ``naive_truncation``, on the same draws of speakers.
        A size that a row lacks is compared with its largest.

    Example
    -------
    >>> import torch
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> found = evaluate_student(student, trials, [2], start=student[[0, 2, 1]])
    >>> found["baselines"]["start"]["2"]["eer"], found["gain"]["start"]
    (1.0, {'2': {'eer': -1.0}})
    """
    teachers, fit_embeddings = teachers or {}, fit_embeddings or {}
    dims = score_trials(student, trials, mrl_dims)
    full = {name: score_trials(x, trials, [x.shape[1]]) for name, x in teachers.items()}
    baselines: dict[str, Any] = {"teacher": None, "teachers": {}}
    for name, scores in full.items():
        ((size, result),) = evaluate_scores(scores, trials, n_bootstrap).items()
        baselines["teachers"][name] = {"dim": int(size), **result}
    rows: dict[str, Scores] = {}
    if start is not None:
        rows["start"] = _prefix_scores(start, trials, mrl_dims)
    if teachers:
        best = min(teachers, key=lambda name: baselines["teachers"][name]["eer"])
        baselines["teacher"] = best
        rows |= truncation_scores(
            teachers[best], fit_embeddings[best], trials, mrl_dims, fit_labels
        )
        numbered, fit = _numbered(teachers), _numbered(fit_embeddings)
        fits = {"ensemble": None} | ({} if fit_labels is None else {"ensemble_lda": fit_labels})
        for name, of_each in fits.items():
            ensemble = EnsembleRotation(max(mrl_dims)).fit(fit, of_each)
            rows[name] = score_trials(ensemble(numbered), trials, mrl_dims)
    for name, scores in rows.items():
        baselines[name] = evaluate_scores(scores, trials, n_bootstrap) if scores else {}
    return {
        "dims": evaluate_scores(dims, trials, n_bootstrap),
        "baselines": baselines,
        "gain": {
            name: _gain(dims, rows[name], trials, n_bootstrap)
            for name in rows
            if rows[name] and name != "naive_truncation"
        },
    }


def _prefix_scores(embeddings: Tensor, trials: Trials, mrl_dims: Sequence[int]) -> Scores:
    """Scores at those sizes that the embeddings have."""
    sizes = [size for size in mrl_dims if size <= embeddings.shape[1]]
    return score_trials(embeddings, trials, sizes) if sizes else {}


def _numbered(teachers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By number: a file's name may hold what a buffer's may not."""
    return {str(i): teachers[name] for i, name in enumerate(sorted(teachers))}


def _gain(student: Scores, other: Scores, trials: Trials, n_bootstrap: int) -> dict[str, Any]:
    names = {"difference": "eer", "difference_ci": "eer_ci"}
    found = compare(student, other, trials, n_bootstrap)
    return {
        size: {names[key]: value for key, value in result.items() if key in names}
        for size, result in found.items()
    }


def truncation_scores(
    teacher: Tensor,
    fit_embeddings: Tensor,
    trials: Trials,
    mrl_dims: Sequence[int],
    fit_labels: Tensor | None = None,
) -> dict[str, Scores]:
    """Scores of a teacher's own embedding, truncated as it is, after PCA and after LDA.

    Arguments
    ---------
    teacher : torch.Tensor
        Embeddings of the trials' utterances, (N, D_t).
    fit_embeddings : torch.Tensor
        Of training utterances, never the trials', (M, D_t); mean and rotations come from them.
    trials, mrl_dims
        See ``score_trials``; sizes above D_t are left out.
    fit_labels : torch.Tensor, optional
        The speakers, as numbers, of the training utterances, (M,), for ``lda_truncation``.

    Returns
    -------
    dict
        ``{"naive_truncation": {64: (n_trials,)}, "pca_truncation": {...}}``.

    Example
    -------
    >>> import torch
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> teacher = torch.tensor([[0.1, 1.0], [0.1, 1.0], [0.1, -1.0]])  # 2 separates speakers
    >>> found = truncation_scores(teacher, teacher, trials, mrl_dims=[1])
    >>> {name: scores[1].round(2).tolist() for name, scores in found.items()}
    {'naive_truncation': [1.0, 1.0], 'pca_truncation': [1.0, -1.0]}
    """
    rows = {"naive_truncation": _prefix_scores(teacher, trials, mrl_dims)}
    sizes = list(rows["naive_truncation"])
    fits = {"pca_truncation": None} | ({} if fit_labels is None else {"lda_truncation": fit_labels})
    for name, labels in fits.items():
        rows[name] = {}
        if sizes:
            rotated = matryoshka_rotation(fit_embeddings, sizes, labels)(teacher.detach())
            rows[name] = score_trials(rotated, trials, sizes)
    return rows
