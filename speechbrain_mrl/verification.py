"""Speaker verification at every prefix: trial lists, scores, error rates, report and plots.

Every clip is embedded once; all sizes are then scored out of one pass over the coordinates.
A trial is accepted when its score is at or above the threshold. Rates are fractions, 0..1.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechbrain_mrl.rotation import check_mrl_dims, matryoshka_rotation

TRIALS_PER_CHUNK = 8192
BOOTSTRAP_SEED = 1986
DET_TICKS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40)  # percent
PLOT_STYLES = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "tab:orange", "linestyle": "--", "marker": "s"},
    {"color": "tab:blue", "linestyle": "-.", "marker": "^"},
    {"color": "tab:red", "linestyle": ":", "marker": "D"},
)


@dataclass(frozen=True)
class Trials:
    """A trial list as indices into its unique clips: 580,000 trials take 5 MB.

    Arguments
    ---------
    clip_ids : list of str
        Unique clips, in order of first appearance, (N,).
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
        return cls(list(index), *pairs, np.array(labels), source)

    def check_clips(self, available: Container[str]) -> None:
        """Raise ValueError, naming the first line in need, if a clip is not in ``available``."""
        missing = np.array([clip_id not in available for clip_id in self.clip_ids])
        if not missing.any():
            return
        affected = missing[self.enrol] | missing[self.test]
        first = int(affected.argmax())
        clip = self.enrol[first] if missing[self.enrol[first]] else self.test[first]
        raise ValueError(
            f"{self.source}, line {first + 1}: clip {self.clip_ids[clip]!r} is missing; "
            f"{missing.sum()} of {len(missing)} clips are, which {affected.sum()} trials need"
        )

    def stack(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (D,) by clip id as the (N, D) matrix that scoring needs."""
        self.check_clips(embeddings)
        return torch.stack([embeddings[clip_id] for clip_id in self.clip_ids])


def read_trials(path: str | os.PathLike) -> Trials:
    """Read a list of ``label enrol test`` lines: VoxCeleb1-O, -E, -H, VoxSRC, or one of your own.

    A broken line, an empty list or one with a single label (1 same speaker, 0 not) is a ValueError.

    Example
    -------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "trials.txt")
    ...     _ = path.write_text("1 a/1.wav a/2.wav\\n0 a/1.wav b/1.wav\\n")
    ...     read_trials(path).clip_ids
    ['a/1.wav', 'a/2.wav', 'b/1.wav']
    """
    lines = Path(path).read_text(encoding="utf-8").rstrip().split("\n")
    return Trials.parse(lines, source=str(path))


def score_trials(
    embeddings: Tensor, trials: Trials, mrl_dims: Sequence[int]
) -> dict[int, np.ndarray]:
    """Cosine of every trial at every prefix, out of one pass over the coordinates.

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
            f"embeddings must be (N, D) with one row for each of {len(trials.clip_ids)} clips, "
            f"got {tuple(embeddings.shape)}; Trials.stack puts them in order"
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
            f"the first is of clip {trials.clip_ids[broken[0]]!r}"
        )
    blocks = list(itertools.pairwise([0, *sizes]))
    squares = [embeddings[:, lo:hi].square().sum(1) for lo, hi in blocks]
    norms = torch.stack(squares, dim=1).cumsum(1).sqrt()  # (N, n_sizes)
    pairs = torch.from_numpy(np.stack([trials.enrol, trials.test])).to(embeddings.device)
    scores = []
    for enrol, test in pairs.split(TRIALS_PER_CHUNK, dim=1):
        products = embeddings[enrol] * embeddings[test]  # (chunk, D)
        dots = torch.stack([products[:, lo:hi].sum(1) for lo, hi in blocks], dim=1).cumsum(1)
        lengths = norms[enrol] * norms[test]
        scores.append(torch.where(lengths > 0, dots / lengths, 0).cpu())
    return dict(zip(sizes, torch.cat(scores).T.contiguous().numpy(), strict=True))


