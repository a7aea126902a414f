"""Error rates by utterance length."""

import numpy as np
import pytest
from reference_metrics import reference_eer
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.duration import eer_by_duration
from speechbrain_mrl.evaluation.verification import Trials, evaluate_scores, score_trials


@pytest.fixture
def voices():
    return toy_trials()


def test_durations_split_the_trials_by_their_shorter_utterance(voices):
    trials, embeddings = voices
    seconds = {clip_id: 1.0 + int(clip_id[-1]) for clip_id in trials.clip_ids}
    scores = score_trials(embeddings, trials, [4, 16])
    bins = eer_by_duration(scores, trials, seconds, n_bins=4)
    # utterances of a speaker last 1 to 5 s: of ten pairs 4, 3, 2 and 1 have a shorter one of 1 to 4 s
    assert [found["seconds"] for found in bins] == [[1, 1], [2, 2], [3, 5]]
    assert [found["target"] for found in bins] == [12 * 4, 12 * 3, 12 * (2 + 1)]
    lengths = np.array([seconds[clip_id] for clip_id in trials.clip_ids])
    shorter = np.minimum(lengths[trials.enrol], lengths[trials.test])
    for found in bins:
        low, high = found["seconds"]
        inside = (shorter >= low) & (shorter <= high)
        assert found["impostor"] == (~trials.labels[inside]).sum()
        expected = reference_eer(scores[16][inside], trials.labels[inside])
        assert found["eer"]["16"] == pytest.approx(expected, abs=1e-6)


def test_utterances_of_one_length_are_one_bin(voices):
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4])
    (found,) = eer_by_duration(scores, trials, dict.fromkeys(trials.clip_ids, 3.0))
    assert found["seconds"] == [3.0, 3.0] and found["target"] == 120


def test_a_duration_without_impostors_has_no_eer():
    trials = Trials.parse(["1 a/1 a/2", "1 b/1 b/2", "0 a/1 b/1"])
    seconds = {"a/1": 9.0, "a/2": 1.0, "b/1": 9.0, "b/2": 9.0}
    short, long = eer_by_duration({4: np.array([0.9, 0.8, 0.1])}, trials, seconds, n_bins=2)
    assert (short["impostor"], short["eer"]) == (0, {})
    assert long["eer"] == {"4": 0.0}


def test_the_interval_of_a_single_bin_is_that_of_the_whole_list(voices):
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4, 16])
    whole = evaluate_scores(scores, trials, n_bootstrap=20)
    seconds = dict.fromkeys(trials.clip_ids, 3.0)
    (found,) = eer_by_duration(scores, trials, seconds, n_bootstrap=20)
    assert found["eer_ci"] == {size: whole[size]["eer_ci"] for size in ("4", "16")}


def test_bins_begin_at_half_seconds(voices):
    trials, embeddings = voices
    seconds = {clip_id: 2.0 + 0.37 * int(clip_id[-1]) for clip_id in trials.clip_ids}
    found = eer_by_duration(score_trials(embeddings, trials, [4]), trials, seconds, n_bins=3)
    # shorter ones last 2, 2.37, 2.74 and 3.11 s; a third of the targets is up to 2 s, two thirds up
    # to 2.37 s: bins begin at 2 and 2.5
    assert [one["seconds"][0] for one in found] == [2.0, 2.74]
