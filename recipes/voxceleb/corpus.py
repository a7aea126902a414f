"""The lists that a training reads, as its YAML asks for them."""

import csv
from itertools import islice
from pathlib import Path

from demo_voices import make_demo_corpus
from folder_prepare import prepare_folder
from read_hparams import is_demo
from speechbrain.utils.distributed import run_on_main
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl.dataio.clips import iter_clips, speaker_of
from speechbrain_mrl.dataio.lists import read_lines, read_rows
from speechbrain_mrl.utils import replacing


def prepare(hparams, debug):
    """The corpus' lists; on the main process first."""
    if is_demo(hparams):
        run_on_main(make_demo_corpus, kwargs={"folder": hparams["data_folder"]})
    arguments = {
        "data_folder": hparams["data_folder"],
        "save_folder": str(Path(hparams["output_folder"]) / "lists"),
        "trials": hparams["trials"],
        "seed": hparams["split_seed"],
        "skip_bad_files": hparams["skip_bad_files"],
    }
    if hparams["speaker_folders"]:
        make_lists = prepare_voxceleb
        for key in ("train_speakers", "valid_speakers", "test_speakers"):
            arguments[key] = hparams[key]
    else:
        make_lists = prepare_folder
        arguments["test_folder"] = hparams["test_folder"]
    run_on_main(make_lists, kwargs=arguments)
    corpus = make_lists(**arguments, skip_prep=True)
    if hparams["speaker_folders"]:
        refuse_shared_speakers(corpus)
    return shrink(corpus, 2 * hparams["batch_size"]) if debug else corpus


def refuse_shared_speakers(corpus):
    """Raise ValueError if a speaker is in two lists: prepared ones never are, edited ones may be."""
    speakers = {}
    for path in (corpus.train_csv, corpus.valid_csv, corpus.test_csv):
        for clip in iter_clips(path):
            speaker = speaker_of(clip.id)
            if speakers.setdefault(speaker, path) != path:
                raise ValueError(
                    f"speaker {speaker!r} is in {speakers[speaker]} and in {path}, and would be "
                    "tested on what it was trained on; delete that folder, it is made anew"
                )


def shrink(corpus, n_clips):
    """The first training utterances and a few trials of a corpus, for ``--debug``."""
    paths = {"train_csv": _copy_rows(corpus.train_csv, lambda row: True, n_clips)}
    if corpus.valid_trials is None:
        paths["valid_csv"] = _copy_rows(corpus.valid_csv, lambda row: True, n_clips)
    for split in ("valid", "test"):
        if getattr(corpus, f"{split}_trials") is None:
            continue
        trials = Path(getattr(corpus, f"{split}_trials"))
        lines = read_lines(trials)
        few = [line for label in "10" for line in [x for x in lines if x[0] == label][:8]]
        paths[f"{split}_trials"] = str(
            Path(corpus.train_csv).with_name(f"debug_{split}_{trials.name}")
        )
        with replacing(paths[f"{split}_trials"]) as part:
            part.write_text("\n".join(few) + "\n", encoding="utf-8")
        ids = {clip for line in few for clip in line.split()[1:]}
        paths[f"{split}_csv"] = _copy_rows(
            getattr(corpus, f"{split}_csv"), lambda row, ids=ids: row["ID"] in ids
        )
    return corpus._replace(**paths)


def _copy_rows(path, wanted, limit=None):
    path = Path(path)
    rows = list(islice((row for _, row in read_rows(path, ["ID"]) if wanted(row)), limit))
    copy = path.with_name(f"debug_{path.name}")
    with replacing(copy) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(copy)
