import numpy as np
import pytest
import torch
from reference_metrics import reference_eer
from sklearn.decomposition import PCA
from toy_trials import toy_trials

from speechbrain_mrl.evaluation.baselines import evaluate_student, truncation_scores
from speechbrain_mrl.evaluation.verification import evaluate_scores
from speechbrain_mrl.rotation import matryoshka_rotation

SIZES = [4, 16, 32]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def voices():
    return toy_trials()


def cosines(embeddings, trials, size):
    unit = np.asarray(embeddings, dtype=float)[:, :size]
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit[trials.enrol] * unit[trials.test]).sum(1)


def test_pca_truncation_centres_and_rotates_by_the_fit_clips_and_naive_truncation_does_not(
    voices, rng
):
    trials, embeddings = voices
    embeddings = embeddings + 1.0
    fit = torch.from_numpy(rng.normal(size=(200, 16)) * np.linspace(1, 3, 16) + 0.5)
    cuts = truncation_scores(embeddings, fit, trials, [4, 16, 32])
    directions = np.linalg.svd((fit - fit.mean(0)).numpy())[2]
    rotated = (embeddings - fit.mean(0)) @ torch.from_numpy(directions.T)
    for name, teacher in (("naive_truncation", embeddings), ("pca_truncation", rotated)):
        results = evaluate_scores(cuts[name], trials)
        assert list(results) == ["4", "16"]  # the teacher has no 32
        for size in (4, 16):
            prefixes = torch.nn.functional.normalize(teacher[:, :size], dim=1)
            scores = (prefixes[trials.enrol] * prefixes[trials.test]).sum(1).numpy()
            expected = reference_eer(scores, trials.labels)
            assert results[str(size)]["eer"] == pytest.approx(expected, abs=1e-6)


def test_teacher_smaller_than_every_size_has_no_cuts(voices):
    trials, embeddings = voices
    cuts = truncation_scores(embeddings, embeddings, trials, [32])
    assert cuts == {"naive_truncation": {}, "pca_truncation": {}}


@pytest.fixture
def compared(voices, rng):
    """A student, its start, two teachers of other sizes and scales, and what they are fitted on."""
    trials, embeddings = voices
    clean = embeddings.numpy()

    def heard(size, noise, scale=1.0):
        mixing = np.linalg.qr(rng.normal(size=(16, 16)))[0][:, :size]
        found = (clean + noise * rng.normal(size=clean.shape)) @ mixing
        return torch.from_numpy(scale * (found + rng.normal(size=size)))

    student = torch.cat([heard(16, 0.3), heard(16, 0.3)], dim=1)
    teachers = {"first.v2": heard(16, 0.5), "second": heard(12, 0.6, scale=20.0)}
    fit = {
        name: torch.from_numpy(rng.normal(size=(300, x.shape[1])) @ np.diag(x.std(0)) + 0.5)
        for name, x in teachers.items()
    }
    start = heard(16, 1.5)
    speakers = torch.arange(300) % 20
    found = evaluate_student(student, trials, SIZES, start, teachers, fit, 60, speakers)
    return found, student, start, teachers, fit


def ensemble_by_sklearn(teachers, fit):
    """All teachers centred, at unit length and side by side; principal components, not centred."""

    def side_by_side(embeddings):
        centred = [embeddings[name].numpy() - fit[name].numpy().mean(0) for name in sorted(fit)]
        return np.hstack([x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred])

    train = side_by_side(fit)
    pca = PCA().fit(np.vstack([train, -train]))  # their mean is zero, so that PCA centres nothing
    return side_by_side(teachers) @ pca.components_.T


def test_the_ensemble_is_the_pca_of_all_teachers_fitted_on_training_utterances(voices, compared):
    found, _, _, teachers, fit = compared
    expected = ensemble_by_sklearn(teachers, fit)
    assert list(found["baselines"]["ensemble"]) == ["4", "16", "32"]  # the two have 28 together
    for size in SIZES:
        eer = reference_eer(cosines(expected, voices[0], size), voices[0].labels)
        assert found["baselines"]["ensemble"][str(size)]["eer"] == pytest.approx(eer, abs=1e-6)


def test_the_lda_of_the_best_teacher_is_that_of_its_training_utterances(voices, compared):
    found, _, _, teachers, fit = compared
    best = found["baselines"]["teacher"]
    rotation = matryoshka_rotation(fit[best], [4], torch.arange(300) % 20)
    eer = reference_eer(cosines(rotation(teachers[best]), voices[0], 4), voices[0].labels)
    assert found["baselines"]["lda_truncation"]["4"]["eer"] == pytest.approx(eer, abs=1e-6)
    rows = ["start", "pca_truncation", "lda_truncation", "ensemble", "ensemble_lda"]
    assert list(found["gain"]) == rows


def test_start_has_the_sizes_that_it_has(voices, compared):
    found, _, start, _, _ = compared
    assert list(found["baselines"]["start"]) == ["4", "16"]
    for size in (4, 16):
        eer = reference_eer(cosines(start, voices[0], size), voices[0].labels)
        assert found["baselines"]["start"][str(size)]["eer"] == pytest.approx(eer, abs=1e-6)


def test_gain_is_the_paired_difference_over_the_same_draws_of_speakers(voices, compared):
    """Against a bootstrap by hand: trials are repeated, both models are measured on each draw."""
    (trials, _), (found, student, start, teachers, fit) = voices, compared
    best = found["baselines"]["teacher"]
    rotated = PCA().fit(fit[best].numpy()).transform(teachers[best].numpy())
    largest = {"start": 16, "pca_truncation": rotated.shape[1] // 4 * 4, "ensemble": 32}
    largest["pca_truncation"] = max(s for s in SIZES if s <= rotated.shape[1])
    others = {
        "start": start,
        "pca_truncation": rotated,
        "ensemble": ensemble_by_sklearn(teachers, fit),
    }
    names = sorted({clip.split("/")[0] for clip in trials.clip_ids})
    speaker = np.array([names.index(clip.split("/")[0]) for clip in trials.clip_ids])
    draws = np.random.default_rng(1986).multinomial(12, np.full(12, 1 / 12), 60)
    for row, other in others.items():
        assert list(found["gain"][row]) == ["4", "16", "32"]
        for size in SIZES:
            pair = [
                cosines(student, trials, size),
                cosines(other, trials, min(size, largest[row])),
            ]
            differences = []
            for counts in [np.ones(12, dtype=int), *draws]:
                enrol, test = counts[speaker[trials.enrol]], counts[speaker[trials.test]]
                repeats = np.where(trials.labels, enrol, enrol * test)
                labels = np.repeat(trials.labels, repeats)
                a, b = (reference_eer(np.repeat(scores, repeats), labels) for scores in pair)
                differences.append(a - b)
            gain = found["gain"][row][str(size)]
            assert gain["eer"] == pytest.approx(differences[0], abs=1e-6)
            expected = np.percentile(differences[1:], [2.5, 97.5])
            assert gain["eer_ci"] == pytest.approx(expected, abs=1e-6)


def test_a_student_without_teachers_is_compared_with_its_start_alone(voices):
    trials, embeddings = voices
    found = evaluate_student(embeddings, trials, [4, 16], start=embeddings, n_bootstrap=5)
    assert set(found["baselines"]) == {"teacher", "teachers", "start"}
    assert found["gain"] == {"start": {str(d): {"eer": 0, "eer_ci": [0, 0]} for d in (4, 16)}}
