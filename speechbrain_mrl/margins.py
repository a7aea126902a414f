"""Additive angular margin at every prefix against thousands of speakers, in little memory.

The speaker of a clip and all others part: the margin and its exact formula concern one cosine per
clip, and the others enter only by the logarithm of their summed exponentials, whose gradient is
written out here, in blocks of speakers that stay in the processor's cache.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
