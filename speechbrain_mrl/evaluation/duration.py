"""Error rates by utterance length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from speechbrain_mrl.evaluation.metrics import Ranking, eer_of_rates
from speechbrain_mrl.evaluation.verification import Trials, bootstrap, interval


def eer_by_duration(
    scores: Mapping[int, np.ndarray],
    trials: Trials,
    seconds: Mapping[str, float],
    n_bins: int = 5,
    n_bootstrap: int = 0,
) -> list[dict[str, Any]]:
    """EER of the trials whose shorter utterance is short, longer, and so on.

    Arguments
    ---------
    scores : mapping of int to array
        Size -> scores, (n_trials,).
    trials : Trials
    seconds : mapping of str to float
        Length of every utterance, by its id.
    n_bins : int
        Bins at most. Each begins at a multiple of half a second, next to where the target trials
        would be shared out evenly.
    n_bootstrap : int
        See ``evaluate_scores``; 0 gives no intervals.

    Returns
    -------
    list of dict
        ``{"seconds": [low, high], "target": ..., "impostor": ..., "eer": {"64": ...}}``, the
        shortest first, from the bin's lowest to its highest, with ``"eer_ci": {"64": [low, high]}``
        if wanted. Without trials of both kinds ``eer`` is empty.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> eer_by_duration({2: np.array([0.9, 0.1])}, trials, {"a/1": 2.0, "a/2": 4.0, "b/1": 3.0})
    [{'seconds': [2.0, 2.0], 'target': 1, 'impostor': 1, 'eer': {'2': 0.0}}]
    """
    trials.check_clips(seconds)
    lengths = np.array([seconds[clip_id] for clip_id in trials.clip_ids])
    shorter = np.minimum(lengths[trials.enrol], lengths[trials.test])
    parts = np.quantile(shorter[trials.labels], np.arange(1, n_bins) / n_bins)
    bins = np.searchsorted(np.unique(np.round(2 * parts) / 2), shorter, side="right")
    results, members, rankings = [], [], {}
    for index, chosen in enumerate(np.unique(bins)):
        inside = np.flatnonzero(bins == chosen)
        labels = trials.labels[inside]
        members.append(inside)
        if labels.any() and not labels.all():
            for size, found in scores.items():
                rankings[index, str(size)] = Ranking(np.asarray(found)[inside], labels)
        results.append(
            {
                "seconds": [float(shorter[inside].min()), float(shorter[inside].max())],
                "target": int(labels.sum()),
                "impostor": int((~labels).sum()),
                "eer": {size: r.eer()[0] for (i, size), r in rankings.items() if i == index},
            }
        )

    def eers(weights: np.ndarray) -> dict[tuple[int, str], float]:
        found = {}
        for (index, size), ranking in rankings.items():
            drawn, labels = weights[members[index]], trials.labels[members[index]]
            if drawn[labels].any() and drawn[~labels].any():
                found[index, size] = eer_of_rates(*ranking.rates(drawn))[0]
        return found

    if n_bootstrap and rankings:
        for (index, size), values in bootstrap(trials, n_bootstrap, eers).items():
            results[index].setdefault("eer_ci", {})[size] = interval(values)
    return results
