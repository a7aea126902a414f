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

from speechbrain_mrl.dataio.audio import audio_info
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, Clip, find_clips
from speechbrain_mrl.evaluation.report import make_report, print_report, write_report
from speechbrain_mrl.evaluation.verification import evaluate, read_trials
from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.optimize import prepare_cpu
from speechbrain_mrl.publish.convert import convert_release
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.hub import add_calibration, push_space, push_to_hub
from speechbrain_mrl.publish.load import (
    find_published,
    load_published,
    model_info,
    read_provenance,
    read_report,
    read_speakers,
)

PROGRAM = "python -m speechbrain_mrl"
MODEL_HELP = (
    "folder or Hub id of a SpeechBrain speaker encoder, a released name (b0 … b6, redimnet2_b0 … "
    "redimnet2_b6), or a checkpoint file of ReDimNet or ReDimNet2"
)
DTYPES = ("float32", "float16")


def parser() -> argparse.ArgumentParser:
    """All commands with their options; ``command`` of what it parses is the command's name."""
    main = _Parser(
        prog=PROGRAM,
        description="Speaker embeddings whose first 64, 128, 192 or 256 coordinates are each an "
        "embedding: use, convert, measure and publish such models.",
        epilog=f"""each command explains itself:
  {PROGRAM} verify --help

from nothing to an answer:
  {PROGRAM} convert b2-vox2-ft_lm models/b2
  {PROGRAM} verify models/b2 first.wav second.wav --threshold 0.4

exit codes: 0 done; 1 what was asked cannot be done, one sentence on stderr says why; 2 usage""",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, epilog: str) -> Any:
        one = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog
        )
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return one

    def embedding_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        one.add_argument(
            "--max_seconds",
            type=float,
            help="only so much of the beginning of a recording is read (default: all of it)",
        )

    one = command(
        "embed",
        "turn recordings into embeddings",
        f"""examples:
  {PROGRAM} embed models/b2 calls/ --output calls.npz
  {PROGRAM} embed org/redimnet-mrl one.wav two.flac --target_dim 64 --json

the .npz holds ids (N,) and embeddings (N, target_dim), float32 at unit length:
  found = numpy.load("calls.npz"); cosines = found["embeddings"] @ found["embeddings"].T""",
    )
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    one.add_argument("recordings", metavar="RECORDING", nargs="+", help="files, or folders of them")
    one.add_argument("--output", metavar="FILE.npz", help="write the embeddings there")
    one.add_argument("--target_dim", type=int, metavar="D", help="first coordinates to keep")
    embedding_options(one)

    one = command(
        "verify",
        "decide whether two recordings are of one speaker, or measure a trial list",
        f"""examples:
  {PROGRAM} verify models/b2 first.wav second.wav --threshold 0.4
  {PROGRAM} verify org/redimnet-mrl first.wav second.wav --json
  {PROGRAM} verify org/redimnet-mrl --trials veri_test2.txt --data_folder VoxCeleb1/wav

a trial list has lines "1 a b" (same speaker) or "0 a b"; a and b are paths below --data_folder.
The decision is by the cosine at the model's equal error rate, unless --threshold says otherwise.
Intervals, score normalisation, calibration, comparison of models: recipes/voxceleb/verify.py.""",
    )
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    one.add_argument("recordings", metavar="RECORDING", nargs="*", help="two files")
    one.add_argument("--threshold", type=float, help="cosine from which on two are one speaker")
    one.add_argument("--trials", metavar="LIST", help="measure error rates on this list instead")
    one.add_argument("--data_folder", metavar="FOLDER", help="holds the recordings of the list")
    one.add_argument("--output", metavar="FOLDER", help="write report.json of the list there")
    embedding_options(one)

    one = command(
        "convert",
        "turn a released ReDimNet or ReDimNet2 into a SpeechBrain model",
        f"""examples:
  {PROGRAM} convert b2-vox2-ft_lm models/b2
  {PROGRAM} convert redimnet2_b2-vox2-lm models/redimnet2_b2
  {PROGRAM} convert b2-vox2-ft_lm models/b2-mrl --recordings calls/ --mrl_dims 64 128 192

Without --recordings the weights stay as they are. With them, the embedding is rotated to the
principal axes of these recordings, so that its first 64 coordinates are an embedding too; a few
thousand recordings are good, nobody needs to know who speaks, and it takes no training.""",
    )
    one.add_argument(
        "release",
        metavar="RELEASE",
        help="model-dataset-training: b2-vox2-ft_lm, redimnet2_b2-vox2-lm",
    )
    one.add_argument("folder", metavar="FOLDER", help="to be written")
    one.add_argument("--recordings", metavar="FOLDER", help="rotate to their principal axes")
    one.add_argument(
        "--mrl_dims",
        type=int,
        nargs="+",
        default=[64, 128, 192],
        metavar="D",
        help="sizes after the rotation, the last one 192 (default: 64 128 192)",
    )
    release_options(one)

    one = command(
        "export",
        "write a model again, smaller: fewer coordinates, half precision",
        f"""examples:
  {PROGRAM} export org/redimnet-mrl models/small --target_dim 64
  {PROGRAM} export models/b2 models/b2-half --dtype float16

Half precision is for the disk: weights are loaded as float32 and computed with as such.""",
    )
    one.add_argument("model", metavar="MODEL", help="folder or Hub id of an exported model")
    one.add_argument("folder", metavar="FOLDER", help="to be written")
    one.add_argument("--target_dim", type=int, metavar="D", help="largest size to keep")
    one.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")

    one = command(
        "publish",
        "check a model as a stranger would, and upload it",
        f"""examples:
  {PROGRAM} publish models/b2 org/redimnet-b2 --dry_run
  {PROGRAM} publish models/b2 org/redimnet-b2 --private
  {PROGRAM} publish models/b2 org/redimnet-b2 --space org/try-redimnet-b2

The login is huggingface_hub's: hf auth login, or HF_TOKEN. A model without report.json or licence
is refused. A Space is a page on the Hub where visitors try the model out.""",
    )
    one.add_argument("folder", metavar="FOLDER", help="exported model, such as a recipe's model/")
    one.add_argument("repo_id", metavar="ORG/NAME", help="where on the Hub")
    publish_options(one)

    one = command(
        "info",
        "say what a model is: sizes, teachers, corpus, error rates, licence",
        f"""examples:
  {PROGRAM} info results/mrl_distill/1986/model
  {PROGRAM} info org/redimnet-mrl --json

EER: equal error rate, where as many strangers are accepted as speakers are refused, in percent.
minDCF: smallest detection cost where one trial in 100 is of the same speaker; 1 is a blind guess.
No code of the model is run.""",
    )
    one.add_argument("model", metavar="MODEL", help="folder or Hub id of an exported model")
    return main


