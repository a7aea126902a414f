"""The command line: speechbrain-mrl embed | verify | convert | export | publish | info.

A command imports what it needs when it runs, so that ``info`` and ``--help`` do not wait for torch.
"""

import argparse
import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechbrain_mrl.publish.folder import model_info, print_info
from speechbrain_mrl.utils import attempt, check_device, check_writable, print_table, replacing

PROGRAM = "speechbrain-mrl"
COMMANDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


def option(*names: str, **settings: Any) -> Any:
    """What ``add_argument`` takes."""
    return names, settings


def command(*options: Any) -> Any:
    """Decorator: a command of the function's name and docstring; what it returns becomes JSON."""
    return lambda run: COMMANDS.setdefault(run.__name__, (run, options))[0]


MODEL = option(
    "model",
    metavar="MODEL",
    help="folder or Hub id of a SpeechBrain speaker encoder, a released name (b0 … b6, "
    "redimnet2_b2, b2-vox2-ptn, …), or a checkpoint file of ReDimNet or ReDimNet2",
)
EXPORTED = option("model", metavar="MODEL", help="folder or Hub id of an exported model")
FOLDER = option("folder", metavar="FOLDER", help="to be written")
DEVICE = option("--device", default="cpu", help="cpu or cuda (default: cpu)")
SECONDS = option("--max_seconds", type=float, help="seconds of each recording (default: all)")
DECISIONS: dict[Any, str] = {True: "same speaker", False: "different speakers", None: "-"}


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

    the .npz holds ids (N,) and embeddings (N, target_dim), float32, L2-normalised
    """
    import numpy as np
    from torch.nn.functional import normalize

    from speechbrain_mrl.dataio.clips import SAMPLE_RATE, clips_at

    if given.output is not None:
        check_writable(given.output)
    clips = clips_at(given.recordings)
    embeddings, _, sizes, _ = _embed(given, clips)
    size = given.target_dim or embeddings.shape[1]
    if size not in sizes:
        raise ValueError(f"--target_dim must be one of {sizes}, the model's sizes, got {size}")
    embeddings = normalize(embeddings[:, :size], dim=1).numpy()
    found = [{"id": c.id, "seconds": round(c.num_frames / SAMPLE_RATE, 2)} for c in clips]
    if given.output is None:
        found = [f | {"embedding": e.tolist()} for f, e in zip(found, embeddings, strict=True)]
    else:
        with replacing(given.output) as part, open(part, "wb") as file:
            np.savez(file, ids=[clip.id for clip in clips], embeddings=embeddings)
    if given.json:
        return dict(model=given.model, target_dim=size, output=given.output, recordings=found)
    few = ["  ".join(f"{x:+.3f}" for x in row[:6]) + " …" for row in embeddings]
    rows = [[f["id"], f["seconds"], start] for f, start in zip(found, few, strict=True)]
    print_table(["recording", "seconds", "first dimensions"], rows)
    where = f"written to {given.output}" if given.output else "to keep them, give --output"
    print(f"{len(clips)} embeddings of {size} dimensions, L2-normalised; {where}")


@command(
    MODEL,
    option("recordings", metavar="RECORDING", nargs="*", help="two files"),
    option("--threshold", type=float, help="lowest cosine of one speaker (default: the model's)"),
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
    The decision is by the cosine at the model's equal error rate, unless --threshold says
    otherwise. Intervals, normalisation, calibration, comparison: recipes/voxceleb/verify.py.
    """
    if given.trials is not None:
        return _verify_list(given)
    from torch.nn.functional import cosine_similarity

    from speechbrain_mrl.dataio.clips import clips_at

    clips = clips_at(given.recordings, folders=False)
    (first, second), _, sizes, thresholds = _embed(given, clips)
    scores = []
    for size in sizes:
        cosine = cosine_similarity(first[:size], second[:size], dim=0).item()
        threshold = thresholds.get(size) if given.threshold is None else given.threshold
        same = None if threshold is None else cosine >= threshold
        scores.append({"size": size, "score": cosine, "threshold": threshold, "same": same})
    if given.json:
        return {"model": given.model, "recordings": given.recordings, "scores": scores}
    rows = [[s["size"], s["score"], s["threshold"], DECISIONS[s["same"]]] for s in scores]
    print_table(["dimensions", "cosine", "threshold", "decision"], rows)
    if not thresholds and given.threshold is None:
        print("The model brings no threshold; give --threshold, fitted to recordings like yours.")


def _verify_list(given: argparse.Namespace) -> Any:
    from speechbrain_mrl.dataio.clips import find_clips
    from speechbrain_mrl.evaluation.report import make_report, print_report, write_report
    from speechbrain_mrl.evaluation.verification import evaluate, read_trials

    started = time.time()
    if given.output is not None:
        check_writable(Path(given.output, "report.json"))
    trials = read_trials(given.trials)
    clips = find_clips(given.data_folder, trials.clip_ids)
    trials.check_clips({clip.id for clip in clips})
    embeddings, encoder, sizes, _ = _embed(given, clips)
    found = trials.stack(dict(zip((clip.id for clip in clips), embeddings, strict=True)))
    dims, params = evaluate(found, trials, sizes), sum(p.numel() for p in encoder.parameters())
    seconds = round(time.time() - started, 1)
    report = make_report(dims, trials, {}, given.data_folder, params, seconds)
    if given.output is not None:
        write_report(report, given.output)
    if given.json:
        return report
    print_report(report)


