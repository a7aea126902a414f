"""Clips: segments of recordings, their CSV, and finding the recordings of a folder."""

import csv
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from speechbrain_mrl.dataio.audio import audio_info
from speechbrain_mrl.utils import replacing

SAMPLE_RATE = 16000  # Hz
THREADS = 16  # header reading waits for the disk more than it computes
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")


class Clip(NamedTuple):
    """A segment of a recording.

    Arguments
    ---------
    id : str
        Its name in trial lists, ``speaker/session/utterance.wav``.
    wav : str
        Path of the file.
    start, stop : int
        First sample and the one after the last, at 16 kHz.
    """

    id: str
    wav: str
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def iter_clips(path: str | os.PathLike[str]) -> Iterator[Clip]:
    """One by one, the clips of a SpeechBrain CSV: ID, wav, start and stop (samples at 16 kHz)."""
    for _, clip in _lines(path):
        yield clip


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Clip]]:
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            yield rows.line_num, Clip(row["ID"], row["wav"], int(row["start"]), int(row["stop"]))


def read_clips(path: str | os.PathLike[str]) -> list[Clip]:
    """All clips of a CSV, as from ``iter_clips``.

    Raises
    ------
    ValueError
        If two rows have one ID.
    """
    lines: dict[str, int] = {}
    clips = []
    for number, clip in _lines(path):
        if lines.setdefault(clip.id, number) != number:
            raise ValueError(
                f"{path} has the ID {clip.id!r} in line {lines[clip.id]} and in line {number}; "
                "give each row its own, for embeddings are kept by it"
            )
        clips.append(clip)
    return clips


def write_clips(clips: Sequence[Clip], path: str | os.PathLike[str]) -> None:
    """Write clips as the CSV that ``read_clips`` and SpeechBrain's datasets read."""
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "start", "stop"])
        for clip in clips:
            writer.writerow([clip.id, clip.num_frames / SAMPLE_RATE, *clip[1:]])


def find_clips(folder: str | os.PathLike[str]) -> list[Clip]:
    """Every recording below a folder, whatever its structure, in the order of their paths.

    Raises
    ------
    ValueError
        If there is none, or one cannot be read.
    """
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no recording ({', '.join(AUDIO_SUFFIXES)})")
    with ThreadPool(THREADS) as pool:
        headers = pool.imap(audio_info, paths, chunksize=16)
        headers = tqdm(headers, "Reading headers", len(paths), unit="file", disable=None)
        return [
            Clip(str(path.relative_to(root)), str(path), 0, header.num_frames)
            for path, header in zip(paths, headers)
        ]
