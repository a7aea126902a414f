"""The command line: speechbrain-mrl embed | verify | convert | export | publish | info."""

import argparse
import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm import tqdm

from speechbrain_mrl.dataio.audio import audio_info
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, Clip, find_clips
from speechbrain_mrl.evaluation.report import make_report, print_report, write_report
from speechbrain_mrl.evaluation.verification import evaluate, read_trials
from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.optimize import prepare_cpu
from speechbrain_mrl.publish.convert import convert_release
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.hub import publish_model
from speechbrain_mrl.publish.load import (
    find_published,
    load_published,
    model_info,
    read_provenance,
    read_report,
    read_speakers,
)

PROGRAM = "speechbrain-mrl"
COMMANDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


def option(*names: str, **settings: Any) -> Any:
    """What ``add_argument`` takes."""
    return names, settings


def command(*options: Any) -> Any:
    """Decorator: the function is a command of its own name; its docstring is its help.

    What it returns is printed as JSON.
    """

    def register(run: Any) -> Any:
        COMMANDS[run.__name__] = run, options
        return run

    return register


MODEL = option(
    "model",
    metavar="MODEL",
    help="folder or Hub id of a SpeechBrain speaker encoder, a released name (b0 … b6, "
    "redimnet2_b0 … redimnet2_b6), or a checkpoint file of ReDimNet or ReDimNet2",
)
EXPORTED = option("model", metavar="MODEL", help="folder or Hub id of an exported model")
FOLDER = option("folder", metavar="FOLDER", help="to be written")
DEVICE = option("--device", default="cpu", help="cpu or cuda (default: cpu)")
SECONDS = option(
    "--max_seconds",
    type=float,
    help="only so much of the beginning of a recording is read (default: all of it)",
)


@command(
    MODEL,
    option("recordings", metavar="RECORDING", nargs="+", help="files, or folders of them"),
    option("--output", metavar="FILE.npz", help="write the embeddings there"),
    option("--target_dim", type=int, metavar="D", help="first dimensions to keep"),
    DEVICE,
    SECONDS,
)
def embed(given: argparse.Namespace) -> Any:
    """Turn recordings into embeddings.

    Examples:
      speechbrain-mrl embed models/b2 calls/ --output calls.npz
      speechbrain-mrl embed org/redimnet-mrl one.wav two.flac --target_dim 64 --json

    the .npz holds ids (N,) and embeddings (N, target_dim), float32 at unit length
    """
    encoder = _encoder(given)
    clips = _clips(given.recordings)
    embeddings = _embed(encoder, clips, given)
    size = given.target_dim or embeddings.shape[1]
    sizes, _ = sizes_and_thresholds(encoder, embeddings.shape[1])
    if size not in sizes:
        raise ValueError(f"--target_dim must be one of {sizes}, the model's sizes, got {size}")
    embeddings = F.normalize(embeddings[:, :size], dim=1).numpy()
    if given.output is not None:
        np.savez(given.output, ids=[clip.id for clip in clips], embeddings=embeddings)
    seconds = [round(clip.num_frames / SAMPLE_RATE, 2) for clip in clips]
    found = [{"id": c.id, "seconds": s} for c, s in zip(clips, seconds, strict=True)]
    if given.output is None:
        found = [f | {"embedding": e.tolist()} for f, e in zip(found, embeddings, strict=True)]
    if given.json:
        return {"model": given.model, "target_dim": size, "output": given.output} | {
            "recordings": found
        }
    few = ["  ".join(f"{x:+.3f}" for x in row[:6]) + " …" for row in embeddings]
    rows = [[f["id"], f"{f['seconds']:.2f}", start] for f, start in zip(found, few, strict=True)]
    _print_table(["recording", "seconds", "first dimensions"], rows)
    where = f"written to {given.output}" if given.output else "to keep them, give --output"
    print(f"{len(clips)} embeddings of {size} dimensions, at unit length; {where}")


@command(
    MODEL,
    option("recordings", metavar="RECORDING", nargs="*", help="two files"),
    option("--threshold", type=float, help="cosine from which on two are one speaker"),
    option("--trials", metavar="LIST", help="measure error rates on this list instead"),
    option("--data_folder", metavar="FOLDER", help="holds the recordings of the list"),
    option("--output", metavar="FOLDER", help="write report.json of the list there"),
    DEVICE,
    SECONDS,
)
def verify(given: argparse.Namespace) -> Any:
    """Decide whether two recordings are of one speaker, or measure a trial list.

    Examples:
      speechbrain-mrl verify models/b2 first.wav second.wav --threshold 0.4
      speechbrain-mrl verify org/redimnet-mrl --trials veri_test2.txt --data_folder VoxCeleb1/wav

    a trial list has lines "1 a b" (same speaker) or "0 a b"; a and b are paths below --data_folder.
    The decision is by the cosine at the model's equal error rate, unless --threshold says otherwise.
    Intervals, score normalisation, calibration, comparison of models: recipes/voxceleb/verify.py.
    """
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
        [
            str(s["size"]),
            f"{s['score']:.3f}",
            "-" if s["threshold"] is None else f"{s['threshold']:.3f}",
            decisions[s["same"]],
        ]
        for s in scores
    ]
    _print_table(["dimensions", "cosine", "threshold", "decision"], rows)
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


