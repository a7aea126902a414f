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

BLOCK = 1024  # speakers at a time
SMALLEST_NORM = 1e-6  # keeps cosines of zero vectors, and their gradients, finite
NEVER = -1e4  # a logit whose exponential is zero


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
        Factor on cosines before the softmax.

    Returns
    -------
    dict of int to torch.Tensor
        Mean loss of each size.

    Reference
    ---------
    Xiang et al., Margin Matters, 2019, arXiv:1906.07317.

    Example
    -------
    >>> embeddings, weight = torch.tensor([[1.0, 0.0, 9.0]]), torch.eye(3)
    >>> prefix_margin_losses(embeddings, weight, torch.tensor([0]), {2: 0.0}, scale=1.0)
    {2: tensor(0.5514)}
    """
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
        x_norms, w_norms = _prefix_norms(x, dims), _prefix_norms(weight, dims)
        logits = x.new_empty(len(dims), len(x), len(weight))
        for speakers in _blocks(len(weight)):
            w = weight[speakers]
            product = x.new_zeros(len(x), len(w))
            for k, block in enumerate(_coordinates(dims)):
                product.addmm_(x[:, block], w[:, block].T)
                torch.mul(product, 1 / w_norms[k, speakers], out=logits[k, :, speakers])
                logits[k, :, speakers].mul_((scale / x_norms[k])[:, None])
        logits.scatter_(2, labels.view(1, -1, 1).expand(len(dims), -1, 1), NEVER)
        log_sums = torch.stack([one.logsumexp(dim=1) for one in logits])
        ctx.save_for_backward(x, weight, x_norms, w_norms, log_sums, logits)
        ctx.dims, ctx.scale = dims, scale
        return log_sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_norms, w_norms, log_sums, logits = ctx.saved_tensors
        x_gradient, w_gradient = torch.zeros_like(x), torch.zeros_like(weight)
        # A cosine also falls as its vectors grow: sums of (gradient * logit) by clip and speaker.
        by_clip, by_speaker = torch.zeros_like(x_norms), torch.zeros_like(w_norms)
        for speakers in _blocks(len(weight)):
            w = weight[speakers]
            to_product = x.new_zeros(len(x), len(w))  # gradient of the sum over coordinates
            for k, block in reversed(list(enumerate(_coordinates(ctx.dims)))):
                logit = logits[k, :, speakers]
                to_logit = (logit - log_sums[k][:, None]).exp_().mul_(gradient[k][:, None])
                weighted = logit * to_logit
                by_clip[k] += weighted.sum(dim=1)
                by_speaker[k, speakers] = weighted.sum(dim=0)
                to_logit.mul_((ctx.scale / x_norms[k])[:, None])
                to_product.addcmul_(to_logit, 1 / w_norms[k, speakers])
                x_gradient[:, block].addmm_(to_product, w[:, block])
                w_gradient[speakers, block] = to_product.T @ x[:, block]
        for k, block in enumerate(_coordinates(ctx.dims)):
            shrink = (by_clip[k:] / x_norms[k:] ** 2).sum(dim=0)
            x_gradient[:, block] -= x[:, block] * shrink[:, None]
            shrink = (by_speaker[k:] / w_norms[k:] ** 2).sum(dim=0)
            w_gradient[:, block] -= weight[:, block] * shrink[:, None]
        return x_gradient, w_gradient, None, None, None


def _blocks(n_speakers: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, n_speakers)) for i in range(0, n_speakers, BLOCK)]


def _coordinates(dims: Iterable[int]) -> list[slice]:
    """The coordinates that each size adds to the one before."""
    return [slice(*ends) for ends in pairwise((0, *dims))]


def _prefix_norms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.stack([x[:, :dim].norm(dim=1) for dim in dims]).clamp_min(SMALLEST_NORM)
