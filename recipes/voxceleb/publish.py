"""Publish an exported model, or export a released ReDimNet as a SpeechBrain model first.

python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl
python recipes/voxceleb/publish.py exported/b2 org/redimnet-b2 --release=b2-vox2-ft_lm \\
    --report=results/verify/report.json --trials="VoxCeleb1-O (cleaned)"
python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl \\
    --calibration=results/verify/calibration.json --space=org/try-redimnet-mrl

One script for ``speechbrain-mrl convert`` and ``publish``, which do the work.
"""

import argparse

from command import run_command

from speechbrain_mrl.publish.convert import convert_release
from speechbrain_mrl.publish.hub import publish_model


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="exported model, such as a recipe's model/")
    parser.add_argument("repo_id", nargs="?", help="org/name on the Hub; without it: no upload")
    parser.add_argument("--private", action="store_true", help="create the repo as private")
    parser.add_argument("--revision", help="branch to upload to, instead of main")
    parser.add_argument("--tag", help="name of this version, instead of the next of v1, v2, …")
    parser.add_argument("--calibration", help="verify.py's calibration.json, to travel with it")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--dry_run", action="store_true", help="check and list, upload nothing")
    either.add_argument("--space", help="push a Space that shows the model too: org/name")
    parser.add_argument("--release", help="write this release to the folder first: b2-vox2-ft_lm")
    parser.add_argument("--source", help="the release's file or folder, instead of a download")
    parser.add_argument("--report", help="report.json of the release, to publish it with")
    parser.add_argument("--trials", default="", help="name of the report's trial list")
    given = parser.parse_args(arguments)
    if given.repo_id is None and given.space is not None:
        parser.error("a Space shows a published model: give its repo_id")
    if given.repo_id is None and given.release is None:
        parser.error("nothing to do: give a repo_id to publish to, or a --release to export")
    if given.release is not None:
        source, report = given.source, given.report
        convert_release(given.release, given.folder, source, report=report, trials=given.trials)
        print(f"{given.folder} holds {given.release} as a SpeechBrain model")
    if given.repo_id is not None:
        keys = "folder repo_id space calibration dry_run tag private revision".split()
        publish_model(**{key: getattr(given, key) for key in keys})


if __name__ == "__main__":
    run_command(main)
