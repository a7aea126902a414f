"""The report of a verification: baselines to compare with, the JSON file, the printed table."""

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

from speechbrain_mrl.evaluation.verification import Trials, evaluate
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.utils import replacing

STEPS = ("centred", "as_norm", "plda", "calibrated")  # results inside those of a size
HEADS = {"eer": "EER %", "min_dcf": "minDCF", "act_dcf": "actDCF", "cllr": "Cllr"}


def truncation_baselines(
    teacher_embeddings: Tensor,
    fit_embeddings: Tensor,
    trials: Trials,
    mrl_dims: Sequence[int],
    n_bootstrap: int = 0,
) -> dict[str, dict[str, Any]]:
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


def agreement(
    student: Tensor, teachers: Mapping[str, Tensor], mrl_dims: Sequence[int]
) -> dict[str, float]:
    """How well a student's cosines agree with its teachers', where no label says who is who.

    Arguments
    ---------
    student : torch.Tensor
        Of N clips that were not trained on, (N, D).
    teachers : mapping of str to torch.Tensor
        Of the same clips, {name: (N, D_t)}. Each is centred; the mean of their cosines counts.
    mrl_dims : sequence of int
        Prefix sizes, ascending.

    Returns
    -------
    dict
        ``"64"`` -> correlation of the two cosines over all pairs of clips, 1 at best.

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
    no_baselines: dict[str, Any] = {
        "teacher": None,
        "teachers": {},
        "naive_truncation": {},
        "pca_truncation": {},
    }
    versions = {}
    for name in ("speechbrain-mrl", "speechbrain", "torch", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout need not be installed
            versions[name] = metadata.version(name)
    report = {
        "dims": dims,
        "baselines": no_baselines | dict(baselines),
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


def results_by_name(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What a report has results of by size: name -> size -> results.

    The model itself, what the steps of ``verify.py`` make of it, and the cuts of the best teacher.

    Example
    -------
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "as_norm": {"eer": 0.2, "min_dcf": 1.0}}}
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> list(results_by_name(make_report(dims, trials, {}, "demo", params=10, seconds=2.5)))
    ['model', 'as_norm']
    """
    baselines = report["baselines"]
    results = {"student" if baselines["teachers"] else "model": report["dims"]}
    for step in STEPS:
        results[step] = {d: found[step] for d, found in report["dims"].items() if step in found}
    results[f"{baselines['teacher']}, naive cut"] = baselines["naive_truncation"]
    results[f"{baselines['teacher']}, PCA cut"] = baselines["pca_truncation"]
    return {name: by_size for name, by_size in results.items() if by_size}


def print_report(report: Mapping[str, Any]) -> None:
    """Print EER (percent) and minDCF per size; each teacher has a row of its own at full size.

    Calibrated scores have their actual DCF (p = 0.01, as minDCF) and Cllr too.

    Example
    -------
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    >>> dims = {"64": {"eer": 0.25, "min_dcf": 1.0, "threshold": 0.3}}
    >>> print_report(make_report(dims, trials, {}, corpus="demo", params=10, seconds=2.5))
    1 target, 1 impostor trials; corpus: demo
    size             model
            EER %   minDCF
      64    25.00    1.000
    """
    trials, teachers = report["trials"], report["baselines"]["teachers"]
    models = results_by_name(report)
    labels = {name: f"{name} ({result['dim']})" for name, result in teachers.items()}
    margin = max(map(len, ["size", *labels.values()]))
    heads, widths = {}, {}
    for name, results in models.items():
        metrics = [key for key in HEADS if any(key in result for result in results.values())]
        heads[name] = "".join(HEADS[key].rjust(9) for key in metrics)
        widths[name] = max(len(heads[name]), len(name) + 2)

    def print_row(label: str, results: Mapping[str, Any]) -> None:
        cells = []
        for name, result in results.items():
            texts = [
                f"{100 * result[key]:9.2f}" if key == "eer" else f"{result[key]:9.3f}"
                for key in HEADS
                if key in result
            ]
            cells.append(("".join(texts) or "-").rjust(widths[name]))
        print(label.rjust(margin) + "".join(cells))

    counts = f"{trials['target']} target, {trials['impostor']} impostor trials"
    print(f"{counts}; corpus: {report['corpus']}")
    print("size".rjust(margin) + "".join(name.rjust(widths[name]) for name in models))
    print(" " * margin + "".join(heads[name].rjust(widths[name]) for name in models))
    for size in sorted({int(size) for results in models.values() for size in results}):
        print_row(str(size), {name: found.get(str(size), {}) for name, found in models.items()})
    if teachers:
        print("teachers, at full size")
    for name, result in teachers.items():
        print_row(labels[name], {"student": result})
    if "comparison" in report:
        _print_comparison(report["comparison"])


def _print_comparison(comparison: Mapping[str, Any]) -> None:
    """One line per size; percent points, with the 95 % interval."""
    print(f"EER less that of {comparison['source']}, in percent points")
    for size, found in comparison["dims"].items():
        other, low_high = comparison["size"] or size, found.get("difference_ci")
        interval = f" ({100 * low_high[0]:+.2f} to {100 * low_high[1]:+.2f})" if low_high else ""
        print(f"{size:>6} against {other}: {100 * found['difference']:+.2f}{interval}")
