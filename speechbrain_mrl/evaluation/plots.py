"""Plots of a verification, readable in black and white, each with its numbers in a .csv beside it.

They need matplotlib (the extra ``plots``) and leave its settings as they are.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from speechbrain_mrl.evaluation.metrics import Ranking, eer_of_rates
from speechbrain_mrl.evaluation.report import results_by_name
from speechbrain_mrl.utils import replacing, require

DET_TICKS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40)  # percent
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "tab:orange", "linestyle": "--", "marker": "s"},
    {"color": "tab:blue", "linestyle": "-.", "marker": "^"},
    {"color": "tab:red", "linestyle": ":", "marker": "D"},
    {"color": "tab:green", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "tab:purple", "linestyle": (0, (1, 3)), "marker": "P"},
    {"color": "tab:brown", "linestyle": (0, (8, 4)), "marker": "X"},
)


def write_plots(
    report: Mapping[str, Any],
    scores: Mapping[int, np.ndarray],
    labels: npt.ArrayLike,
    folder: str | os.PathLike[str],
) -> None:
    """Write eer_by_dim, det, scores and (if the report has it) eer_by_duration, .png and .csv.

    ``scores`` of the report's trials are by size, they and ``labels`` (n_trials,). ``folder`` exists.

    Example
    -------
    >>> from speechbrain_mrl.evaluation.report import make_report
    >>> from speechbrain_mrl.evaluation.verification import Trials, evaluate_scores
    >>> folder = getfixture("tmp_path")
    >>> trials, scores = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"]), {64: np.array([0.9, 0.1])}
    >>> report = make_report(evaluate_scores(scores, trials), trials, {}, "demo", 10, 2.5)
    >>> write_plots(report, scores, trials.labels, folder)
    >>> sorted(path.name for path in folder.glob("*.png"))
    ['det.png', 'eer_by_dim.png', 'scores.png']
    """
    folder = Path(folder)
    plot_eer_by_dim(report, folder / "eer_by_dim.png")
    plot_det(scores, labels, folder / "det.png")
    thresholds = {int(size): result["threshold"] for size, result in report["dims"].items()}
    plot_scores(scores, labels, thresholds, folder / "scores.png")
    if "by_duration" in report:
        plot_eer_by_duration(report["by_duration"], folder / "eer_by_duration.png")


def _figure(size: tuple[float, float] = (6.4, 4.8), layout: Any = "constrained") -> Any:
    require("matplotlib", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)  # no pyplot: the caller's backend and rcParams stay as they are
    return figure


def _axes(x_label: str, y_label: str, title: str, size: tuple[float, float] = (6.4, 4.8)) -> Any:
    axes = _figure(size).add_subplot(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return axes


def _save(
    figure: Any, path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """The picture at ``path``, its numbers beside it."""
    with replacing(path) as part:
        figure.savefig(part, dpi=150)
    with (
        replacing(Path(path).with_suffix(".csv")) as part,
        open(part, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)


def plot_eer_by_dim(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw EER against size: a line for each row of the report, teachers in a panel beside.

    Bands are 95 % intervals, drawn if the report has them for every row; the CSV has them too.

    Example
    -------
    >>> from speechbrain_mrl.evaluation.report import make_report
    >>> from speechbrain_mrl.evaluation.verification import Trials
    >>> dims, path = {"64": {"eer": 0.25}, "128": {"eer": 0.2}}, getfixture("tmp_path") / "eer.png"
    >>> trials = Trials.parse(["1 a b", "0 a c"])
    >>> plot_eer_by_dim(make_report(dims, trials, {}, "demo", 10, 2.5), path)
    >>> print(path.with_suffix(".csv").read_text())
    name,size,eer,low,high
    model,64,0.25,,
    model,128,0.2,,
    <BLANKLINE>
    """
    lines = results_by_name(report)
    points = report["baselines"]["teachers"]
    every = [*points.values(), *(one for results in lines.values() for one in results.values())]
    has_intervals = all("eer_ci" in one for one in every)
    rows: list[tuple[Any, ...]] = []

    figure = _figure((6.8, 5.2))
    widths = [4, 1] if points else [1]
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes in panels:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    for (name, results), style in zip(lines.items(), itertools.cycle(STYLES)):
        sizes = sorted(map(int, results))
        found = [results[str(size)] for size in sizes]
        bounds = [one.get("eer_ci", ("", "")) for one in found]
        rows += [(name, size, one["eer"], *ci) for size, one, ci in zip(sizes, found, bounds)]
        fill = "none" if panels[0].lines else "full"  # what lies below stays visible
        panels[0].plot(sizes, [100 * one["eer"] for one in found], **style, fillstyle=fill)
        panels[0].lines[-1].set_label(name)
        if has_intervals:
            low, high = 100 * np.array(bounds).T
            panels[0].fill_between(sizes, low, high, color=style["color"], alpha=0.12, linewidth=0)
    ticks = sorted({row[1] for row in rows})
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(ticks, ticks)
    panels[0].minorticks_off()
    panels[0].set(xlabel="embedding size (dimensions)", ylabel="EER (%)", ylim=(0, None))
    panels[0].set_title("EER against embedding size")
    for place, ((name, result), marker) in enumerate(zip(points.items(), itertools.cycle("*PXph"))):
        low, high = result.get("eer_ci", ("", ""))
        rows.append((f"teacher {name}", result["dim"], result["eer"], low, high))
        if has_intervals:
            look = {"color": "0.4", "alpha": 0.25, "linewidth": 0}
            panels[1].fill_between([place - 0.2, place + 0.2], 100 * low, 100 * high, **look)
        label = f"{name} ({result['dim']} dimensions)"
        panels[1].plot(place, 100 * result["eer"], marker, color="0.3", markersize=9, label=label)
    if points:
        panels[1].set(title="teachers", xlim=(-0.7, len(points) - 0.3), xticks=[])
    title = "bands: 95 % intervals over speakers" if has_intervals else None
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", title=title)
    _save(figure, path, ["name", "size", "eer", "low", "high"], rows)