class _Ranking:
    """Trials sorted once, highest score first; error rates for any weights then cost one pass.

    Thresholds go from infinity (accept nothing) to the lowest score; equal scores fall together.
    """

    def __init__(self, scores, labels):
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
        ranked = scores[self.order]
        self.ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        self.thresholds = np.append(np.inf, ranked[self.ends])

    def rates(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(far, frr) at each threshold; ``weights`` (n_trials,) in ranked order."""
        weights = np.ones(len(self.order)) if weights is None else weights
        hits = np.cumsum(weights * self.is_target)[self.ends]
        false_accepts = np.cumsum(weights)[self.ends] - hits
        far = false_accepts / false_accepts[-1]
        frr = (hits[-1] - hits) / hits[-1]
        return np.append(0.0, far), np.append(1.0, frr)


def _eer_of_rates(far: np.ndarray, frr: np.ndarray) -> tuple[float, int]:
    """EER on the polyline, and the index of the operating point next to it."""
    gap = far - frr  # never falls, from -1 to 1
    after = int(np.searchsorted(gap, 0.0))
    before = after - 1
    step = -gap[before] / (gap[after] - gap[before])
    nearest = before if -gap[before] < gap[after] else after
    return float(far[before] + step * (far[after] - far[before])), nearest


def _min_dcf_of_rates(far, frr, p_target=0.01, c_miss=1, c_fa=1) -> float:
    miss_cost, fa_cost = c_miss * p_target, c_fa * (1 - p_target)
    return float((miss_cost * frr + fa_cost * far).min() / min(miss_cost, fa_cost))


def eer(scores, labels) -> tuple[float, float]:
    """Equal error rate, where the polyline through the ROC's points has FAR = FRR; and a threshold.

    Arguments
    ---------
    scores : array
        (n_trials,), higher means more alike. NaN is refused.
    labels : array
        (n_trials,), 1 or True for target trials, 0 or False for impostors; both must occur.

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
    ranking = _Ranking(scores, labels)
    rate, nearest = _eer_of_rates(*ranking.rates())
    return rate, float(ranking.thresholds[nearest])


def min_dcf(scores, labels, p_target: float = 0.01, c_miss: float = 1, c_fa: float = 1) -> float:
    """Smallest detection cost over all thresholds; 1 is the cost of the better blind decision.

    Arguments
    ---------
    scores, labels : array
        See ``eer``.
    p_target : float
        Prior probability of a target trial, inside 0..1.
    c_miss, c_fa : float
        Cost of a false reject and of a false accept, positive.

    Example
    -------
    >>> min_dcf([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    0.5
    """
    if not 0 < p_target < 1 or c_miss <= 0 or c_fa <= 0:
        raise ValueError(
            "p_target must lie inside 0..1, c_miss and c_fa above 0; "
            f"got {p_target}, {c_miss}, {c_fa}"
        )
    return _min_dcf_of_rates(*_Ranking(scores, labels).rates(), p_target, c_miss, c_fa)


def evaluate(
    embeddings: Tensor, trials: Trials, mrl_dims: Sequence[int], n_bootstrap: int = 0
) -> dict[str, dict]:
    """EER, minDCF (p = 0.01) and the EER's threshold at every prefix.

    Arguments
    ---------
    embeddings, trials, mrl_dims
        See ``score_trials``.
    n_bootstrap : int
        Replicates for 95 % intervals over speakers (the first folder of each clip id, which must
        agree with the labels), 0 for none. A target trial counts as often as its speaker was
        drawn, an impostor trial the product of its two speakers' draws.

    Returns
    -------
    dict
        ``{"64": {"eer": ..., "min_dcf": ..., "threshold": ...}, ...}``, with ``"eer_ci"`` and
        ``"min_dcf_ci"`` ([low, high]) if ``n_bootstrap`` is above 0.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> evaluate(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), trials, mrl_dims=[2])
    {'2': {'eer': 0.0, 'min_dcf': 0.0, 'threshold': 1.0}}
    """
    draws = _SpeakerDraws(trials, n_bootstrap) if n_bootstrap else None
    results = {}
    for size, scores in score_trials(embeddings, trials, mrl_dims).items():
        ranking = _Ranking(scores, trials.labels)
        far, frr = ranking.rates()
        rate, nearest = _eer_of_rates(far, frr)
        result = {"eer": rate, "min_dcf": _min_dcf_of_rates(far, frr)}
        result["threshold"] = float(ranking.thresholds[nearest])
        results[str(size)] = result | (draws.intervals(ranking) if draws else {})
    return results


class _SpeakerDraws:
    """Bootstrap draws of a list's speakers; every size and model sees the same ones."""

    def __init__(self, trials: Trials, n_bootstrap: int):
        speakers = [clip_id.split("/")[0] for clip_id in trials.clip_ids]
        names, speaker = np.unique(speakers, return_inverse=True)
        self.enrol, self.test = speaker[trials.enrol], speaker[trials.test]
        contradicted = (self.enrol == self.test) != trials.labels
        if contradicted.any():
            raise ValueError(
                f"{trials.source}, line {contradicted.argmax() + 1}: the label contradicts the "
                "clips' first folders, which n_bootstrap takes for their speakers; "
                "name clips speaker/... or set n_bootstrap=0"
            )
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        chances = np.full(len(names), 1 / len(names))
        self.counts = rng.multinomial(len(names), chances, n_bootstrap).astype(float)

    def intervals(self, ranking: _Ranking) -> dict[str, list[float]]:
        enrol, test = self.enrol[ranking.order], self.test[ranking.order]
        rates, costs = [], []
        for count in self.counts:
            # copies of a speaker are one person: their target trials repeat, they do not multiply
            weights = count[enrol] * np.where(ranking.is_target, 1.0, count[test])
            if not weights[ranking.is_target].any() or not weights[~ranking.is_target].any():
                continue  # with few speakers a draw can lack trials of one kind
            far, frr = ranking.rates(weights)
            rates.append(_eer_of_rates(far, frr)[0])
            costs.append(_min_dcf_of_rates(far, frr))
        if not rates:
            raise ValueError(
                f"none of n_bootstrap={len(self.counts)} draws has trials of each kind"
            )
        ends = (2.5, 97.5)
        return {
            "eer_ci": np.percentile(rates, ends).tolist(),
            "min_dcf_ci": np.percentile(costs, ends).tolist(),
        }


def truncation_baselines(
    teacher_embeddings: Tensor,
    fit_embeddings: Tensor,
    trials: Trials,
    mrl_dims: Sequence[int],
    n_bootstrap: int = 0,
) -> dict[str, dict]:
    """What a teacher's own embedding gives when it is cut, as it is and after PCA.

    Arguments
    ---------
    teacher_embeddings : torch.Tensor
        Of the trials' clips, (N, D_t).
    fit_embeddings : torch.Tensor
        Of training clips, never the trials', (M, D_t); mean and rotation come from them.
    trials, mrl_dims, n_bootstrap
        See ``evaluate``; sizes above D_t are left out.

    Returns
    -------
    dict
        ``{"naive_truncation": {"64": {...}}, "pca_truncation": {"64": {...}}}``

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> teacher = torch.tensor([[0.1, 1.0], [0.1, 1.0], [0.1, -1.0]])  # the second tells speakers
    >>> cuts = truncation_baselines(teacher, teacher, trials, mrl_dims=[1])
    >>> cuts["naive_truncation"]["1"]["eer"], cuts["pca_truncation"]["1"]["eer"]
    (0.5, 0.0)
    """
    sizes = [size for size in mrl_dims if size <= teacher_embeddings.shape[1]]
    if not sizes:
        return {"naive_truncation": {}, "pca_truncation": {}}
    with torch.no_grad():
        rotated = matryoshka_rotation(fit_embeddings, sizes)(teacher_embeddings)
    return {
        "naive_truncation": evaluate(teacher_embeddings, trials, sizes, n_bootstrap),
        "pca_truncation": evaluate(rotated, trials, sizes, n_bootstrap),
    }


def teacher_baselines(
    teachers: Mapping[str, Tensor],
    fit_embeddings: Mapping[str, Tensor],
    trials: Trials,
    mrl_dims: Sequence[int],
    n_bootstrap: int = 0,
) -> dict[str, Any]:
    """A report's ``"baselines"``: each teacher at its full size, and the cuts of the best one.

    Arguments are those of ``truncation_baselines``, the embeddings by teacher name. ``"teacher"``
    of the result names the teacher with the lowest EER, ``"dim"`` of each teacher is its size.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> b0 = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1]])
    >>> baselines = teacher_baselines({"b0": b0}, {"b0": b0}, trials, mrl_dims=[1, 2, 4])
    >>> baselines["teacher"], baselines["teachers"]["b0"]["dim"], list(baselines["pca_truncation"])
    ('b0', 2, ['1', '2'])
    """
    results = {}
    for name, embeddings in teachers.items():
        full_size = embeddings.shape[1]
        (result,) = evaluate(embeddings, trials, [full_size], n_bootstrap).values()
        results[name] = {"dim": full_size, **result}
    best = min(results, key=lambda name: results[name]["eer"])
    cuts = truncation_baselines(teachers[best], fit_embeddings[best], trials, mrl_dims, n_bootstrap)
    return {"teacher": best, "teachers": results, **cuts}


def make_report(
    dims: Mapping[str, dict],
    trials: Trials,
    baselines: Mapping[str, Any],
    corpus: str,
    params: int,
    seconds: float,
) -> dict[str, Any]:
    """Assemble a report of plain Python values, ready for JSON; NaN and infinity are refused.

    Arguments
    ---------
    dims : mapping
        The model's results on ``trials``, from ``evaluate``.
    trials : Trials
        Only counted.
    baselines : mapping
        From ``teacher_baselines``; empty if there are no teachers.
    corpus : str
        ``"demo"`` or the data folder.
    params : int
        Parameters of the model.
    seconds : float
        What the run took.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "threshold": 0.3}}
    >>> report = make_report(dims, trials, {}, corpus="demo", params=10, seconds=2.5)
    >>> report["trials"], report["baselines"]["teacher"]
    ({'target': 1, 'impostor': 1}, None)
    """
    no_baselines = {"teacher": None, "teachers": {}, "naive_truncation": {}, "pca_truncation": {}}
    versions = {}
    for name in ("speechbrain-mrl", "speechbrain", "torch", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[name] = metadata.version(name)
    report = {
        "dims": dims,
        "baselines": no_baselines | dict(baselines),
        "trials": {"target": int(trials.labels.sum()), "impostor": int((~trials.labels).sum())},
        "corpus": corpus,
        "params": params,
        "seconds": seconds,
        "versions": versions,
    }
    return json.loads(_to_json(report))


def _to_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=2, allow_nan=False, default=lambda number: number.item())


def write_report(report: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write ``<folder>/report.json``, complete or not at all, and return its path.

    Example
    -------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_report({"seconds": 2.5}, folder).name
    'report.json'
    """
    text = _to_json(report)
    path = Path(folder, "report.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".report.{os.getpid()}.json")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _models(report: Mapping[str, Any]) -> dict[str, dict[str, dict]]:
    """What has results by size: label -> size -> results."""
    baselines = report["baselines"]
    models = {
        "student": report["dims"],
        f"{baselines['teacher']}, naive cut": baselines["naive_truncation"],
        f"{baselines['teacher']}, PCA cut": baselines["pca_truncation"],
    }
    return {name: results for name, results in models.items() if results}


def print_report(report: Mapping[str, Any]) -> None:
    """Print EER (percent) and minDCF per size; each teacher has a row of its own at full size.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "threshold": 0.3}}
    >>> print_report(make_report(dims, trials, {}, corpus="demo", params=10, seconds=2.5))
    1 target, 1 impostor trials; corpus: demo
    size           student
            EER %   minDCF
      64    25.00    1.000
    """
    trials, models, teachers = report["trials"], _models(report), report["baselines"]["teachers"]
    labels = {name: f"{name} ({result['dim']})" for name, result in teachers.items()}
    margin = max(map(len, ["size", *labels.values()]))
    width = max(18, *(len(name) + 2 for name in models))

    def print_row(label, results):
        cells = (f"{100 * r['eer']:9.2f}{r['min_dcf']:9.3f}" if r else "-" for r in results)
        print(label.rjust(margin) + "".join(cell.rjust(width) for cell in cells))

    counts = f"{trials['target']} target, {trials['impostor']} impostor trials"
    print(f"{counts}; corpus: {report['corpus']}")
    print("size".rjust(margin) + "".join(name.rjust(width) for name in models))
    print(" " * margin + "EER %   minDCF".rjust(width) * len(models))
    for size in sorted({int(size) for results in models.values() for size in results}):
        print_row(str(size), [results.get(str(size)) for results in models.values()])
    if teachers:
        print("teachers, at full size")
    for name, result in teachers.items():
        print_row(labels[name], [result])


def _axes(x_label: str, y_label: str, title: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: the caller's backend and rcParams stay as they are
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return axes


def plot_eer_by_dim(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw EER against size: the model, both cuts of the best teacher, each teacher as a line.

    Example
    -------
    >>> from tempfile import TemporaryDirectory
    >>> dims = {"64": {"eer": 0.25}, "128": {"eer": 0.2}}
    >>> report = make_report(dims, Trials.parse(["1 a b", "0 a c"]), {}, "demo", 10, 2.5)
    >>> with TemporaryDirectory() as folder:
    ...     plot_eer_by_dim(report, Path(folder, "eer.png"))
    """
    axes = _axes("embedding size (coordinates)", "EER (%)", "EER against embedding size")
    ticks = set()
    for (name, results), style in zip(_models(report).items(), PLOT_STYLES, strict=False):
        sizes = sorted(map(int, results))
        ticks.update(sizes)
        axes.plot(sizes, [100 * results[str(d)]["eer"] for d in sizes], **style, label=name)
    markers = itertools.cycle("DvPX*")
    for name, result in report["baselines"]["teachers"].items():
        size, percent = result["dim"], 100 * result["eer"]
        ticks.add(size)
        axes.axhline(percent, color="0.6", linestyle=":", linewidth=1)
        axes.plot(size, percent, next(markers), color="0.4", markersize=9, label=f"teacher {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), sorted(ticks))
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside right upper")
    axes.figure.savefig(path, dpi=150)


def plot_det(scores: Mapping[int, np.ndarray], labels, path: str | os.PathLike) -> None:
    """Draw a DET curve per size on probit axes, its EER marked; the numbers go to a .csv beside it.

    ``scores`` come from ``score_trials``; ``labels`` are the trials'.

    Example
    -------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     plot_det({64: [0.9, 0.4, 0.6, 0.1]}, [1, 1, 0, 0], Path(folder, "det.png"))
    ...     print(Path(folder, "det.csv").read_text()[:70])
    size,threshold,false_accept_rate,false_reject_rate
    64,inf,0,1
    64,0.9,0
    """
    probit = NormalDist().inv_cdf
    axes = _axes("false accepts (%)", "false rejects (%)", "Detection error trade-off")
    rows, lowest = ["size,threshold,false_accept_rate,false_reject_rate\n"], 0.02
    styles = itertools.cycle(PLOT_STYLES)
    for size, size_scores in scores.items():
        ranking = _Ranking(size_scores, labels)
        far, frr = ranking.rates()
        warped = torch.special.ndtri(torch.from_numpy(np.stack([far, frr]))).numpy()
        steps = np.round(200 * warped)  # finer than a pixel
        keep = np.append(True, (steps[:, 1:] != steps[:, :-1]).any(axis=0))
        for threshold, fa, fr in np.stack([ranking.thresholds, far, frr], axis=1)[keep]:
            rows.append(f"{size},{threshold:.6g},{fa:.6g},{fr:.6g}\n")
        rate, _ = _eer_of_rates(far, frr)
        style = {**next(styles), "markevery": []}
        inside = keep & np.isfinite(warped).all(axis=0)
        axes.plot(*warped[:, inside], **style, label=f"{size}: EER {100 * rate:.2f} %")
        if 0 < rate < 1:
            lowest = min(lowest, rate / 10)
            axes.plot(*[probit(rate)] * 2, **{**style, "markevery": None})
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1)
    ticks = [tick for tick in DET_TICKS if lowest <= tick / 100]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([probit(tick / 100) for tick in ticks], [f"{tick:g}" for tick in ticks])
    limits = probit(lowest), probit(0.6)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.legend(title="size", loc="upper right")
    axes.figure.savefig(path, dpi=150)
    Path(path).with_suffix(".csv").write_text("".join(rows), encoding="utf-8")


def plot_scores(scores, labels, threshold: float, path: str | os.PathLike) -> None:
    """Draw histograms of the target and impostor scores of one size, with its threshold.

    Example
    -------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     plot_scores([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], 0.6, Path(folder, "scores.png"))
    """
    scores, is_target = np.asarray(scores), np.asarray(labels).astype(bool)
    axes = _axes("score (cosine)", "density", "Scores of target and impostor trials")
    bins = np.linspace(scores.min(), scores.max(), 46)
    look = {"bins": bins, "density": True, "histtype": "stepfilled", "edgecolor": "black"}
    impostors = f"impostor ({np.sum(~is_target)})"
    axes.hist(scores[~is_target], facecolor="0.75", label=impostors, **look)
    targets = f"target ({np.sum(is_target)})"
    axes.hist(scores[is_target], facecolor="none", hatch="////", label=targets, **look)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.legend()
    axes.figure.savefig(path, dpi=150)
