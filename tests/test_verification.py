"""Trial lists, scores, error rates, baselines, report and plots of the verification module."""

import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from speechbrain_mrl.verification import (
    Trials,
    eer,
    evaluate,
    make_report,
    min_dcf,
    plot_det,
    plot_eer_by_dim,
    plot_scores,
    print_report,
    read_trials,
    score_trials,
    teacher_baselines,
    truncation_baselines,
    write_report,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def voices(rng):
    """Every trial among 12 speakers' 5 clips each, and float64 embeddings (60, 16)."""
    speakers = rng.normal(size=(12, 1, 16))
    embeddings = torch.from_numpy((speakers + rng.normal(size=(12, 5, 16))).reshape(60, 16))
    names = [f"s{speaker}/{clip}" for speaker in range(12) for clip in range(5)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    trials = Trials.parse(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}" for a, b in pairs)
    return trials, trials.stack(dict(zip(names, embeddings)))


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


def score_lists():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    smooth = rng.normal(size=300) + labels
    few_targets = np.arange(300) < 7
    return {
        "distinct": (smooth, labels),
        "many ties": (smooth.round(), labels),
        "two values": ((smooth > 0.5).astype(float), labels),
        "all equal": (np.full(300, 0.2), labels),
        "perfectly separated": (labels + rng.uniform(0, 0.5, 300), labels),
        "perfectly wrong": (-labels - rng.uniform(0, 0.5, 300), labels),
        "few targets": (rng.normal(size=300).round(1) + few_targets, few_targets),
        "integers": (smooth.round().astype(int), labels),
        "one trial of each": (np.array([0.1, 0.9]), np.array([1, 0])),
    }


@pytest.mark.parametrize("name", score_lists())
def test_eer_is_that_of_the_roc_polyline(name):
    scores, labels = score_lists()[name]
    assert eer(scores, labels)[0] == pytest.approx(reference_eer(scores, labels), abs=1e-6)


@pytest.mark.parametrize("costs", [(0.01, 1, 1), (0.05, 1, 1), (0.5, 10, 1), (0.9, 1, 3)])
@pytest.mark.parametrize("name", score_lists())
def test_min_dcf_is_the_smallest_cost_of_all_thresholds(name, costs):
    scores, labels = score_lists()[name]
    expected = reference_min_dcf(scores, labels, *costs)
    assert min_dcf(scores, labels, *costs) == pytest.approx(expected, abs=1e-9)


def test_eer_of_equal_scores_is_one_half_and_of_separated_scores_zero():
    assert eer([0.2, 0.2, 0.2], [1, 0, 0]) == (0.5, 0.2)
    assert eer([0.7, 0.6, 0.5], [1, 1, 0]) == (0.0, 0.6)


def test_eer_is_interpolated_between_tied_thresholds():
    # accept nothing: FAR 0, FRR 1; accept the tie: FAR 1/3, FRR 0; they meet at a quarter
    rate, threshold = eer([0.9, 0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0, 0])
    assert rate == pytest.approx(0.25, abs=1e-12)
    assert threshold == 0.9


def test_threshold_gives_the_rates_that_eer_promises(rng):
    labels = rng.integers(0, 2, 2000)
    scores = rng.normal(size=2000) + 2 * labels
    rate, threshold = eer(scores, labels)
    accepted = scores >= threshold
    assert accepted[labels == 0].mean() == pytest.approx(rate, abs=2e-3)
    assert (~accepted[labels == 1]).mean() == pytest.approx(rate, abs=2e-3)


@pytest.mark.parametrize("metric", [eer, min_dcf])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "got 2 ones, 0 zeros"),
        ([0.1, 0.2], [0, 0], "got 0 ones, 2 zeros"),
        ([], [], "got 0 ones, 0 zeros"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "got 1 ones, 1 zeros among 3"),
        ([0.1, float("nan")], [0, 1], "1 of 2 scores are NaN"),
        ([0.1, 0.2], [1], r"got \(2,\) and \(1,\)"),
    ],
)
def test_lists_without_a_defined_rate_are_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


