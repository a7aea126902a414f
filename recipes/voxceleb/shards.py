"""Write a training list's recordings into tar shards, in random order; a killed run resumes.

python recipes/voxceleb/shards.py results/mrl_distill/1986/lists/train.csv /net/shards
"""

import argparse
import io
import json
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_mrl.dataio.audio import audio_info, read_audio
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, THREADS
from speechbrain_mrl.dataio.dataset import ClipDataset
from speechbrain_mrl.inference.store import claim
from speechbrain_mrl.utils import only_run, replacing, require, sha256

READ_AHEAD = 64  # utterances in memory


def write_shards(csv_path, folder, n_shards=512):
    """Tar files ``<number>.tar`` that ``shard_loader`` reads; those that are there are kept.

    Which utterances a shard holds is drawn once, so that neighbours are of different speakers. A
    recording is copied as it is; a segment of one is written as 24-bit FLAC at 16 kHz.

    Arguments
    ---------
    csv_path : path
        The training list: ID, wav, start and stop (samples at 16 kHz), spk_id if there is one.
    folder : path
        Where the shards go, each when it is complete.
    n_shards : int
        How many; best a multiple of the processes times their workers that will train.

    Returns
    -------
    str
        The shards' paths in the form in which the YAML's ``shards`` takes them.

    Raises
    ------
    ValueError
        If there are fewer utterances than shards, a recording cannot be read, or ``folder`` holds
        shards of another list or number.
    """
    webdataset = require("webdataset", "writing shards")
    rows, folder = ClipDataset(csv_path).data, Path(folder).absolute()
    if not 1 <= n_shards <= len(rows):
        raise ValueError(f"n_shards must be from 1 to the {len(rows)} utterances, got {n_shards}")
    order = np.random.default_rng(0).permutation(len(rows))
    names = [f"{number:0{len(str(n_shards - 1))}d}" for number in range(n_shards)]
    with only_run(folder), tqdm(total=len(rows), unit=" utterances", disable=None) as bar:
        claim(folder / "shards.json", {"shards": n_shards, "list": sha256(csv_path)})
        for part in folder.glob(".*.tar"):  # of a killed run
            part.unlink()
        for number, name in enumerate(names):
            path = folder / f"{name}.tar"
            own = order[number * len(rows) // n_shards : (number + 1) * len(rows) // n_shards]
            if not path.exists():
                with (
                    replacing(path) as part,
                    open(part, "wb") as file,
                    webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0) as tar,
                    ThreadPool(THREADS) as pool,
                ):
                    for first in range(0, len(own), READ_AHEAD):
                        some = own[first : first + READ_AHEAD]
                        for sample in pool.map(lambda i: _sample(i, rows[i]), some):
                            tar.write(sample)
                        bar.update(len(some))
            else:
                bar.update(len(own))
    return f"{folder}/{{{names[0]}..{names[-1]}}}.tar" if n_shards > 1 else f"{folder}/0.tar"


def _sample(number, row):
    """What is stored of an utterance."""
    start, stop = int(row["start"]), int(row["stop"])
    try:
        if start == 0 and stop >= audio_info(row["wav"]).num_frames:
            suffix, recording = Path(row["wav"]).suffix[1:].lower(), Path(row["wav"]).read_bytes()
        else:
            found, suffix = io.BytesIO(), "flac"
            wav = read_audio(row["wav"], start, stop - start).numpy()
            soundfile.write(found, wav, SAMPLE_RATE, "PCM_24", format="FLAC")
            start, stop, recording = 0, stop - start, found.getvalue()
    except OSError as error:
        raise ValueError(f"cannot read {row['wav']}: {error}") from error
    about = {key: row[key] for key in ("id", "spk_id") if key in row}
    about |= {"start": start, "stop": stop}
    return {"__key__": f"{number:09d}", suffix: recording, "json": json.dumps(about).encode()}


def main(argv=None):
    """Everything from the command line to the shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="training list, as in <output_folder>/lists/train.csv")
    parser.add_argument("folder")
    parser.add_argument("--shards", type=int, default=512, help="how many (default: 512)")
    options = parser.parse_args(argv)
    shards = write_shards(options.csv, options.folder, options.shards)
    print(f"train with --shards='{shards}'")


if __name__ == "__main__":
    main()
