import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from speechbrain.processing.PLDA_LDA import Ndx, StatObject_SB, fast_PLDA_scoring
from toy_trials import toy_trials

from speechbrain_mrl.evaluation import plda
from speechbrain_mrl.evaluation.metrics import eer
from speechbrain_mrl.evaluation.plda import plda_scores
from speechbrain_mrl.evaluation.verification import evaluate_scores, score_trials


@pytest.fixture
def model():
    """Fitted on 30 speakers in 5 dimensions, in 4 of which speakers are let differ."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(30, 5)), 6, axis=0)
    return plda._fit(centres + 0.7 * rng.normal(size=(180, 5)), np.repeat(np.arange(30), 6), 4)


@pytest.fixture
def clips():
    trials, _ = toy_trials(n_speakers=3, n_clips=2)
    return trials, np.random.default_rng(1).normal(size=(6, 5))


def test_scores_are_log_ratios_of_gaussian_densities(model, clips):
    trials, vectors = clips
    between, total = model.F @ model.F.T, model.F @ model.F.T + model.Sigma
    alone = multivariate_normal(model.mean, total)
    together = multivariate_normal(
        np.tile(model.mean, 2), np.block([[total, between], [between, total]])
    )
    expected = [
        together.logpdf(np.append(vectors[a], vectors[b]))
        - alone.logpdf(vectors[a])
        - alone.logpdf(vectors[b])
        for a, b in zip(trials.enrol, trials.test)
    ]
    np.testing.assert_allclose(plda._score(model, vectors, trials), expected, atol=1e-9)


def test_scores_are_speechbrains_own(model, clips):
    trials, vectors = clips
    ids, unused = np.array(trials.clip_ids, dtype=object), np.full(6, None)
    packed = StatObject_SB(ids, ids, unused, unused, np.ones((6, 1)), vectors.copy())
    ndx = Ndx(models=ids, testsegs=ids)
    expected = fast_PLDA_scoring(packed, packed, ndx, model.mean, model.F, model.Sigma).scoremat
    found = plda._score(model, vectors, trials)
    np.testing.assert_allclose(found, expected[trials.enrol, trials.test], atol=1e-9)


@pytest.fixture
def stretched():
    """Voices with loud noise in dimensions without speaker information, which PLDA suppresses."""
    noise = torch.ones(16, dtype=torch.float64)
    noise[::2] = 6.0
    rng = np.random.default_rng(0)

    def make(n_speakers, prefix, seed):
        trials, embeddings = toy_trials(n_speakers, 8, prefix=prefix, seed=seed)
        return trials, embeddings + noise * torch.from_numpy(rng.normal(size=embeddings.shape)) / 2

    return make(12, "s", 1), make(60, "fit", 2)


def test_plda_beats_the_cosine_where_noise_has_a_direction_at_every_size(stretched):
    (trials, embeddings), (fit_trials, fit) = stretched
    speakers = [clip_id.split("/")[0] for clip_id in fit_trials.clip_ids]
    found = plda_scores(embeddings, trials, fit, speakers, [8, 16])
    cosines = score_trials(embeddings, trials, [8, 16])
    for size in (8, 16):
        assert eer(found[size], trials.labels)[0] < 0.85 * eer(cosines[size], trials.labels)[0]


def test_a_dimension_that_never_varies_is_left_out(stretched):
    (trials, embeddings), (fit_trials, fit) = stretched
    speakers = [clip_id.split("/")[0] for clip_id in fit_trials.clip_ids]
    expected = plda_scores(embeddings, trials, fit, speakers, [16])[16]
    dead, dead_fit = (torch.cat([x, torch.zeros(len(x), 2)], dim=1) for x in (embeddings, fit))
    found = plda_scores(dead, trials, dead_fit, speakers, [18])
    np.testing.assert_allclose(found[18], expected, atol=1e-6)
    assert evaluate_scores(found, trials)["18"]["eer"] < 0.5


@pytest.mark.parametrize(
    ("n_clips", "speakers", "message"),
    [
        (10, ["a"] * 5 + ["b"] * 5, "size 16 needs more utterances than that, got 10"),
        (20, ["a"] * 20, "1 speakers in 20 names for 20 utterances"),
        (20, ["a", "b"], "2 speakers in 2 names for 20 utterances"),
    ],
)
def test_too_little_to_fit_on_is_refused(n_clips, speakers, message):
    trials, embeddings = toy_trials(4, 3)
    with pytest.raises(ValueError, match=message):
        plda_scores(embeddings, trials, torch.ones(n_clips, 16), speakers, [16])
