"""Reads what an exported folder says of its model, as data: without its code, and without torch."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import AliasToken

from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.utils import hub_folder, print_table, read_json, sha256

# All that a published folder may hold; examples is a folder of recordings.
FILES = (
    "README.md calibration.json check.json classifier.ckpt config.json custom.py custom_st.py "
    "eer_by_dim.png embedding_model.ckpt examples hyperparams.yaml label_encoder.ckpt modules.json "
    "report.json"
).split()
CHECKPOINTS = ("embedding_model.ckpt", "classifier.ckpt", "label_encoder.ckpt")


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
    with as_written(path):
        return Provenance(**config.get("provenance", {}))


def read_report(source: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report.json of a published model; None without one."""
    path = find_published(source) / "report.json"
    if not path.is_file():
        return None
    report = read_json(path)
    with as_written(path):
        for found in report["dims"].values():
            found["eer"], found["min_dcf"], found["threshold"]
    return report


def model_info(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a published model is, as plain values: sizes, teachers, corpus, error rates, licence.

    It takes a moment: tensors are compared with the digests of the export, not loaded.

    ``source`` is a folder from ``export_model``, or a Hub id.

    Returns
    -------
    dict
        ``title``, ``license``, ``training_data``, ``teachers`` (name -> licence), ``mrl_dims``,
        ``params``, ``megabytes`` (10^6 bytes, of the weights), ``speakers`` (how many it names), and
        of its report ``corpus``, ``list`` (of trials), ``trials``, ``dims`` (size -> ``eer``,
        ``min_dcf``, fractions, and ``threshold``, a cosine); None or empty without one.

    Raises
    ------
    ValueError
        If a file is damaged, naming it, or has no digest yet.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL, export_model
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(32, 64), backbone="b0")
    >>> provenance = Provenance("Random weights", "cc0-1.0", "Nothing.")
    >>> info = model_info(export_model(model, getfixture("tmp_path") / "model", provenance))
    >>> info["title"], info["license"], info["mrl_dims"]
    ('Random weights', 'cc0-1.0', [32, 64])
    """
    folder = find_published(source)
    provenance, report = read_provenance(folder), read_report(folder) or {}
    mrl_dims = list(read_hyperparams(folder)["mrl_dims"])
    config = read_json(folder / "config.json")
    if "sha256" not in config:
        raise ValueError(
            f"{source} was exported by an earlier version, without digests of its checkpoints; "
            f"write it again: speechbrain-mrl export {source} NEW_FOLDER"
        )
    with as_written(folder / "config.json"):
        params, speakers, digests = (config[key] for key in ("params", "speakers", "sha256"))
        expected = {name: digests[name] for name in CHECKPOINTS}
    for name, digest in expected.items():
        with as_written(folder / name):
            if sha256(folder / name) != digest:
                raise ValueError("its SHA-256 differs from the one in config.json")
    return {
        "source": str(source),
        "title": provenance.title,
        "license": provenance.license,
        "training_data": provenance.training_data,
        "teachers": dict(provenance.teachers),
        "mrl_dims": mrl_dims,
        "params": params,
        "megabytes": round((folder / "embedding_model.ckpt").stat().st_size / 1e6, 2),
        "speakers": speakers,
        "corpus": report.get("corpus"),
        "list": provenance.trials or None,
        "trials": report.get("trials"),
        "dims": {
            size: {key: found[key] for key in ("eer", "min_dcf", "threshold")}
            for size, found in report.get("dims", {}).items()
        },
    }


def print_info(found: Mapping[str, Any]) -> None:
    """What ``model_info`` returns, as tables for people."""
    teachers = [f"{name} ({license})" for name, license in found["teachers"].items()]
    rows = [
        ["source", found["source"]],
        ["sizes", f"{', '.join(map(str, found['mrl_dims']))} dimensions"],
        ["weights", f"{found['params'] / 1e6:.2f} million, {found['megabytes']:.2f} MB"],
        ["speakers", f"{found['speakers']} known by name"],
        ["teachers", ", ".join(teachers) or "none"],
        ["trained on", found["training_data"]],
        ["licence", found["license"]],
    ]
    if found["dims"]:
        counts = "{target} target, {impostor} impostor trials".format(**found["trials"])
        rows.append(["measured on", f"{found['corpus']}: {counts} ({found['list']})"])
    print(found["title"])
    print_table(None, rows)
    if not found["dims"]:
        print("No report: nobody has measured it, or the report was not exported with it.")
        return
    print()
    measured = found["dims"].items()
    rows = [[d, f"{100 * r['eer']:.2f}", r["min_dcf"], r["threshold"]] for d, r in measured]
    print_table(["dimensions", "EER %", "minDCF", "threshold (cosine)"], rows)


def read_hyperparams(folder: Path) -> Any:
    """The YAML's values; its tags are left alone, so nothing of it is built or run."""
    path = folder / "hyperparams.yaml"
    with as_written(path):
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
def as_written(path: Path) -> Iterator[None]:
    """Whatever is wrong with what a file holds is one sentence that names it."""
    try:
        yield
    except _DAMAGE as error:
        reason = f"it lacks {error}" if isinstance(error, LookupError) else error
        raise ValueError(
            f"{path} is not as export_model wrote it: {' '.join(str(reason).split())}"
        ) from error
