"""The report of a verification: its layout, the JSON file, the printed table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_mrl.evaluation.verification import Trials
from speechbrain_mrl.utils import replacing

ROWS = {  # baselines by size, and what people read for them
    "start": "student before training",
    "ensemble_lda": "ensemble, LDA",
    "ensemble": "ensemble, PCA",
    "pca_truncation": "{teacher}, PCA",
    "lda_truncation": "{teacher}, LDA",
    "naive_truncation": "{teacher}, truncated",
}
STEPS = ("centred", "as_norm", "plda", "calibrated")  # results inside those of a size
HEADS = {"eer": "EER %", "min_dcf": "minDCF", "act_dcf": "actDCF", "cllr": "Cllr"}
FULL_SIZE = "teachers, at full size"


def agreement(
    student: Tensor, teachers: Mapping[str, Tensor], mrl_dims: Sequence[int]
) -> dict[str, float]:
    """How well a student's cosines agree with its teachers', where no label says who is who.

    Arguments
    ---------
    student : torch.Tensor
        Of N utterances that were not trained on, (N, D).
    teachers : mapping of str to torch.Tensor
        Of the same utterances, {name: (N, D_t)}. Each is centred; the mean of their cosines counts.
    mrl_dims : sequence of int
        Prefix sizes, ascending.

    Returns
    -------
    dict
        ``"64"`` -> correlation of the two cosines over all pairs of utterances, 1 at best.

    Example
    -------
    >>> clips = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    >>> {dim: round(value, 3) for dim, value in agreement(clips, {"b0": clips}, [1, 2]).items()}
    {'1': -0.277, '2': 1.0}
    """
    pairs = torch.triu_indices(len(student), len(student), offset=1).unbind()
    centred = [F.normalize(x.double() - x.double().mean(dim=0), dim=1) for x in teachers.values()]
    wanted: Any = sum((x @ x.T)[pairs] for x in centred)
    prefixes = {str(dim): F.normalize(student[:, :dim].double(), dim=1) for dim in mrl_dims}
    return {
        dim: torch.corrcoef(torch.stack([(x @ x.T)[pairs], wanted]))[0, 1].item()
        for dim, x in prefixes.items()
    }


def make_report(
    dims: Mapping[str, dict[str, Any]],
    trials: Trials,
    baselines: Mapping[str, Any],
    corpus: str,
    params: int,
    seconds: float,
    gain: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Assemble a report of plain Python values, ready for JSON; NaN and infinity are refused.

    Arguments
    ---------
    dims : mapping
        The model's results on ``trials``, from ``evaluate``.
    trials : Trials
        Only counted.
    baselines : mapping
        From ``evaluate_student``; empty if the model is compared with nothing.
    corpus : str
        ``"demo"`` or the data folder.
    params : int
        Parameters of the model.
    seconds : float
        What the run took.
    gain : mapping, optional
        From ``evaluate_student``.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "threshold": 0.3}}
    >>> report = make_report(dims, trials, {}, corpus="demo", params=10, seconds=2.5)
    >>> report["trials"], report["baselines"]["teacher"]
    ({'target': 1, 'impostor': 1}, None)
    """
    empty: dict[str, Any] = {"teacher": None, "teachers": {}, **{row: {} for row in ROWS}}
    versions = {}
    for name in ("speechbrain-mrl", "speechbrain", "torch", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[name] = metadata.version(name)
    report = {
        "dims": dims,
        "baselines": empty | dict(baselines),
        **({} if gain is None else {"gain": gain}),
        "trials": count_trials(trials),
        "corpus": corpus,
        "params": params,
        "seconds": seconds,
        "versions": versions,
    }
    return json.loads(_to_json(report))


def count_trials(trials: Trials) -> dict[str, int]:
    """A report's ``"trials"``.

    Example
    -------
    >>> count_trials(Trials.parse(["1 a/1 a/2", "0 a/1 b/1"]))
    {'target': 1, 'impostor': 1}
    """
    return {"target": int(trials.labels.sum()), "impostor": int((~trials.labels).sum())}


def _to_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=2, allow_nan=False, default=lambda number: number.item())


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
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
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return path


def row_names(report: Mapping[str, Any]) -> dict[str, str]:
    """What people read for each of a report's baselines by size.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> report = make_report({}, trials, {"teacher": "b2"}, "demo", params=10, seconds=2.5)
    >>> row_names(report)["pca_truncation"]
    'b2, PCA'
    """
    teacher = report["baselines"]["teacher"]
    return {key: name.replace("{teacher}", str(teacher)) for key, name in ROWS.items()}


