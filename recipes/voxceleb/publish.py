"""Publish an exported model, or export a released ReDimNet as a SpeechBrain model first.

python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl
python recipes/voxceleb/publish.py exported/b2 org/redimnet-b2 --release=b2-vox2-ft_lm \\
    --report=results/verify/report.json --trials="VoxCeleb1-O (cleaned)"
python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl \\
    --calibration=results/verify/calibration.json --space=org/try-redimnet-mrl

One script for ``python -m speechbrain_mrl convert`` and ``publish``, which do the work.
"""

import argparse

from command import run_command

from speechbrain_mrl.cli import publish_options, release_options, upload
from speechbrain_mrl.publish.convert import convert_release


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="exported model, such as a recipe's model/")
    parser.add_argument("repo_id", nargs="?", help="org/name on the Hub; without it: no upload")
    publish_options(parser)
    parser.add_argument("--release", help="write this release to the folder first: b2-vox2-ft_lm")
    release_options(parser)
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
        upload(given)


if __name__ == "__main__":
    run_command(main)
