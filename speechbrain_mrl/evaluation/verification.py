"""Speaker verification at every prefix: trial lists, scores, error rates with their intervals.

Every utterance is embedded once; all sizes are then scored out of one pass over the dimensions.
A trial is accepted when its score is at or above the threshold. Rates are fractions, 0..1.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechbrain_mrl.dataio.clips import speaker_of
from speechbrain_mrl.dataio.lists import read_lines
from speechbrain_mrl.evaluation.metrics import Ranking, eer_of_rates
from speechbrain_mrl.prefixes import check_mrl_dims, prefix_norms

TRIALS_PER_CHUNK = 1024  # their products stay in a core's cache
BOOTSTRAP_SEED = 1986


@dataclass(frozen=True)
class Trials:
    """A trial list as indices into its unique utterances: 580,000 trials take 5 MB.

    Arguments
    ---------
    clip_ids : list of str
        Unique utterances, in order of first appearance, (N,).
    enrol, test : numpy.ndarray
        int32 indices into ``clip_ids``, (n_trials,). Trial i is line i + 1 of its list.
    labels : numpy.ndarray
        bool, (n_trials,). True for a target trial (same speaker).
    source : str
        The list's name, for error messages.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> trials.clip_ids, trials.test.tolist(), trials.labels.tolist()
    (['a/1', 'a/2', 'b/1'], [1, 2], [True, False])
    >>> trials.stack({"a/1": torch.ones(2), "a/2": torch.ones(2), "b/1": torch.zeros(2)}).shape
    torch.Size([3, 2])
    """

    clip_ids: list[str]
    enrol: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    source: str = "trials"

    @classmethod
    def parse(cls, lines: Iterable[str], source: str = "trials") -> Trials:
        """Trials from lines of ``label enrol test``; see ``read_trials``."""
        index: dict[str, int] = {}
        enrol, test, labels = [], [], []
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if len(fields) != 3 or fields[0] not in ("0", "1"):
                raise ValueError(
                    f"{source}, line {number}: expected '1 enrol test' or '0 enrol test', "
                    f"got {line!r}"
                )
            labels.append(fields[0] == "1")
            enrol.append(index.setdefault(fields[1], len(index)))
            test.append(index.setdefault(fields[2], len(index)))
        if len(set(labels)) < 2:
            raise ValueError(
                f"{source}, lines 1 to {len(labels)}: {sum(labels)} target trials (label 1) among "
                f"{len(labels)}; error rates need target and impostor trials"
            )
        pairs = np.array([enrol, test], dtype=np.int32)
        return cls(list(index), pairs[0], pairs[1], np.array(labels), source)

    def check_clips(self, available: Container[str]) -> None:
        """Raise ValueError, naming the first line, if an utterance is not in ``available``."""
        missing = np.array([clip_id not in available for clip_id in self.clip_ids])
        if not missing.any():
            return
        affected = missing[self.enrol] | missing[self.test]
        first = int(affected.argmax())
        clip = self.enrol[first] if missing[self.enrol[first]] else self.test[first]
        raise ValueError(
            f"{self.source}, line {first + 1}: utterance {self.clip_ids[clip]!r} is missing; "
            f"{missing.sum()} of {len(missing)} utterances are, which {affected.sum()} trials need"
        )

    def stack(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (D,) by utterance id as the (N, D) matrix that scoring needs."""
        self.check_clips(embeddings)
        return torch.stack([embeddings[clip_id] for clip_id in self.clip_ids])


def read_trials(path: str | os.PathLike[str]) -> Trials:
    """Read a list of ``label enrol test`` lines: VoxCeleb1-O, -E, -H, VoxSRC, or one of your own.

    A broken line, an empty list or one with a single label (1 same speaker, 0 not) is a ValueError.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.txt"
    >>> _ = path.write_text("1 a/1.wav a/2.wav\\n0 a/1.wav b/1.wav\\n")
    >>> read_trials(path).clip_ids
    ['a/1.wav', 'a/2.wav', 'b/1.wav']
    """
    return Trials.parse(read_lines(path), source=str(path))


