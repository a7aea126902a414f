import json

import numpy as np
import pytest
import torch
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.baselines import evaluate_student
from speechbrain_mrl.evaluation.report import make_report, print_report, write_report
from speechbrain_mrl.evaluation.verification import compare, score_trials


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def voices():
    return toy_trials()


@pytest.fixture
def report(voices, rng):
    trials, embeddings = voices
    noise = torch.from_numpy(rng.normal(size=embeddings.shape))
    teachers = {"worse": (embeddings + 2 * noise)[:, :12], "better": embeddings}
    found = evaluate_student(
        torch.cat([embeddings, noise], dim=1), trials, [4, 8, 16, 32], noise, teachers, teachers, 20
    )
    found["dims"] = {"16": {"eer": np.float32(0.25), "min_dcf": np.float64(0.5), "threshold": 0.1}}
    found["gain"]["ensemble"] = {"16": {"eer": -0.0125, "eer_ci": [-0.02, 0.005]}}
    return make_report(trials=trials, corpus="demo", params=np.int64(7), seconds=1.5, **found)


def test_report_has_the_promised_layout_and_plain_values(report):
    assert list(report) == [
        "dims", "baselines", "gain", "trials", "corpus", "params", "seconds", "versions",
    ]  # fmt: skip
    baselines = report["baselines"]
    assert baselines["teacher"] == "better"
    assert {name: result["dim"] for name, result in baselines["teachers"].items()} == {
        "worse": 12,
        "better": 16,
    }
    assert list(baselines["naive_truncation"]) == list(baselines["pca_truncation"])
    assert list(baselines["naive_truncation"]) == ["4", "8", "16"]
    assert list(baselines["ensemble"]) == ["4", "8", "16", "32"]
    assert list(baselines["start"]) == ["4", "8", "16"]
    for row in ("naive_truncation", "pca_truncation", "ensemble", "start"):
        assert {"eer", "eer_ci", "min_dcf", "min_dcf_ci", "threshold"} <= set(baselines[row]["4"])
    assert list(report["gain"]) == ["start", "pca_truncation", "ensemble"]
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
    assert max(map(len, lines)) <= 100
    assert lines[0] == "120 target, 1650 impostor trials; corpus: demo"
    assert lines[1].split() == ["EER", "%", "4", "8", "16", "32"]
    eers = {line[:25].strip(): line[25:].split() for line in lines[2:7]}
    assert list(eers) == [
        "student", "student before training", "ensemble, PCA", "better, PCA", "better, truncated",
    ]  # fmt: skip
    assert eers["student"] == ["-", "-", "25.00", "-"]  # it has 16 only
    assert eers["better, PCA"][-1] == eers["student before training"][-1] == "-"
    ensemble = report["baselines"]["ensemble"]
    assert eers["ensemble, PCA"] == [f"{100 * one['eer']:.2f}" for one in ensemble.values()]
    assert lines[7].split() == ["minDCF", "4", "8", "16", "32"]
    assert lines[8].split() == ["student", "-", "-", "0.500", "-"]
    assert len({len(line) for line in lines[1:13]}) == 1
    percent = 100 * report["baselines"]["teachers"]["worse"]["eer"]
    assert lines[13] == "teachers, at full size      EER %  minDCF"
    assert lines[14].split()[:3] == ["worse", "(12)", f"{percent:.2f}"]


def test_printed_gain_is_in_percentage_points_with_its_interval(report, capsys):
    start, pca = report["gain"]["start"]["16"], report["gain"]["pca_truncation"]["16"]
    gain = {"start": {"16": start}, "pca_truncation": {"16": pca}}
    report["gain"] = gain | {"ensemble": report["gain"]["ensemble"]}
    report["baselines"]["pca_truncation"] = {"8": report["baselines"]["pca_truncation"]["8"]}
    print_report(report)
    *_, heads, row, note = capsys.readouterr().out.splitlines()
    assert heads.split("  ")[-1].strip() == "ensemble, PCA"
    assert row.split()[0] == "16" and row.endswith(" -1.25 (-2.00 to +0.50)")
    for one in (start, pca):
        low, high = one["eer_ci"]
        assert f" {100 * one['eer']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})" in row
    assert len(heads) == len(row) <= 100
    assert note.strip() == "sizes above 8 are compared with better, PCA at 8"


def test_steps_of_a_verification_are_rows_and_calibrated_ones_have_their_costs(report, capsys):
    step = {"eer": 0.125, "min_dcf": 0.25}
    dims = {"16": report["dims"]["16"] | {"as_norm": step}}
    dims["16"]["calibrated"] = step | {"act_dcf": 0.75, "cllr": 0.375}
    print_report({**report, "dims": dims})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["as_norm", "-", "-", "12.50", "-"] in lines
    assert ["as_norm", "-", "-", "0.250", "-"] in lines
    for heading, value in (("actDCF", "0.750"), ("Cllr", "0.375")):
        at = next(i for i, line in enumerate(lines) if line[0] == heading)
        assert lines[at + 1] == ["calibrated", "-", "-", value, "-"]
        assert len(lines[at + 2]) != 5 or lines[at + 2][0] == "Cllr"


def test_a_comparison_is_printed_in_percent_points(report, voices, capsys):
    trials, embeddings = voices
    one, other = (score_trials(embeddings, trials, [size]) for size in (4, 16))
    dims = compare(one, other, trials, n_bootstrap=5)
    dims["4"] |= {"difference": 0.0125, "difference_ci": [-0.005, 0.02]}
    print_report({**report, "comparison": {"source": "other", "size": 16, "dims": dims}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "EER minus that of other, in percentage points (95 % interval)"
    assert lines[-1].split() == "4 against 16: +1.25 (-0.50 to +2.00)".split()
