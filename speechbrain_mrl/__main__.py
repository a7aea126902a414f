"""The command line: python -m speechbrain_mrl embed | verify | convert | export | publish | info."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from speechbrain_mrl.arguments import PROGRAM, parser
from speechbrain_mrl.audio import audio_info
from speechbrain_mrl.convert import convert_release
from speechbrain_mrl.cpu import prepare_cpu
from speechbrain_mrl.embedding import SAMPLE_RATE, Clip, embed_clips, find_clips
from speechbrain_mrl.export import export_model
from speechbrain_mrl.hub import add_calibration, push_space, push_to_hub
from speechbrain_mrl.published import (
    find_published,
    load_published,
    model_info,
    read_provenance,
    read_report,
    read_speakers,
)
from speechbrain_mrl.report import make_report, print_report, write_report
from speechbrain_mrl.teachers import load_teacher, sizes_and_thresholds
from speechbrain_mrl.verification import evaluate, read_trials


def embed(given: argparse.Namespace) -> Any:
    """Embeddings of recordings, (N, target_dim) at unit length, to a file or to the screen."""
    encoder = _encoder(given)
    clips = _clips(given.recordings)
    embeddings = _embed(encoder, clips, given)
    size = given.target_dim or embeddings.shape[1]
    _check_size(size, sizes_and_thresholds(encoder, embeddings.shape[1])[0])
    embeddings = F.normalize(embeddings[:, :size], dim=1).numpy()
    if given.output is not None:
        np.savez(given.output, ids=[clip.id for clip in clips], embeddings=embeddings)
    result = {"model": given.model, "target_dim": size, "output": given.output, "recordings": []}
    for clip, embedding in zip(clips, embeddings, strict=True):
        entry = {"id": clip.id, "seconds": round(clip.num_frames / SAMPLE_RATE, 2)}
        if given.output is None:
            entry["embedding"] = embedding.tolist()
        result["recordings"].append(entry)
    if given.json:
        return result
    heads = ["recording", "seconds"] + ([] if given.output else ["first coordinates"])
    rows = []
    for entry, embedding in zip(result["recordings"], embeddings, strict=True):
        few = "  ".join(f"{x:+.3f}" for x in embedding[:6]) + " …"
        rows.append([entry["id"], f"{entry['seconds']:.2f}", few][: len(heads)])
    _print_table(heads, rows)
    where = f"written to {given.output}" if given.output else "to keep them, give --output"
    print(f"{len(clips)} embeddings of {size} coordinates, at unit length; {where}")


def verify(given: argparse.Namespace) -> Any:
    """Two recordings: score and decision at each size; or a trial list: error rates at each size."""
    if given.trials is not None:
        return _verify_list(given)
    encoder = _encoder(given)
    first, second = _embed(encoder, _clips(given.recordings), given)
    sizes, thresholds = sizes_and_thresholds(encoder, len(first))
    scores = []
    for size in sizes:
        cosine = F.cosine_similarity(first[:size], second[:size], dim=0).item()
        threshold = thresholds.get(size) if given.threshold is None else given.threshold
        same = None if threshold is None else cosine >= threshold
        scores.append({"size": size, "score": cosine, "threshold": threshold, "same": same})
    if given.json:
        return {"model": given.model, "recordings": given.recordings, "scores": scores}
    decisions: dict[Any, str] = {True: "same speaker", False: "different speakers", None: "-"}
    rows = [
        [str(s["size"]), f"{s['score']:.3f}", _number(s["threshold"]), decisions[s["same"]]]
        for s in scores
    ]
    _print_table(["coordinates", "cosine", "threshold", "decision"], rows)
    if not thresholds and given.threshold is None:
        print("The model brings no threshold; give --threshold, fitted to recordings like yours.")


def _verify_list(given: argparse.Namespace) -> Any:
    started = time.time()
    trials = read_trials(given.trials)
    wanted = set(trials.clip_ids)
    clips = [clip for clip in find_clips(given.data_folder) if clip.id in wanted]
    trials.check_clips({clip.id for clip in clips})
    encoder = _encoder(given)
    embeddings = _embed(encoder, clips, given)
    sizes, _ = sizes_and_thresholds(encoder, embeddings.shape[1])
    found = trials.stack(dict(zip((clip.id for clip in clips), embeddings, strict=True)))
    report = make_report(
        evaluate(found, trials, sizes),
        trials,
        baselines={},
        corpus=given.data_folder,
        params=sum(p.numel() for p in encoder.parameters()),
        seconds=round(time.time() - started, 1),
    )
    if given.output is not None:
        write_report(report, given.output)
    if given.json:
        return report
    print_report(report)


def convert(given: argparse.Namespace) -> Any:
    """A released ReDimNet as a SpeechBrain model."""
    convert_release(
        given.release,
        given.folder,
        given.source,
        recordings=given.recordings,
        mrl_dims=given.mrl_dims,
        report=given.report,
        trials=given.trials,
    )
    return _written(given)


def export(given: argparse.Namespace) -> Any:
    """A published model again, smaller: fewer coordinates, half precision."""
    folder = find_published(given.model)
    report, plot = read_report(folder), folder / "eer_by_dim.png"
    export_model(
        load_published(folder),
        given.folder,
        read_provenance(folder),
        report=report,
        plot=plot if plot.is_file() else None,
        speakers=read_speakers(folder),
        target_dim=given.target_dim,
        dtype=getattr(torch, given.dtype),
    )
    return _written(given)


def _written(given: argparse.Namespace) -> Any:
    if given.json:
        return model_info(given.folder)
    print(f"{given.folder} is a SpeechBrain model. Next:")
    print(f"{PROGRAM} info {given.folder}")
    print(f"{PROGRAM} publish {given.folder} ORG/NAME --dry_run")


def publish(given: argparse.Namespace) -> Any:
    """Check a model and upload it in one commit, and a Space that shows it if one is wanted."""
    if not given.json:
        upload(given)
        return None
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is for people
        return upload(given)


def upload(given: argparse.Namespace) -> dict[str, Any]:
    """``publish`` for its own command and for the recipe's; where the model and its Space are."""
    if given.calibration is not None:
        add_calibration(given.folder, given.calibration)
    options = {key: getattr(given, key) for key in ("private", "revision")}
    address = push_to_hub(
        given.folder, given.repo_id, dry_run=given.dry_run, tag=given.tag, **options
    )
    space = None if given.space is None else push_space(given.space, given.repo_id, **options)
    return {"address": address, "uploaded": not given.dry_run, "space": space}