def score_trials(
    embeddings: Tensor, trials: Trials, mrl_dims: Sequence[int]
) -> dict[int, np.ndarray]:
    """Cosine of every trial at every prefix, out of one pass over the dimensions.

    Arguments
    ---------
    embeddings : torch.Tensor
        Float, (N, D), row i for ``trials.clip_ids[i]`` (``Trials.stack`` does that). Must be
        finite. A prefix that is all zero scores 0.
    trials : Trials
    mrl_dims : sequence of int
        Prefix sizes, ascending, 1..D.

    Returns
    -------
    dict of int to numpy.ndarray
        Size -> scores, (n_trials,).

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    >>> {size: scores.round(4).tolist() for size, scores in
    ...  score_trials(embeddings.double(), trials, mrl_dims=[1, 2]).items()}
    {1: [1.0, 0.0], 2: [0.6, 0.0]}
    """
    if embeddings.ndim != 2 or len(embeddings) != len(trials.clip_ids):
        raise ValueError(
            f"embeddings must be (N, D) with one row for each of {len(trials.clip_ids)} "
            f"utterances, got {tuple(embeddings.shape)}; Trials.stack puts them in order"
        )
    sizes = check_mrl_dims(mrl_dims)
    if sizes[-1] > embeddings.shape[1]:
        raise ValueError(f"mrl_dims {sizes} do not fit embeddings of size {embeddings.shape[1]}")
    embeddings = embeddings.detach()
    if embeddings.dtype != torch.float64:
        embeddings = embeddings.float()
    broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{len(broken)} embeddings hold NaN or infinity, "
            f"the first is of utterance {trials.clip_ids[broken[0]]!r}"
        )
    blocks = list(itertools.pairwise([0, *sizes]))
    norms = torch.stack([*prefix_norms(embeddings, sizes, smallest=0.0).values()], dim=1)  # (N, K)
    pairs = torch.from_numpy(np.stack([trials.enrol, trials.test])).to(embeddings.device)
    scores = []
    for enrol, test in pairs.split(TRIALS_PER_CHUNK, dim=1):
        products = embeddings[enrol] * embeddings[test]  # (chunk, D)
        dots = torch.stack([products[:, lo:hi].sum(1) for lo, hi in blocks], dim=1).cumsum(1)
        lengths = norms[enrol] * norms[test]
        scores.append(torch.where(lengths > 0, dots / lengths, 0).cpu())
    return dict(zip(sizes, torch.cat(scores).T.contiguous().numpy(), strict=True))


def evaluate(
    embeddings: Tensor, trials: Trials, mrl_dims: Sequence[int], n_bootstrap: int = 0
) -> dict[str, dict[str, Any]]:
    """Error rates, costs and thresholds of the cosine at every prefix.

    Arguments are those of ``score_trials``; ``n_bootstrap`` and the result are of ``evaluate_scores``.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> results = evaluate(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), trials, mrl_dims=[2])
    >>> results["2"]["eer"], results["2"]["min_dcf"], results["2"]["threshold"]
    (0.0, 0.0, 1.0)
    """
    return evaluate_scores(score_trials(embeddings, trials, mrl_dims), trials, n_bootstrap)


def evaluate_scores(
    scores: Mapping[int, np.ndarray],
    trials: Trials,
    n_bootstrap: int = 0,
    calibrated: bool = False,
) -> dict[str, dict[str, Any]]:
    """Error rates, costs and thresholds of every size.

    Arguments
    ---------
    scores : mapping of int to array
        Size -> scores, (n_trials,).
    trials : Trials
    n_bootstrap : int
        Replicates for 95 % intervals over speakers (the first folder of each utterance id, which
        must agree with the labels), 0 for none. A target trial counts as often as its speaker was
        drawn, an impostor trial the product of its two speakers' draws.
    calibrated : bool
        Whether the scores are log-likelihood ratios, for actual DCF and Cllr.

    Returns
    -------
    dict
        For ``"64"`` and so on: ``eer``, ``min_dcf`` (p = 0.01), ``min_dcf_0.05``; with
        ``calibrated`` also ``act_dcf``, ``act_dcf_0.05`` and ``cllr``; with ``n_bootstrap`` each
        one's ``eer_ci`` and so on ([low, high]). ``threshold`` is the EER's, ``thresholds`` those
        of fixed false-accept rates, ``{"far_0.01": ...}``, as far as 30 false accepts tell them.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> evaluate_scores({2: np.array([3.0, -3.0])}, trials, calibrated=True)["2"]["act_dcf_0.05"]
    0.0
    """
    rankings = {str(size): Ranking(values, trials.labels) for size, values in scores.items()}
    results: dict[str, dict[str, Any]] = {
        size: {**ranking.summary(calibrated=calibrated)} for size, ranking in rankings.items()
    }
    if n_bootstrap:
        draws = bootstrap(
            trials,
            n_bootstrap,
            lambda weights: {
                (size, name): value
                for size, ranking in rankings.items()
                for name, value in ranking.summary(weights, calibrated).items()
            },
        )
        for (size, name), values in draws.items():
            results[size][f"{name}_ci"] = interval(values)
    for size, ranking in rankings.items():
        results[size]["threshold"] = ranking.eer()[1]
        results[size]["thresholds"] = ranking.far_thresholds()
    return results


