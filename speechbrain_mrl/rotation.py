"""Makes the prefixes of existing embeddings useful in closed form, without training.

``matryoshka_rotation`` orders one model's coordinates by importance; ``EnsembleRotation``
turns several models into one nested target that a student can learn.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this fraction of the mean within-speaker variance a direction counts as unseen by LDA,
# so that the few clips that happened not to vary along it cannot make it the best one.
LDA_VARIANCE_FLOOR = 1e-3
ALIGN_RIDGE = 0.01  # of the mean variance of a target's coordinate


def check_mrl_dims(mrl_dims: Iterable[int]) -> tuple[int, ...]:
    """The sizes as a tuple, once they follow the rule: positive integers in ascending order.

    Arguments
    ---------
    mrl_dims : iterable of int
        Prefix sizes trained together.

    Returns
    -------
    tuple of int

    Raises
    ------
    ValueError
        If the list is empty, not strictly ascending, or holds anything but positive integers.

    Example
    -------
    >>> check_mrl_dims([64, 128, 256])
    (64, 128, 256)
    """
    try:
        dims = tuple(operator.index(dim) for dim in mrl_dims)
    except TypeError:
        dims = ()
    if not dims or dims[0] < 1 or any(a >= b for a, b in zip(dims, dims[1:])):
        raise ValueError(f"mrl_dims must be positive integers in ascending order, got {mrl_dims!r}")
    return dims


class Rotation(nn.Module):
    """Moves embeddings to coordinates sorted by importance, so that every prefix is useful.

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
        """Embeddings (..., D) in the new coordinates (..., d)."""
        return (embeddings.to(self.matrix.dtype) - self.mean) @ self.matrix.T


def matryoshka_rotation(
    embeddings: Tensor, mrl_dims: Iterable[int], labels: Tensor | None = None
) -> Rotation:
    """The rotation that makes the prefixes of any encoder's embeddings useful, without training.

    Without labels this is PCA: each prefix keeps the most variance that its size can hold.
    With labels it is LDA: variance inside a speaker is whitened, the directions that tell speakers
    apart come first, and directions that do not (all past C - 1) follow by their variance. LDA wants
    more clips than coordinates. The result does not depend on the order of the clips.

    Arguments
    ---------
    embeddings : torch.Tensor
        Clips to learn from, (N, D), N >= 2. With fewer than d + 1 clips the PCA tail has no
        variance and is any orthonormal completion.
    mrl_dims : iterable of int
        Prefix sizes, ascending; the last one is d <= D.
    labels : torch.Tensor, optional
        Speaker of each clip, (N,), at least two speakers and one of them with two clips.

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
    _check_clips(embeddings, "embeddings")
    n_clips, embed_dim = embeddings.shape
    if mrl_dims[-1] > embed_dim:
        raise ValueError(
            f"mrl_dims {mrl_dims} ends past the embeddings' {embed_dim} coordinates; "
            "a rotation cannot add any"
        )
    x = embeddings.detach().cpu().double()
    mean = x.mean(dim=0)
    if labels is None:
        axes = _principal_axes((x - mean).T @ (x - mean) / n_clips)
    else:
        axes = _lda_axes(x - mean, torch.as_tensor(labels).cpu())
    return Rotation(mean.float(), axes[: mrl_dims[-1]].float()).to(embeddings.device)


def aligning_rotation(embeddings: Tensor, targets: Tensor) -> Tensor:
    """The orthogonal matrix that brings embeddings nearest to targets; no cosine changes.

    Arguments
    ---------
    embeddings, targets : torch.Tensor
        Of the same clips, (N, k).

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


