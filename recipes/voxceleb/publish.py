"""Publish an exported model, or export a released ReDimNet as a SpeechBrain model first.

python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl
python recipes/voxceleb/publish.py exported/b2 org/redimnet-b2 --release=b2-vox2-ft_lm \\
    --report=results/verify/report.json --trials="VoxCeleb1-O (cleaned)"
"""

import argparse
from pathlib import Path

from speechbrain_mrl.convert import convert_release
from speechbrain_mrl.hub import push_to_hub


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
    given = parser.parse_args(arguments)
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
    if given.repo_id is not None:
        push_to_hub(
            given.folder,
            given.repo_id,
            private=given.private,
            revision=given.revision,
            dry_run=given.dry_run,
            tag=given.tag,
        )


if __name__ == "__main__":
    main()
