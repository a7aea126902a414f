"""Released checkpoints of ReDimNet and ReDimNet2: where they are, their licences, loading them."""

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from speechbrain_mrl.models.redimnet import (
    MatryoshkaReDimNet,
    ReDimNet,
    check_state_dict,
    read_tensors,
    refuse_foreign_weights,
)
from speechbrain_mrl.models.redimnet2 import MatryoshkaReDimNet2, ReDimNet2

PATIENCE = 60  # seconds without an answer
URL = "https://github.com/IDRnD/ReDimNet/releases/download/latest/"
# Train types by dataset, and the licence of the weights. vox2: VoxCeleb2, CC BY 4.0; vb2:
# VoxBlink2, whose licence forbids commercial use of what is trained on it; cnc: CN-Celeb.
RELEASES = {
    "vox2": {
        "model_names": ("b0", "b1", "b2", "b3", "b4", "b5", "b6"),
        "train_types": ("ptn", "ft_lm"),
        "license": "cc-by-4.0",
    },
    "vb2": {"model_names": ("S", "M"), "train_types": ("ptn",), "license": "non-commercial"},
    "vb2+vox2+cnc": {
        "model_names": ("S", "M"),
        "train_types": ("ft_mix",),
        "license": "non-commercial",
    },
}
URL2 = "https://github.com/PalabraAI/redimnet2/releases/download/v1.0.0/"
# The licence of vox2 is that of the authors' README; whether it covers weights they have not said.
# The other corpora are as above, cnc2 is CN-Celeb 2.
RELEASES2 = {
    "vox2": {
        "model_names": ("b0", "b1", "b2", "b3", "b4", "b5", "b6"),
        "train_types": ("ptn", "lm"),
        "license": "mit",
    },
    "vb2+vox2_v0": {
        "model_names": ("b6",),
        "train_types": ("ptn", "lm", "dis"),
        "license": "non-commercial",
    },
    "vb2+vox2+cnc2_v0": {
        "model_names": ("b3", "b6"),
        "train_types": ("ptn", "lm"),
        "license": "non-commercial",
    },
}
SHA256 = {  # of ReDimNet2's files, as far as they are known
    "b2-vox2-lm.pt": "0545a29679a87fe1c662d2bbd05e3b3fe0d1b392832729abaa135e4079a2f77a",
    "b6-vb2+vox2+cnc2_v0-lm.pt": "287365f6f485b19e65e5176554f8f7123bfa8d85185f3d2c040eab51acec9868",
}
PREFIX2 = "redimnet2_"  # of a ReDimNet2's name where both families are named: redimnet2_b2


def parse_release(release: str) -> tuple[str, str, str]:
    """Model name, dataset and train type out of a release's name.

    Example
    -------
    >>> parse_release("redimnet2_b2-vox2-lm")
    ('redimnet2_b2', 'vox2', 'lm')
    """
    parts, table = release.split("-"), releases_of(release)
    if len(parts) != 3 or parts[1] not in table:
        raise ValueError(
            f"a release is named like b2-vox2-ft_lm or redimnet2_b2-vox2-lm (model, dataset of "
            f"{list(table)}, training), got {release!r}"
        )
    model_name, dataset, train_type = parts
    return model_name, dataset, train_type


def releases_of(model_name: str) -> dict[str, dict[str, Any]]:
    """The table of the family that ``model_name`` is of: "b2", "redimnet2_b2"."""
    return RELEASES2 if model_name.startswith(PREFIX2) else RELEASES


def release_license(model_name: str, dataset: str) -> str:
    """Licence of a released model's weights, by its name "b2" or "redimnet2_b2"."""
    release = releases_of(model_name).get(dataset, {"model_names": ()})
    released = model_name.removeprefix(PREFIX2) in release["model_names"]
    return str(release["license"]) if released else "not stated"