def plot_det(
    scores: Mapping[int, np.ndarray], labels: npt.ArrayLike, path: str | os.PathLike[str]
) -> None:
    """Draw a DET curve per size on probit axes, which meets the diagonal at its EER.

    ``scores`` come from ``score_trials``; ``labels`` are the trials'.

    Example
    -------
    >>> path = getfixture("tmp_path") / "det.png"
    >>> plot_det({64: [0.9, 0.4, 0.6, 0.1]}, [1, 1, 0, 0], path)
    >>> print(path.with_suffix(".csv").read_text()[:70])
    size,threshold,false_accept_rate,false_reject_rate
    64,inf,0,1
    64,0.9,0
    """
    probit = NormalDist().inv_cdf
    axes = _axes("false accepts (%)", "false rejects (%)", "Detection error trade-off", (5.4, 6.2))
    rows, lowest, highest = [], 0.02, 0.45
    widths = np.linspace(3.6, 1.2, len(scores))  # where curves coincide, each stays visible
    for (size, size_scores), style, width in zip(scores.items(), itertools.cycle(STYLES), widths):
        ranking = Ranking(size_scores, labels)
        far, frr = ranking.rates()
        warped = torch.special.ndtri(torch.from_numpy(np.stack([far, frr]))).numpy()
        steps = np.round(200 * warped)  # finer than a pixel
        keep = np.append(True, (steps[:, 1:] != steps[:, :-1]).any(axis=0))
        points = np.stack([ranking.thresholds, far, frr], axis=1)[keep]
        rows += [(size, *point) for point in points.tolist()]
        rate, _ = eer_of_rates(far, frr)
        inside = keep & np.isfinite(warped).all(axis=0)
        look = {**style, "marker": None, "linewidth": width}
        axes.plot(*warped[:, inside], **look, label=f"{size} dimensions: EER {100 * rate:.2f} %")
        if 0 < rate < 1:
            lowest, highest = min(lowest, rate / 10), max(highest, 1.2 * rate)
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1)
    ticks = [tick for tick in DET_TICKS if lowest <= tick / 100]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([probit(tick / 100) for tick in ticks], [f"{tick:g}" for tick in ticks])
    limits = probit(lowest), probit(min(highest, 0.9))
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    _save(axes.figure, path, ["size", "threshold", "false_accept_rate", "false_reject_rate"], rows)


