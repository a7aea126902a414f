"""Clips: segments of recordings, their CSV, and finding the recordings of a folder."""

import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speechbrain_mrl.dataio.audio import audio_info
from speechbrain_mrl.dataio.lists import read_rows
from speechbrain_mrl.utils import replacing

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000  # Hz
THREADS = 16  # that wait for the disk more than they compute
COLUMNS = ["ID", "wav", "start", "stop"]
# Of recordings, which PyAV decodes; of one utterance in several formats, the first is taken.
AUDIO_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        "wav flac aif aiff aifc au caf sph w64 rf64 wv tta ape "  # lossless
        "ogg oga opus spx m4a m4b mp4 aac mp3 mp2 webm weba mka mkv wma asf amr awb ac3 "
        "3gp 3g2 mov m4v avi flv mpg mpeg"
    ).split()
)


class Clip(NamedTuple):
    """A segment of a recording."""

    id: str  # its name in trial lists, ``speaker/session/utterance.wav``
    wav: str  # path of the file
    start: int  # first sample, at 16 kHz
    stop: int  # the one after the last

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def iter_clips(path: str | os.PathLike[str]) -> Iterator[Clip]:
    """The utterances of a SpeechBrain CSV one by one: ID, wav, start and stop (at 16 kHz)."""
    for _, clip in _lines(path):
        yield clip


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Clip]]:
    for number, row in read_rows(path, COLUMNS):
        start, stop = row["start"], row["stop"]
        if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(
                f"{path}, line {number}: start and stop must be whole samples at 16 kHz, the first "
                f"below the second, got {start!r} and {stop!r}"
            )
        yield number, Clip(row["ID"], row["wav"], int(start), int(stop))


def read_clips(path: str | os.PathLike[str]) -> list[Clip]:
    """All utterances of a CSV, as from ``iter_clips``.

    Raises
    ------
    ValueError
        If two rows have one ID, or there is none.
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
    if not clips:
        raise ValueError(f"{path} has no row below its header")
    return clips


def write_clips(
    clips: Sequence[Clip], path: str | os.PathLike[str], speakers: bool = False
) -> None:
    """Write utterances as the CSV that ``read_clips`` and SpeechBrain's datasets read.

    With ``speakers`` it has a column ``spk_id``, which their IDs begin with.
    """
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "start", "stop", *["spk_id"] * speakers])
        for clip in clips:
            speaker = [speaker_of(clip.id)] * speakers
            writer.writerow([clip.id, clip.num_frames / SAMPLE_RATE, *clip[1:], *speaker])


def recordings_in(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the recordings that lie in a folder itself, hidden ones aside, in their order."""
    with os.scandir(folder) as entries:
        found = [
            entry
            for entry in entries
            if not entry.name.startswith(".")  # as macOS' ._1.wav
            and os.path.splitext(entry.name)[1].lower() in AUDIO_SUFFIXES
            and not entry.is_dir()
        ]
    for entry in found:
        if not entry.is_file():
            logger.warning("%s is left out: it links to no file", entry.path)
    return sorted(entry.path for entry in found if entry.is_file())


def check_names(paths: Iterable[str], unfit: list[str] | None = None) -> list[str]:
    """The paths that a list can hold; why another cannot goes to ``unfit``, else is a ValueError."""
    fit = []
    for path in paths:
        try:
            path.encode()
            fit.append(path)
        except UnicodeEncodeError:
            reason = f"the name of {path!r} is not UTF-8, as lists are; rename it"
            if unfit is None:
                raise ValueError(reason) from None
            unfit.append(reason)
    return fit