@command(
    option("release", metavar="RELEASE", help="such as b2-vox2-ft_lm, redimnet2_b2-vox2-lm"),
    FOLDER,
    option("--recordings", metavar="FOLDER", help="rotate to their principal components"),
    option(
        "--mrl_dims",
        type=int,
        nargs="+",
        default=[64, 128, 192],
        metavar="D",
        help="sizes after the rotation, the last one 192 (default: 64 128 192)",
    ),
    option("--source", help="the release's file or its folder, instead of a download"),
    option("--report", help="report.json of the converted model, to publish it with"),
    option("--trials", default="", help="name of the report's trial list"),
)
def convert(given: argparse.Namespace) -> Any:
    """Turn a released ReDimNet or ReDimNet2 into a SpeechBrain model.

    Examples:
      speechbrain-mrl convert b2-vox2-ft_lm models/b2
      speechbrain-mrl convert redimnet2_b2-vox2-lm models/redimnet2_b2
      speechbrain-mrl convert b2-vox2-ft_lm models/b2-mrl --recordings calls/ --mrl_dims 64 128 192

    Without --recordings the weights stay as they are. With them, the embedding is rotated to the
    principal components of these recordings, so that its first 64 dimensions are an embedding too;
    a few thousand recordings are good, nobody needs to know who speaks, and it takes no training.
    """
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


@command(
    EXPORTED,
    FOLDER,
    option("--target_dim", type=int, metavar="D", help="largest size to keep"),
    option("--dtype", choices=("float32", "float16"), default="float32", help="default: float32"),
)
def export(given: argparse.Namespace) -> Any:
    """Write a model again, smaller: fewer dimensions, half precision.

    Examples:
      speechbrain-mrl export org/redimnet-mrl models/small --target_dim 64
      speechbrain-mrl export models/b2 models/b2-half --dtype float16

    Half precision is for the disk: weights are loaded as float32 and computed with as such.
    """
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


@command(
    option("folder", metavar="FOLDER", help="exported model, such as a recipe's model/"),
    option("repo_id", metavar="ORG/NAME", help="where on the Hub"),
    option("--private", action="store_true", help="create the repo as private"),
    option("--revision", help="branch to upload to, instead of main"),
    option("--tag", help="name of this version, instead of the next of v1, v2, …"),
    option(
        "--calibration",
        metavar="FILE.json",
        help="verify.py's calibration.json of the model: put into the folder, to travel with it",
    ),
    option("--dry_run", action="store_true", help="check and list, upload nothing"),
    option("--space", metavar="ORG/NAME", help="push a Space that shows the model too"),
)
def publish(given: argparse.Namespace) -> Any:
    """Check a model in an isolated process, and upload it.

    Examples:
      speechbrain-mrl publish models/b2 org/redimnet-b2 --dry_run
      speechbrain-mrl publish models/b2 org/redimnet-b2 --space org/try-redimnet-b2

    The login is huggingface_hub's: hf auth login, or HF_TOKEN. A model without report.json or licence
    is refused. A Space is a page on the Hub where visitors try the model out.
    """
    options = {key: value for key, value in vars(given).items() if key not in ("command", "json")}
    if not given.json:
        publish_model(**options)
        return None
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is for people
        return publish_model(**options)


@command(
    EXPORTED,
)
def info(given: argparse.Namespace) -> Any:
    """Say what a model is: sizes, teachers, corpus, error rates, licence.

    Examples:
      speechbrain-mrl info results/mrl_distill/1986/model
      speechbrain-mrl info org/redimnet-mrl --json

    EER: equal error rate, where as many impostors are accepted as speakers are refused, in percent.
    minDCF: smallest detection cost where one trial in 100 is of the same speaker; 1 is a blind guess.
    No code of the model is run.
    """
    found = model_info(given.model)
    if given.json:
        return found
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
        ["dimensions", "EER %", "minDCF", "threshold (cosine)"],
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


def _print_table(heads: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    table = Table(*(heads or []), box=None, show_header=heads is not None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    wide = None if sys.stdout.isatty() else 1000  # nothing is folded in a file or a pipe
    Console(file=sys.stdout, width=wide).print(table)


def parser() -> argparse.ArgumentParser:
    """All commands with their options; ``command`` of what it parses is the command's name."""
    as_written = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(
        prog=PROGRAM,
        formatter_class=as_written,
        description="Speaker embeddings whose first 64, 128, 192 or 256 dimensions are each an "
        "embedding: use, convert, measure and publish such models.",
        epilog=f"""each command explains itself:
  {PROGRAM} verify --help

from nothing to an answer:
  {PROGRAM} convert b2-vox2-ft_lm models/b2
  {PROGRAM} verify models/b2 first.wav second.wav --threshold 0.4

exit codes: 0 done; 1 what was asked cannot be done, one sentence on stderr says why; 2 usage""",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, options) in COMMANDS.items():
        summary, *more = inspect.cleandoc(str(run.__doc__)).split("\n", 1)
        one = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:-1],
            description=summary,
            epilog="".join(more).strip(),
            formatter_class=as_written,
        )
        for names, settings in options:
            one.add_argument(*names, **settings)
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    one = parser()
    given = one.parse_args(arguments)
    if given.command == "verify" and given.trials is None and len(given.recordings) != 2:
        one.error(f"verify needs two recordings, or --trials; got {len(given.recordings)}")
    if given.command == "verify" and given.trials is not None and given.data_folder is None:
        one.error("verify --trials needs --data_folder, which holds the recordings of the list")
    if given.command == "publish" and given.dry_run and given.space is not None:
        one.error("publish takes either --dry_run or --space")
    try:
        result = COMMANDS[given.command][0](given)
    except (ValueError, OSError, ImportError, TypeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result, indent=2))
    return 0


def run() -> None:
    """The console script: one command with the process prepared for networks on the CPU."""
    prepare_cpu()
    sys.exit(main())
