import csv
import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.baselines import evaluate_student
from speechbrain_mrl.evaluation.duration import eer_by_duration
from speechbrain_mrl.evaluation.plots import plot_det, plot_eer_by_dim, plot_scores, write_plots
from speechbrain_mrl.evaluation.report import make_report
from speechbrain_mrl.evaluation.verification import evaluate_scores, score_trials


@pytest.fixture
def voices():
    return toy_trials()


@pytest.fixture
def scores(voices):
    trials, embeddings = voices
    return score_trials(embeddings, trials, [4, 16])


@pytest.fixture
def report(voices, scores):
    trials, embeddings = voices
    dims = evaluate_scores(scores, trials, n_bootstrap=5)
    for result in dims.values():
        result["as_norm"] = {"eer": 0.0625}
    teachers = {"b2": embeddings[:, :12]}
    found = evaluate_student(embeddings, trials, [4, 16], -embeddings, teachers, teachers, 5)
    found["dims"] = dims
    report = make_report(trials=trials, corpus="demo", params=7, seconds=1.5, **found)
    seconds = {clip_id: 1.0 + int(clip_id[-1]) for clip_id in trials.clip_ids}
    return {**report, "by_duration": eer_by_duration(scores, trials, seconds)}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_plot_has_its_numbers_beside_it_and_leaves_matplotlib_as_it_was(
    report, scores, voices, tmp_path
):
    backend, settings = matplotlib.get_backend(), dict(matplotlib.rcParams)
    write_plots(report, scores, voices[0].labels, tmp_path)
    names = ["det", "eer_by_dim", "eer_by_duration", "scores"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for name in names for suffix in (".png", ".csv")
    )
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == settings


def test_eer_numbers_are_the_reports(report, tmp_path):
    plot_eer_by_dim(report, tmp_path / "eer.png")
    found = {(row["name"], row["size"]): float(row["eer"]) for row in rows(tmp_path / "eer.csv")}
    baselines = report["baselines"]
    expected = {
        ("student", "4"): report["dims"]["4"]["eer"],
        ("student", "16"): report["dims"]["16"]["eer"],
        ("as_norm", "4"): 0.0625,
        ("as_norm", "16"): 0.0625,
        ("student before training", "4"): baselines["start"]["4"]["eer"],
        ("student before training", "16"): baselines["start"]["16"]["eer"],
        ("ensemble, PCA", "4"): baselines["ensemble"]["4"]["eer"],
        ("ensemble, PCA", "16"): baselines["ensemble"]["16"]["eer"],
        ("b2, truncated", "4"): baselines["naive_truncation"]["4"]["eer"],
        ("b2, PCA", "4"): baselines["pca_truncation"]["4"]["eer"],
        ("teacher b2", "12"): baselines["teachers"]["b2"]["eer"],
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_det_numbers_are_the_rates_at_their_thresholds(scores, voices, tmp_path):
    labels = voices[0].labels
    plot_det(scores, labels, tmp_path / "det.png")
    points = [row for row in rows(tmp_path / "det.csv") if row["size"] == "4"]
    for point in points[:: len(points) // 10]:
        accepted = scores[4] >= float(point["threshold"]) - 1e-6  # six digits are written
        far, frr = accepted[~labels].mean(), 1 - accepted[labels].mean()
        assert float(point["false_accept_rate"]) == pytest.approx(far, abs=2e-3)
        assert float(point["false_reject_rate"]) == pytest.approx(frr, abs=1e-2)


def test_score_numbers_count_every_trial(scores, voices, tmp_path):
    plot_scores(scores, voices[0].labels, {4: 0.3, 16: 0.2}, tmp_path / "scores.png")
    for size, group in itertools.groupby(rows(tmp_path / "scores.csv"), lambda row: row["size"]):
        group = list(group)
        assert sum(int(row["target"]) for row in group) == 120
        assert sum(int(row["impostor"]) for row in group) == 1650
        middle = float(group[30]["from_score"])
        below = sum(int(row["impostor"]) for row in group[:30])
        expected = np.sum(scores[int(size)][~voices[0].labels] < middle)
        assert below == pytest.approx(expected, abs=2)  # a score on the edge, to six digits


def test_duration_numbers_are_the_reports(report, scores, voices, tmp_path):
    write_plots(report, scores, voices[0].labels, tmp_path)
    found = rows(tmp_path / "eer_by_duration.csv")
    bins = report["by_duration"]
    assert len(found) == 2 * len(bins)
    for row, (size, one) in zip(found, itertools.product(["4", "16"], bins)):
        assert row["size"] == size and float(row["eer"]) == pytest.approx(one["eer"][size], 1e-5)
        assert [float(row["from_seconds"]), float(row["to_seconds"])] == one["seconds"]


def test_plots_of_a_perfect_list_are_written(tmp_path):
    plot_det({2: np.array([0.9, 0.1])}, [1, 0], tmp_path / "det.png")
    plot_scores({2: np.array([0.9, 0.1])}, [1, 0], {2: 0.9}, tmp_path / "scores.png")


def test_import_needs_neither_matplotlib_nor_sklearn():
    code = (
        "import sys, speechbrain_mrl.evaluation.plots, speechbrain_mrl.evaluation.calibration; "
        "sys.exit(bool({'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