def release_options(one: argparse.ArgumentParser) -> None:
    """What writing a release as a SpeechBrain model takes, besides the release and the folder."""
    one.add_argument("--source", help="the release's file or its folder, instead of a download")
    one.add_argument("--report", help="report.json of the converted model, to publish it with")
    one.add_argument("--trials", default="", help="name of the report's trial list")


def publish_options(one: argparse.ArgumentParser) -> None:
    """What publishing takes, besides the folder and the name on the Hub."""
    one.add_argument("--private", action="store_true", help="create the repo as private")
    one.add_argument("--revision", help="branch to upload to, instead of main")
    one.add_argument("--tag", help="name of this version, instead of the next of v1, v2, …")
    one.add_argument(
        "--calibration",
        metavar="FILE.json",
        help="verify.py's calibration.json of the model: put into the folder, to travel with it",
    )
    either = one.add_mutually_exclusive_group()
    either.add_argument("--dry_run", action="store_true", help="check and list, upload nothing")
    either.add_argument("--space", metavar="ORG/NAME", help="push a Space that shows the model too")


class _Parser(argparse.ArgumentParser):
    """Keeps the lines of examples as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


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
    """A released ReDimNet or ReDimNet2 as a SpeechBrain model."""
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


def run() -> None:
    """The console script: one command with the process prepared for networks on the CPU."""
    prepare_cpu()
    sys.exit(main())
