import json

import numpy as np
import pytest
import torch
from reference_metrics import reference_cllr
from scipy.optimize import minimize
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.calibration import (
    Calibration,
    log_durations,
    read_calibrations,
    s_norm,
    write_calibrations,
)
from speechbrain_mrl.evaluation.metrics import act_dcf, cllr, eer, min_dcf
from speechbrain_mrl.evaluation.verification import Trials, score_trials


@pytest.fixture
def voices():
    return toy_trials()


@pytest.fixture
def cohort():
    return toy_trials(n_speakers=8, prefix="c", seed=9)[1]  # (40, 16)


def reference_s_norm(embeddings, trials, cohort, size, top):
    """Utterance by utterance, every cosine by itself."""

    def cosine(a, b):
        return (a @ b / np.sqrt((a @ a) * (b @ b))).item()

    utterances, impostors = embeddings[:, :size].numpy(), cohort[:, :size].numpy()
    statistics = []
    for utterance in utterances:
        closest = sorted((cosine(utterance, impostor) for impostor in impostors), reverse=True)[
            :top
        ]
        statistics.append((np.mean(closest), np.std(closest)))
    scores = []
    for a, b in zip(trials.enrol, trials.test):
        score = cosine(utterances[a], utterances[b])
        scores.append(sum((score - m) / s for m, s in (statistics[a], statistics[b])) / 2)
    return scores


@pytest.mark.parametrize("top", [None, 40, 7])
def test_s_norm_is_that_of_every_clip_by_itself_at_every_size(voices, cohort, top, monkeypatch):
    monkeypatch.setattr("speechbrain_mrl.evaluation.calibration.CLIPS_PER_CHUNK", 13)
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4, 16])
    normalised = s_norm(scores, embeddings, trials, cohort, top)
    for size in (4, 16):
        expected = reference_s_norm(embeddings, trials, cohort, size, top or 40)
        np.testing.assert_allclose(normalised[size], expected, atol=1e-9)


def test_s_norm_lowers_the_scores_of_a_clip_that_is_like_everyone():
    trials = Trials.parse(["0 plain/1 a/1", "1 a/1 a/2"])
    cohort = torch.tensor([[1.0, 0.2], [1.0, -0.1], [1.0, 0.0]])
    embeddings = torch.tensor([[1.0, 0.1], [0.8, 0.6], [0.5, 0.7]])
    scores = score_trials(embeddings, trials, [2])
    before, after = scores[2], s_norm(scores, embeddings, trials, cohort)[2]
    assert after[0] - after[1] < before[0] - before[1]


@pytest.mark.parametrize("top", [1, 41, 0])
def test_a_top_that_the_cohort_does_not_have_is_refused(voices, cohort, top):
    trials, embeddings = voices
    with pytest.raises(ValueError, match=rf"top must be in 2\.\.40.*got {top}"):
        s_norm(score_trials(embeddings, trials, [4]), embeddings, trials, cohort, top)


def test_a_cohort_of_another_model_or_of_one_voice_is_refused(voices, cohort):
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4])
    with pytest.raises(ValueError, match="of one size, got 16 and 8"):
        s_norm(scores, embeddings, trials, cohort[:, :8])
    with pytest.raises(ValueError, match="utterance 's0/0' has the same score"):
        s_norm(scores, embeddings, trials, cohort[:1].repeat(5, 1))


@pytest.fixture
def scored():
    """Scores that are worth less in short trials, their labels and log durations."""
    rng = np.random.default_rng(5)
    labels = np.arange(4000) % 5 == 0
    quality = np.sort(rng.uniform(0, 3, (4000, 2)), axis=1)
    scores = 0.3 + 0.1 * rng.normal(size=4000) + labels * (0.1 + 0.1 * quality[:, 0])
    return scores, labels, quality


@pytest.mark.parametrize("p_target", [0.01, 0.5])
@pytest.mark.parametrize("with_quality", [False, True])
def test_calibration_is_prior_weighted_logistic_regression(scored, p_target, with_quality):
    scores, labels, quality = scored
    fitted = Calibration.fit(scores, labels, quality if with_quality else None, p_target)
    inputs = np.column_stack([scores, quality]) if with_quality else scores[:, None]
    weights = np.where(labels, p_target / labels.sum(), (1 - p_target) / (~labels).sum())
    signs = np.where(labels, 1.0, -1.0)

    def loss(theta):  # its definition, minimised by another library
        return weights @ np.logaddexp(0, -signs * (theta[0] + inputs @ theta[1:]))

    theta = minimize(loss, np.zeros(1 + inputs.shape[1]), tol=1e-12).x
    expected = theta[0] + inputs @ theta[1:] - np.log(p_target / (1 - p_target))
    np.testing.assert_allclose(
        fitted(scores, quality if with_quality else None), expected, atol=1e-3
    )


