"""Releases of ReDimNet and ReDimNet2: names, licences, hashes, and where their files are."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

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


def names_release(name: object) -> bool:
    """Whether a text names a model, "b2", or is meant as a whole release name, "b2-vox2-ptn"."""
    is_name = isinstance(name, str) and "/" not in name
    return is_name and str(name).split("-")[0] in released_names()


def parse_release(
    release: str, train_type: str = "ft_lm", dataset: str = "vox2"
) -> tuple[str, str, str]:
    """Model name, dataset and train type out of a release's name; of a model's those given.

    Example
    -------
    >>> parse_release("redimnet2_b2-vox2-ptn"), parse_release("b2")
    (('redimnet2_b2', 'vox2', 'ptn'), ('b2', 'vox2', 'ft_lm'))
    """
    if release in released_names():
        return release, dataset, own_train_type(release, train_type)
    parts, table = release.split("-"), releases_of(release)
    if len(parts) != 3 or parts[1] not in table:
        raise ValueError(
            f"a release is named like b2, b2-vox2-ft_lm or redimnet2_b2-vox2-lm (model, dataset of "
            f"{list(table)}, training), got {release!r}"
        )
    model_name, dataset, train_type = parts
    return model_name, dataset, train_type


def releases_of(model_name: str) -> dict[str, dict[str, Any]]:
    """The table of the family that ``model_name`` is of: "b2", "redimnet2_b2"."""
    return RELEASES2 if model_name.startswith(PREFIX2) else RELEASES


def release_license(release_name: str, dataset: str) -> str:
    """Licence of released weights; of a model's name, "b2" or "redimnet2_b2", those of a dataset."""
    if not names_release(release_name):
        return "not stated"
    model_name, dataset, _ = parse_release(release_name, dataset=dataset)
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


def own_train_type(model_name: str, train_type: str) -> str:
    """The family's own name of large-margin fine-tuning."""
    if train_type not in ("lm", "ft_lm"):
        return train_type
    return "lm" if model_name.startswith(PREFIX2) else "ft_lm"


def check_released(release: str, train_type: str, dataset: str) -> None:
    """Raise ValueError unless there is a release as ``load_teacher`` names it."""
    model_name, dataset, train_type = parse_release(release, train_type, dataset)
    _check_release(model_name, train_type, dataset)


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


def find_release(
    model_name: str, train_type: str, dataset: str, source: str | os.PathLike[str] | None = None
) -> Path:
    """Path of a release file: ``source`` or in it, else in torch.hub's cache, downloaded if need be."""
    if source is not None and os.path.isfile(source):
        return Path(source)
    of_two = model_name.startswith(PREFIX2)
    name = f"{model_name.removeprefix(PREFIX2)}-{dataset}-{train_type}.pt"
    url = (URL2 if of_two else URL) + urllib.parse.quote(name)
    if source is not None:
        path = Path(source) / name
        if not path.is_file():
            released = _is_released(model_name, train_type, dataset)
            hint = f"; download it from {url}" if released else ""
            raise FileNotFoundError(
                f"source {str(source)!r} is neither a checkpoint nor a folder that holds {name}"
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
    # torch.hub's and pooch's downloads begin again where an interrupted one had come far.
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