def bootstrap(
    trials: Trials, n_bootstrap: int, measure: Callable[[np.ndarray], Mapping[Any, float]]
) -> dict[Any, list[float]]:
    """What ``measure(weights)`` gives, by its keys, over draws of the list's speakers.

    Every model sees the same draws. Weights are (n_trials,), in the order of the list.
    """
    speakers = [speaker_of(clip_id) for clip_id in trials.clip_ids]
    names, speaker = np.unique(speakers, return_inverse=True)
    enrol, test = speaker[trials.enrol], speaker[trials.test]
    contradicted = (enrol == test) != trials.labels
    if contradicted.any():
        raise ValueError(
            f"{trials.source}, line {contradicted.argmax() + 1}: the label contradicts the "
            "first folders of the two ids, which n_bootstrap takes for their speakers; "
            "name utterances speaker/... or set n_bootstrap=0"
        )
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    chances = np.full(len(names), 1 / len(names))
    counts = rng.multinomial(len(names), chances, n_bootstrap).astype(float)
    found: dict[Any, list[float]] = {}
    for count in counts:
        # copies of a speaker are one person: their target trials repeat, they do not multiply
        weights = count[enrol] * np.where(trials.labels, 1.0, count[test])
        if not weights[trials.labels].any() or not weights[~trials.labels].any():
            continue  # with few speakers a draw can lack trials of one kind
        for key, value in measure(weights).items():
            found.setdefault(key, []).append(value)
    if not found:
        raise ValueError(f"none of n_bootstrap={n_bootstrap} draws has trials of each kind")
    return found


def interval(values: Sequence[float]) -> list[float]:
    return np.percentile(values, (2.5, 97.5)).tolist()


def compare(
    scores_a: Mapping[int, np.ndarray],
    scores_b: Mapping[int, np.ndarray],
    trials: Trials,
    n_bootstrap: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Difference in EER of two models on one list, with its interval over speakers.

    Both models are measured on the same draws of speakers, so what makes a draw easy or hard for
    both cancels out. The interval is that of the difference, not of either model.

    Arguments
    ---------
    scores_a, scores_b : mapping of int to array
        Size -> scores, (n_trials,). A size that b lacks is compared with b's largest.
    trials : Trials
    n_bootstrap : int
        See ``evaluate_scores``; 0 gives no interval.

    Returns
    -------
    dict
        ``{"64": {"eer_a": ..., "eer_b": ..., "difference": ..., "difference_ci": [low, high]}}``.
        The difference is a's EER less b's: with an interval below zero, a is the better one.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> right, wrong = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    >>> compare({2: right, 4: right}, {2: wrong}, trials, n_bootstrap=0)["4"]
    {'eer_a': 0.0, 'eer_b': 1.0, 'difference': -1.0}
    """
    rankings_a = {size: Ranking(scores, trials.labels) for size, scores in scores_a.items()}
    rankings_b = {size: Ranking(scores, trials.labels) for size, scores in scores_b.items()}
    largest = max(rankings_b)

    def eers(weights: np.ndarray | None = None) -> dict[str, tuple[float, float]]:
        """(a's, b's) by a's sizes."""
        of_a, of_b = (
            {size: eer_of_rates(*ranking.rates(weights))[0] for size, ranking in rankings.items()}
            for rankings in (rankings_a, rankings_b)
        )
        return {str(size): (eer, of_b.get(size, of_b[largest])) for size, eer in of_a.items()}

    results: dict[str, dict[str, Any]] = {
        size: {"eer_a": a, "eer_b": b, "difference": a - b} for size, (a, b) in eers().items()
    }
    if n_bootstrap:
        draws = bootstrap(
            trials, n_bootstrap, lambda w: {size: a - b for size, (a, b) in eers(w).items()}
        )
        for size, differences in draws.items():
            results[size]["difference_ci"] = interval(differences)
    return results