def find_recordings(folder: str | os.PathLike[str], unfit: list[str] | None = None) -> list[str]:
    """Paths of all recordings below a folder, in their order; each linked folder is followed once.

    Raises
    ------
    ValueError
        If there is none, or, without ``unfit`` to take the reason, the name of one is not UTF-8.
    """
    found: list[str] = []
    walked: set[str] = set()
    for root, folders, _ in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(root)) in walked:
            folders.clear()
        else:
            walked.add(real)
            found += recordings_in(root)
    if not found:
        raise ValueError(f"{folder} holds no recording ({', '.join(AUDIO_SUFFIXES)})")
    return [str(path) for path in sorted(Path(path) for path in check_names(found, unfit))]


def find_clips(folder: str | os.PathLike[str], clip_ids: Iterable[str] | None = None) -> list[Clip]:
    """Every recording below a folder, whatever its structure, in the order of their paths.

    With ``clip_ids`` only those that this list names, as ``find_listed`` finds them; of no other
    is the header read.

    Raises
    ------
    ValueError
        If there is none, or one cannot be read.
    """
    paths = find_recordings(folder)
    clips = [Clip(os.path.relpath(path, folder), path, 0, 0) for path in paths]
    if clip_ids is not None:
        clips = find_listed(clip_ids, clips)
    headers = in_threads(audio_info, [clip.wav for clip in clips], "read headers")
    return [clip._replace(stop=header.num_frames) for clip, header in zip(clips, headers)]


def in_threads(function: Callable[..., Any], items: Sequence[Any], what: str) -> Iterator[Any]:
    """What the function gives for each item, in order, as it comes; shows progress."""
    with ThreadPool(THREADS) as pool:
        yield from tqdm(pool.imap(function, items, chunksize=16), what, len(items), disable=None)


def clips_at(paths: Iterable[str], folders: bool = True) -> list[Clip]:
    """The recordings at these paths, folders searched through if ``folders``; a path is its ID.

    Raises
    ------
    ValueError
        If there is none in a folder, or one cannot be read.
    """
    clips = []
    for path in paths:
        if folders and os.path.isdir(path):
            clips += [c._replace(id=str(Path(path, c.id))) for c in find_clips(path)]
        else:
            check_names([path])
            clips.append(Clip(path, path, 0, audio_info(path).num_frames))
    return clips


def preference(path: str) -> int:
    """Which format is taken of an utterance that is there in several: the one of least number."""
    suffix = os.path.splitext(path)[1].lower()
    return AUDIO_SUFFIXES.index(suffix) if suffix in AUDIO_SUFFIXES else len(AUDIO_SUFFIXES)


def stem_of(clip_id: str) -> str:
    """What names an utterance in a list, whatever its format and with ``wav/`` before it or not.

    Example
    -------
    >>> stem_of("wav/id1/call/1.m4a"), stem_of("id1/call/1.wav"), stem_of("id1/call/at.10")
    ('id1/call/1', 'id1/call/1', 'id1/call/at.10')
    """
    stem, suffix = os.path.splitext(clip_id.removeprefix("wav/"))
    return stem if suffix.lower() in AUDIO_SUFFIXES else stem + suffix


def speaker_of(clip_id: str) -> str:
    """The speaker in an utterance's ID, ``speaker/session/utterance.wav``."""
    return stem_of(clip_id).split("/")[0]


def speaker_labels(clip_ids: Iterable[str]) -> Tensor:
    """The speakers of utterances' IDs as numbers, (N,)."""
    speakers = [speaker_of(clip_id) for clip_id in clip_ids]
    return torch.from_numpy(np.unique(speakers, return_inverse=True)[1])


def find_listed(clip_ids: Iterable[str], clips: Iterable[Clip]) -> list[Clip]:
    """Of ``clips`` those that a list names, under its names; others of its names are left out."""
    clips = sorted(clips, key=lambda clip: -preference(clip.wav))
    by_stem = {stem_of(clip.id): clip for clip in clips}  # the last one stays
    stems = {clip_id: stem_of(clip_id) for clip_id in clip_ids}
    return [by_stem[stem]._replace(id=i) for i, stem in stems.items() if stem in by_stem]