@pytest.mark.parametrize("costs", [{"p_target": 0}, {"p_target": 1}, {"c_miss": 0}, {"c_fa": -1}])
def test_min_dcf_refuses_meaningless_costs(costs):
    with pytest.raises(ValueError, match="p_target must lie inside 0..1"):
        min_dcf([0.1, 0.2], [0, 1], **costs)


def test_trials_are_read_as_indices_into_unique_clips(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_bytes(b"1 a/x.wav a/y.wav\r\n0 a/x.wav\tb/z.wav\n0 b/z.wav a/y.wav\n\n")
    trials = read_trials(path)
    assert trials.clip_ids == ["a/x.wav", "a/y.wav", "b/z.wav"]
    assert trials.enrol.tolist() == [0, 0, 2] and trials.test.tolist() == [1, 2, 1]
    assert trials.labels.tolist() == [True, False, False]
    assert trials.enrol.dtype == np.int32 and trials.labels.dtype == bool


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n0 a\n", r"trials.txt, line 2: expected .* got '0 a'"),
        ("1 a b\n0 a b c\n", r"trials.txt, line 2: .* got '0 a b c'"),
        ("1 a b\n\n0 a c\n", r"trials.txt, line 2: .* got ''"),
        ("target a b\n", r"trials.txt, line 1: .* got 'target a b'"),
        ("", r"trials.txt, line 1: .* got ''"),
        ("1 a b\n1 a c\n", r"trials.txt, lines 1 to 2: 2 target trials .* among 2"),
        ("0 a b\n", r"trials.txt, lines 1 to 1: 0 target trials .* among 1"),
    ],
)
def test_a_broken_trial_list_is_refused_by_path_and_line(tmp_path, text, message):
    path = tmp_path / "trials.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trials(path)


def test_missing_clips_are_counted_and_the_first_trial_in_need_is_named():
    trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1", "0 b/1 c/1"], source="list.txt")
    embeddings = {"a/1": torch.ones(2), "a/2": torch.ones(2)}
    with pytest.raises(ValueError, match=r"list.txt, line 2: clip 'b/1'.*2 of 4.*which 2 trials"):
        trials.stack(embeddings)


def test_scores_are_the_cosines_of_prefixes(voices, monkeypatch):
    monkeypatch.setattr("speechbrain_mrl.verification.TRIALS_PER_CHUNK", 100)
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [3, 8, 16])
    assert list(scores) == [3, 8, 16]
    for size, got in scores.items():
        prefixes = embeddings[:, :size]
        expected = torch.cosine_similarity(prefixes[trials.enrol], prefixes[trials.test])
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-12)


