"""Objectives that train every prefix of an embedding at once: by labels, by teachers, or by both.

All sizes come out of one pass over the coordinates: the product of the first d coordinates is the
product of the size before plus one more block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.rotation import check_mrl_dims
from speechbrain_mrl.targets import EnsembleRotation

BLOCK = 4096  # speakers at a time
SMALLEST_NORM = 1e-6  # keeps cosines of zero vectors, and their gradients, finite
NEVER = -1e4  # a logit whose exponential is zero
LARGEST_SCALE = 70.0  # float32 holds the sum of exp(scale) over 10**8 speakers


def prefix_margin_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margins: Mapping[int, float],
    scale: float,
) -> dict[int, Tensor]:
    """What SpeechBrain's ``LogSoftmaxWrapper(AdditiveAngularMargin(...))`` gives at each prefix.

    Arguments
    ---------
    embeddings : torch.Tensor
        Float, (B, D).
    weight : torch.Tensor
        One vector per speaker, (C, D), of the same type.
    labels : torch.Tensor
        Speakers of the clips, int, (B,).
    margins : mapping of int to float
        Radians for each prefix size, ascending, the largest at most D.
    scale : float
        Factor on cosines before the softmax, above 0 and at most 70.

    Returns
    -------
    dict of int to torch.Tensor
        Mean loss of each size.

    Raises
    ------
    ValueError
        For another scale.

    Reference
    ---------
    Xiang et al., Margin Matters, 2019, arXiv:1906.07317.

    Example
    -------
    >>> embeddings, weight = torch.tensor([[1.0, 0.0, 9.0]]), torch.eye(3)
    >>> prefix_margin_losses(embeddings, weight, torch.tensor([0]), {2: 0.0}, scale=1.0)
    {2: tensor(0.5514)}
    """
    if not 0 < scale <= LARGEST_SCALE:
        raise ValueError(f"scale must be above 0 and at most {LARGEST_SCALE}, got {scale}")
    dims = tuple(margins)
    others = _LogSumOfOthers.apply(embeddings, weight, labels, dims, scale)  # (K, B)
    own = weight[labels]  # (B, D)
    losses = {}
    for dim, log_sum in zip(dims, others):
        cosines = F.cosine_similarity(embeddings[:, :dim], own[:, :dim], eps=SMALLEST_NORM)
        logits = scale * _with_margin(cosines, margins[dim])
        losses[dim] = F.softplus(log_sum - logits).mean()
    return losses


def _with_margin(cosines: Tensor, radians: float) -> Tensor:
    """cos(angle + margin), and past a half turn a straight line, as in SpeechBrain."""
    margin = torch.tensor(radians, dtype=cosines.dtype, device=cosines.device)
    cosines = cosines.clamp(-1 + 1e-7, 1 - 1e-7)
    turned = cosines * margin.cos() - (1 - cosines**2).sqrt() * margin.sin()
    return torch.where(cosines > -margin.cos(), turned, cosines - margin * margin.sin())


class _LogSumOfOthers(torch.autograd.Function):
    """log of the sum of exp(scale * cosine) over all speakers but a clip's own, (K, B)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, dims: tuple[int, ...], scale: float
    ) -> Tensor:
        x_norms, w_norms = prefix_norms(x, dims), prefix_norms(weight, dims)
        factors, divisors = (scale / x_norms).unsqueeze(2), w_norms.reciprocal()
        logits, sums = x.new_empty(len(dims), len(x), len(weight)), torch.zeros_like(x_norms)
        for speakers in _blocks(len(weight)):
            w = weight[speakers]
            product = x.new_zeros(len(x), len(w))
            inside = (labels >= speakers.start) & (labels < speakers.stop)
            clips, own = inside.nonzero(as_tuple=True)[0], labels[inside]
            for k, block in enumerate(prefix_blocks(dims)):
                product.addmm_(x[:, block], w[:, block].T)
                one = torch.mul(product, divisors[k, speakers], out=logits[k, :, speakers])
                one.mul_(factors[k])[clips, own - speakers.start] = NEVER
                sums[k] += one.exp().sum(dim=1)
        sums.clamp_min_(torch.finfo(sums.dtype).tiny)  # of a speaker who is alone
        ctx.save_for_backward(x, weight, factors, divisors, sums, logits)
        ctx.dims, ctx.scale = dims, scale
        return sums.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors, divisors, sums, logits = ctx.saved_tensors
        x_gradient, w_gradient = torch.zeros_like(x), torch.zeros_like(weight)
        shares = (gradient / sums).unsqueeze(2) * factors
        # A cosine also falls as its vectors grow: sums of (gradient * logit) by clip and speaker.
        by_clip, unscaled = torch.zeros_like(sums), 1 / factors.squeeze(2)
        blocks = list(enumerate(prefix_blocks(ctx.dims)))
        for speakers in _blocks(len(weight)):
            w = weight[speakers]
            to_product = x.new_zeros(len(x), len(w))  # gradient of the sum over coordinates
            shrink = x.new_zeros(len(w))
            for k, block in reversed(blocks):
                logit = logits[k, :, speakers]
                share = logit.exp().mul_(shares[k])
                to_product.addcmul_(share, divisors[k, speakers])
                share.mul_(logit)
                by_clip[k] += share.sum(dim=1)
                shrink += (unscaled[k] @ share) * divisors[k, speakers] ** 2
                x_gradient[:, block].addmm_(to_product, w[:, block])
                w_gradient[speakers, block].addmm_(to_product.T, x[:, block])
                w_gradient[speakers, block].addcmul_(w[:, block], shrink[:, None], value=-1)
        shrink = torch.zeros_like(by_clip[0])
        for k, block in reversed(blocks):
            shrink += by_clip[k] * factors[k, :, 0] / ctx.scale**2
            x_gradient[:, block] -= x[:, block] * shrink[:, None]
        return x_gradient, w_gradient, None, None, None


