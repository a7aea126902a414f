"""Makes scores comparable: normalised by a cohort, calibrated to log-likelihood ratios.

``s_norm`` uses each utterance's scores against a cohort of impostors. ``Calibration`` is fitted on
one trial list and applied to another. Both work on every size's scores.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from speechbrain_mrl.evaluation.metrics import Ranking
from speechbrain_mrl.evaluation.verification import Trials
from speechbrain_mrl.prefixes import prefix_cosines
from speechbrain_mrl.utils import read_json, replacing

CLIPS_PER_CHUNK = 1024
# Weight of the squared coefficients beside the mean loss: without effect on any list with errors,
# it keeps the scale finite on one that the scores separate perfectly.
RIDGE = 1e-9


def s_norm(
    scores: Mapping[int, np.ndarray],
    embeddings: Tensor,
    trials: Trials,
    cohort: Tensor,
    top: int | None = None,
) -> dict[int, np.ndarray]:
    """Symmetric score normalisation: each score relative to cohort scores.

    The mean of (score - mean) / deviation over both utterances of a trial, with mean and deviation
    of the utterance's cosines with the cohort. One pass over the dimensions serves all sizes.

    Arguments
    ---------
    scores : mapping of int to array
        Size -> cosines, (n_trials,), from ``score_trials``.
    embeddings : torch.Tensor
        Of the trials' utterances, (N, D).
    trials : Trials
    cohort : torch.Tensor
        Embeddings of M utterances, (M, D), of speakers that no trial has.
    top : int, optional
        Adaptive: only each utterance's ``top`` highest cosines count, 2..M. None: all.

    Returns
    -------
    dict of int to numpy.ndarray
        Size -> normalised scores, (n_trials,).

    Raises
    ------
    ValueError
        If ``top`` is outside 2..M, the sizes of embeddings differ, or an utterance has the
        same score with its whole cohort.

    Reference
    ---------
    Matějka et al., Analysis of score normalization in multilingual speaker recognition,
    Interspeech 2017 (there adaptive S-norm 1).

    Example
    -------
    >>> import torch
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> cohort = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    >>> scores = {2: np.array([1.0, 0.0])}
    >>> s_norm(scores, embeddings, trials, cohort)[2].round(3).tolist()
    [3.0, -7.0]
    """
    if embeddings.shape[1] != cohort.shape[1]:
        raise ValueError(
            f"embeddings and cohort must be of one size, got {embeddings.shape[1]} and "
            f"{cohort.shape[1]}"
        )
    top = len(cohort) if top is None else top
    if not 2 <= top <= len(cohort):
        raise ValueError(f"top must be in 2..{len(cohort)}, the size of the cohort, got {top}")
    sizes = list(scores)
    means = np.empty((len(sizes), len(embeddings)))
    deviations = np.empty_like(means)
    for start in range(0, len(embeddings), CLIPS_PER_CHUNK):
        chunk = embeddings[start : start + CLIPS_PER_CHUNK]
        inside = slice(start, start + len(chunk))
        for i, cosines in enumerate(prefix_cosines(chunk, cohort, sizes).values()):
            closest = np.partition(cosines.cpu().numpy(), -top, axis=1)[:, -top:]
            means[i, inside], deviations[i, inside] = closest.mean(1), closest.std(1)
    flat = (deviations < 1e-6).any(axis=0)
    if flat.any():
        raise ValueError(
            f"utterance {trials.clip_ids[flat.argmax()]!r} has the same score with the whole "
            "cohort; a cohort needs different speakers"
        )
    return {
        size: sum((scores[size] - mean[side]) / deviation[side] for side in _sides(trials)) / 2
        for size, mean, deviation in zip(sizes, means, deviations)
    }


def _sides(trials: Trials) -> tuple[np.ndarray, np.ndarray]:
    return trials.enrol, trials.test


def log_durations(trials: Trials, seconds: Mapping[str, float]) -> np.ndarray:
    """Quality measures of every trial: log seconds of its shorter and longer utterance, (n_trials, 2).

    ``seconds`` has the length of every utterance, above 0, by its id.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> log_durations(trials, {"a/1": 1.0, "a/2": 1.0, "b/1": 1.0}).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    trials.check_clips(seconds)
    logs = np.log([seconds[clip_id] for clip_id in trials.clip_ids])
    return np.sort(np.stack([logs[side] for side in _sides(trials)], axis=1), axis=1)


