"""The options of the command line, and the help that explains them."""

import argparse
from typing import Any

PROGRAM = "python -m speechbrain_mrl"
MODEL_HELP = (
    "folder or Hub id of a SpeechBrain speaker encoder, a released name (b0 … b6), or a "
    "ReDimNet checkpoint file"
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
            default=150.0,
            help="only so much of the beginning of a recording is read (default: 150)",
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
        "turn a released ReDimNet into a SpeechBrain model",
        f"""examples:
  {PROGRAM} convert b2-vox2-ft_lm models/b2
  {PROGRAM} convert b2-vox2-ft_lm models/b2-mrl --recordings calls/ --mrl_dims 64 128 192

Without --recordings the weights stay as they are. With them, the embedding is rotated to the
principal axes of these recordings, so that its first 64 coordinates are an embedding too; a few
thousand recordings are good, nobody needs to know who speaks, and it takes no training.""",
    )
    one.add_argument("release", metavar="RELEASE", help="model-dataset-training: b2-vox2-ft_lm")
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
