import numpy as np
import pytest
from reference_metrics import reference_act_dcf, reference_cllr, reference_eer, reference_min_dcf

from speechbrain_mrl.evaluation.metrics import Ranking, act_dcf, cllr, eer, min_dcf


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


def test_threshold_gives_the_rates_that_eer_promises():
    rng = np.random.default_rng(3)
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


def test_labels_of_one_kind_are_refused_with_what_labels_are():
    with pytest.raises(
        ValueError, match=r"^labels must be 1 \(target\) or 0 \(impostor\), .*; got"
    ):
        Ranking([0.1, 0.2], [1, 1])


def test_costs_not_given_are_those_of_a_prior_of_one_percent_and_equal_errors():
    # one impostor of 1000 above the targets: a FAR of 0.001 at odds of 99
    llrs, labels = np.array([9.0] + [0.0] * 999 + [5.0, 5.0]), np.arange(1002) >= 1000
    summary = Ranking(llrs, labels).summary()
    assert min_dcf(llrs, labels) == act_dcf(llrs, labels) == pytest.approx(0.099)
    assert summary == pytest.approx({"eer": 0.001, "min_dcf": 0.099, "min_dcf_0.05": 0.019})


def test_of_two_thresholds_the_one_whose_rates_are_closer_is_taken():
    # at 0.8 FAR 0 and FRR 1/3, at 0.7 FAR 1 and FRR 1/3
    assert eer([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]) == (pytest.approx(1 / 3), 0.8)


@pytest.mark.parametrize("costs", [{"p_target": 0}, {"p_target": 1}, {"c_miss": 0}, {"c_fa": 0}])
def test_min_dcf_refuses_meaningless_costs(costs):
    with pytest.raises(ValueError, match=r"^p_target must lie inside 0\.\.1"):
        min_dcf([0.1, 0.2], [0, 1], **costs)


COSTS = [(0.01, 1, 1), (0.05, 1, 1), (0.5, 10, 1), (0.9, 1, 3)]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("name", score_lists())
def test_act_dcf_is_the_cost_of_the_bayes_decisions(name, costs):
    llrs, labels = score_lists()[name]
    llrs = 3.0 * llrs
    expected = reference_act_dcf(llrs, labels, *costs)
    assert act_dcf(llrs, labels, *costs) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", score_lists())
def test_cllr_is_the_mean_surprise_in_bits(name):
    llrs, labels = score_lists()[name]
    assert cllr(llrs, labels) == pytest.approx(reference_cllr(llrs, labels), abs=1e-9)


def test_a_trial_at_the_bayes_threshold_is_accepted():
    at_even_odds = 0.0
    assert act_dcf([at_even_odds, at_even_odds], [1, 0], p_target=0.5) == 1.0  # one false accept
    assert act_dcf([at_even_odds, -1e-9], [1, 0], p_target=0.5) == 0.0


def test_act_dcf_is_never_below_min_dcf():
    for scores, labels in score_lists().values():
        assert act_dcf(scores, labels) >= min_dcf(scores, labels) - 1e-12


def test_certain_and_wrong_ratios_cost_their_bits_without_overflow():
    assert cllr([5000.0, -5000.0], [1, 0]) == 0.0
    assert cllr([-5000.0, 5000.0], [1, 0]) == pytest.approx(5000 / np.log(2))


@pytest.mark.parametrize("metric", [act_dcf, cllr])
def test_ratios_of_one_kind_of_trial_are_refused(metric):
    with pytest.raises(ValueError, match="got 2 ones, 0 zeros"):
        metric([0.1, 0.2], [1, 1])


def test_weights_count_trials_as_if_they_were_repeated():
    rng = np.random.default_rng(0)
    scores, labels = score_lists()["many ties"]
    times = rng.integers(0, 4, 300)
    weighted = Ranking(scores, labels).summary(times.astype(float), calibrated=True)
    scores, labels = np.repeat(scores, times), np.repeat(labels, times)
    assert weighted["eer"] == pytest.approx(reference_eer(scores, labels), abs=1e-6)
    for name, p_target in (("", 0.01), ("_0.05", 0.05)):
        expected = reference_min_dcf(scores, labels, p_target, 1, 1)
        assert weighted[f"min_dcf{name}"] == pytest.approx(expected, abs=1e-9)
        expected = reference_act_dcf(scores, labels, p_target, 1, 1)
        assert weighted[f"act_dcf{name}"] == pytest.approx(expected, abs=1e-9)
    assert weighted["cllr"] == pytest.approx(reference_cllr(scores, labels), abs=1e-9)


def test_threshold_of_a_false_accept_rate_is_the_lowest_that_keeps_it():
    impostors = np.arange(4000) / 4000
    ranking = Ranking(np.append(impostors, [2.0, 3.0]), np.append(np.zeros(4000), [1, 1]))
    # one percent is 40 impostors, 0.9900 to 0.99975; a permille is 4, too few to tell
    assert ranking.far_thresholds() == {"far_0.01": 0.99}


@pytest.mark.parametrize("n_impostors, told", [(3000, True), (2999, False)])
def test_a_rate_is_told_from_thirty_errors_on(n_impostors, told):
    scores = np.append(np.arange(n_impostors) / n_impostors, 2.0)
    found = Ranking(scores, np.arange(n_impostors + 1) == n_impostors).far_thresholds()
    assert ("far_0.01" in found) == told


def test_impostors_that_tie_past_the_rate_are_all_kept_out():
    impostors = np.append(np.zeros(3900), np.full(100, 0.5))  # 2.5 % share the highest score
    scores, labels = np.append(impostors, [0.7]), np.append(np.zeros(4000), [1])
    assert Ranking(scores, labels).far_thresholds() == {"far_0.01": 0.7}


def test_a_rate_that_only_infinity_keeps_has_no_threshold():
    assert Ranking(np.zeros(5000), np.arange(5000) < 10).far_thresholds() == {}