def _blocks(n_speakers: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, n_speakers)) for i in range(0, n_speakers, BLOCK)]


def prefix_blocks(dims: Iterable[int]) -> list[slice]:
    """The coordinates that each size adds to the one before."""
    return [slice(*ends) for ends in pairwise((0, *dims))]


def prefix_norms(x: Tensor, dims: Iterable[int]) -> Tensor:
    """Norms of the rows (rows, D) at each of K sizes, (K, rows), at least ``SMALLEST_NORM``."""
    squares = [x[:, block].square().sum(dim=1) for block in prefix_blocks(dims)]
    return torch.stack(squares).cumsum(dim=0).clamp_min(SMALLEST_NORM**2).sqrt()


DEFAULT_TEACHER_MAP = {64: "b0", 128: "b1", 192: "b2", 256: "b6"}  # small teachers, small prefixes
TERMS = ("cosine", "gram", "contrastive", "mse", "aam")
AAM_SCALE = 30.0  # as in SpeechBrain's VoxCeleb recipes for ECAPA-TDNN and ResNet


def prefix_cosines(x: Tensor, y: Tensor, mrl_dims: Iterable[int]) -> dict[int, Tensor]:
    """Cosines between all rows of ``x`` and ``y`` at every prefix size, for the cost of the largest.

    Arguments
    ---------
    x : torch.Tensor
        Float, (B, D), D at least the largest size. Computed in float32 or better, autocast or not.
    y : torch.Tensor
        Float, (C, D): speakers, targets, or ``x`` itself.
    mrl_dims : iterable of int
        Prefix sizes, ascending.

    Returns
    -------
    dict of int to torch.Tensor
        (B, C) for each size.

    Raises
    ------
    ValueError
        If ``x`` or ``y`` is not (rows, coordinates) with enough coordinates.

    Example
    -------
    >>> x = torch.tensor([[3.0, 0.0, 4.0]])
    >>> prefix_cosines(x, torch.tensor([[1.0, 0.0, 0.0]]), [1, 3])
    {1: tensor([[1.]]), 3: tensor([[0.6000]])}
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    with torch.autocast(x.device.type, enabled=False):
        x, y = _precise(x, mrl_dims), _precise(y, mrl_dims)
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        products = _prefix_sums(lambda block: x[:, block] @ y[:, block].T, mrl_dims)
        x_norms, y_norms = _prefix_norms(x, mrl_dims), _prefix_norms(y, mrl_dims)
        return {d: products[d] / (x_norms[d][:, None] * y_norms[d]) for d in mrl_dims}


def scale_tail_gradients(embeddings: Tensor, mrl_dims: Iterable[int]) -> Tensor:
    """The same embeddings, but each block of coordinates gets K / (K - k) times the gradient.

    Block k (from 0) belongs to only K - k of the K prefixes; without this the tail learns slowest.

    Arguments
    ---------
    embeddings : torch.Tensor
        Float, (B, D).
    mrl_dims : iterable of int
        The K prefix sizes, ascending.

    Returns
    -------
    torch.Tensor
        ``embeddings``, values unchanged.

    Reference
    ---------
    Park & Kim, IEEE Access 2025.

    Example
    -------
    >>> embeddings = torch.ones(1, 3, requires_grad=True)
    >>> scale_tail_gradients(embeddings, mrl_dims=[2, 3]).sum().backward()
    >>> embeddings.grad
    tensor([[1., 1., 2.]])
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    factors = embeddings.new_ones(embeddings.shape[-1])
    for k, start in enumerate((0, *mrl_dims[:-1])):
        factors[start:] = len(mrl_dims) / (len(mrl_dims) - k)
    scaled = embeddings.view_as(embeddings)
    if scaled.requires_grad:
        scaled.register_hook(lambda gradient: gradient * factors)
    return scaled


