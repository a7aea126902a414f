import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import eigh, orthogonal_procrustes
from sklearn.covariance import empirical_covariance, shrunk_covariance
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from speechbrain_mrl import rotation
from speechbrain_mrl.rotation import LDA_SHRINKAGE, aligning_rotation, matryoshka_rotation
from speechbrain_mrl.targets import EnsembleRotation

N_SPEAKERS, CLIPS_EACH, EMBED_DIM = 6, 40, 12


@pytest.fixture
def labels():
    return torch.arange(N_SPEAKERS).repeat_interleave(CLIPS_EACH)


@pytest.fixture
def embeddings(labels):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(EMBED_DIM, EMBED_DIM, generator=generator)
    speakers = torch.randn(N_SPEAKERS, EMBED_DIM, generator=generator)
    noise = torch.randn(len(labels), EMBED_DIM, generator=generator)
    return speakers[labels] + 0.7 * noise @ mixing + 3.0


def cosines(embeddings):
    unit = F.normalize(torch.as_tensor(embeddings, dtype=torch.float64), dim=-1)
    return unit @ unit.T


def test_pca_rotation_is_scikit_learns_up_to_signs(embeddings):
    rotated = matryoshka_rotation(embeddings, [4, EMBED_DIM])(embeddings)
    expected = torch.from_numpy(PCA().fit_transform(embeddings.double().numpy())).float()
    torch.testing.assert_close(rotated.abs(), expected.abs(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 8, EMBED_DIM])
def test_pca_prefix_keeps_centred_cosines_no_worse_than_scikit_learn(embeddings, size):
    wanted = cosines(embeddings - embeddings.mean(dim=0))
    ours = cosines(matryoshka_rotation(embeddings, [size])(embeddings))
    theirs = cosines(PCA(size).fit_transform(embeddings.numpy()))
    error = (ours - wanted).square().mean()
    assert error <= (theirs - wanted).square().mean() + 1e-6


def test_pca_does_not_depend_on_the_order_of_the_clips(embeddings):
    shuffled = embeddings[torch.randperm(len(embeddings))]
    rotation, again = (matryoshka_rotation(x, [3, 12]) for x in (embeddings, shuffled))
    torch.testing.assert_close(rotation.matrix, again.matrix, atol=1e-5, rtol=0)


def test_pca_of_few_clips_is_still_an_orthonormal_rotation(embeddings):
    matrix = matryoshka_rotation(embeddings[:5], [4, 12]).matrix
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12), atol=1e-6, rtol=0)


def covariances(embeddings, labels):
    """Between speakers and, shrunk, within them."""
    x = embeddings.double().numpy()
    means = np.stack([x[labels == speaker].mean(axis=0) for speaker in range(N_SPEAKERS)])[labels]
    within = shrunk_covariance(empirical_covariance(x - means), LDA_SHRINKAGE)
    return empirical_covariance(means), within


def test_lda_solves_the_generalised_eigenproblem_as_scipy_does(embeddings, labels):
    n_directions = N_SPEAKERS - 1
    matrix = matryoshka_rotation(embeddings, [n_directions], labels).matrix
    _, expected = eigh(*covariances(embeddings, labels))  # ascending; scaled to whiten
    expected = torch.from_numpy(expected.T[::-1][:n_directions].copy()).float()
    torch.testing.assert_close(matrix.abs(), expected.abs(), atol=1e-4, rtol=1e-4)


def test_lda_without_shrinkage_is_scikit_learns(embeddings, labels, monkeypatch):
    monkeypatch.setattr(rotation, "LDA_SHRINKAGE", 0.0)
    n_directions = N_SPEAKERS - 1
    rotated = matryoshka_rotation(embeddings, [n_directions], labels)(embeddings).double()
    lda = LinearDiscriminantAnalysis().fit(embeddings.double().numpy(), labels.numpy())
    expected = torch.from_numpy(lda.transform(embeddings.double().numpy()))
    # Some versions of scikit-learn divide the variance by N, others by N - C
    rotated, expected = (x.abs() / x.norm() for x in (rotated, expected))
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-4)


def test_lda_whitens_the_shrunk_covariance_and_stays_invertible(embeddings, labels):
    fitted = matryoshka_rotation(embeddings, [3, EMBED_DIM], labels)
    matrix = fitted.matrix.double()
    between, within = map(torch.from_numpy, covariances(embeddings, labels))
    white = matrix @ within @ matrix.T
    torch.testing.assert_close(white, torch.eye(EMBED_DIM).double(), atol=1e-4, rtol=0)
    spread = (matrix @ between @ matrix.T).diagonal()
    assert (spread[: N_SPEAKERS - 1].diff() < 0).all() and (spread[N_SPEAKERS - 1 :] < 1e-6).all()
    back = fitted(embeddings).double() @ torch.linalg.inv(matrix).T + fitted.mean
    torch.testing.assert_close(back, embeddings.double(), atol=1e-4, rtol=0)


def test_lda_with_fewer_clips_than_dims_is_invertible(embeddings, labels):
    few = torch.arange(0, len(labels), 30)  # 8 clips
    matrix = matryoshka_rotation(embeddings[few], [12], labels[few]).matrix
    assert torch.linalg.matrix_rank(matrix.double()) == EMBED_DIM


