"""Trial lists, scores, error rates with their intervals, and differences of models."""

import numpy as np
import pytest
import torch
from reference_metrics import reference_eer, reference_min_dcf
from toy_trials import toy_trials

from speechbrain_mrl.dataio.lists import read_clip_list
from speechbrain_mrl.evaluation.verification import (
    BOOTSTRAP_SEED,
    Trials,
    compare,
    evaluate,
    evaluate_scores,
    read_trials,
    score_trials,
)


@pytest.fixture
def voices():
    return toy_trials()


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
    with pytest.raises(
        ValueError, match=r"list.txt, line 2: utterance 'b/1'.*2 of 4.*which 2 trials"
    ):
        trials.stack(embeddings)


def test_scores_are_the_cosines_of_prefixes(voices, monkeypatch):
    monkeypatch.setattr("speechbrain_mrl.evaluation.verification.TRIALS_PER_CHUNK", 100)
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
        ((2, 4), [2], r"one row for each of 3 utterances, got \(2, 4\)"),
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
        assert set(result) == {"eer", "min_dcf", "min_dcf_0.05", "threshold", "thresholds"}
        assert result["eer"] == pytest.approx(reference_eer(scores, trials.labels), abs=1e-6)
        expected = reference_min_dcf(scores, trials.labels, 0.01, 1, 1)
        assert result["min_dcf"] == pytest.approx(expected, abs=1e-6)


def test_bootstrap_weights_equal_a_list_with_trials_repeated(voices):
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
        for metric in ("eer", "min_dcf", "min_dcf_0.05"):
            low, high = result[f"{metric}_ci"]
            assert low <= result[metric] <= high
        assert result["eer_ci"][0] < result["eer_ci"][1]


def test_bootstrap_without_speakers_in_the_clip_ids_is_refused():
    trials = Trials.parse(["1 clip1 clip2", "0 clip1 clip3"])
    with pytest.raises(ValueError, match="line 1: the label contradicts.*n_bootstrap=0"):
        evaluate(torch.eye(3), trials, [3], n_bootstrap=10)


def test_calibrated_scores_have_costs_with_intervals(voices):
    trials, embeddings = voices
    scores = {16: 20 * score_trials(embeddings, trials, [16])[16] - 9}
    (result,) = evaluate_scores(scores, trials, n_bootstrap=30, calibrated=True).values()
    for name in ("act_dcf", "act_dcf_0.05", "cllr"):
        low, high = result[f"{name}_ci"]
        assert low < result[name] < high


def compared(one, other, trials, sizes, n_bootstrap):
    """Two models by their embeddings."""
    scores = (score_trials(embeddings, trials, sizes) for embeddings in (one, other))
    return compare(*scores, trials, n_bootstrap)


def test_the_difference_of_two_models_is_that_of_their_eers(voices):
    trials, embeddings = voices
    rng = np.random.default_rng(0)
    noisy = embeddings + torch.from_numpy(rng.normal(size=embeddings.shape))
    found = compared(noisy, embeddings, trials, [4, 16], n_bootstrap=50)
    for size in (4, 16):
        result = found[str(size)]
        for name, model in (("eer_a", noisy), ("eer_b", embeddings)):
            scores = score_trials(model, trials, [size])[size]
            expected = reference_eer(scores, trials.labels)
            assert result[name] == pytest.approx(expected, abs=1e-6)
        assert result["difference"] == result["eer_a"] - result["eer_b"]
    low, high = found["16"]["difference_ci"]
    assert 0 < low < found["16"]["difference"] < high  # noise makes it worse, without doubt


def test_the_difference_is_taken_within_each_draw(voices):
    trials, embeddings = voices
    noisy = embeddings + 0.3 * torch.from_numpy(np.random.default_rng(0).normal(size=(60, 16)))
    alone = evaluate(embeddings, trials, [16], n_bootstrap=200)["16"]["eer_ci"]
    paired = compared(noisy, embeddings, trials, [16], n_bootstrap=200)["16"]["difference_ci"]
    assert paired[1] - paired[0] < alone[1] - alone[0]  # what is hard for both cancels out


def test_a_model_does_not_differ_from_itself_and_swapping_turns_the_sign(voices):
    trials, embeddings = voices
    same = compared(embeddings, 2 * embeddings, trials, [4], n_bootstrap=20)["4"]
    assert same["difference"] == 0 and same["difference_ci"] == [0, 0]
    shifted = embeddings + 1
    forth = compared(embeddings, shifted, trials, [4], n_bootstrap=20)["4"]
    back = compared(shifted, embeddings, trials, [4], n_bootstrap=20)["4"]
    assert back["difference_ci"] == pytest.approx([-x for x in forth["difference_ci"][::-1]])


def test_every_size_can_be_compared_with_one_size_of_another_model(voices):
    trials, embeddings = voices
    scores = score_trials(embeddings, trials, [4, 16])
    found = compare(scores, score_trials(embeddings, trials, [8]), trials, n_bootstrap=0)
    expected = reference_eer(score_trials(embeddings, trials, [8])[8], trials.labels)
    assert [found[size]["eer_b"] for size in ("4", "16")] == pytest.approx([expected] * 2, abs=1e-6)
    assert "difference_ci" not in found["4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1\na/2 b/1\n", r"line 2: expected one utterance id, got 'a/2 b/1'"),
        ("", r"line 1: expected one utterance id, got ''"),
        ("a/1\na/2\na/1\n", r"line 3: utterance 'a/1' is on line 1 too"),
    ],
)
def test_a_broken_clip_list_is_refused_by_path_and_line(tmp_path, text, message):
    (tmp_path / "cohort.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"cohort\.txt, {message}"):
        read_clip_list(tmp_path / "cohort.txt")
