"""Publishes an exported folder on the Hub, and a Space that shows it."""

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub  # its classes cost a second and load on first use

from speechbrain_mrl.evaluation.calibration import check_calibration
from speechbrain_mrl.publish.card import card_for
from speechbrain_mrl.publish.check import check_folder
from speechbrain_mrl.publish.folder import FILES
from speechbrain_mrl.utils import read_json, replacing

# What space.py and verdicts.py import, besides Gradio
SPACE_PACKAGES = ("speechbrain", "torch", "torchaudio", "av", "scikit-learn")


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    token: str | bool | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    tag: str | None = None,
) -> str:
    """Check an exported folder, upload it in one commit, tag it, and print how to use it.

    An upload that fails leaves the branch as it was; a repo that had to be created stays, empty. If
    only the tag fails, the error says so. A commit that somebody else makes meanwhile is kept, and
    this one refused.

    Arguments
    ---------
    folder : path
        From ``export_model``, with a report.
    repo_id : str
        "organisation/name". Created if need be.
    token : str, optional
        None: the login that huggingface_hub knows.
    private : bool
        Create the repo as private. A public repo is then refused.
    revision : str, optional
        Branch; created if need be. None: main.
    dry_run : bool
        Check and print only.
    tag : str, optional
        A name for this version. None: the next of v1, v2, …

    Returns
    -------
    str
        The address of the repo.

    Raises
    ------
    ValueError
        If the folder fails ``check_folder``, ``repo_id`` or ``tag`` is no such name, the tag exists,
        or the repo is not private enough.
    ConnectionError
        If the Hub refuses or cannot be reached.

    Example
    -------
    >>> push_to_hub(getfixture("tmp_path"), "org/name")
    Traceback (most recent call last):
    ...
    ValueError: ... lacks ['README.md', 'check.json', ...
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be organisation/name, got {repo_id!r}")
    if tag is not None and not re.fullmatch(r"[\w-][\w.-]*", tag):
        raise ValueError(f"tag must be of letters, digits, '.', '_' and '-', got {tag!r}")
    check_folder(folder)
    print(
        "It loads with SpeechBrain alone and gives the exported model's embeddings at every size;"
    )
    print("its card has a licence and the report's figures.", flush=True)
    api = huggingface_hub.HfApi(token=token)
    address = f"{api.endpoint}/{repo_id}"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if dry_run:
        for path in paths:
            print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
        print(f"would be uploaded to {address}; the Hub was not asked whether that may be")
        return address

    contents: dict[str, Any] = {path.relative_to(folder).as_posix(): str(path) for path in paths}
    contents["README.md"] = card_for(folder, repo_id, api.endpoint).encode()
    with _asking(f"{repo_id} is as it was"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public; nothing was uploaded")
        tags = {ref.name for ref in api.list_repo_refs(repo_id).tags}
        if tag in tags:
            raise ValueError(f"{repo_id} has the tag {tag!r} already; nothing was uploaded")
        if tag is None:
            tag = next(name for i in range(1, len(tags) + 2) if (name := f"v{i}") not in tags)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=revision).sha
        there = api.list_repo_files(repo_id, revision=parent)
        size = sum(path.stat().st_size for path in paths) / 1e6
        print(f"Uploading {len(paths)} files, {size:.1f} MB, to {address}", flush=True)
        added = [huggingface_hub.CommitOperationAdd(*content) for content in contents.items()]
        commit = api.create_commit(
            repo_id,
            added
            + [
                huggingface_hub.CommitOperationDelete(name)
                for name in there
                if name not in contents and name.split("/")[0] in FILES
            ],
            commit_message=f"Model {tag}",
            revision=revision,
            parent_commit=parent,
        )
    with _asking(f"{repo_id} has the model as commit {commit.oid}, and no tag {tag}"):
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    print(f"{address} has it as {tag}. To use it:")
    print("from speechbrain.inference.speaker import SpeakerRecognition")
    print(f'model = SpeakerRecognition.from_hparams(source="{repo_id}")')
    print('score, same_speaker = model.verify_files("one.wav", "two.wav")')
    return address


@contextlib.contextmanager
def _asking(state: str) -> Iterator[None]:
    """What the Hub or the network answers, as one sentence that ends with how things are now."""
    try:
        yield
    except (ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # of huggingface_hub, and of the HTTP client that its version uses
        reason = " ".join(str(error).split())
        raise ConnectionError(f"the Hub did not do it: {reason}; {state}") from error


SPACE_CARD = """\
---
title: Voices at several sizes
emoji: 🪆
colorFrom: yellow
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: apache-2.0
short_description: Compare voices, find one among some, see a map of them
models:
- {model}
---