@command(
    MODEL,
    FOLDER,
    option("--recordings", metavar="FOLDER", help="rotate to the principal components of these"),
    option("--mrl_dims", type=int, nargs="+", help="sizes after rotation (default: 64 128 192 …)"),
    option("--source", help="the release's file or its folder, instead of a download"),
    option("--report", help="report.json of the converted model, to publish it with"),
    option("--trials", default="", help="name of the report's trial list"),
)
def convert(given: argparse.Namespace) -> Any:
    """Write a ReDimNet as a SpeechBrain model, or make any speaker encoder Matryoshka by rotation.

    Examples:
      speechbrain-mrl convert b2-vox2-ft_lm models/b2
      speechbrain-mrl convert redimnet2_b2 models/redimnet2_b2
      speechbrain-mrl convert speechbrain/spkrec-ecapa-voxceleb models/ecapa --recordings calls/
      speechbrain-mrl convert b2 models/b2-mrl --recordings calls/ --mrl_dims 64 128 192

    Without --recordings the weights stay as they are. With them, the embedding is rotated to the
    principal components of these recordings, so that its first 64 dimensions are an embedding too.
    A few thousand unlabelled recordings are enough, and it takes no training.
    """
    from speechbrain_mrl.publish.convert import convert_release

    convert_release(**_options(given))
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
    import torch

    from speechbrain_mrl.publish.load import export_again

    export_again(given.model, given.folder, given.target_dim, getattr(torch, given.dtype))
    return _written(given)


def _written(given: argparse.Namespace) -> Any:
    if given.json:
        return model_info(given.folder)
    print(f"{given.folder} is a SpeechBrain model. Next:\n{PROGRAM} info {given.folder}")
    print(f"{PROGRAM} publish {given.folder} ORG/NAME --dry_run")


@command(
    option("folder", metavar="FOLDER", help="exported model, such as a recipe's model/"),
    option("repo_id", metavar="ORG/NAME", help="where on the Hub"),
    option("--private", action="store_true", help="create the repo as private"),
    option("--revision", help="branch to upload to, instead of main"),
    option("--tag", help="name of this version, instead of the next of v1, v2, …"),
    option(
        "--calibration", metavar="FILE.json", help="that of verify.py, published with the model"
    ),
    option("--dry_run", action="store_true", help="check and list, upload nothing"),
    option("--space", metavar="ORG/NAME", help="push a Space that shows the model too"),
)
def publish(given: argparse.Namespace) -> Any:
    """Check a model in an isolated process, and upload it.

    Examples:
      speechbrain-mrl publish models/b2 org/redimnet-b2 --dry_run
      speechbrain-mrl publish models/b2 org/redimnet-b2 --space org/try-redimnet-b2

    The login is huggingface_hub's: hf auth login, or HF_TOKEN. A model without report.json or
    licence is refused. A Space is a page on the Hub where visitors try the model out.
    """
    from speechbrain_mrl.publish.hub import publish_model

    # With --json what it prints, which is for people, goes to stderr.
    with contextlib.redirect_stdout(sys.stderr if given.json else sys.stdout):
        published = publish_model(**_options(given))
    return published if given.json else None


@command(EXPORTED)
def info(given: argparse.Namespace) -> Any:
    """Say what a model is: sizes, teachers, corpus, error rates, licence.

    Examples:
      speechbrain-mrl info results/mrl_distill/1986/model
      speechbrain-mrl info org/redimnet-mrl --json

    EER: equal error rate, where as many impostors are accepted as speakers are refused, in percent.
    minDCF: smallest detection cost where one trial in 100 is of the same speaker; 1 is a blind
    guess. No code of the model is run.
    """
    found = model_info(given.model)
    if given.json:
        return found
    print_info(found)


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """What the command's function in the package takes."""
    return {key: value for key, value in vars(given).items() if key not in ("command", "json")}


def _embed(given: argparse.Namespace, clips: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Embeddings of the utterances, (N, D); their encoder, its sizes and its thresholds."""
    from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds
    from speechbrain_mrl.inference.extract import embed_clips

    device = check_device(given.device)
    encoder = load_teacher(given.model, device=device)
    with tqdm(total=len(clips), unit=" utterances", desc="Embedding", disable=None) as bar:
        options = {"device": device, "max_seconds": given.max_seconds, "progress": bar}
        embeddings = embed_clips({"model": encoder}, clips, **options)["model"]
    return embeddings, encoder, *sizes_and_thresholds(encoder, embeddings.shape[1])


def parser() -> argparse.ArgumentParser:
    """All commands with their options; ``command`` of what it parses is the command's name."""
    as_written = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(
        prog=PROGRAM,
        formatter_class=as_written,
        description="Use, convert, measure and publish speaker encoders of several sizes.",
        epilog=f"""{PROGRAM} COMMAND --help explains a command. From nothing to an answer:
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
    return attempt(lambda: _run(given), exit_code=1)


def _run(given: argparse.Namespace) -> None:
    result = COMMANDS[given.command][0](given)
    if result is not None:
        print(json.dumps(result, indent=2))


def run() -> None:
    """The console script: one command; the process is prepared for those that embed recordings."""
    if {"embed", "verify", "convert"} & {*sys.argv[1:2]}:
        from speechbrain_mrl.inference.optimize import prepare_cpu

        prepare_cpu()
    sys.exit(main())