def results_by_name(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What a report has results of by size: name -> size -> results.

    The model itself, what the steps of ``verify.py`` make of it, and the baselines.

    Example
    -------
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "as_norm": {"eer": 0.2, "min_dcf": 1.0}}}
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> list(results_by_name(make_report(dims, trials, {}, "demo", params=10, seconds=2.5)))
    ['model', 'as_norm']
    """
    baselines = report["baselines"]
    is_student = baselines["teachers"] or baselines["start"]
    results = {"student" if is_student else "model": report["dims"]}
    for step in STEPS:
        results[step] = {d: found[step] for d, found in report["dims"].items() if step in found}
    for key, name in row_names(report).items():
        results[name] = baselines.get(key, {})
    return {name: by_size for name, by_size in results.items() if by_size}


def print_report(report: Mapping[str, Any]) -> None:
    """Print EER (percent) and minDCF (p = 0.01) by size, the teachers' at full size, and the gain.

    Calibrated scores have their actual DCF and Cllr too.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "threshold": 0.3}}
    >>> print_report(make_report(dims, trials, {}, corpus="demo", params=10, seconds=2.5))
    1 target, 1 impostor trials; corpus: demo
    EER %                       64
      model                  25.00
    minDCF                      64
      model                  1.000
    """
    trials, teachers = report["trials"], report["baselines"]["teachers"]
    models = results_by_name(report)
    sizes = sorted({int(size) for results in models.values() for size in results})
    labels = {name: f"{name} ({result['dim']})" for name, result in teachers.items()}
    margin = max(len(FULL_SIZE), *(len(name) + 2 for name in [*models, *labels.values()]))

    print(f"{trials['target']} target, {trials['impostor']} impostor trials; ", end="")
    print(f"corpus: {report['corpus']}")
    for key, heading in HEADS.items():
        rows = {
            name: [_cell(results.get(str(size), {}), key) for size in sizes]
            for name, results in models.items()
            if any(key in result for result in results.values())
        }
        if rows:
            print(heading.ljust(margin) + "".join(f"{size:8}" for size in sizes))
        for name, cells in rows.items():
            print(f"  {name}".ljust(margin) + "".join(cells))
    if teachers:
        print(FULL_SIZE.ljust(margin) + "   EER %  minDCF")
    for name, result in teachers.items():
        numbers = _cell(result, "eer") + _cell(result, "min_dcf")
        print(f"  {labels[name]}".ljust(margin) + numbers)
    if report.get("gain"):
        _print_gain(report)
    if "comparison" in report:
        _print_comparison(report["comparison"])


def _cell(result: Mapping[str, Any], key: str) -> str:
    if key not in result:
        return "-".rjust(8)
    return f"{100 * result[key]:8.2f}" if key == "eer" else f"{result[key]:8.3f}"


def _points(difference: float, low_high: Sequence[float] | None) -> str:
    """A difference in percentage points, with its 95 % interval."""
    interval = f" ({100 * low_high[0]:+.2f} to {100 * low_high[1]:+.2f})" if low_high else ""
    return f"{100 * difference:+.2f}{interval}"


def _print_gain(report: Mapping[str, Any]) -> None:
    """A column for each row that the student is compared with."""
    gain, names = report["gain"], row_names(report)
    print("EER of the student minus that of the others, in percentage points (95 % interval)")
    columns, notes = [], []
    for key, found in gain.items():
        cells = [_points(one["eer"], one.get("eer_ci")) for one in found.values()]
        width = 2 + max(map(len, [names[key], *cells]))
        columns.append([cell.rjust(width) for cell in [names[key], *cells]])
        largest = max(map(int, report["baselines"][key]))
        if any(int(size) > largest for size in found):
            notes.append(f"  sizes above {largest} are compared with {names[key]} at {largest}")
    sizes = ["size", *report["dims"]]
    for size, *cells in zip(sizes, *columns):
        print(size.rjust(6) + "".join(cells))
    for note in notes:
        print(note)


def _print_comparison(comparison: Mapping[str, Any]) -> None:
    """One line per size."""
    print(f"EER minus that of {comparison['source']}, in percentage points (95 % interval)")
    for size, found in comparison["dims"].items():
        points = _points(found["difference"], found.get("difference_ci"))
        print(f"{size:>6} against {comparison['size'] or size}: {points}")
