import json

import numpy as np
import pytest
import torch
from reference_metrics import reference_eer
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.report import (
    make_report,
    print_report,
    teacher_baselines,
    truncation_baselines,
    write_report,
)
from speechbrain_mrl.evaluation.verification import compare


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def voices():
    return toy_trials()


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


def test_steps_of_a_verification_are_columns_and_calibrated_ones_have_their_costs(report, capsys):
    step = {"eer": 0.125, "min_dcf": 0.25}
    dims = {"16": report["dims"]["16"] | {"as_norm": step}}
    dims["16"]["calibrated"] = step | {"act_dcf": 0.75, "cllr": 0.375}
    print_report({**report, "dims": dims})
    lines = capsys.readouterr().out.splitlines()
    assert "as_norm" in lines[1] and "calibrated" in lines[1]
    assert lines[2].split().count("actDCF") == lines[2].split().count("Cllr") == 1
    row = next(line for line in lines if line.split()[0] == "16").split()
    assert row[3:9] == ["12.50", "0.250", "12.50", "0.250", "0.750", "0.375"]
    assert len({len(line) for line in lines[1:6]}) == 1


def test_a_comparison_is_printed_in_percent_points(report, voices, capsys):
    trials, embeddings = voices
    dims = compare(embeddings, embeddings, trials, [4], n_bootstrap=5, size_b=16)
    dims["4"] |= {"difference": 0.0125, "difference_ci": [-0.005, 0.02]}
    print_report({**report, "comparison": {"source": "other", "size": 16, "dims": dims}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "EER less that of other, in percent points"
    assert lines[-1].split() == "4 against 16: +1.25 (-0.50 to +2.00)".split()
