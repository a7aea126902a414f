"""Turns a released ReDimNet into a SpeechBrain model, as it is or rotated into a Matryoshka one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from speechbrain_mrl.dataio.clips import find_clips
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.pretrained import (
    ReDimNetMRL,
    load_released,
)
from speechbrain_mrl.models.releases import (
    PREFIX2,
    parse_release,
    releases_of,
)
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.rotation import matryoshka_rotation

CORPORA = {"vox2": "VoxCeleb2", "vb2": "VoxBlink2", "cnc": "CN-Celeb", "cnc2": "CN-Celeb 2"}


def convert_release(
    release: str,
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    recordings: str | os.PathLike[str] | None = None,
    mrl_dims: Sequence[int] = (64, 128, 192),
    report: str | os.PathLike[str] | None = None,
    trials: str = "",
) -> Path:
    """Write a released ReDimNet or ReDimNet2 as a folder that SpeechBrain loads without this package.

    Arguments
    ---------
    release : str
        Model, dataset and training: "b2-vox2-ft_lm", "redimnet2_b2-vox2-lm".
    folder : path
        To be written.
    source : path, optional
        The release's file, or a folder that holds it. None: the authors' release is downloaded.
    recordings : path, optional
        A folder of some thousand recordings, of nobody knows whom. Given, the embedding is centred
        on them and rotated to its principal axes, so that its first coordinates are embeddings
        too. None: the weights stay as they are, of one size.
    mrl_dims : sequence of int
        Sizes of the rotated model, ascending, the last one that of the release (192).
    report : path, optional
        A report.json of ``verify.py`` for the converted model; with it, it can be published.
    trials : str
        Name of the report's trial list.

    Returns
    -------
    pathlib.Path
        ``folder``.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError
        As ``load_released``, ``find_clips`` and ``export_model``.
    """
    model_name, dataset, train_type = parse_release(release)
    model = load_released(model_name, train_type, dataset, source)
    family, corpora = type(model).__name__, dataset.removesuffix("_v0").split("+")
    own_name = release.removeprefix(PREFIX2)
    what = "in another container and otherwise unchanged."
    if recordings is not None:
        rotated = ReDimNetMRL.from_redimnet(model, model.embed_dim, mrl_dims)
        clips = find_clips(recordings)
        with tqdm(total=len(clips), unit="clip", desc="Embedding", disable=None) as bar:
            embeddings = embed_clips({"model": model}, clips, progress=bar)["model"]
        rotation = matryoshka_rotation(embeddings, mrl_dims)
        rotated.rotate_head(rotation.matrix, rotation.mean)
        model = rotated
        what = f"centred on {len(clips)} recordings and rotated to their principal axes."
    provenance = Provenance(
        title=f"{family} {own_name}",
        license=str(releases_of(model_name)[dataset]["license"]),
        training_data=", ".join(CORPORA[name] for name in corpora)
        + f". The weights are those of `{own_name}.pt`, released by the authors of {family}, {what}",
        datasets=["voxceleb"] if "vox2" in corpora else (),
        trials=trials,
    )
    plot = found = None
    if report is not None:
        plot = Path(report).with_name("eer_by_dim.png")
        found = json.loads(Path(report).read_text(encoding="utf-8"))
    plot = plot if plot is not None and plot.is_file() else None
    return export_model(model, folder, provenance, report=found, plot=plot)
