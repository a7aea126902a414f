"""Publish an exported model, or export a released ReDimNet as a SpeechBrain model first.

python recipes/voxceleb/publish.py results/mrl_distill/1986/model org/redimnet-mrl
python recipes/voxceleb/publish.py exported/b2 org/redimnet-b2 --release=b2-vox2-ft_lm \\
    --report=results/verify/report.json --trials="VoxCeleb1-O (cleaned)"
"""

import argparse
import json
from pathlib import Path

from speechbrain_mrl import load_pretrained_redimnet
from speechbrain_mrl.card import Provenance
from speechbrain_mrl.export import export_model
from speechbrain_mrl.hub import push_to_hub
from speechbrain_mrl.pretrained import RELEASES

CORPORA = {"vox2": "VoxCeleb2", "vb2": "VoxBlink2", "cnc": "CN-Celeb"}


def export_release(folder, release, source, report_file, trials):
    """Write a released checkpoint, unchanged, as a SpeechBrain model."""
    try:
        model_name, dataset, train_type = release.split("-")
    except ValueError:
        raise ValueError(
            f"--release must be like b2-vox2-ft_lm (model, dataset, training), got {release!r}"
        ) from None
    model = load_pretrained_redimnet(model_name, train_type, dataset, source)
    corpora = ", ".join(CORPORA[name] for name in dataset.split("+"))
    provenance = Provenance(
        title=f"ReDimNet {release}",
        license=RELEASES[dataset]["license"],
        training_data=f"{corpora}. The weights are those of `{release}.pt`, released by the "
        "authors of ReDimNet, in another container and otherwise unchanged.",
        datasets=["voxceleb"] if "vox2" in dataset.split("+") else (),
        trials=trials,
    )
    report = plot = None
    if report_file is not None:
        report = json.loads(report_file.read_text(encoding="utf-8"))
        plot = report_file.with_name("eer_by_dim.png")
        plot = plot if plot.is_file() else None
    export_model(model, folder, provenance, report=report, plot=plot)
    print(f"{folder} holds {release} as a SpeechBrain model")


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
        export_release(given.folder, given.release, given.source, given.report, given.trials)
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
