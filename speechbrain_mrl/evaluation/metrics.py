"""Error rates and detection costs of verification scores, all out of one sort.

A trial is accepted when its score is at or above the threshold. Rates are fractions, 0..1.
Arguments ``scores`` and ``labels`` are (n_trials,): higher means more similar. Labels are 1 or
True for target trials, 0 or False for impostor trials, and both must occur. NaN is refused.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

P_TARGETS = {"": 0.01, "_0.05": 0.05}  # suffix of a cost's name -> prior of a target trial
FALSE_ACCEPT_RATES = (0.01, 0.001, 0.0001)
# An observed rate is within 30 % of the true one, at 90 % confidence, from 30 errors on:
# Doddington et al., The NIST speaker recognition evaluation, Speech Communication 31, 2000.
MIN_FALSE_ACCEPTS = 30


class Ranking:
    """Trials sorted once, highest score first; error rates for any weights then cost one pass.

    Example
    -------
    >>> ranking = Ranking([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    >>> far, frr = ranking.rates()
    >>> ranking.thresholds.tolist(), frr.tolist()
    ([inf, 0.9, 0.6, 0.4, 0.1], [1.0, 0.5, 0.5, 0.0, 0.0])
    """

    def __init__(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        scores, labels = np.asarray(scores), np.asarray(labels)
        if scores.ndim != 1 or scores.shape != labels.shape:
            raise ValueError(
                f"scores and labels must be (n_trials,) both, got {scores.shape} and {labels.shape}"
            )
        if np.isnan(scores).any():
            raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
        n_targets, n_impostors = (labels == 1).sum(), (labels == 0).sum()
        if not n_targets or not n_impostors or n_targets + n_impostors < len(labels):
            raise ValueError(
                "labels must be 1 (target) or 0 (impostor), with some of each; "
                f"got {n_targets} ones, {n_impostors} zeros among {len(labels)}"
            )
        self.order = np.argsort(scores)[::-1]
        self.is_target = labels[self.order] == 1
        self.scores = scores[self.order]
        # thresholds go from infinity (accept nothing) to the lowest score; ties fall together
        changes = np.flatnonzero(self.scores[1:] != self.scores[:-1])
        self.ends = np.append(changes, len(scores) - 1)
        self.thresholds = np.append(np.inf, self.scores[self.ends])

    def rates(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(far, frr) at each threshold; ``weights`` (n_trials,) count trials more than once."""
        weights = np.ones(len(self.order)) if weights is None else weights[self.order]
        hits = np.cumsum(weights * self.is_target)[self.ends]
        false_accepts = np.cumsum(weights)[self.ends] - hits
        far = false_accepts / false_accepts[-1]
        frr = (hits[-1] - hits) / hits[-1]
        return np.append(0.0, far), np.append(1.0, frr)

    def eer(self) -> tuple[float, float]:
        """Equal error rate and its threshold; see the function ``eer``."""
        rate, nearest = eer_of_rates(*self.rates())
        return rate, float(self.thresholds[nearest])

    def far_thresholds(self) -> dict[str, float]:
        """Lowest threshold whose FAR is at most 1 %, 0.1 % and 0.01 %: ``{"far_0.01": ...}``.

        A rate is left out when the list has too few impostor trials to tell it.
        """
        far, _ = self.rates()
        n_impostors = np.sum(~self.is_target)
        found = {}
        for rate in FALSE_ACCEPT_RATES:
            threshold = self.thresholds[np.searchsorted(far, rate, side="right") - 1]
            if rate * n_impostors >= MIN_FALSE_ACCEPTS and np.isfinite(threshold):
                found[f"far_{rate:g}"] = float(threshold)
        return found

    def summary(
        self, weights: np.ndarray | None = None, calibrated: bool = False
    ) -> dict[str, float]:
        """EER and minDCF; if the scores are log-likelihood ratios, actual DCF and Cllr too.

        Costs are named ``min_dcf`` at a prior of 0.01 and ``min_dcf_0.05`` at 0.05.
        """
        far, frr = self.rates(weights)
        values = {"eer": eer_of_rates(far, frr)[0]}
        for suffix, p_target in P_TARGETS.items():
            values[f"min_dcf{suffix}"] = float(detection_costs(far, frr, p_target).min())
        if calibrated:
            for suffix, p_target in P_TARGETS.items():
                values[f"act_dcf{suffix}"] = self._act_dcf(far, frr, p_target)
            values["cllr"] = self._cllr(weights)
        return values

    def _act_dcf(
        self, far: Any, frr: Any, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0
    ) -> float:
        bayes = np.log(c_fa * (1 - p_target)) - np.log(c_miss * p_target)
        at = np.count_nonzero(self.thresholds >= bayes) - 1
        return float(detection_costs(far[at], frr[at], p_target, c_miss, c_fa))

    def _cllr(self, weights: np.ndarray | None) -> float:
        weights = np.ones(len(self.order)) if weights is None else weights[self.order]
        llrs = self.scores.astype(float)
        bits = np.logaddexp(0, np.where(self.is_target, -llrs, llrs)) / np.log(2)
        targets, impostors = weights * self.is_target, weights * ~self.is_target
        return float((targets @ bits / targets.sum() + impostors @ bits / impostors.sum()) / 2)


def eer_of_rates(far: np.ndarray, frr: np.ndarray) -> tuple[float, int]:
    """EER on the polyline through the points, and the index of the point next to it."""
    gap = far - frr  # never falls, from -1 to 1
    after = int(np.searchsorted(gap, 0.0))
    before = after - 1
    step = -gap[before] / (gap[after] - gap[before])
    nearest = before if -gap[before] < gap[after] else after
    return float(far[before] + step * (far[after] - far[before])), nearest


def detection_costs(
    far: Any, frr: Any, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0
) -> Any:
    """Detection cost at each point, over the cost of the better blind decision."""
    miss_cost, fa_cost = c_miss * p_target, c_fa * (1 - p_target)
    return (miss_cost * frr + fa_cost * far) / min(miss_cost, fa_cost)


def _check_costs(p_target: float, c_miss: float, c_fa: float) -> None:
    if not 0 < p_target < 1 or c_miss <= 0 or c_fa <= 0:
        raise ValueError(
            "p_target must lie inside 0..1, c_miss and c_fa above 0; "
            f"got {p_target}, {c_miss}, {c_fa}"
        )


def eer(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
    """Equal error rate, where the polyline through the ROC's points has FAR = FRR; and a threshold.

    Returns
    -------
    eer : float
        Fraction, 0..1.
    threshold : float
        Of all scores the one whose FAR and FRR lie closest together; accept at or above it.

    Example
    -------
    >>> eer([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    (0.5, 0.6)
    """
    return Ranking(scores, labels).eer()


def min_dcf(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1,
    c_fa: float = 1,
) -> float:
    """Smallest detection cost over all thresholds; 1 is the cost of the better blind decision.

    Arguments
    ---------
    scores, labels : array
        (n_trials,).
    p_target : float
        Prior probability of a target trial, inside 0..1.
    c_miss, c_fa : float
        Cost of a false reject and of a false accept, positive.

    Example
    -------
    >>> min_dcf([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    0.5
    """
    _check_costs(p_target, c_miss, c_fa)
    return float(detection_costs(*Ranking(scores, labels).rates(), p_target, c_miss, c_fa).min())


def act_dcf(
    llrs: npt.ArrayLike,
    labels: npt.ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1,
    c_fa: float = 1,
) -> float:
    """Detection cost of deciding at the Bayes threshold, which only calibrated scores deserve.

    Arguments
    ---------
    llrs : array
        Natural-log likelihood ratios of target against impostor, (n_trials,).
    labels, p_target, c_miss, c_fa
        See ``min_dcf``.

    Example
    -------
    >>> act_dcf([6.0, 4.0, 0.1, -3.0], [1, 1, 0, 0])  # the threshold is log(99) = 4.6
    0.5
    """
    _check_costs(p_target, c_miss, c_fa)
    ranking = Ranking(llrs, labels)
    return ranking._act_dcf(*ranking.rates(), p_target, c_miss, c_fa)


def cllr(llrs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Cost of the log-likelihood ratio in bits: 0 is perfect, 1 says nothing, more misleads.

    Arguments
    ---------
    llrs : array
        Natural-log likelihood ratios of target against impostor, (n_trials,).
    labels : array
        (n_trials,).

    Reference
    ---------
    Brümmer and du Preez, Application-independent evaluation of speaker detection, Computer Speech
    and Language 20, 2006.

    Example
    -------
    >>> cllr([0.0, 0.0], [1, 0])
    1.0
    """
    return Ranking(llrs, labels)._cllr(None)