class EnsembleRotation(nn.Module):
    """One nested target out of several teachers: its first d coordinates are the best d.

    Each teacher is centred by its fitted mean and scaled to unit length, so that none drowns the
    others, weighted, and set beside the others. The union's dot products are then the weighted mean
    of the teachers' cosines, and its principal axes (not centred again) keep those dot
    products as well as any d coordinates can.

    Arguments
    ---------
    dim : int
        Coordinates of the target; zeros fill it up where the teachers together have fewer.
    names : iterable of str, optional
        The teachers. Default: all that ``fit`` (or, before it, ``concatenate``) is given.
    weights : mapping of str to float, optional
        Positive share of a teacher, 1 where not given; only ratios matter.

    Example
    -------
    >>> teachers = {"b0": torch.randn(50, 6), "b6": torch.randn(50, 8)}
    >>> ensemble = EnsembleRotation(dim=4).fit(teachers)
    >>> ensemble.concatenate(teachers).shape, ensemble(teachers).shape
    (torch.Size([50, 14]), torch.Size([50, 4]))
    """

    matrix: Tensor

    def __init__(
        self,
        dim: int,
        names: Iterable[str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.names = None if names is None else sorted(names)
        self.weights = dict(weights or {})
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError(f"teacher weights must be positive, got {self.weights}")
        self.register_buffer("matrix", torch.empty(0, 0))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called or a fitted state was loaded."""
        return self.matrix.numel() > 0

    def fit(self, teachers: Mapping[str, Tensor]) -> "EnsembleRotation":
        """Means and axes from the same N clips of every teacher, {name: (N, D_t)}."""
        names = self._select(teachers, self.names or sorted(teachers))
        for name in names:
            _check_clips(teachers[name], f"teacher {name!r}")
            if "." in name:
                raise ValueError(f"a teacher's name may not hold a dot, got {name!r}")
        clips = {name: len(teachers[name]) for name in names}
        if len(set(clips.values())) > 1:
            raise ValueError(f"all teachers must embed the same clips, got {clips} clips")
        teachers = {name: teachers[name].detach().to(self.matrix.device) for name in names}
        means = {name: teachers[name].mean(dim=0, dtype=torch.float64) for name in names}
        self._set_buffers({f"mean_{name}": mean for name, mean in means.items()})
        union = self.concatenate(teachers).cpu()
        moment: Any = sum(part.double().T @ part.double() for part in union.split(65536))
        self.matrix = _principal_axes(moment / len(union))[: self.dim].to(self.matrix)
        return self

    def align(self, teachers: Mapping[str, Tensor], prefix: Tensor) -> "EnsembleRotation":
        """Turn the target so that it goes on from what a student already has.

        Its first coordinates become those directions of the target that the student's regress on,
        made orthonormal, the others the principal axes of what these leave. The whole target's
        cosines do not change.

        Arguments
        ---------
        teachers : mapping of str to torch.Tensor
            Of N clips, {name: (N, D_t)}.
        prefix : torch.Tensor
            The student's coordinates of these clips, (N, d).
        """
        target = self(teachers).double()  # (N, dim)
        prefix = prefix[:, : self.dim].to(target)
        moment = target.T @ target
        moment.diagonal().add_(ALIGN_RIDGE * moment.diagonal().mean())
        regression = torch.linalg.solve(moment, target.T @ prefix).T  # (d, dim)
        left, _, right = torch.linalg.svd(regression, full_matrices=False)
        known = left @ right  # the orthonormal rows nearest to it
        residual = target - target @ known.T @ known
        moment = residual.T @ residual
        moment -= (1 + moment.trace()) * known.T @ known  # known directions come last
        rest = _principal_axes(moment)[: self.dim - len(known)]
        axes = torch.cat([known, rest])
        matrix = F.pad(self.matrix, (0, 0, 0, self.dim - len(self.matrix)))
        self.matrix = (axes.to(self.matrix.device) @ matrix.double()).to(self.matrix)
        return self

    def concatenate(self, teachers: Mapping[str, Tensor]) -> Tensor:
        """Teachers side by side, (B, sum of D_t), at unit length; not centred before ``fit``."""
        means: dict[str, Any] = {
            k.removeprefix("mean_"): m for k, m in self._buffers.items() if k != "matrix"
        }
        names = self._select(teachers, sorted(means) or self.names or sorted(teachers))
        total = sum(self.weights.get(name, 1.0) for name in names)
        parts = []
        for name in names:
            embeddings = teachers[name].detach()
            wanted = len(means[name]) if means else embeddings.shape[-1]
            if embeddings.ndim != 2 or embeddings.shape[1] != wanted:
                raise ValueError(
                    f"teacher {name!r} must be (B, {wanted}), got {tuple(embeddings.shape)}"
                )
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            unit = F.normalize(embeddings - means.get(name, 0.0), dim=-1)
            parts.append(unit * (self.weights.get(name, 1.0) / total) ** 0.5)
        return torch.cat(parts, dim=-1)

    def rotate(self, union: Tensor) -> Tensor:
        """The nested target (B, dim) of concatenated teachers."""
        if not self.fitted:
            raise RuntimeError(
                "the teachers' rotation is not fitted; call fit({name: (N, D_t)}) with their "
                "embeddings of training clips, or load a fitted state"
            )
        rotated = union @ self.matrix.T.to(union.dtype)
        return F.pad(rotated, (0, self.dim - rotated.shape[-1]))

    def forward(self, teachers: Mapping[str, Tensor]) -> Tensor:
        """The nested target (B, dim) of the teachers' embeddings {name: (B, D_t)}."""
        return self.rotate(self.concatenate(teachers))

    def _select(self, teachers: Mapping[str, Tensor], names: list[str]) -> list[str]:
        missing = sorted({*names, *self.weights} - set(teachers))
        if missing or not names:
            raise ValueError(f"teachers {missing} are missing; given: {sorted(teachers)}")
        unknown = sorted(set(teachers) - set(names))
        if unknown and self.names is None:
            raise ValueError(f"teachers {unknown} were not there at fit, only {names} were")
        return names

    def _set_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        for key in [key for key in self._buffers if key != "matrix"]:
            delattr(self, key)
        for key, value in buffers.items():
            self.register_buffer(key, value.to(self.matrix))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # Shapes, and without `names` the teachers too, are known only to the fitted state.
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        teachers = {key for key in own if key.startswith("mean_")}
        if self.names is not None:
            teachers &= {f"mean_{name}" for name in self.names}
        if "matrix" in own:
            self._set_buffers({key: torch.empty_like(own[key]) for key in sorted(teachers)})
            self.matrix = torch.empty_like(own["matrix"]).to(self.matrix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_clips(embeddings: Tensor, name: str) -> None:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"{name} must be (N, D) with N >= 2 clips, got {tuple(embeddings.shape)}")
    if not embeddings.isfinite().all():
        raise ValueError(f"{name} must be finite, but some values are infinite or not a number")


def _principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as rows, the largest eigenvalue first."""
    return _with_fixed_signs(torch.linalg.eigh(moment).eigenvectors.flip(-1).T)


def _with_fixed_signs(rows: Tensor) -> Tensor:
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def _lda_axes(centred: Tensor, labels: Tensor) -> Tensor:
    """All D directions as rows, those that separate the classes best first."""
    if labels.shape != centred.shape[:1]:
        raise ValueError(f"labels must be ({len(centred)},), got {tuple(labels.shape)}")
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(counts) < len(labels):
        raise ValueError(
            f"labels must name at least two speakers, one of them twice, got {len(counts)} "
            f"speakers in {len(labels)} clips; leave labels out for PCA"
        )
    sums = centred.new_zeros(len(counts), centred.shape[1]).index_add_(0, classes, centred)
    means = sums / counts[:, None]  # (C, D)
    residuals = centred - means[classes]
    variances, axes = torch.linalg.eigh(residuals.T @ residuals / len(labels))
    variances = variances.clamp_min(LDA_VARIANCE_FLOOR * variances.mean())
    whiten = axes / variances.sqrt()  # (D, D)
    between = whiten.T @ (sums.T @ means / len(labels)) @ whiten
    # The D - (C - 1) directions that separate nobody would tie; a trace of variance orders them.
    order = variances.diag() * (1e-9 * between.diagonal().max() / variances.max())
    return _with_fixed_signs(_principal_axes(between + order) @ whiten.T)
