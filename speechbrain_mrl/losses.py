"""The objective that trains every prefix of an embedding at once: by teachers, labels, or both."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.classification import PrefixClassifier, margin_losses
from speechbrain_mrl.prefixes import (
    check_mrl_dims,
    check_weights,
    for_each_size,
    in_single_or_better,
    prefix_cosines,
    prefix_norms,
    prefix_sums,
    weighted_mean,
)
from speechbrain_mrl.targets import EnsembleRotation

DEFAULT_TEACHER_MAP = {64: "b0", 128: "b1", 192: "b2", 256: "b6"}  # small teachers, small prefixes
TERMS = ("cosine", "gram", "contrastive", "mse", "aam")
AAM_SCALE = 30.0  # as in SpeechBrain's VoxCeleb recipes for ECAPA-TDNN and ResNet


class MatryoshkaDistillationLoss(nn.Module):
    """Distils one or several teachers into every prefix of a student, all sizes in one pass.

    A teacher's own first d dimensions are not an embedding. A prefix is compared only with the
    teachers' cosines, or with d dimensions of a fixed nested target (``EnsembleRotation``):

    * ``cosine``: 1 - cosine between prefix and target.
    * ``mse``: mean squared difference of prefix and target, neither normalised.
    * ``contrastive``: cross-entropy between the softmax rows of scaled student-target cosines and
      those of the teachers' own cosines.
    * ``gram``: mean squared difference of the cosines of utterance pairs, student's and teachers'. A
      batch of one utterance has no pairs and costs nothing.
    * ``aam``: additive angular margin on labels.

    Where sizes follow different teachers, their targets disagree on the dimensions that prefixes
    share. The first three terms then compare a linear map of the prefix, one per size. It is
    trained with the student (give the objective's parameters to the optimizer) and of no use
    afterwards.

    With several processes in training, all terms but ``aam`` see the utterances of all ranks, which
    must be equally many. Gradients averaged over ranks are then those of one process with the whole
    batch. In eval mode each rank sees its own utterances.

    Arguments
    ---------
    mrl_dims : iterable of int
        Prefix sizes, ascending. Dimensions past the last one are not used.
    teacher_map : mapping of int to str or list of str, or "all", optional
        Teacher or teachers of each size. Default: b0 to 64, b1 to 128, b2 to 192, b6 to 256.
        With "all", the whole ensemble teaches every size.
    terms : mapping of str to float
        Weight of each term; null or 0 switches one off.
    mrl_weights : iterable of float, optional
        One per size; only ratios matter. Default: equal.
    teacher_weights : mapping of str to float, optional
        Share of a teacher where a size has several, 1 where not given; only ratios matter.
    n_classes : int, optional
        Training speakers; ``aam`` needs it.
    margins : float or mapping of int to float
        Angular margin in radians, for all sizes or for each.
    contrastive_scale : float
        Factor on cosines before the softmax.

    Raises
    ------
    ValueError
        If arguments do not belong together, or a call lacks a teacher, labels or utterances.
    RuntimeError
        If a term needs the target and ``fit`` was not called.

    Example
    -------
    >>> objective = MatryoshkaDistillationLoss([2, 4], {2: "small", 4: ["small", "large"]})
    >>> clips = {"small": torch.randn(50, 6), "large": torch.randn(50, 8)}
    >>> batch = {name: embeddings[:5] for name, embeddings in clips.items()}
    >>> loss, values = objective.fit(clips)(torch.randn(5, 4), batch)
    >>> sorted(values)
    ['contrastive/2', 'contrastive/4', 'cosine/2', 'cosine/4']
    """

    ensembles: Any  # nn.ModuleList of EnsembleRotation

    def __init__(
        self,
        mrl_dims: Iterable[int],
        teacher_map: Mapping[int, str | list[str]] | str | None = None,
        terms: Mapping[str, float] = {"cosine": 1.0, "contrastive": 0.1},
        mrl_weights: Iterable[float] | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        n_classes: int | None = None,
        margins: float | Mapping[int, float] = 0.2,
        contrastive_scale: float = 20.0,
    ) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        self.mrl_weights = check_weights(mrl_weights, self.mrl_dims)
        known = isinstance(terms, Mapping) and set(terms) <= set(TERMS)
        self.terms = {term: weight for term, weight in terms.items() if weight} if known else {}
        valid = [isinstance(w, (int, float)) and 0 < w < inf for w in self.terms.values()]
        if not valid or not all(valid):
            raise ValueError(
                f"terms must be some of {TERMS} with finite weights of at least 0, got {terms!r}"
            )
        self.values_as_tensors = False
        self.contrastive_scale = contrastive_scale

        groups = _teachers_of_each_size(teacher_map, self.mrl_dims)
        if not isinstance(teacher_weights, (Mapping, type(None))):
            raise ValueError(
                f"teacher_weights must be a mapping of names to weights, got {teacher_weights!r}"
            )
        weights = dict(teacher_weights or {})
        teaching = {name for group in groups.values() for name in group or weights}
        if set(weights) - teaching:
            raise ValueError(f"teacher_weights {weights} must be for teachers {sorted(teaching)}")
        distinct = list(dict.fromkeys(groups.values()))
        self.ensemble_of = {dim: distinct.index(group) for dim, group in groups.items()}
        self.ensembles = nn.ModuleList(
            EnsembleRotation(
                dim=max(dim for dim in self.mrl_dims if groups[dim] == group),
                names=group,
                weights={n: w for n, w in weights.items() if group is None or n in group},
            )
            for group in distinct
        )
        self.maps = nn.ModuleDict()
        if len(distinct) > 1 and self.terms.keys() & {"cosine", "mse", "contrastive"}:
            for dim in self.mrl_dims:
                self.maps[str(dim)] = same = nn.Linear(dim, dim, bias=False)
                nn.init.eye_(same.weight)

        if "aam" in self.terms:
            if n_classes is None:
                raise ValueError("the aam term needs n_classes, the number of training speakers")
            if not isinstance(margins, Mapping):
                margins = dict.fromkeys(self.mrl_dims, margins)
            self.margins = for_each_size(margins, self.mrl_dims, "margins")
            self.classifier = PrefixClassifier(self.mrl_dims[-1], n_classes, self.mrl_dims)
            self.scale_margins(1.0)

    @property
    def fitted(self) -> bool:
        """Whether the targets exist: after ``fit``, or once a fitted state was loaded."""
        return all(ensemble.fitted for ensemble in self.ensembles)

    def fit(
        self, teachers: Mapping[str, Tensor], labels: Tensor | None = None
    ) -> "MatryoshkaDistillationLoss":
        """Means and rotations from the same N utterances of each teacher, {name: (N, D_t)}.

        The rotation is PCA, or with the utterances' speakers, ``labels`` (N,), LDA. ``gram`` keeps
        the teachers' own cosines, so that it does not go with LDA.
        """
        for ensemble in self.ensembles:
            ensemble.fit(teachers, labels)
        return self

    def align(self, teachers: Mapping[str, Tensor], prefix: Tensor) -> "MatryoshkaDistillationLoss":
        """Rotate the fitted targets so that they continue a student's prefix (N, d)."""
        for ensemble in self.ensembles:
            ensemble.align(teachers, prefix)
        return self

    def scale_margins(self, fraction: float) -> None:
        """Set the term ``aam``'s margins to a fraction of ``margins``, for a schedule."""
        if "aam" not in self.terms:
            raise ValueError("a schedule of margins needs the term aam")
        self.scaled_margins = {dim: fraction * margin for dim, margin in self.margins.items()}

    def targets(self, teacher_embeddings: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """What ``cosine`` and ``mse`` compare each prefix with, {d: (B, d)}."""
        rotated = [ensemble(teacher_embeddings) for ensemble in self.ensembles]
        return {dim: rotated[self.ensemble_of[dim]][:, :dim] for dim in self.mrl_dims}

    def forward(
        self,
        student_embeddings: Tensor,
        teacher_embeddings: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Student (B, D), teachers {name: (B, D_t)} and, for ``aam``, speakers (B,) to the loss.

        Returns the scalar to minimise and each term's unweighted value, {"gram/64": float, ...}.
        With ``values_as_tensors`` these stay on their device, and a GPU need not be waited for.
        In eval mode without labels, ``aam`` is left out: held-out speakers are no classes.
        """
        self._check_batch(student_embeddings, teacher_embeddings, labels)
        with torch.autocast(student_embeddings.device.type, enabled=False):
            student = in_single_or_better(student_embeddings, self.mrl_dims)
            losses = self._distillation(student, teacher_embeddings)
            if "aam" in self.terms and labels is not None:
                losses["aam"] = margin_losses(
                    student,
                    self.classifier.weight,
                    labels.reshape(-1).long(),
                    self.scaled_margins,
                    AAM_SCALE,
                )
            if not losses:
                return student.new_zeros(()), {}
            loss: Any = sum(
                self.terms[term] * weighted_mean(found, self.mrl_weights)
                for term, found in losses.items()
            )
        names = [f"{term}/{dim}" for term in losses for dim in self.mrl_dims]
        values = torch.stack([value for term in losses.values() for value in term.values()])
        return loss, dict(
            zip(names, values.detach() if self.values_as_tensors else values.tolist())
        )

    def _check_batch(
        self, student: Tensor, teachers: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        if "aam" in self.terms and labels is None and self.training:
            raise ValueError("the aam term needs labels, (B,); give them or leave the term out")
        sizes = {"student": len(student), **{name: len(teachers[name]) for name in teachers}}
        if labels is not None:
            sizes["labels"] = len(labels)
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"student, teachers and labels must hold the same utterances, got {sizes}"
            )

    def _distillation(
        self, student: Tensor, teachers: Mapping[str, Tensor]
    ) -> dict[str, dict[int, Tensor]]:
        """{term: {d: scalar}} of all terms that teachers teach."""
        if self.terms.keys() == {"aam"}:
            return {}
        unions = [ensemble.concatenate(teachers).to(student) for ensemble in self.ensembles]
        if self.training and dist.is_initialized():
            student, *unions = [_gather(x) for x in (student, *unions)]
        cosines = [union @ union.T for union in unions]
        teacher_cosines = {dim: cosines[self.ensemble_of[dim]] for dim in self.mrl_dims}

        losses: dict[str, dict[int, Tensor]] = {term: {} for term in self.terms if term != "aam"}
        if "gram" in losses:
            losses["gram"] = _gram_losses(student, teacher_cosines, self.mrl_dims)
        if losses.keys() & {"cosine", "mse", "contrastive"}:
            for dims, prefix, target in self._matched(student, unions):
                if "cosine" in losses:
                    losses["cosine"] |= _cosine_losses(prefix, target, dims)
                if "mse" in losses:
                    losses["mse"] |= _mse_losses(prefix, target, dims)
                if "contrastive" in losses:
                    losses["contrastive"] |= _contrastive_losses(
                        prefix, target, teacher_cosines, dims, self.contrastive_scale
                    )
        return losses

    def _matched(
        self, student: Tensor, unions: list[Tensor]
    ) -> list[tuple[tuple[int, ...], Tensor, Tensor]]:
        """(sizes, student, target) where student and target share their dimensions' meaning."""
        targets = [ensemble.rotate(union) for ensemble, union in zip(self.ensembles, unions)]
        if not self.maps:
            return [(self.mrl_dims, student, targets[0])]
        return [
            ((dim,), self.maps[str(dim)](student[:, :dim]), targets[self.ensemble_of[dim]])
            for dim in self.mrl_dims
        ]


def _cosine_losses(student: Tensor, target: Tensor, mrl_dims: tuple[int, ...]) -> dict[int, Tensor]:
    products = prefix_sums(lambda b: (student[:, b] * target[:, b]).sum(dim=-1), mrl_dims)
    lengths, wanted = prefix_norms(student, mrl_dims), prefix_norms(target, mrl_dims)
    return {d: (1 - products[d] / (lengths[d] * wanted[d])).mean() for d in mrl_dims}


def _mse_losses(student: Tensor, target: Tensor, mrl_dims: tuple[int, ...]) -> dict[int, Tensor]:
    sums = prefix_sums(lambda b: (student[:, b] - target[:, b]).square().sum(dim=-1), mrl_dims)
    return {d: sums[d].mean() / d for d in mrl_dims}


def _gram_losses(
    student: Tensor, teacher_cosines: Mapping[int, Tensor], mrl_dims: tuple[int, ...]
) -> dict[int, Tensor]:
    n_pairs = max(len(student) * (len(student) - 1), 1)
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    return {
        d: (cosines - teacher_cosines[d]).masked_fill(itself, 0.0).square().sum() / n_pairs
        for d, cosines in prefix_cosines(student, student, mrl_dims).items()
    }


def _contrastive_losses(
    student: Tensor,
    target: Tensor,
    teacher_cosines: Mapping[int, Tensor],
    mrl_dims: tuple[int, ...],
    scale: float,
) -> dict[int, Tensor]:
    return {
        d: F.cross_entropy(scale * cosines, (scale * teacher_cosines[d]).softmax(dim=-1))
        for d, cosines in prefix_cosines(student, target, mrl_dims).items()
    }


def _gather(x: Tensor) -> Tensor:
    """The utterances of all ranks, (ranks * B, D), for a loss that every rank computes the same.

    A rank's own utterances get the gradient of all ranks' losses together, which DDP then averages.
    """
    sent = x.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    own = parts[dist.get_rank()] = x.view_as(x)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * len(parts))
    return torch.cat(parts)


def _teachers_of_each_size(
    teacher_map: Mapping[int, Any] | str | None, mrl_dims: tuple[int, ...]
) -> dict[int, tuple[str, ...] | None]:
    """{d: sorted names}, or {d: None} where the whole ensemble teaches."""
    if teacher_map == "all":
        return dict.fromkeys(mrl_dims)
    if teacher_map is None:
        groups = for_each_size(DEFAULT_TEACHER_MAP, mrl_dims, "the default teacher_map")
    else:
        groups = for_each_size(teacher_map, mrl_dims, "teacher_map")
    groups = {
        dim: tuple(sorted({names} if isinstance(names, str) else set(names)))
        for dim, names in groups.items()
    }
    if not all(groups.values()):
        raise ValueError(f"teacher_map must name a teacher for each size, got {teacher_map}")
    return groups
