"""Checks, in an isolated process, that an exported folder can be published."""

import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from speechbrain_mrl.evaluation.calibration import check_calibration
from speechbrain_mrl.publish.card import card_problems
from speechbrain_mrl.publish.definition import probe_wavs
from speechbrain_mrl.publish.export import foreign_files
from speechbrain_mrl.publish.folder import FILES
from speechbrain_mrl.utils import read_json


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise unless ``folder`` is a complete export that loads without this package.

    Loads it at every size in a fresh process, offline and without this package, and runs its code.
    Compares its embeddings with the exported model's. Checks labels, card, licence and report.

    Raises
    ------
    ValueError
        Listing everything that is wrong.

    Example
    -------
    >>> check_folder(getfixture("tmp_path"))
    Traceback (most recent call last):
    ...
    ValueError: ... lacks ['README.md', 'check.json', ...
    """
    folder = Path(folder).absolute()
    optional = {"calibration.json", "report.json", "eer_by_dim.png", "examples"}
    missing = [name for name in FILES if name not in optional and not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}; write it with export_model")
    if foreign := foreign_files(folder):
        raise ValueError(
            f"{folder} holds {foreign}, which no export wrote (a link is none either); take them out"
        )
    print(f"Checking {folder}: it is loaded at every size, which takes a minute or two", flush=True)
    found = _load_isolated(folder)
    problems = card_problems(folder, found["labels"], sorted(map(int, found["embeddings"])))
    if (calibration := folder / "calibration.json").is_file():
        try:
            check_calibration(calibration, [int(size) for size in found["embeddings"]])
        except ValueError as error:
            problems.append(str(error))
    check = read_json(folder / "check.json")
    expected = torch.tensor(check["embedding"])
    for size, embedding in found["embeddings"].items():
        own = expected[: int(size)]
        if (torch.tensor(embedding) - own).norm() > check["tolerance"] * own.norm():
            problems.append(f"at target_dim {size} the embedding is not the exported model's")
    if (torch.tensor(found["sentences"]) - expected).norm() > check["tolerance"] * expected.norm():
        problems.append("sentence-transformers gets another embedding than the exported model's")
    if not found.get("refuses"):
        problems.append("a target_dim that the model was not trained for is not refused")
    if problems:
        raise ValueError(f"{folder} cannot be published: " + "; ".join(problems))


def _load_isolated(folder: Path) -> dict[str, Any]:
    script = "\n".join(
        ["import json, runpy, sys", "sys.modules['speechbrain_mrl'] = None  # as if not installed"]
        + ["import torch", inspect.getsource(probe_wavs), inspect.getsource(_report_isolated)]
        + ["_report_isolated(sys.argv[1])"]
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            cwd=elsewhere,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ValueError(
            f"{folder} does not load with SpeechBrain alone: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _report_isolated(folder: str) -> None:
    """What an isolated process without this package finds in ``folder``."""
    from speechbrain.inference.classifiers import EncoderClassifier

    def load(**overrides: object) -> EncoderClassifier:
        return EncoderClassifier.from_hparams(
            source=folder, overrides=overrides, run_opts={"device": "cpu"}
        )

    model, wavs = load(), probe_wavs()
    found: dict[str, Any] = {"embeddings": {}, "labels": len(model.hparams.label_encoder)}
    for size in model.hparams.mrl_dims:
        model = load(target_dim=size)
        found["embeddings"][size] = model.encode_batch(wavs).flatten().tolist()
        if found["labels"]:
            model.classify_batch(wavs)
    encoder = runpy.run_path(f"{folder}/custom_st.py")["SpeakerEncoder"].load(folder)
    wavs = encoder.preprocess([{"array": wavs[0], "sampling_rate": 16000}])
    found["sentences"] = encoder(wavs)["sentence_embedding"].flatten().tolist()
    try:
        load(target_dim=size + 1)
    except ValueError:
        found["refuses"] = True
    print(json.dumps(found))
