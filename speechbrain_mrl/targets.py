"""The nested target of several teachers: centred, L2-normalised, concatenated, rotated by PCA or LDA."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.rotation import check_clips, lda_axes, principal_axes

ALIGN_RIDGE = 0.01  # of the mean variance of a target's dimension


class EnsembleRotation(nn.Module):
    """One nested target out of several teachers: its first d dimensions are the best d.

    Each teacher is centred by its fitted mean, L2-normalised, weighted, and concatenated with the
    others. Dot products of the whole are then the weighted mean of the teachers' cosines. Its
    principal components (not centred again) keep them as well as any d dimensions can. With
    labelled utterances the axes are those of LDA instead, which separate speakers.

    Arguments
    ---------
    dim : int
        Dimensions of the target; zeros fill it up where the teachers together have fewer.
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
        if not all(isinstance(w, (int, float)) and w > 0 for w in self.weights.values()):
            raise ValueError(f"teacher weights must be positive numbers, got {self.weights}")
        self.register_buffer("matrix", torch.empty(0, 0))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called or a fitted state was loaded."""
        return self.matrix.numel() > 0

    def fit(
        self, teachers: Mapping[str, Tensor], labels: Tensor | None = None
    ) -> "EnsembleRotation":
        """Means and axes from the same N utterances of every teacher, {name: (N, D_t)}.

        With the utterances' speakers, ``labels`` (N,), the axes are those of LDA.
        """
        names = self._select(teachers, self.names or sorted(teachers))
        for name in names:
            check_clips(teachers[name], f"teacher {name!r}")
            if "." in name:
                raise ValueError(f"a teacher's name may not hold a dot, got {name!r}")
        clips = {name: len(teachers[name]) for name in names}
        if len(set(clips.values())) > 1:
            raise ValueError(f"all teachers must embed the same utterances, got {clips} utterances")
        teachers = {name: teachers[name].detach().to(self.matrix.device) for name in names}
        means = {name: teachers[name].mean(dim=0, dtype=torch.float64) for name in names}
        self._set_buffers({f"mean_{name}": mean for name, mean in means.items()})
        union = self.concatenate(teachers).cpu().double()
        if labels is None:
            axes = principal_axes(union.T @ union / len(union))
        else:
            axes = lda_axes(union - union.mean(dim=0), labels.cpu())
            axes /= (union @ axes.T).square().sum(dim=1).mean().sqrt()  # a target's usual length
        self.matrix = axes[: self.dim].to(self.matrix)
        return self

    def align(self, teachers: Mapping[str, Tensor], prefix: Tensor) -> "EnsembleRotation":
        """Rotate the target so that it continues what a student already has.

        Its first dimensions become those directions of the target that the student's regress on,
        made orthonormal, the others the principal components of what these leave. The whole
        target's cosines do not change.

        Arguments
        ---------
        teachers : mapping of str to torch.Tensor
            Of N utterances, {name: (N, D_t)}.
        prefix : torch.Tensor
            The student's dimensions of these utterances, (N, d).
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
        rest = principal_axes(moment)[: self.dim - len(known)]
        axes = torch.cat([known, rest])
        matrix = F.pad(self.matrix, (0, 0, 0, self.dim - len(self.matrix)))
        self.matrix = (axes.to(self.matrix.device) @ matrix.double()).to(self.matrix)
        return self

    def concatenate(self, teachers: Mapping[str, Tensor]) -> Tensor:
        """Teachers side by side, (B, sum of D_t), L2-normalised; not centred before ``fit``."""
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
                "embeddings of training utterances, or load a fitted state"
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
