"""Slow, obvious error rates to compare with."""

import numpy as np
from scipy.optimize import brentq
from sklearn.metrics import roc_curve


def reference_eer(scores, labels):
    """Where 1 - TPR meets FPR on scikit-learn's ROC polyline, walked by arc length."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    walk = np.arange(len(fpr))
    crossing = brentq(
        lambda t: np.interp(t, walk, fpr) - (1 - np.interp(t, walk, tpr)), 0, walk[-1], xtol=1e-12
    )
    return np.interp(crossing, walk, fpr)


def reference_min_dcf(scores, labels, p_target, c_miss, c_fa):
    """Every threshold tried one by one."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    costs = []
    for threshold in [np.inf, *scores]:
        miss = np.mean(scores[labels == 1] < threshold)
        false_accept = np.mean(scores[labels == 0] >= threshold)
        costs.append(c_miss * p_target * miss + c_fa * (1 - p_target) * false_accept)
    return min(costs) / min(c_miss * p_target, c_fa * (1 - p_target))


def reference_act_dcf(llrs, labels, p_target, c_miss, c_fa):
    """Trial by trial, whichever decision has the lower expected cost."""
    misses, false_accepts = [], []
    for llr, label in zip(llrs, labels):
        odds = p_target / (1 - p_target) * np.exp(float(llr))
        accept = c_miss * odds >= c_fa
        (misses if label else false_accepts).append(not accept if label else accept)
    cost = c_miss * p_target * np.mean(misses) + c_fa * (1 - p_target) * np.mean(false_accepts)
    return cost / min(c_miss * p_target, c_fa * (1 - p_target))


def reference_cllr(llrs, labels):
    """Mean bits of surprise of each kind of trial, at even odds."""
    costs = {0: [], 1: []}
    for llr, label in zip(llrs, labels):
        posterior = 1 / (1 + np.exp(-float(llr)))
        costs[int(label)].append(-np.log2(posterior if label else 1 - posterior))
    return (np.mean(costs[0]) + np.mean(costs[1])) / 2
