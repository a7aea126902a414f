"""The command line: speechbrain-mrl embed | verify | enroll | identify | diarize | calibrate |
convert | export | publish | info. Here are the commands that write and publish models.

A command imports what it needs when it runs, so that ``info`` and ``--help`` do not wait for torch.
"""

import argparse
import contextlib
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from speechbrain_mrl.commands import COMMANDS, MODEL, command, option
from speechbrain_mrl.publish.folder import model_info, print_info
from speechbrain_mrl.utils import attempt

PROGRAM = "speechbrain-mrl"
EXPORTED = option("model", metavar="MODEL", help="folder or Hub id of an exported model")
FOLDER = option("folder", metavar="FOLDER", help="to be written")


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
    if (COMMANDS.keys() - {"export", "publish", "info"}) & {*sys.argv[1:2]}:
        from speechbrain_mrl.inference.optimize import prepare_cpu

        prepare_cpu()
    sys.exit(main())
