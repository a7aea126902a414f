"""Sizes, norms and cosines of prefixes, those of all sizes for the cost of the largest.

The product of the first d dimensions is the product of the size before plus one more block.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

SMALLEST_NORM = 1e-6  # keeps cosines of zero vectors, and their gradients, finite


def check_mrl_dims(mrl_dims: Iterable[int]) -> tuple[int, ...]:
    """The sizes as a tuple, once they are one or more positive integers in ascending order.

    Anything else is a ValueError.

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


def prefix_sums(block_sum: Callable[[slice], Tensor], mrl_dims: Iterable[int]) -> dict[int, Tensor]:
    """{d: sum of ``block_sum(block)`` over the blocks of dimensions up to d}."""
    dims = tuple(mrl_dims)
    blocks = [slice(*ends) for ends in pairwise((0, *dims))]
    return dict(zip(dims, accumulate(map(block_sum, blocks))))


def prefix_norms(
    x: Tensor, mrl_dims: Iterable[int], smallest: float = SMALLEST_NORM
) -> dict[int, Tensor]:
    """{d: lengths of the prefixes (N,), at least ``smallest``} of embeddings (N, D).

    Example
    -------
    >>> prefix_norms(torch.tensor([[3.0, 4.0]]), mrl_dims=[1, 2])
    {1: tensor([3.]), 2: tensor([5.])}
    """
    squares = prefix_sums(lambda block: x[:, block].square().sum(dim=1), mrl_dims)
    return {d: square.clamp_min(smallest**2).sqrt() for d, square in squares.items()}


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
        If ``x`` or ``y`` is not (rows, dimensions) with enough dimensions.

    Example
    -------
    >>> x = torch.tensor([[3.0, 0.0, 4.0]])
    >>> prefix_cosines(x, torch.tensor([[1.0, 0.0, 0.0]]), [1, 3])
    {1: tensor([[1.]]), 3: tensor([[0.6000]])}
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    with torch.autocast(x.device.type, enabled=False):
        x, y = in_single_or_better(x, mrl_dims), in_single_or_better(y, mrl_dims)
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        products = prefix_sums(lambda block: x[:, block] @ y[:, block].T, mrl_dims)
        x_norms, y_norms = prefix_norms(x, mrl_dims), prefix_norms(y, mrl_dims)
        return {d: products[d] / (x_norms[d][:, None] * y_norms[d]) for d in mrl_dims}


def in_single_or_better(x: Tensor, mrl_dims: tuple[int, ...]) -> Tensor:
    """``x`` in float32 or better, once it has the dimensions that the sizes need."""
    if x.ndim != 2 or x.shape[1] < mrl_dims[-1]:
        raise ValueError(
            f"expected (rows, dimensions) with at least {mrl_dims[-1]} dimensions for mrl_dims "
            f"{mrl_dims}, got {tuple(x.shape)}"
        )
    return x if x.dtype == torch.float64 else x.float()


def weighted_mean(per_size: Mapping[int, Tensor], weights: Sequence[float]) -> Any:
    return sum(w * x for w, x in zip(weights, per_size.values())) / sum(weights)


def check_weights(
    mrl_weights: Iterable[float] | None, mrl_dims: tuple[int, ...]
) -> tuple[float, ...]:
    try:
        weights = (1.0,) * len(mrl_dims) if mrl_weights is None else tuple(map(float, mrl_weights))
    except (TypeError, ValueError):
        raise ValueError(f"mrl_weights must be a list of numbers, got {mrl_weights!r}") from None
    if len(weights) != len(mrl_dims):
        raise ValueError(
            f"mrl_weights has {len(weights)} entries for {len(mrl_dims)} mrl_dims {mrl_dims}; "
            "give one weight per size, in the same order"
        )
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"mrl_weights must be finite, none negative, one above 0, got {weights}")
    return weights


def for_each_size(value: Any, mrl_dims: tuple[int, ...], argument: str) -> dict[int, Any]:
    """{d: entry} in the order of the sizes, from a mapping whose keys are 64 or "64"."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{argument} must map sizes to entries, got a {type(value).__name__}")
    given = {str(dim): entry for dim, entry in value.items()}
    if set(given) != {str(dim) for dim in mrl_dims}:
        raise ValueError(f"{argument} must have the keys mrl_dims {mrl_dims}, got {list(value)}")
    return {dim: given[str(dim)] for dim in mrl_dims}
