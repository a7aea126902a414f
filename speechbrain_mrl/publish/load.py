"""Reads an exported folder as data, without running its code: what it is, and the model itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import AliasToken
from speechbrain.dataio.encoder import CategoricalEncoder
from torch import Tensor

from speechbrain_mrl.models.architecture import build_parts, hub_folder, of_package, parts_of
from speechbrain_mrl.models.matryoshka import MatryoshkaEncoder
from speechbrain_mrl.models.pretrained import ReDimNetMRL, load_strictly
from speechbrain_mrl.models.redimnet import read_tensors
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import FILES, export_model
from speechbrain_mrl.utils import read_json


def find_published(source: str | os.PathLike[str]) -> Path:
    """The folder of an exported model; one on the Hub is downloaded, or found in the Hub's cache.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, no such model on the Hub or no way to it, or it is another kind.
    """
    folder = hub_folder(source, [*FILES, "examples/*"])
    missing = [name for name in ("hyperparams.yaml", "config.json") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {missing}, so it is no model that export_model wrote"
        )
    return folder


def read_provenance(source: str | os.PathLike[str]) -> Provenance:
    """What a published model says that it was made from; all "not stated" if it says nothing."""
    path = find_published(source) / "config.json"
    config = read_json(path)
    with _as_written(path):
        return Provenance(**config.get("provenance", {}))


def read_report(source: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report.json of a published model; None without one."""
    path = find_published(source) / "report.json"
    if not path.is_file():
        return None
    report = read_json(path)
    with _as_written(path):
        for found in report["dims"].values():
            found["eer"], found["min_dcf"], found["threshold"]
    return report


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
    hyperparams = _hyperparams(folder)
    path = folder / "embedding_model.ckpt"
    state_dict = read_tensors(path)
    with _as_written(folder / "hyperparams.yaml"):
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
    with _as_written(folder / "classifier.ckpt"):
        weight = stored["weight"]
    with _as_written(folder / "label_encoder.ckpt"):
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


def model_info(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a published model is, as plain values: sizes, teachers, corpus, error rates, licence.

    Arguments
    ---------
    source : path
        A folder from ``export_model``, or a Hub id.

    Returns
    -------
    dict
        ``title``, ``license``, ``training_data``, ``teachers`` (name -> licence), ``mrl_dims``,
        ``params``, ``megabytes`` (10^6 bytes, of the weights), ``speakers`` (how many it names), and
        of its report ``corpus``, ``list`` (of trials), ``trials``, ``dims`` (size -> ``eer``,
        ``min_dcf``, fractions, and ``threshold``, a cosine); None or empty without one.

    Example
    -------
    >>> from speechbrain_mrl import export_model
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(32, 64), backbone="b0")
    >>> provenance = Provenance("Random weights", "cc0-1.0", "Nothing.")
    >>> info = model_info(export_model(model, getfixture("tmp_path") / "model", provenance))
    >>> info["title"], info["license"], info["mrl_dims"]
    ('Random weights', 'cc0-1.0', [32, 64])
    """
    folder = find_published(source)
    provenance, report = read_provenance(folder), read_report(folder) or {}
    return {
        "source": str(source),
        "title": provenance.title,
        "license": provenance.license,
        "training_data": provenance.training_data,
        "teachers": dict(provenance.teachers),
        "mrl_dims": list(_hyperparams(folder)["mrl_dims"]),
        "params": sum(p.numel() for p in load_published(folder).parameters()),
        "megabytes": round((folder / "embedding_model.ckpt").stat().st_size / 1e6, 2),
        "speakers": len(read_speakers(folder)),
        "corpus": report.get("corpus"),
        "list": provenance.trials or None,
        "trials": report.get("trials"),
        "dims": {
            size: {key: found[key] for key in ("eer", "min_dcf", "threshold")}
            for size, found in report.get("dims", {}).items()
        },
    }


def _hyperparams(folder: Any) -> Any:
    """The YAML's values; its tags are left alone, so nothing of it is built or run."""
    path = folder / "hyperparams.yaml"
    with _as_written(path):
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, AliasToken) for token in YAML().scan(text)):
            raise ValueError("it has aliases, which may stand for more than fits anywhere")
        found = YAML().load(text)
        return {key: found[key] for key in ("mrl_dims", "embedding_model")}


_DAMAGE = (  # what readers raise; SyntaxError and MemoryError are Python's own reader's, of labels
    YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    SyntaxError,
    MemoryError,
)


@contextlib.contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Whatever is wrong with what a file holds is one sentence that names it."""
    try:
        yield
    except _DAMAGE as error:
        reason = f"it lacks {error}" if isinstance(error, LookupError) else error
        raise ValueError(
            f"{path} is none that export_model wrote: {' '.join(str(reason).split())}"
        ) from error


def _plain(value: Any) -> Any:
    """Lists and dicts out of ruamel.yaml's."""
    return json.loads(json.dumps(value))
