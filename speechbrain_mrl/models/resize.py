"""Gives a model more dimensions, or fewer."""

import copy
from collections.abc import Sequence
from typing import TypeVar

from speechbrain_mrl.models.redimnet import MatryoshkaHead, resized_rows
from speechbrain_mrl.prefixes import check_mrl_dims

_Student = TypeVar("_Student", bound=MatryoshkaHead)


def expand_model(model: _Student, new_dim: int) -> _Student:
    """A copy with ``new_dim`` dimensions: the old ones as they were, new ones small and random.

    ``start_new_dimensions`` gives the new ones a better start.

    Arguments
    ---------
    model : ReDimNetMRL or MatryoshkaEncoder
        Not changed.
    new_dim : int
        More than ``model.embed_dim``; becomes the last of ``mrl_dims``.

    Raises
    ------
    ValueError
        If ``new_dim`` is not larger.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> small = ReDimNetMRL(embed_dim=64, mrl_dims=(64,), backbone="b0")
    >>> expand_model(small, 128).mrl_dims
    (64, 128)
    """
    if new_dim <= model.embed_dim:
        raise ValueError(
            f"new_dim must be larger than the model's embed_dim {model.embed_dim}, got {new_dim}"
        )
    return resize_model(model, (*model.mrl_dims, new_dim))


def resize_model(model: _Student, mrl_dims: Sequence[int]) -> _Student:
    """A copy with other sizes: truncated past the last, missing dimensions small and random.

    Arguments
    ---------
    model : ReDimNetMRL or MatryoshkaEncoder
        Not changed.
    mrl_dims : sequence of int
        Ascending; the last one becomes ``embed_dim``.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(64,), backbone="b0")
    >>> resize_model(model, (16, 32)).linear.weight.equal(model.linear.weight[:32])
    True
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    model = copy.deepcopy(model).cpu()
    resized, state_dict = model.of_sizes(mrl_dims), model.state_dict()
    rows = resized_rows(model.linear, mrl_dims[-1])
    state_dict |= zip(("linear.weight", "linear.bias"), rows)
    resized.load_state_dict(state_dict)
    return resized