def test_true_log_likelihood_ratios_come_back():
    """Normal scores of equal variance: the ratio is a line, known in closed form."""
    rng = np.random.default_rng(0)
    labels = np.arange(200_000) % 2 == 0
    scores = rng.normal(np.where(labels, 0.7, 0.3), 0.1)
    fitted = Calibration.fit(scores, labels, p_target=0.5)
    assert fitted.scale == pytest.approx(0.4 / 0.01, rel=0.02)  # (mu1 - mu0) / variance
    assert fitted.offset == pytest.approx(-0.5 * (0.49 - 0.09) / 0.01, rel=0.02)
    assert cllr(fitted(scores), labels) == pytest.approx(reference_cllr(fitted(scores), labels))


def test_calibrating_makes_the_bayes_threshold_nearly_the_best(scored):
    scores, labels, quality = scored
    half = np.arange(4000) < 2000
    fitted = Calibration.fit(scores[half], labels[half], p_target=0.05)
    llrs, rest = fitted(scores[~half]), labels[~half]
    assert act_dcf(llrs, rest, 0.05) < 1.1 * min_dcf(llrs, rest, 0.05)
    assert cllr(llrs, rest) < 0.6 < cllr(scores[~half], rest)


def test_quality_measures_help_where_they_matter(scored):
    scores, labels, quality = scored
    plain = Calibration.fit(scores, labels)(scores)
    informed = Calibration.fit(scores, labels, quality)(scores, quality)
    assert cllr(informed, labels) < cllr(plain, labels)
    assert eer(plain, labels)[0] == pytest.approx(eer(scores, labels)[0])  # a line keeps the order


def test_the_share_of_targets_in_the_list_does_not_matter(scored):
    scores, labels, _ = scored
    more = np.repeat(np.arange(4000), np.where(labels, 3, 1))
    once = Calibration.fit(scores, labels)
    thrice = Calibration.fit(scores[more], labels[more])
    assert thrice.scale == pytest.approx(once.scale, rel=1e-6)
    assert thrice.offset == pytest.approx(once.offset, rel=1e-6)


def test_a_perfectly_separated_list_gives_finite_ratios():
    fitted = Calibration.fit([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0])
    assert np.isfinite([fitted.offset, fitted.scale]).all() and fitted.scale > 0


def test_a_measure_that_never_changes_is_left_out(scored):
    scores, labels, _ = scored
    plain = Calibration.fit(scores, labels)
    fitted = Calibration.fit(scores, labels, np.full((4000, 1), 3.7))
    assert fitted.quality == (0.0,)
    assert fitted.scale == pytest.approx(plain.scale)


def test_a_measure_outside_the_fitted_range_counts_as_its_nearest_end(scored):
    scores, labels, quality = scored
    fitted = Calibration.fit(scores, labels, quality)
    ends = np.array([quality.min(axis=0), quality.max(axis=0)])
    far = np.array([[-5.0, -4.0], [8.0, 9.0]])
    np.testing.assert_array_equal(fitted([0.5, 0.5], far), fitted([0.5, 0.5], ends))
    inside = quality[:10]
    assert (fitted(scores[:10], inside) != fitted(scores[:10], inside + 0.01)).all()


def test_a_file_without_bounds_is_read_as_it_was_meant(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(
        '{"scores": "cosine", "dims": {"64": {"offset": 1, "scale": 2, "quality": [3, 4]}}}'
    )
    fitted = read_calibrations(path)[0][64]
    assert fitted([0.5], np.array([[10.0, 100.0]])) == [1 + 1 + 30 + 400]


def test_what_does_not_fit_a_calibration_is_refused(scored):
    scores, labels, quality = scored
    with pytest.raises(ValueError, match="with 0 quality measures, got 2"):
        Calibration(0.0, 1.0)(scores, quality)
    with pytest.raises(ValueError, match="with 1 quality measures, got 0"):
        Calibration(0.0, 1.0, (2.0,))(scores)
    with pytest.raises(ValueError, match="p_target must lie inside"):
        Calibration.fit(scores, labels, p_target=1.0)
    with pytest.raises(ValueError, match="0 zeros"):
        Calibration.fit(scores[labels], labels[labels])


def test_durations_do_not_depend_on_which_clip_comes_first():
    trials = Trials.parse(["1 a/1 a/2", "0 b/1 a/1"])
    measures = log_durations(trials, {"a/1": np.e, "a/2": 1.0, "b/1": np.e**3})
    np.testing.assert_allclose(measures, [[0, 1], [1, 3]], atol=1e-12)


def test_a_clip_without_duration_is_named():
    trials = Trials.parse(["1 a/1 a/2", "0 b/1 a/1"], source="list.txt")
    with pytest.raises(ValueError, match="list.txt, line 2: utterance 'b/1'"):
        log_durations(trials, {"a/1": 1.0, "a/2": 1.0})


def test_a_calibration_travels_as_plain_numbers(scored, tmp_path):
    scores, labels, quality = scored
    fitted = {64: Calibration.fit(scores, labels, quality), 256: Calibration.fit(scores, labels)}
    write_calibrations(fitted, tmp_path / "calibration.json", "as_norm")
    assert read_calibrations(tmp_path / "calibration.json") == (fitted, "as_norm")
    found = json.loads((tmp_path / "calibration.json").read_text())["dims"]["64"]
    by_hand = found["offset"] + found["scale"] * scores + quality @ found["quality"]
    np.testing.assert_allclose(fitted[64](scores, quality), by_hand)