Compare two voices at every size of [{model}](https://huggingface.co/{model}), find one among a few,
and see a map of many. Recordings are deleted once they have been read.

The model is loaded at the commit that `model.json` names, never at a later one: loading a SpeechBrain
model runs the code in it. A private model needs the Space's secret `HF_TOKEN`.
"""


def push_space(
    repo_id: str,
    model: str,
    token: str | bool | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Publish a page for trying a published model out: a Space, which needs SpeechBrain alone.

    Arguments
    ---------
    repo_id : str
        The Space's "organisation/name". Created if need be.
    model : str
        The published model's. The Space is pinned to the commit that it has now.
    token : str, optional
        None: the login that huggingface_hub knows.
    private : bool
        Create the Space as private. A public one is then refused.
    revision : str, optional
        The model's branch, tag or commit. None: main.

    Returns
    -------
    str
        The address of the Space.

    Raises
    ------
    ValueError
        If the Space is not private enough.
    PackageNotFoundError
        If what the page needs (the extra ``space``) is not installed here: its versions are pinned.
    ConnectionError
        If the Hub refuses or cannot be reached.
    """
    api, space = huggingface_hub.HfApi(token=token), Path(__file__).with_name("space.py")
    with _asking(f"{repo_id} does not show {model}"):
        commit = api.model_info(model, revision=revision).sha
        pinned = [f"{name}=={version(name).split('+')[0]}" for name in SPACE_PACKAGES]
        contents = {
            "app.py": space.read_text(encoding="utf-8").replace(f"from {__package__}.", "from "),
            "verdicts.py": space.with_name("verdicts.py").read_text(encoding="utf-8"),
            "model.json": json.dumps({"model": model, "revision": commit}) + "\n",
            "requirements.txt": "\n".join(pinned) + "\n",
            "README.md": SPACE_CARD.format(
                model=model,
                gradio=version("gradio"),
                python=".".join(platform.python_version_tuple()[:2]),
            ),
        }
        api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        )
        if private and not api.space_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public; nothing was uploaded")
        api.create_commit(
            repo_id,
            [
                huggingface_hub.CommitOperationAdd(name, text.encode())
                for name, text in contents.items()
            ],
            commit_message=f"{model} at {commit}",
            repo_type="space",
        )
    address = f"{api.endpoint}/spaces/{repo_id}"
    print(f"{address} shows {model} at {commit}")
    return address


def add_calibration(folder: str | os.PathLike[str], calibration: str | os.PathLike[str]) -> None:
    """Let an exported folder with a report travel with what ``verify.py`` fitted for its sizes.

    Raises
    ------
    ValueError
        If a size lacks a calibration, or the scores were not plain cosines.
    """
    report = read_json(Path(folder, "report.json"))
    check_calibration(calibration, [int(size) for size in report["dims"]])
    with replacing(Path(folder, "calibration.json")) as part:
        shutil.copyfile(calibration, part)


def publish_model(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    space: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    tag: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """``add_calibration``, ``push_to_hub`` and ``push_space`` in turn, as far as they are asked for.

    Returns ``address`` of the model, whether it was ``uploaded``, and its ``space`` or None.
    """
    if calibration is not None:
        add_calibration(folder, calibration)
    access: Any = {"private": private, "revision": revision}
    address = push_to_hub(folder, repo_id, dry_run=dry_run, tag=tag, **access)
    address_of_space = None if space is None else push_space(space, repo_id, **access)
    return {"address": address, "uploaded": not dry_run, "space": address_of_space}