def test_an_all_zero_prefix_scores_zero():
    trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    embeddings = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    scores = score_trials(embeddings, trials, [1, 2])
    assert scores[1].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(scores[2], [0.5**0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_refused_by_clip(value):
    trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    embeddings = torch.ones(3, 2)
    embeddings[1, 1] = value
    with pytest.raises(ValueError, match="1 embeddings hold NaN or infinity.*'a/2'"):
        score_trials(embeddings, trials, [1])


@pytest.mark.parametrize(
    ("shape", "mrl_dims", "message"),
    [
        ((2, 4), [2], r"one row for each of 3 clips, got \(2, 4\)"),
        ((3, 4), [2, 8], r"\(2, 8\) do not fit embeddings of size 4"),
        ((3, 4), [4, 2], "ascending order"),
        ((3, 4), [], "ascending order"),
    ],
)
def test_embeddings_or_sizes_that_do_not_fit_are_refused(shape, mrl_dims, message):
    trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1"])
    with pytest.raises(ValueError, match=message):
        score_trials(torch.ones(shape), trials, mrl_dims)


def test_evaluate_reports_every_size_as_if_measured_alone(voices):
    trials, embeddings = voices
    results = evaluate(embeddings, trials, [4, 16])
    for size in (4, 16):
        prefixes = torch.nn.functional.normalize(embeddings[:, :size], dim=1)
        scores = (prefixes[trials.enrol] * prefixes[trials.test]).sum(1).numpy()
        result = results[str(size)]
        assert set(result) == {"eer", "min_dcf", "threshold"}
        assert result["eer"] == pytest.approx(reference_eer(scores, trials.labels), abs=1e-6)
        expected = reference_min_dcf(scores, trials.labels, 0.01, 1, 1)
        assert result["min_dcf"] == pytest.approx(expected, abs=1e-6)


def test_bootstrap_weights_equal_a_list_with_trials_repeated(voices):
    from speechbrain_mrl.verification import BOOTSTRAP_SEED

    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [16])[16]
    interval = evaluate(embeddings, trials, [16], n_bootstrap=1)["16"]["eer_ci"]
    names = sorted({clip_id.split("/")[0] for clip_id in trials.clip_ids})
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(12, [1 / 12] * 12, 1)[0]
    count = dict(zip(names, drawn))
    repeats = []
    for enrol, test, same in zip(trials.enrol, trials.test, trials.labels):
        a, b = (count[trials.clip_ids[i].split("/")[0]] for i in (enrol, test))
        repeats.append(a if same else a * b)
    expected = reference_eer(np.repeat(scores, repeats), np.repeat(trials.labels, repeats))
    assert interval == pytest.approx([expected, expected], abs=1e-6)


def test_bootstrap_interval_is_reproducible_and_holds_the_estimate(voices):
    trials, embeddings = voices
    first = evaluate(embeddings, trials, [4, 16], n_bootstrap=50)
    assert first == evaluate(embeddings, trials, [4, 16], n_bootstrap=50)
    for result in first.values():
        for metric in ("eer", "min_dcf"):
            low, high = result[f"{metric}_ci"]
            assert low <= result[metric] <= high
        assert result["eer_ci"][0] < result["eer_ci"][1]


def test_bootstrap_without_speakers_in_the_clip_ids_is_refused():
    trials = Trials.parse(["1 clip1 clip2", "0 clip1 clip3"])
    with pytest.raises(ValueError, match="line 1: the label contradicts.*n_bootstrap=0"):
        evaluate(torch.eye(3), trials, [3], n_bootstrap=10)


def test_pca_cut_centres_and_rotates_by_the_fit_clips_and_naive_cut_does_not(voices, rng):
    trials, embeddings = voices
    embeddings = embeddings + 1.0
    fit = torch.from_numpy(rng.normal(size=(200, 16)) * np.linspace(1, 3, 16) + 0.5)
    cuts = truncation_baselines(embeddings, fit, trials, [4, 16, 32])
    directions = np.linalg.svd((fit - fit.mean(0)).numpy())[2]
    rotated = (embeddings - fit.mean(0)) @ torch.from_numpy(directions.T)
    for name, teacher in (("naive_truncation", embeddings), ("pca_truncation", rotated)):
        assert list(cuts[name]) == ["4", "16"]  # the teacher has no 32
        for size in (4, 16):
            prefixes = torch.nn.functional.normalize(teacher[:, :size], dim=1)
            scores = (prefixes[trials.enrol] * prefixes[trials.test]).sum(1).numpy()
            expected = reference_eer(scores, trials.labels)
            assert cuts[name][str(size)]["eer"] == pytest.approx(expected, abs=1e-6)


def test_teacher_smaller_than_every_size_has_no_cuts(voices):
    trials, embeddings = voices
    cuts = truncation_baselines(embeddings, embeddings, trials, [32])
    assert cuts == {"naive_truncation": {}, "pca_truncation": {}}


@pytest.fixture
def report(voices, rng):
    trials, embeddings = voices
    noise = torch.from_numpy(rng.normal(size=embeddings.shape))
    teachers = {"worse": (embeddings + 2 * noise)[:, :12], "better": embeddings}
    baselines = teacher_baselines(teachers, teachers, trials, [4, 8, 16, 32])
    dims = {"16": {"eer": np.float32(0.25), "min_dcf": np.float64(0.5), "threshold": 0.1}}
    return make_report(dims, trials, baselines, corpus="demo", params=np.int64(7), seconds=1.5)


def test_report_has_the_promised_layout_and_plain_values(report):
    assert list(report) == [
        "dims", "baselines", "trials", "corpus", "params", "seconds", "versions",
    ]  # fmt: skip
    baselines = report["baselines"]
    assert baselines["teacher"] == "better"
    assert {name: result["dim"] for name, result in baselines["teachers"].items()} == {
        "worse": 12,
        "better": 16,
    }
    assert list(baselines["naive_truncation"]) == list(baselines["pca_truncation"])
    assert list(baselines["naive_truncation"]) == ["4", "8", "16"]
    assert baselines["teachers"]["better"]["eer"] == baselines["naive_truncation"]["16"]["eer"]
    assert report["trials"] == {"target": 120, "impostor": 1650}  # 12 * C(5, 2), C(60, 2) - 120
    assert type(report["dims"]["16"]["eer"]) is float and type(report["params"]) is int
    assert torch.__version__.startswith(report["versions"]["torch"])  # without the +cu130


def test_written_report_reads_back_and_leaves_no_other_file(report, tmp_path):
    path = write_report(report, tmp_path / "new" / "folder")
    assert json.loads(path.read_text()) == report
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_nan_is_refused_and_the_old_report_survives(report, tmp_path):
    path = write_report(report, tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({**report, "seconds": float("nan")}, tmp_path)
    assert json.loads(path.read_text()) == report


def test_printed_report_is_an_aligned_table_in_percent(report, capsys):
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "120 target, 1650 impostor trials; corpus: demo"
    assert lines[1].split("  ")[-1].strip() == "better, PCA cut"
    by_size = {line.split()[0]: line for line in lines[3:6]}
    assert list(by_size) == ["4", "8", "16"]
    assert by_size["4"].split()[1] == "-"  # the student has 16 only
    assert by_size["16"].split()[1:3] == ["25.00", "0.500"]
    assert len({len(line) for line in lines[1:6]}) == 1
    percent = 100 * report["baselines"]["teachers"]["worse"]["eer"]
    assert lines[-2].split()[:3] == ["worse", "(12)", f"{percent:.2f}"]


def test_plots_are_written_without_touching_the_callers_matplotlib(report, voices, tmp_path):
    trials, embeddings = voices
    backend, settings = matplotlib.get_backend(), dict(matplotlib.rcParams)
    scores = score_trials(embeddings, trials, [4, 16])
    plot_eer_by_dim(report, tmp_path / "eer.png")
    plot_det(scores, trials.labels, tmp_path / "det.png")
    plot_scores(scores[4], trials.labels, 0.3, tmp_path / "scores.png")
    for name in ("eer.png", "det.png", "scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == settings


def test_det_numbers_are_the_rates_at_their_thresholds(voices, tmp_path):
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4])
    plot_det(scores, trials.labels, tmp_path / "det.png")
    points = np.genfromtxt(tmp_path / "det.csv", delimiter=",", names=True)
    for point in points[:: len(points) // 10]:
        accepted = scores[4] >= point["threshold"] - 1e-6  # six digits are written
        far, frr = accepted[~trials.labels].mean(), 1 - accepted[trials.labels].mean()
        assert point["false_accept_rate"] == pytest.approx(far, abs=2e-3)
        assert point["false_reject_rate"] == pytest.approx(frr, abs=1e-2)


def test_plots_of_a_perfect_list_are_written(tmp_path):
    plot_det({2: np.array([0.9, 0.1])}, [1, 0], tmp_path / "det.png")
    plot_scores([0.9, 0.1], [1, 0], 0.9, tmp_path / "scores.png")


def test_import_needs_neither_matplotlib_nor_sklearn():
    code = (
        "import sys, speechbrain_mrl.verification; "
        "sys.exit(bool({'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
