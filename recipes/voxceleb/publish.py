"""Publish an exported model, or export a released ReDimNet as a SpeechBrain model first.

python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl
python recipes/voxceleb/publish.py exported/b2 org/redimnet-b2 --release=b2-vox2-ft_lm \\
    --report=results/verify/report.json --trials="VoxCeleb1-O (cleaned)"
python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl \\
    --calibration=results/verify/calibration.json --space=org/try-redimnet-mrl
"""

import argparse
import json
import shutil
from pathlib import Path

from speechbrain_mrl.calibration import check_calibration
from speechbrain_mrl.convert import convert_release
from speechbrain_mrl.hub import push_space, push_to_hub


def add_calibration(folder, calibration):
    """Let an exported model travel with what verify.py fitted for it."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    check_calibration(calibration, [int(size) for size in report["dims"]])
    shutil.copyfile(calibration, folder / "calibration.json")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="exported model, such as a recipe's model/")
    parser.add_argument("repo_id", nargs="?", help="org/name on the Hub; without it: no upload")
    parser.add_argument("--private", action="store_true", help="create the repo as private")
    parser.add_argument("--revision", help="branch to upload to, instead of main")
    parser.add_argument("--tag", help="name of this version, instead of the next of v1, v2, …")
    parser.add_argument("--dry_run", action="store_true", help="check and list, upload nothing")
    parser.add_argument("--release", help="write this release to the folder first: b2-vox2-ft_lm")
    parser.add_argument("--source", help="the release's file or its folder, instead of a download")
    parser.add_argument("--report", type=Path, help="the release's report.json, from verify.py")
    parser.add_argument("--trials", default="", help="name of the report's trial list")
    parser.add_argument("--calibration", type=Path, help="the model's calibration.json, likewise")
    parser.add_argument(
        "--space", help="org/name of a Space that shows the model; see docs/space.md"
    )
    given = parser.parse_args(arguments)
    if given.space is not None and (given.repo_id is None or given.dry_run):
        parser.error("a Space shows a published model: give its repo_id, and no --dry_run")
    if given.release is not None:
        convert_release(
            given.release,
            given.folder,
            given.source,
            report=given.report,
            trials=given.trials,
        )
        print(f"{given.folder} holds {given.release} as a SpeechBrain model")
    elif given.repo_id is None:
        parser.error("nothing to do: give a repo_id to publish to, or a --release to export")
    if given.calibration is not None:
        add_calibration(given.folder, given.calibration)
    if given.repo_id is not None:
        push_to_hub(
            given.folder,
            given.repo_id,
            private=given.private,
            revision=given.revision,
            dry_run=given.dry_run,
            tag=given.tag,
        )
    if given.space is not None:
        push_space(given.space, given.repo_id, private=given.private, revision=given.revision)


if __name__ == "__main__":
    main()
