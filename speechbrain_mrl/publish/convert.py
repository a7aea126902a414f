"""Turns a ReDimNet, or any published SpeechBrain encoder, into a Matryoshka model by rotation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub  # its classes cost a second and load on first use
from tqdm import tqdm

from speechbrain_mrl.dataio.clips import find_clips
from speechbrain_mrl.inference.encoders import HUB_ID
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.matryoshka import MatryoshkaEncoder, usual_dims
from speechbrain_mrl.models.pretrained import ReDimNetMRL, load_checkpoint, load_released
from speechbrain_mrl.models.redimnet import check_mrl_dims
from speechbrain_mrl.models.releases import PREFIX2, parse_release, releases_of
from speechbrain_mrl.models.resize import resize_model
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import check_replaceable, export_model
from speechbrain_mrl.publish.folder import read_provenance
from speechbrain_mrl.publish.load import load_published
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.utils import published_folder, read_json

CORPORA = {"vox2": "VoxCeleb2", "vb2": "VoxBlink2", "cnc": "CN-Celeb", "cnc2": "CN-Celeb 2"}


def convert_release(
    model: str,
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    recordings: str | os.PathLike[str] | None = None,
    mrl_dims: Sequence[int] | None = None,
    report: str | os.PathLike[str] | None = None,
    trials: str = "",
) -> Path:
    """Write a ReDimNet, or any SpeechBrain encoder, as a folder that loads without this package.

    Arguments
    ---------
    model : str
        A release, "b2-vox2-ft_lm" (or "b2" for it), "redimnet2_b2-vox2-lm"; a checkpoint file; or
        the folder or Hub id of an exported model, or of any other SpeechBrain speaker encoder, such
        as "speechbrain/spkrec-ecapa-voxceleb". Loading one of the last kind runs its YAML.
    folder : path
        To be written.
    source : path, optional
        The release's file, or a folder that holds it. None: the authors' release is downloaded.
    recordings : path, optional
        A folder of a few thousand unlabelled recordings. The embedding is centred on them and
        rotated to their principal components, so that its prefixes are embeddings too.
        None: the weights stay as they are, of one size.
    mrl_dims : sequence of int, optional
        Sizes of the rotated model, ascending, the last one that of the model (192 of a release).
        None: 64, 128, 192 and 256 as far as they are smaller than that, and that.
    report : path, optional
        A report.json of ``verify.py`` for the converted model; with it, it can be published.
    trials : str
        Name of the report's trial list.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError
        As ``load_released``, ``load_published``, ``find_clips`` and ``export_model``.
    """
    check_replaceable(folder)
    found = None if report is None else read_json(report)
    network, provenance, name = _load(model, source)
    what = "in another container and otherwise unchanged."
    if recordings is not None:
        size = network.embed_dim
        sizes = mrl_dims or usual_dims(size)
        if isinstance(network, MatryoshkaEncoder):
            rotated: Any = resize_model(network, check_mrl_dims(sizes, size))
        else:
            rotated = ReDimNetMRL.from_redimnet(network, size, sizes)
        clips = find_clips(recordings)
        with tqdm(total=len(clips), unit=" utterances", desc="Embedding", disable=None) as bar:
            embeddings = embed_clips({"model": network}, clips, progress=bar)["model"]
        rotation = matryoshka_rotation(embeddings, sizes)
        rotated.rotate_head(rotation.matrix, rotation.mean)
        network = rotated
        what = f"centred on {len(clips)} recordings and rotated to their principal components."
    training_data = f"{provenance.training_data} The weights are those of `{name}`, {what}"
    provenance = dataclasses.replace(provenance, training_data=training_data, trials=trials)
    plot = None if report is None else Path(report).with_name("eer_by_dim.png")
    plot = plot if plot is not None and plot.is_file() else None
    return export_model(network, folder, provenance, report=found, plot=plot)


def _load(model: str, source: str | os.PathLike[str] | None) -> tuple[Any, Provenance, str]:
    """The network, what is known of its weights, and their name, without the folder that they are in."""
    if source is None and os.path.isfile(model):
        network, file = load_checkpoint(model), Path(model)
        return network, Provenance(f"{type(network).__name__} {file.stem}"), file.name
    if source is None and (os.path.isdir(model) or HUB_ID.fullmatch(model)):
        name = Path(model).name if os.path.isdir(model) else model
        folder = published_folder(model)
        if (folder / "check.json").is_file():  # which export_model alone writes
            return load_published(folder), read_provenance(folder), name
        encoder = MatryoshkaEncoder.from_hparams(folder)
        encoder.mrl_dims = (encoder.embed_dim,)
        return encoder, _read_card(folder / "README.md", name), name
    model_name, dataset, train_type = parse_release(model)
    network, corpora = load_released(model_name, train_type, dataset, source), dataset.split("+")
    family = type(network).__name__
    name = f"{model_name.removeprefix(PREFIX2)}-{dataset}-{train_type}"
    provenance = Provenance(
        title=f"{family} {name}",
        license=str(releases_of(model_name)[dataset]["license"]),
        training_data=", ".join(CORPORA[corpus.removesuffix("_v0")] for corpus in corpora)
        + f". Released by the authors of {family}.",
        datasets=["voxceleb"] if any(corpus.startswith("vox2") for corpus in corpora) else (),
    )
    return network, provenance, f"{name}.pt"


def _read_card(path: Path, name: str) -> Provenance:
    """Licence and data sets as another model's card states them."""
    told = huggingface_hub.ModelCard.load(path).data if path.is_file() else {}
    return Provenance(
        title=name,
        license=told.get("license") or "not stated",
        training_data=f"As the card of `{name}` says.",
        datasets=told.get("datasets") or (),
    )