class PrefixClassifier(nn.Module):
    """Cosines to one set of speaker vectors, whose prefixes serve the embedding's prefixes.

    Arguments
    ---------
    embed_dim : int
        Coordinates of the embedding (D).
    n_classes : int
        Speakers (C).
    mrl_dims : iterable of int
        Prefix sizes, ascending, the largest at most ``embed_dim``.

    Example
    -------
    >>> cosines = PrefixClassifier(8, 5, mrl_dims=[2, 8])(torch.randn(3, 8))
    >>> {dim: tuple(cosine.shape) for dim, cosine in cosines.items()}
    {2: (3, 5), 8: (3, 5)}
    """

    def __init__(self, embed_dim: int, n_classes: int, mrl_dims: Iterable[int]) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        if self.mrl_dims[-1] > embed_dim:
            raise ValueError(f"mrl_dims {self.mrl_dims} ends past embed_dim={embed_dim}")
        self.weight = nn.Parameter(torch.empty(n_classes, embed_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor) -> dict[int, Tensor]:
        """Embeddings (B, D) -> {d: cosines (B, C)}."""
        return prefix_cosines(embeddings, self.weight, self.mrl_dims)


class MatryoshkaLoss(nn.Module):
    """A classification loss at every prefix size, averaged over the sizes by weight.

    Arguments
    ---------
    base_loss_per_dim : callable, or mapping of int to callable
        One loss for all sizes or one for each, called as SpeechBrain's: predictions (B, 1, C),
        targets (B, 1).
    mrl_dims : iterable of int
        Prefix sizes, ascending.
    mrl_weights : iterable of float, optional
        One per size; only ratios matter, for the weighted sum is divided by their sum. Default: equal.

    Raises
    ------
    ValueError
        If sizes, weights or losses do not belong together.

    Reference
    ---------
    Kusupati et al., Matryoshka Representation Learning, 2022, arXiv:2205.13147.

    Example
    -------
    >>> from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
    >>> base_loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30.0))
    >>> loss = MatryoshkaLoss(base_loss, mrl_dims=[2, 8])
    >>> cosines = PrefixClassifier(8, 5, mrl_dims=[2, 8])(torch.randn(3, 8))
    >>> loss(cosines, torch.tensor([0, 4, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        base_loss_per_dim: Callable[..., Tensor] | Mapping[int, Callable[..., Tensor]],
        mrl_dims: Iterable[int],
        mrl_weights: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        self.mrl_weights = _check_weights(mrl_weights, self.mrl_dims)
        if not isinstance(base_loss_per_dim, Mapping):
            base_loss_per_dim = dict.fromkeys(self.mrl_dims, base_loss_per_dim)
        losses = _for_each_size(base_loss_per_dim, self.mrl_dims, "base_loss_per_dim")
        for dim, loss in losses.items():
            setattr(self, f"base_loss_{dim}", loss)  # registers those that are modules

    def per_size(self, predictions: Mapping[int, Tensor], targets: Tensor) -> dict[int, Tensor]:
        """The base losses before they are averaged, {d: scalar}."""
        predictions = _for_each_size(predictions, self.mrl_dims, "predictions")
        targets = targets.reshape(-1, 1)
        for dim, prediction in predictions.items():
            if len(prediction) != len(targets):
                raise ValueError(
                    f"predictions at size {dim} hold {len(prediction)} clips for "
                    f"{len(targets)} targets"
                )
        return {
            dim: getattr(self, f"base_loss_{dim}")(prediction.flatten(1).unsqueeze(1), targets)
            for dim, prediction in predictions.items()
        }

    def forward(self, predictions: Mapping[int, Tensor], targets: Tensor) -> Tensor:
        """Predictions {d: (B, C)} and classes (B,) -> scalar."""
        return _weighted_mean(self.per_size(predictions, targets), self.mrl_weights)


class MatryoshkaDistillationLoss(nn.Module):
    """Teaches every prefix of a student what one or several teachers know, all sizes in one pass.

    A teacher's own first d coordinates mean nothing, so a prefix is compared only with the teachers'
    cosines, or with d coordinates of a fixed nested target (``EnsembleRotation``), fitted once:

    * ``cosine``: 1 - cosine between prefix and target.
    * ``mse``: mean squared difference of prefix and target, neither normalised.
    * ``contrastive``: cross-entropy between the softmax rows of scaled student-target cosines and
      those of the teachers' own cosines.
    * ``gram``: mean squared difference of the cosines of clip pairs, student's and teachers'. A batch
      of one clip has no pairs and costs nothing.
    * ``aam``: additive angular margin on labels, tail gradients scaled (``scale_tail_gradients``).

    Where sizes follow different teachers, whose targets disagree on the coordinates that prefixes
    share, the first three see the prefix through a linear map per size, trained with the student
    (give the objective's parameters to the optimizer) and of no use afterwards.
    With several processes in training, all terms but ``aam`` see the clips of all ranks, which must be
    equally many; gradients averaged over ranks are then those of one process with the whole batch.
    In eval mode each rank sees its own clips.

    Arguments
    ---------
    mrl_dims : iterable of int
        Prefix sizes, ascending. Coordinates past the last one are not used.
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
        If arguments do not belong together, or a call lacks a teacher, labels or clips.
    RuntimeError
        If a term needs the target and ``fit`` was not called.

    Example
    -------
    >>> objective = MatryoshkaDistillationLoss([2, 4], {2: "small", 4: ["small", "large"]})
    >>> clips = {"small": torch.randn(50, 6), "large": torch.randn(50, 8)}
    >>> batch = {name: embeddings[:5] for name, embeddings in clips.items()}
    >>> loss, values = objective.fit(clips)(torch.randn(5, 4), batch)
    >>> sorted(values)
    ['cosine/2', 'cosine/4', 'gram/2', 'gram/4']
    """

    ensembles: Any  # nn.ModuleList of EnsembleRotation

    def __init__(
        self,
        mrl_dims: Iterable[int],
        teacher_map: Mapping[int, str | list[str]] | str | None = None,
        terms: Mapping[str, float] = {"cosine": 1.0, "gram": 1.0},
        mrl_weights: Iterable[float] | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        n_classes: int | None = None,
        margins: float | Mapping[int, float] = 0.2,
        contrastive_scale: float = 20.0,
    ) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        self.mrl_weights = _check_weights(mrl_weights, self.mrl_dims)
        self.terms = {term: weight for term, weight in terms.items() if weight}
        unknown = sorted(set(terms) - set(TERMS))
        if unknown or not self.terms:
            raise ValueError(f"terms must be some of {TERMS}, got {dict(terms)}")
        self.contrastive_scale = contrastive_scale

        groups = _teachers_of_each_size(teacher_map, self.mrl_dims)
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
            self.margins = _for_each_size(margins, self.mrl_dims, "margins")
            self.classifier = PrefixClassifier(self.mrl_dims[-1], n_classes, self.mrl_dims)
            self.scale_margins(1.0)

    @property
    def fitted(self) -> bool:
        """Whether the targets exist: after ``fit``, or once a fitted state was loaded."""
        return all(ensemble.fitted for ensemble in self.ensembles)

    def fit(self, teachers: Mapping[str, Tensor]) -> "MatryoshkaDistillationLoss":
        """Means and rotations from the same N unlabelled clips of each teacher, {name: (N, D_t)}."""
        for ensemble in self.ensembles:
            ensemble.fit(teachers)
        return self

    def align(self, teachers: Mapping[str, Tensor], prefix: Tensor) -> "MatryoshkaDistillationLoss":
        """Turn the fitted targets so that they go on from a student's prefix (N, d) of N clips."""
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
        In eval mode without labels, ``aam`` is left out: held-out speakers are no classes.
        """
        self._check_batch(student_embeddings, teacher_embeddings, labels)
        with torch.autocast(student_embeddings.device.type, enabled=False):
            student = _precise(student_embeddings, self.mrl_dims)
            losses = self._distillation(student, teacher_embeddings)
            if "aam" in self.terms and labels is not None:
                losses["aam"] = prefix_margin_losses(
                    scale_tail_gradients(student, self.mrl_dims),
                    self.classifier.weight.to(student.dtype),
                    labels.reshape(-1).long(),
                    self.scaled_margins,
                    AAM_SCALE,
                )
            if not losses:
                return student.new_zeros(()), {}
            loss: Any = sum(
                self.terms[term] * _weighted_mean(found, self.mrl_weights)
                for term, found in losses.items()
            )
        names = [f"{term}/{dim}" for term in losses for dim in self.mrl_dims]
        values = torch.stack([value for term in losses.values() for value in term.values()])
        return loss, dict(zip(names, values.tolist()))

    def _check_batch(
        self, student: Tensor, teachers: Mapping[str, Tensor], labels: Tensor | None
    ) -> None:
        if "aam" in self.terms and labels is None and self.training:
            raise ValueError("the aam term needs labels, (B,); give them or leave the term out")
        sizes = {"student": len(student), **{name: len(teachers[name]) for name in teachers}}
        if labels is not None:
            sizes["labels"] = len(labels)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"student, teachers and labels must hold the same clips, got {sizes}")

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
        """(sizes, student, target) where student and target share their coordinates' meaning."""
        targets = [ensemble.rotate(union) for ensemble, union in zip(self.ensembles, unions)]
        if not self.maps:
            return [(self.mrl_dims, student, targets[0])]
        return [
            ((dim,), self.maps[str(dim)](student[:, :dim]), targets[self.ensemble_of[dim]])
            for dim in self.mrl_dims
        ]


def _cosine_losses(student: Tensor, target: Tensor, mrl_dims: tuple[int, ...]) -> dict[int, Tensor]:
    products = _prefix_sums(lambda b: (student[:, b] * target[:, b]).sum(dim=-1), mrl_dims)
    lengths, wanted = _prefix_norms(student, mrl_dims), _prefix_norms(target, mrl_dims)
    return {d: (1 - products[d] / (lengths[d] * wanted[d])).mean() for d in mrl_dims}


def _mse_losses(student: Tensor, target: Tensor, mrl_dims: tuple[int, ...]) -> dict[int, Tensor]:
    sums = _prefix_sums(lambda b: (student[:, b] - target[:, b]).square().sum(dim=-1), mrl_dims)
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
    """The clips of all ranks, (ranks * B, D), for a loss that every rank computes alike.

    A rank's own clips get the gradient of all ranks' losses together, which DDP then averages.
    """
    sent = x.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    own = parts[dist.get_rank()] = x.view_as(x)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * len(parts))
    return torch.cat(parts)


def _prefix_sums(
    block_sum: Callable[[slice], Tensor], mrl_dims: tuple[int, ...]
) -> dict[int, Tensor]:
    """{d: sum of ``block_sum(block)`` over the blocks of coordinates up to d}."""
    return dict(zip(mrl_dims, accumulate(map(block_sum, prefix_blocks(mrl_dims)))))


def _prefix_norms(x: Tensor, mrl_dims: tuple[int, ...]) -> dict[int, Tensor]:
    return dict(zip(mrl_dims, prefix_norms(x, mrl_dims)))


def _precise(x: Tensor, mrl_dims: tuple[int, ...]) -> Tensor:
    """``x`` in float32 or better, once it has the coordinates that the sizes need."""
    if x.ndim != 2 or x.shape[1] < mrl_dims[-1]:
        raise ValueError(
            f"expected (rows, coordinates) with at least {mrl_dims[-1]} coordinates for mrl_dims "
            f"{mrl_dims}, got {tuple(x.shape)}"
        )
    return x if x.dtype == torch.float64 else x.float()


def _weighted_mean(per_size: Mapping[int, Tensor], weights: Sequence[float]) -> Any:
    return sum(w * x for w, x in zip(weights, per_size.values())) / sum(weights)


def _check_weights(
    mrl_weights: Iterable[float] | None, mrl_dims: tuple[int, ...]
) -> tuple[float, ...]:
    weights = (1.0,) * len(mrl_dims) if mrl_weights is None else tuple(mrl_weights)
    if len(weights) != len(mrl_dims):
        raise ValueError(
            f"mrl_weights has {len(weights)} entries for {len(mrl_dims)} mrl_dims {mrl_dims}; "
            "give one weight per size, in the same order"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"mrl_weights must not be negative, nor all zero, got {weights}")
    return weights


def _for_each_size(value: Any, mrl_dims: tuple[int, ...], argument: str) -> dict[int, Any]:
    """{d: entry} in the order of the sizes, from a mapping whose keys are 64 or "64"."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{argument} must map sizes to entries, got a {type(value).__name__}")
    given = {str(dim): entry for dim, entry in value.items()}
    if set(given) != {str(dim) for dim in mrl_dims}:
        raise ValueError(f"{argument} must have the keys mrl_dims {mrl_dims}, got {list(value)}")
    return {dim: given[str(dim)] for dim in mrl_dims}


def _teachers_of_each_size(
    teacher_map: Mapping[int, Any] | str | None, mrl_dims: tuple[int, ...]
) -> dict[int, tuple[str, ...] | None]:
    """{d: sorted names}, or {d: None} where the whole ensemble teaches."""
    if teacher_map == "all":
        return dict.fromkeys(mrl_dims)
    if teacher_map is None:
        groups = _for_each_size(DEFAULT_TEACHER_MAP, mrl_dims, "the default teacher_map")
    else:
        groups = _for_each_size(teacher_map, mrl_dims, "teacher_map")
    groups = {
        dim: tuple(sorted({names} if isinstance(names, str) else set(names)))
        for dim, names in groups.items()
    }
    if not all(groups.values()):
        raise ValueError(f"teacher_map must name a teacher for each size, got {teacher_map}")
    return groups