def test_lda_finds_the_speakers_where_pca_finds_the_noise():
    noise = torch.tensor([-9.0, 9.0, 9.0, -9.0])
    speaker = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    embeddings = torch.stack([noise, speaker + 0.1 * noise.roll(1).sign()], dim=1)
    pca = matryoshka_rotation(embeddings, [1]).matrix
    lda = matryoshka_rotation(embeddings, [1], labels=speaker > 0).matrix
    assert pca.abs().argmax() == 0 and lda.abs().argmax() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(9, 4), [2, 5]), "ends past the embeddings' 4 dimensions"),
        ((torch.randn(1, 4), [2]), r"N >= 2 utterances, got \(1, 4\)"),
        ((torch.randn(4), [2]), r"must be \(N, D\)"),
        ((torch.full((3, 4), torch.nan), [2]), "must be finite"),
        ((torch.randn(9, 4), [2], torch.zeros(8)), r"labels must be \(9,\), got \(8,\)"),
        ((torch.randn(9, 4), [2], torch.zeros(9)), "at least two speakers"),
        ((torch.randn(9, 4), [2], torch.arange(9)), "9 speakers in 9 utterances"),
    ],
)
def test_unusable_clips_or_labels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        matryoshka_rotation(*arguments)


def test_rotation_takes_half_precision_and_any_leading_shape(embeddings):
    rotation = matryoshka_rotation(embeddings, [4])
    assert rotation(embeddings.bfloat16()[:, None]).shape == (len(embeddings), 1, 4)


def test_ensembles_dot_products_are_the_weighted_mean_of_the_teachers_cosines(embeddings):
    teachers = {"small": embeddings[:, :3], "large": embeddings[:, 3:] * 100}
    ensemble = EnsembleRotation(dim=12, weights={"large": 3.0}).fit(teachers)
    small, large = (cosines(x - x.mean(dim=0)) for x in (teachers["small"], teachers["large"]))
    target = ensemble(teachers).double()
    torch.testing.assert_close(target @ target.T, (small + 3 * large) / 4, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 6, 11])
def test_ensembles_prefix_keeps_cosines_no_worse_than_scikit_learns_pca(embeddings, size):
    teachers = {"b0": embeddings[:, :5], "b6": embeddings[:, 5:]}
    ensemble = EnsembleRotation(dim=12).fit(teachers)
    union = ensemble.concatenate(teachers).double()
    ours = ensemble(teachers).double()[:, :size]
    theirs = torch.from_numpy(PCA(size).fit_transform(union.numpy()))
    ours, theirs = (((x @ x.T) - union @ union.T).square().mean() for x in (ours, theirs))
    assert ours <= theirs + 1e-9


def test_with_labels_the_ensemble_is_the_lda_of_the_concatenated_teachers(embeddings, labels):
    teachers = {"one": embeddings, "two": embeddings[:, :7].roll(1, 0)}
    ensemble = EnsembleRotation(dim=19).fit(teachers, labels)
    union = [F.normalize(x - x.mean(dim=0), dim=1) for x in teachers.values()]
    union = torch.cat(union, dim=1) / 2**0.5
    between, within = covariances(union, labels)
    _, axes = eigh(between, within)
    expected = axes.T[::-1][: N_SPEAKERS - 1]
    found = ensemble.matrix[: N_SPEAKERS - 1].numpy()
    scale = np.linalg.norm(found[0]) / np.linalg.norm(expected[0])
    np.testing.assert_allclose(np.abs(found), scale * np.abs(expected), atol=2e-3 * scale)
    length = ensemble(teachers).square().sum(dim=1).mean()
    torch.testing.assert_close(length, torch.tensor(1.0), atol=1e-4, rtol=0)


def test_ensemble_of_few_dimensions_is_filled_up_with_zeros(embeddings):
    ensemble = EnsembleRotation(dim=16).fit({"b0": embeddings})
    target = ensemble({"b0": embeddings})
    assert target.shape == (len(embeddings), 16) and (target[:, 12:] == 0).all()
    torch.testing.assert_close(target.norm(dim=1), torch.ones(len(embeddings)))


def test_ensemble_refuses_clips_that_do_not_belong_together(embeddings):
    ensemble = EnsembleRotation(dim=4, names=["b0", "b6"])
    with pytest.raises(ValueError, match=r"\['b6'\] are missing; given: \['b0', 'b1'\]"):
        ensemble.fit({"b0": embeddings, "b1": embeddings})
    with pytest.raises(ValueError, match="same utterances"):
        ensemble.fit({"b0": embeddings, "b6": embeddings[:-1]})
    with pytest.raises(ValueError, match="not hold a dot"):
        EnsembleRotation(dim=4).fit({"b0.pt": embeddings})
    with pytest.raises(ValueError, match="must be positive"):
        EnsembleRotation(dim=4, weights={"b0": 0.0})
    with pytest.raises(RuntimeError, match="not fitted; call fit"):
        ensemble({"b0": embeddings, "b6": embeddings})
    ensemble.fit({"b0": embeddings, "b6": embeddings})
    with pytest.raises(ValueError, match=r"teacher 'b6' must be \(B, 12\), got \(240, 7\)"):
        ensemble({"b0": embeddings, "b6": embeddings[:, :7]})


def test_ensemble_of_all_given_teachers_refuses_one_that_came_after_fit(embeddings):
    ensemble = EnsembleRotation(dim=4).fit({"b0": embeddings})
    with pytest.raises(ValueError, match=r"\['b6'\] were not there at fit"):
        ensemble({"b0": embeddings, "b6": embeddings})


def test_the_aligning_rotation_is_scipys():
    torch.manual_seed(0)
    embeddings, targets = torch.randn(50, 6), torch.randn(50, 6)
    matrix = aligning_rotation(embeddings, targets)
    expected, _ = orthogonal_procrustes(embeddings.numpy(), targets.numpy())  # embeddings @ R
    np.testing.assert_allclose(matrix.numpy(), expected.T, atol=1e-5)


def test_alignment_of_other_clips_is_refused():
    with pytest.raises(ValueError, match=r"both be \(N, k\)"):
        aligning_rotation(torch.ones(3, 2), torch.ones(4, 2))