def info(given: argparse.Namespace) -> Any:
    """What a model is."""
    found = model_info(given.model)
    if given.json:
        return found
    teachers = [f"{name} ({license})" for name, license in found["teachers"].items()]
    rows = [
        ["source", found["source"]],
        ["sizes", f"{', '.join(map(str, found['mrl_dims']))} coordinates"],
        ["weights", f"{found['params'] / 1e6:.2f} million, {found['megabytes']:.2f} MB"],
        ["speakers", f"{found['speakers']} known by name"],
        ["teachers", ", ".join(teachers) or "none"],
        ["trained on", found["training_data"]],
        ["licence", found["license"]],
    ]
    if found["dims"]:
        counts = (
            f"{found['trials']['target']} target, {found['trials']['impostor']} impostor trials"
        )
        rows.append(["measured on", f"{found['corpus']}: {counts} ({found['list']})"])
    print(found["title"])
    _print_table(None, rows)
    if not found["dims"]:
        print("No report: nobody has measured it, or the report was not exported with it.")
        return None
    print()
    _print_table(
        ["coordinates", "EER %", "minDCF", "threshold (cosine)"],
        [
            [size, f"{100 * r['eer']:.2f}", f"{r['min_dcf']:.3f}", f"{r['threshold']:.3f}"]
            for size, r in found["dims"].items()
        ],
    )


def _encoder(given: argparse.Namespace) -> Any:
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {given.device}: this machine has no GPU that torch can use")
    return load_teacher(given.model, device=given.device)


def _clips(paths: Sequence[str]) -> Any:
    """The recordings at these paths, folders searched through."""
    clips = []
    for path in paths:
        if Path(path).is_dir():
            found = find_clips(path)
            clips += [clip._replace(id=str(Path(path, clip.id))) for clip in found]
        else:
            clips.append(Clip(path, path, 0, audio_info(path).num_frames))
    return clips


def _embed(encoder: nn.Module, clips: Sequence[Clip], given: argparse.Namespace) -> Any:
    with tqdm(total=len(clips), unit="clip", desc="Embedding", disable=None) as bar:
        options = {"device": given.device, "max_seconds": given.max_seconds, "progress": bar}
        return embed_clips({"model": encoder}, clips, **options)["model"]


def _check_size(size: int | None, sizes: Sequence[int]) -> None:
    if size not in sizes:
        raise ValueError(f"--target_dim must be one of {sizes}, the model's sizes, got {size}")


def _number(value: Any) -> Any:
    return "-" if value is None else f"{value:.3f}"


def _print_table(heads: Sequence[str] | None, rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; two spaces between."""
    lines = [*([heads] if heads else []), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


COMMANDS = {run.__name__: run for run in (embed, verify, convert, export, publish, info)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    one = parser()
    given = one.parse_args(arguments)
    if given.command == "verify" and given.trials is None and len(given.recordings) != 2:
        one.error(f"verify needs two recordings, or --trials; got {len(given.recordings)}")
    if given.command == "verify" and given.trials is not None and given.data_folder is None:
        one.error("verify --trials needs --data_folder, which holds the recordings of the list")
    try:
        result = COMMANDS[given.command](given)
    except (ValueError, OSError, ImportError, TypeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    prepare_cpu()
    sys.exit(main())
