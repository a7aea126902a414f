"""Makes the prefixes of existing embeddings useful in closed form, without training."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from speechbrain_mrl.prefixes import check_mrl_dims

# Share of the mean variance in LDA's within-speaker covariance. A few thousand utterances know that
# covariance badly, and embeddings of training speakers vary less than those of others.
LDA_SHRINKAGE = 0.5


class Rotation(nn.Module):
    """Centres and rotates embeddings, the most important directions first: every prefix is useful.

    Arguments
    ---------
    mean : torch.Tensor
        Mean embedding, (D,).
    matrix : torch.Tensor
        Directions, the most important first, (d, D).

    Example
    -------
    >>> rotation = Rotation(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]]))
    >>> rotation(torch.tensor([[5.0, 3.0]]))
    tensor([[3.]])
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., D) to rotated ones (..., d)."""
        return (embeddings.to(self.matrix.dtype) - self.mean) @ self.matrix.T


def matryoshka_rotation(
    embeddings: Tensor, mrl_dims: Iterable[int], labels: Tensor | None = None
) -> Rotation:
    """The rotation that makes the prefixes of any encoder's embeddings useful, without training.

    Without labels this is PCA: each prefix keeps the most variance that its size can hold.

    With labels of C speakers it is LDA. Variance within a speaker is whitened, by a covariance that
    is shrunk half way to its mean variance. The C - 1 directions that separate speakers come first;
    the others follow by their variance. The order of the utterances has no effect.

    Arguments
    ---------
    embeddings : torch.Tensor
        Of utterances to fit on, (N, D), N >= 2. With fewer than d + 1 utterances the PCA tail has
        no variance and is any orthonormal completion.
    mrl_dims : iterable of int
        Prefix sizes, ascending; the last one is d <= D.
    labels : torch.Tensor, optional
        Speaker of each utterance, (N,), at least two speakers and one of them with two utterances.

    Returns
    -------
    Rotation
        (..., D) -> (..., d).

    Raises
    ------
    ValueError
        If the embeddings, sizes or labels break the rules above.

    Example
    -------
    >>> embeddings = torch.tensor([[0.0, 5.0], [0.1, -5.0], [-0.1, 0.0]])
    >>> matryoshka_rotation(embeddings, mrl_dims=[1, 2]).matrix.abs().argmax(dim=1)
    tensor([1, 0])
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    check_clips(embeddings, "embeddings")
    n_clips, embed_dim = embeddings.shape
    if mrl_dims[-1] > embed_dim:
        raise ValueError(
            f"mrl_dims {mrl_dims} ends past the embeddings' {embed_dim} dimensions; "
            "a rotation cannot add any"
        )
    x = embeddings.detach().cpu().double()
    mean = x.mean(dim=0)
    if labels is None:
        axes = principal_axes((x - mean).T @ (x - mean) / n_clips)
    else:
        axes = lda_axes(x - mean, torch.as_tensor(labels).cpu())
    return Rotation(mean.float(), axes[: mrl_dims[-1]].float()).to(embeddings.device)


def aligning_rotation(embeddings: Tensor, targets: Tensor) -> Tensor:
    """The orthogonal matrix that brings embeddings nearest to targets; no cosine changes.

    Arguments
    ---------
    embeddings, targets : torch.Tensor
        Of the same utterances, (N, k).

    Returns
    -------
    torch.Tensor
        (k, k), float32; ``embeddings @ matrix.T`` is nearest to ``targets`` (Procrustes).

    Reference
    ---------
    Schönemann, A generalized solution of the orthogonal Procrustes problem, 1966.

    Example
    -------
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> aligning_rotation(embeddings, embeddings.flip(1))
    tensor([[0., 1.],
            [1., 0.]])
    """
    if embeddings.shape != targets.shape or embeddings.ndim != 2:
        raise ValueError(
            f"embeddings and targets must both be (N, k), got {tuple(embeddings.shape)} and "
            f"{tuple(targets.shape)}"
        )
    left, _, right = torch.linalg.svd(targets.double().T @ embeddings.double())
    return (left @ right).float()


def check_clips(embeddings: Tensor, name: str) -> None:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(
            f"{name} must be (N, D) with N >= 2 utterances, got {tuple(embeddings.shape)}"
        )
    if not embeddings.isfinite().all():
        raise ValueError(f"{name} must be finite, but some values are infinite or not a number")


def principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as rows, the largest eigenvalue first."""
    return _with_fixed_signs(torch.linalg.eigh(moment).eigenvectors.flip(-1).T)


def _with_fixed_signs(rows: Tensor) -> Tensor:
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def lda_axes(centred: Tensor, labels: Tensor) -> Tensor:
    """All D directions as rows, those that separate the classes best first."""
    if labels.shape != centred.shape[:1]:
        raise ValueError(f"labels must be ({len(centred)},), got {tuple(labels.shape)}")
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(counts) < len(labels):
        raise ValueError(
            f"labels must name at least two speakers, one of them twice, got {len(counts)} "
            f"speakers in {len(labels)} utterances; leave labels out for PCA"
        )
    sums = centred.new_zeros(len(counts), centred.shape[1]).index_add_(0, classes, centred)
    means = sums / counts[:, None]  # (C, D)
    residuals = centred - means[classes]
    variances, axes = torch.linalg.eigh(residuals.T @ residuals / len(labels))
    variances = torch.lerp(variances, variances.mean(), LDA_SHRINKAGE)
    whiten = axes / variances.sqrt()  # (D, D)
    between = whiten.T @ (sums.T @ means / len(labels)) @ whiten
    # The D - (C - 1) directions that separate no speakers would tie; a trace of variance orders them.
    order = variances.diag() * (1e-9 * between.diagonal().max() / variances.max())
    return _with_fixed_signs(principal_axes(between + order) @ whiten.T)