def plot_scores(
    scores: Mapping[int, np.ndarray],
    labels: npt.ArrayLike,
    thresholds: Mapping[int, float],
    path: str | os.PathLike[str],
) -> None:
    """Draw histograms of target and impostor scores, one above the other by size.

    ``scores`` and ``thresholds`` are by size, scores and ``labels`` (n_trials,).

    Example
    -------
    >>> path = getfixture("tmp_path") / "scores.png"
    >>> plot_scores({64: [0.9, 0.4, 0.6, 0.1]}, [1, 1, 0, 0], {64: 0.6}, path)
    >>> path.with_suffix(".csv").read_text().splitlines()[0]
    'size,from_score,target,impostor'
    """
    is_target = np.asarray(labels).astype(bool)
    ends = [(np.min(values), np.max(values)) for values in scores.values()]
    bins = np.linspace(min(low for low, _ in ends), max(high for _, high in ends), 61)
    height = 1.5 + 1.2 * len(scores)  # inches
    figure = _figure((6.4, height), layout="none")  # panels touch
    figure.subplots_adjust(0.06, 1 / height, 0.98, 1 - 0.4 / height, hspace=0)
    panels = figure.subplots(len(scores), sharex=True, sharey=True, squeeze=False)[:, 0]
    rows = []
    for axes, (size, values) in zip(panels, scores.items()):
        values = np.asarray(values)
        look = {"bins": bins, "density": True, "histtype": "stepfilled", "edgecolor": "black"}
        impostors = f"impostor ({np.sum(~is_target):,})"
        axes.hist(values[~is_target], facecolor="0.75", label=impostors, **look)
        targets = f"target ({np.sum(is_target):,})"
        axes.hist(values[is_target], facecolor="none", hatch="////", label=targets, **look)
        axes.axvline(thresholds[size], color="black", linestyle="--", label="threshold at the EER")
        axes.text(0.01, 0.9, f"{size} dimensions", transform=axes.transAxes, va="top")
        axes.set_yticks([])
        counts = [np.histogram(values[chosen], bins)[0] for chosen in (is_target, ~is_target)]
        rows += [(size, *row) for row in zip(bins.tolist(), *(c.tolist() for c in counts))]
    panels[-1].set_xlabel("score (cosine)")
    figure.supylabel("density of trials", fontsize="medium")
    panels[0].set_title("Scores of target and impostor trials")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    _save(figure, path, ["size", "from_score", "target", "impostor"], rows)


def plot_eer_by_duration(bins: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw EER against the length of a trial's shorter utterance, a line per size.

    ``bins`` are from ``eer_by_duration``; bands are their 95 % intervals, if they have them.

    Example
    -------
    >>> bins = [{"seconds": [1, 4], "target": 9, "impostor": 9, "eer": {"64": 0.1}}]
    >>> path = getfixture("tmp_path") / "eer_by_duration.png"
    >>> plot_eer_by_duration(bins, path)
    >>> print(path.with_suffix(".csv").read_text())
    size,from_seconds,to_seconds,target,impostor,eer,low,high
    64,1,4,9,9,0.1,,
    <BLANKLINE>
    """
    axes = _axes("length of the shorter utterance (s)", "EER (%)", "EER against utterance length")
    rows = []
    drawn = [one for one in bins if one["eer"]]
    has_intervals = all("eer_ci" in one for one in drawn)
    sizes = dict.fromkeys(size for one in drawn for size in one["eer"])
    for size, style in zip(sizes, itertools.cycle(STYLES)):
        bounds = [one["eer_ci"][size] if has_intervals else ("", "") for one in drawn]
        rows += [
            (size, *one["seconds"], one["target"], one["impostor"], one["eer"][size], *ci)
            for one, ci in zip(drawn, bounds)
        ]
        percents = [100 * one["eer"][size] for one in drawn]
        axes.plot(range(len(drawn)), percents, **style, fillstyle="none", label=size)
        if has_intervals:
            low, high = 100 * np.array(bounds).T
            places = range(len(drawn))
            axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)
    labels = [
        f"{low:.1f}–{high:.1f}\n{one['target']:,} / {one['impostor']:,}"
        for one in drawn
        for low, high in [one["seconds"]]
    ]
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.set_xlabel("length of the shorter utterance (s), target / impostor trials")
    axes.set_ylim(bottom=0)
    note = "; bands: 95 % intervals over speakers" if has_intervals and drawn else ""
    axes.figure.legend(title=f"dimensions{note}", loc="outside lower center", ncols=4)
    header = ["size", "from_seconds", "to_seconds", "target", "impostor", "eer", "low", "high"]
    _save(axes.figure, path, header, rows)
