"""Reads the model of an exported folder, without running the folder's code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from torch import Tensor

from speechbrain_mrl.models.architecture import build_parts, of_package, parts_of
from speechbrain_mrl.models.matryoshka import MatryoshkaEncoder
from speechbrain_mrl.models.pretrained import ReDimNetMRL, load_strictly
from speechbrain_mrl.models.redimnet import read_tensors
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.folder import (
    as_written,
    find_published,
    read_hyperparams,
    read_provenance,
    read_report,
)


def load_published(source: str | os.PathLike[str]) -> Any:
    """A published model as a ``ReDimNetMRL`` or ``MatryoshkaEncoder`` in eval mode.

    It can be exported again, grown or trained further. No code of the folder is run: architecture
    and sizes are read, nothing but layers is made, tensors are loaded strictly.

    Arguments
    ---------
    source : path
        A folder from ``export_model``, or a Hub id.

    Raises
    ------
    ValueError
        If the tensors do not fill the network, or its architecture names anything but layers.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mrl import export_model
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(32, 64), backbone="b0").eval()
    >>> folder = export_model(model, getfixture("tmp_path") / "model")
    >>> wavs = torch.randn(1, 16000)
    >>> torch.equal(load_published(folder)(wavs), model(wavs))
    True
    """
    folder = find_published(source)
    hyperparams = read_hyperparams(folder)
    path = folder / "embedding_model.ckpt"
    state_dict = read_tensors(path)
    with as_written(folder / "hyperparams.yaml"):
        model = _network(hyperparams["embedding_model"], _plain(hyperparams["mrl_dims"]))
    load_strictly(model, state_dict, path)
    return model.eval()


def _network(node: Any, mrl_dims: list[int]) -> ReDimNetMRL | MatryoshkaEncoder:
    """What the YAML's ``embedding_model`` stands for, with random weights, of this package's code."""
    if "model_config" in node:
        config = _plain(node["model_config"])
        return ReDimNetMRL(config["embed_dim"], mrl_dims, config)
    package = str(node.tag.value).removeprefix("!new:").partition(".")[0]
    architecture = of_package(parts_of(node), package)
    parts = build_parts(architecture)
    model = MatryoshkaEncoder(embed_dim=mrl_dims[-1], mrl_dims=mrl_dims, **parts)
    model.architecture = architecture
    return model


def read_speakers(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Label -> vector (D,) of a published model's classifier; empty if it names nobody."""
    folder = find_published(source)
    stored = read_tensors(folder / "classifier.ckpt")
    labels = CategoricalEncoder()
    with as_written(folder / "classifier.ckpt"):
        weight = stored["weight"]
    with as_written(folder / "label_encoder.ckpt"):
        if len(weight):
            labels.load(folder / "label_encoder.ckpt")
        return {labels.ind2lab[i]: row.float() for i, row in enumerate(weight)}


def export_again(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    target_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """``export_model`` of a published model, with all that its folder says of it."""
    published = find_published(source)
    plot = published / "eer_by_dim.png"
    return export_model(
        load_published(published),
        folder,
        read_provenance(published),
        report=read_report(published),
        plot=plot if plot.is_file() else None,
        speakers=read_speakers(published),
        target_dim=target_dim,
        dtype=dtype,
    )


def _plain(value: Any) -> Any:
    """Lists and dicts out of ruamel.yaml's."""
    return json.loads(json.dumps(value))
