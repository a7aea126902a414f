"""Loads checkpoints of ReDimNet and ReDimNet2, and makes students of them."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from speechbrain_mrl import utils
from speechbrain_mrl.models.redimnet import (
    MatryoshkaReDimNet,
    ReDimNet,
    check_state_dict,
    read_tensors,
    refuse_foreign_weights,
)
from speechbrain_mrl.models.redimnet2 import MatryoshkaReDimNet2, ReDimNet2
from speechbrain_mrl.models.releases import PREFIX2, SHA256, find_release, own_train_type


def network_class(model_config: Any) -> type[ReDimNet]:
    """The class of a checkpoint's ``model_config``: ReDimNet, or ReDimNet2.

    Only ReDimNet2 knows ``causal``, and its authors' code needs it.
    """
    of_two = isinstance(model_config, dict) and "causal" in model_config
    return ReDimNet2 if of_two else ReDimNet


def load_pretrained_redimnet(
    model_name: str = "b2",
    train_type: str = "ft_lm",
    dataset: str = "vox2",
    source: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
) -> ReDimNet:
    """A pretrained ReDimNet in eval mode, built from the checkpoint's own configuration.

    Arguments
    ---------
    model_name : str
        "b0" … "b6" (vox2), "S" or "M" (vb2, vb2+vox2+cnc).
    train_type : str
        "ptn" (pretrained), "ft_lm" (large-margin fine-tuned) or "ft_mix".
    dataset : str
        "vox2", "vb2" or "vb2+vox2+cnc".
    source : path, optional
        None: the authors' release, kept in torch.hub's cache. Else a checkpoint file, or a folder
        that holds ``{model_name}-{dataset}-{train_type}.pt``.
    sha256 : str, optional
        The file's expected SHA-256, in hexadecimal.

    Returns
    -------
    ReDimNet
        With ``embed_dim`` dimensions (192 in every release).

    Raises
    ------
    ValueError
        For a model that was not released, or a file that is damaged, of another layout, or does
        not fill every tensor of the network.
    FileNotFoundError
        If ``source`` does not hold the file.
    ConnectionError
        If the release cannot be downloaded.
    """
    path = find_release(model_name, train_type, dataset, source)
    return load_checkpoint(path, sha256, ReDimNet)


def load_pretrained_redimnet2(
    model_name: str = "b2",
    train_type: str = "lm",
    dataset: str = "vox2",
    source: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
) -> ReDimNet2:
    """A pretrained ReDimNet2 in eval mode, built from the checkpoint's own configuration.

    Files of dataset "vb2…" are for non-commercial use only, which a warning says.

    Arguments
    ---------
    model_name : str
        "b0" … "b6" (vox2), "b6" (vb2+vox2_v0), "b3" or "b6" (vb2+vox2+cnc2_v0).
    train_type : str
        "ptn" (pretrained), "lm" (large-margin fine-tuned), or of vb2+vox2_v0 "dis" (distilled).
    dataset : str
        "vox2", "vb2+vox2_v0" or "vb2+vox2+cnc2_v0".
    source, sha256
        As for ``load_pretrained_redimnet``; the cache has a folder ``redimnet2`` for these files.

    Returns
    -------
    ReDimNet2
        With ``embed_dim`` dimensions (192 in every release).

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError
        As ``load_pretrained_redimnet``.
    """
    path = find_release(PREFIX2 + model_name, train_type, dataset, source)
    if source is None and sha256 is None:
        sha256 = SHA256.get(path.name)
    if "vb2" in path.name:
        warnings.warn(
            f"{path.name} was trained on VoxBlink2, whose authors restrict models trained on it to "
            "research; a student of it is not for commercial use either",
            stacklevel=2,
        )
    return load_checkpoint(path, sha256, ReDimNet2)


def load_released(
    model_name: str,
    train_type: str = "ft_lm",
    dataset: str = "vox2",
    source: str | os.PathLike[str] | None = None,
) -> ReDimNet:
    """A released model of either family by its name, "b2" or "redimnet2_b2".

    The families' names of large-margin fine-tuning, "ft_lm" and "lm", mean the same here.
    """
    train_type = own_train_type(model_name, train_type)
    if not model_name.startswith(PREFIX2):
        return load_pretrained_redimnet(model_name, train_type, dataset, source)
    model_name = model_name.removeprefix(PREFIX2)
    return load_pretrained_redimnet2(model_name, train_type, dataset, source)


def load_checkpoint(
    path: str | os.PathLike[str],
    sha256: str | None = None,
    expected: type[ReDimNet] | None = None,
) -> Any:
    """A ReDimNet or ReDimNet2 in eval mode out of a checkpoint file.

    Raises
    ------
    ValueError
        As ``read_checkpoint`` and ``load_strictly``, or if it is not of the family ``expected``.
    """
    checkpoint = read_checkpoint(path, sha256)
    network = network_class(checkpoint["model_config"])
    if expected not in (None, network):
        loader = f"load_pretrained_{network.__name__.lower()}"
        raise ValueError(
            f"{path} holds a {network.__name__}, not a {expected.__name__}; load it with {loader}, "
            "and keep the files of the two releases, whose names are similar, in separate folders"
        )
    model = network.from_config(checkpoint["model_config"])
    load_strictly(model, checkpoint["state_dict"], path)
    return model.eval()


class ReDimNetMRL(MatryoshkaReDimNet):
    __doc__ = (
        str(MatryoshkaReDimNet.__doc__)
        .replace("MatryoshkaReDimNet(", "ReDimNetMRL(")
        .replace('"b0" … "b6" for', '"b0" … "b6" or "redimnet2_b0" … "redimnet2_b6" for')
        .replace("or a checkpoint's", "a checkpoint file, or its")
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "ReDimNetMRL":
        """Of a ReDimNet2 backbone the subclass for it."""
        backbone = _config_of(args[2] if len(args) > 2 else kwargs.get("backbone"))
        named = isinstance(backbone, str) and backbone.startswith(PREFIX2)
        if cls is ReDimNetMRL and (named or network_class(backbone) is ReDimNet2):
            cls = ReDimNet2MRL
        return super().__new__(cls)

    def __init__(
        self,
        embed_dim: int = 256,
        mrl_dims: Iterable[int] = (64, 128, 192, 256),
        backbone: str | os.PathLike[str] | dict[str, Any] = "b2",
    ) -> None:
        super().__init__(embed_dim, mrl_dims, _config_of(backbone))

    @classmethod
    def from_pretrained(
        cls,
        model_name: str = "b2",
        train_type: str = "ptn",
        dataset: str = "vox2",
        source: str | os.PathLike[str] | None = None,
        embed_dim: int = 256,
        mrl_dims: Iterable[int] = (64, 128, 192, 256),
    ) -> "ReDimNetMRL":
        """A student that starts as the pretrained model: every tensor is the checkpoint's.

        Its first dimensions (192 for a release) are the checkpoint's embedding; the others start
        small and random. ``rotate_head`` puts the principal components first.

        Arguments are those of ``load_released`` and of the class.
        """
        redimnet = load_released(model_name, train_type, dataset, source)
        return cls.from_redimnet(redimnet, embed_dim, mrl_dims)


class ReDimNet2MRL(ReDimNetMRL, MatryoshkaReDimNet2):
    """``ReDimNetMRL`` of a ReDimNet2 backbone, which ``ReDimNetMRL(backbone=…)`` makes."""


def _config_of(backbone: Any) -> Any:
    """Of a checkpoint file its ``model_config``, of anything else itself."""
    is_file = isinstance(backbone, (str, os.PathLike)) and os.path.isfile(backbone)
    return read_checkpoint(backbone)["model_config"] if is_file else backbone


def read_checkpoint(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Any]:
    """``{"model_config": ..., "state_dict": ...}`` out of a release file; runs no code of it.

    Raises
    ------
    ValueError
        If the file's SHA-256 is another, or it is damaged or not a release's checkpoint.
    """
    if sha256 is not None and (found := utils.sha256(path)) != sha256.lower():
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {sha256}; delete it and load it again"
        )
    checkpoint = read_tensors(path)
    keys = {"model_config", "state_dict"}
    if not isinstance(checkpoint, dict) or not keys <= set(checkpoint):
        raise ValueError(f"{path} is not a ReDimNet release: it must hold {sorted(keys)}")
    if not isinstance(checkpoint["state_dict"], dict):
        found = type(checkpoint["state_dict"]).__name__
        raise ValueError(f"{path} is not a ReDimNet release: its state_dict is a {found}")
    return checkpoint


def load_strictly(
    model: nn.Module, state_dict: dict[str, Any], where: str | os.PathLike[str]
) -> None:
    """Load a checkpoint's tensors, all of them and no others; subnormal numbers become zero.

    Raises
    ------
    ValueError
        If a key is missing, unexpected, of another shape, or holds NaN or infinity. Lists them.
    """
    refuse_foreign_weights(model, state_dict, where)
    if problems := check_state_dict(model, state_dict):
        found = "; ".join(f"{len(keys)} {what}: {keys}" for what, keys in problems.items())
        raise ValueError(f"{where} does not fit the model: {found}")
    # Subnormal weights slow a CPU down by up to 25 times.
    tiny = torch.finfo(torch.float32).tiny
    model.load_state_dict(
        {key: value.where(value.abs() >= tiny, 0) for key, value in state_dict.items()}
    )