@dataclass(frozen=True)
class Calibration:
    """Turns scores of one size into log-likelihood ratios: offset + scale * score + quality terms.

    Arguments
    ---------
    offset, scale : float
    quality : tuple of float
        A coefficient for each quality measure; none without them.
    bounds : tuple of (float, float)
        Lowest and highest of each quality measure where it was fitted; a trial outside counts as
        one at the bound. None: no bounds.

    Example
    -------
    >>> Calibration(offset=-2.0, scale=10.0)(np.array([0.3]))
    array([1.])
    """

    offset: float
    scale: float
    quality: tuple[float, ...] = ()
    bounds: tuple[tuple[float, float], ...] = ()

    @classmethod
    def fit(
        cls,
        scores: npt.ArrayLike,
        labels: npt.ArrayLike,
        quality: np.ndarray | None = None,
        p_target: float = 0.01,
    ) -> Calibration:
        """Logistic regression on one list's trials.

        Arguments
        ---------
        scores, labels : array
            (n_trials,), see ``speechbrain_mrl.evaluation.metrics``.
        quality : array, optional
            Quality measures, (n_trials, n_measures), such as ``log_durations``.
        p_target : float
            Prior probability of a target trial, inside 0..1, for which the ratios will be best.
            The list's own share of target trials does not matter.

        Example
        -------
        >>> fitted = Calibration.fit([0.9, 0.2, 0.5, 0.1], [1, 1, 0, 0], p_target=0.5)
        >>> fitted.scale > 0
        True
        """
        if not 0 < p_target < 1:
            raise ValueError(f"p_target must lie inside 0..1, got {p_target}")
        ranking = Ranking(scores, labels)  # checks them
        is_target = np.asarray(labels) == 1
        n_targets = is_target.sum()
        features = _features(scores, quality)
        center, spread = features.mean(0), features.std(0)
        constant = np.ptp(features, axis=0) == 0
        center[constant], spread[constant] = features[0, constant], 1.0  # gets no coefficient
        n_impostors = len(ranking.order) - n_targets
        weights = np.where(is_target, p_target / n_targets, (1 - p_target) / n_impostors)
        from sklearn.linear_model import LogisticRegression  # a second, which reports need not pay

        model = LogisticRegression(C=1 / RIDGE, solver="newton-cholesky", tol=1e-9, max_iter=1000)
        model.fit((features - center) / spread, is_target, sample_weight=weights)
        coefficients = model.coef_[0] / spread
        prior_log_odds = np.log(p_target) - np.log1p(-p_target)
        offset = model.intercept_[0] - coefficients @ center - prior_log_odds
        scale, *terms = coefficients.tolist()
        _, *bounds = zip(features.min(0).tolist(), features.max(0).tolist())
        return cls(float(offset), scale, tuple(terms), tuple(bounds))

    def __call__(self, scores: npt.ArrayLike, quality: np.ndarray | None = None) -> np.ndarray:
        """Log-likelihood ratios (natural logarithm) of other trials, (n_trials,)."""
        features = _features(scores, quality)
        if features.shape[1] != 1 + len(self.quality):
            raise ValueError(
                f"this calibration was fitted with {len(self.quality)} quality measures, "
                f"got {features.shape[1] - 1}"
            )
        if self.bounds:
            lowest, highest = np.transpose(self.bounds)
            features[:, 1:] = features[:, 1:].clip(lowest, highest)
        return self.offset + features @ np.array([self.scale, *self.quality])


def _features(scores: npt.ArrayLike, quality: np.ndarray | None) -> np.ndarray:
    columns = [np.asarray(scores, dtype=float)]
    return np.column_stack(columns if quality is None else [*columns, quality])


def write_calibrations(
    calibrations: Mapping[int, Calibration], path: str | os.PathLike[str], scores: str = "cosine"
) -> None:
    """Write every size's calibration as JSON, so that it can travel with a model.

    ``scores`` says what was calibrated: "cosine", "as_norm", …

    Example
    -------
    >>> path = getfixture("tmp_path") / "calibration.json"
    >>> write_calibrations({64: Calibration(-2.0, 10.0)}, path)
    >>> read_calibrations(path)
    ({64: Calibration(offset=-2.0, scale=10.0, quality=(), bounds=())}, 'cosine')
    """
    dims = {str(size): asdict(calibration) for size, calibration in calibrations.items()}
    text = json.dumps({"scores": scores, "dims": dims}, indent=2, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_calibrations(path: str | os.PathLike[str]) -> tuple[dict[int, Calibration], str]:
    """What ``write_calibrations`` wrote: the calibrations by size, and what they calibrate."""
    found = read_json(path)
    try:
        calibrations = {
            int(size): Calibration(
                one["offset"],
                one["scale"],
                tuple(one["quality"]),
                tuple(map(tuple, one.get("bounds", []))),  # files of before have none
            )
            for size, one in found["dims"].items()
        }
        for size, one in calibrations.items():
            _check_values(size, one)
        return calibrations, found["scores"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no calibration that verify.py wrote: {reason}") from None


def _check_values(size: int, fitted: Calibration) -> None:
    numbers = [fitted.offset, fitted.scale, *fitted.quality, *itertools.chain(*fitted.bounds)]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"size {size} has {number!r}, which is no number")
        if not math.isfinite(number):
            raise ValueError(f"size {size} has {number}, which is not finite")
    if not fitted.scale > 0:
        raise ValueError(f"size {size} has the scale {fitted.scale}, it must be positive")
    if any(len(bound) != 2 or bound[0] > bound[1] for bound in fitted.bounds):
        raise ValueError(f"size {size} has bounds that are no ranges: {fitted.bounds}")


def check_calibration(path: str | os.PathLike[str], mrl_dims: Sequence[int]) -> None:
    """Raise unless the calibrations can travel with a model of ``mrl_dims``.

    Scores that were centred or normalised by a cohort cannot: the model has only its cosines.

    Raises
    ------
    ValueError
        If they are not of cosines, lack one of the sizes, or hold values that no fit gives.

    Example
    -------
    >>> path = getfixture("tmp_path") / "calibration.json"
    >>> write_calibrations({64: Calibration(-2.0, 10.0)}, path, scores="as_norm")
    >>> check_calibration(path, [64])
    Traceback (most recent call last):
    ...
    ValueError: ... is of as_norm scores; a model travels with one of cosines, ...
    """
    calibrations, scores = read_calibrations(path)
    if scores != "cosine":
        raise ValueError(
            f"{path} is of {scores} scores; a model travels with one of cosines, "
            "fitted without domain and cohort"
        )
    if missing := sorted(set(mrl_dims) - set(calibrations)):
        raise ValueError(f"{path} has no calibration of the sizes {missing}; fit it on this model")
