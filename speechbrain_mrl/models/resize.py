"""Gives a model more dimensions, or fewer."""

import copy
from collections.abc import Sequence

from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.prefixes import check_mrl_dims


def expand_model(model: MatryoshkaReDimNet, new_dim: int) -> MatryoshkaReDimNet:
    """A copy with ``new_dim`` dimensions: the old ones as they were, new ones small and random.

    ``start_new_dimensions`` gives the new ones a better start.

    Arguments
    ---------
    model : MatryoshkaReDimNet
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


def resize_model(model: MatryoshkaReDimNet, mrl_dims: Sequence[int]) -> MatryoshkaReDimNet:
    """A copy with other sizes: truncated past the last, missing dimensions small and random.

    Arguments
    ---------
    model : MatryoshkaReDimNet
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
    embed_dim = mrl_dims[-1]
    model = copy.deepcopy(model).cpu()
    if embed_dim >= model.embed_dim:
        return type(model).from_redimnet(model, embed_dim, mrl_dims)
    smaller = type(model)(embed_dim, mrl_dims, model.model_config)
    state_dict = model.state_dict()
    state_dict |= {key: state_dict[key][:embed_dim] for key in ("linear.weight", "linear.bias")}
    smaller.load_state_dict(state_dict)
    return smaller