def released_names(dataset: str | None = None) -> list[str]:
    """Names of the models of both families, "b0" … "redimnet2_b6", of one dataset or of any."""
    return sorted(
        {
            prefix + name
            for prefix, table in (("", RELEASES), (PREFIX2, RELEASES2))
            for trained_on, release in table.items()
            for name in release["model_names"]
            if dataset in (None, trained_on)
        }
    )


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
        With ``embed_dim`` coordinates (192 in every release).

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
    if source is not None and os.path.isfile(source):
        path = Path(source)
    else:
        path = _find_release(model_name, train_type, dataset, source)
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
    if source is not None and os.path.isfile(source):
        path = Path(source)
    else:
        path = _find_release(PREFIX2 + model_name, train_type, dataset, source)
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
    train_type = _own_train_type(model_name, train_type)
    if not model_name.startswith(PREFIX2):
        return load_pretrained_redimnet(model_name, train_type, dataset, source)
    model_name = model_name.removeprefix(PREFIX2)
    return load_pretrained_redimnet2(model_name, train_type, dataset, source)


def _own_train_type(model_name: str, train_type: str) -> str:
    """The family's own name of large-margin fine-tuning."""
    if train_type not in ("lm", "ft_lm"):
        return train_type
    return "lm" if model_name.startswith(PREFIX2) else "ft_lm"


def check_released(model_name: str, train_type: str, dataset: str) -> None:
    """Raise ValueError unless there is a release as ``load_released`` names it."""
    _check_release(model_name, _own_train_type(model_name, train_type), dataset)


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
            "and keep the files of the two releases, whose names are alike, in separate folders"
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

        Its first coordinates (192 for a release) are the checkpoint's embedding; the others start
        small and random. ``rotate_head`` puts the principal axes first.

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
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if found != sha256.lower():
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
    model: ReDimNet, state_dict: dict[str, Any], where: str | os.PathLike[str]
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


def _is_released(model_name: str, train_type: str, dataset: str) -> bool:
    release = releases_of(model_name).get(dataset, {"model_names": (), "train_types": ()})
    named = model_name.removeprefix(PREFIX2) in release["model_names"]
    return named and train_type in release["train_types"]


def _check_release(model_name: str, train_type: str, dataset: str) -> None:
    if not _is_released(model_name, train_type, dataset):
        known = [
            f"{'/'.join(entry['model_names'])}-{data}-{'/'.join(entry['train_types'])}"
            for data, entry in releases_of(model_name).items()
        ]
        name = f"{model_name.removeprefix(PREFIX2)}-{dataset}-{train_type}.pt"
        family = "ReDimNet2" if model_name.startswith(PREFIX2) else "ReDimNet"
        raise ValueError(f"{name} of {family} was never released; released are {', '.join(known)}")


def _find_release(
    model_name: str, train_type: str, dataset: str, folder: str | os.PathLike[str] | None
) -> Path:
    """Path of a release file, in a folder or, downloaded if need be, in torch.hub's cache."""
    of_two = model_name.startswith(PREFIX2)
    name = f"{model_name.removeprefix(PREFIX2)}-{dataset}-{train_type}.pt"
    url = (URL2 if of_two else URL) + urllib.parse.quote(name)
    if folder is not None:
        path = Path(folder) / name
        if not path.is_file():
            released = _is_released(model_name, train_type, dataset)
            hint = f"; download it from {url}" if released else ""
            raise FileNotFoundError(
                f"source {str(folder)!r} is neither a checkpoint nor a folder that holds {name}"
                + hint
            )
        return path
    _check_release(model_name, train_type, dataset)
    path = Path(torch.hub.get_dir(), "checkpoints", "redimnet2" if of_two else "", name)
    if not path.is_file():
        try:
            download(url, path)
        except (OSError, EOFError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"cannot download {url} ({error}); get that file elsewhere and put it at "
                f"{path}, or name it with source="
            ) from error
    return path


def download(url: str, path: Path) -> None:
    """Download to ``path``: with a progress bar, atomically, and where possible from where an
    interrupted download stopped. Of several processes one does it, and the others wait.

    Raises
    ------
    OSError
        If the server cannot be reached or refuses.
    EOFError, http.client.IncompleteRead
        If the connection ended early; what has come is kept for the next try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            _download_alone(url, path)


def _download_alone(url: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part cannot be continued
            raise
        part.unlink()
        return _download_alone(url, path)
    with response:
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name) as bar,
        ):
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))
            done = file.tell()
    if total is not None and done != total:
        raise EOFError(f"the connection ended after {done} of {total} bytes")
    os.replace(part, path)
