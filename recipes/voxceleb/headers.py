"""Lengths of many recordings, read by threads and kept in a journal."""

import functools
import itertools
import logging
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

from speechbrain_mrl.dataio.audio import audio_info, check_audio
from speechbrain_mrl.dataio.clips import THREADS, in_threads
from speechbrain_mrl.utils import writing

logger = logging.getLogger(__name__)

JOURNALS = ("headers.tsv", "decoded.tsv")  # length, size, time and path of what was read


def read_headers(
    paths: dict[str, str], save_folder: Path | None = None, decode: bool = False
) -> dict[str, int | str]:
    """Length of each utterance in samples at 16 kHz, or the reason why it cannot be used.

    With ``decode`` the samples are checked too, by ``check_audio``. Good files are kept in a journal
    in ``save_folder``. The call after a killed one reads the others, and those whose size or time
    has changed.
    """
    journal = Path(os.devnull) if save_folder is None else save_folder / JOURNALS[decode]
    lengths = dict.fromkeys(paths)
    if journal.exists():
        keys = {path: key for key, path in paths.items()}
        for path, num_frames in _recall(journal):
            if path in keys:
                lengths[keys[path]] = num_frames
        del keys
    unread = [key for key, length in lengths.items() if length is None]
    if len(unread) < len(paths):
        logger.info("%s knows %d of %d files", journal, len(paths) - len(unread), len(paths))
    read = functools.partial(_read_header, check_audio if decode else audio_info)
    found = in_threads(read, [paths[key] for key in unread], "decode" if decode else "read headers")
    with writing(journal), open(journal, "a", encoding="utf-8", errors="surrogateescape") as file:
        if file.tell():
            file.write("\n")  # the last line may be torn
        for key, (length, size, mtime) in zip(unread, found, strict=True):
            lengths[key] = length
            if not isinstance(length, str):
                file.write(f"{length}\t{size}\t{mtime}\t{paths[key]}\n")
    return lengths


def _recall(journal: Path):
    """(path, length) of the files in a journal that are as they were."""
    with open(journal, encoding="utf-8", errors="surrogateescape") as file:
        with ThreadPool(THREADS) as pool:
            while lines := list(itertools.islice(file, 10_000)):
                yield from filter(None, pool.map(_unchanged, lines))


def _unchanged(line: str) -> tuple[str, int] | None:
    """None for a torn line: the path, which comes last, is then of no file, or of another size."""
    try:
        length, *before, path = line.removesuffix("\n").split("\t", 3)
        return (path, int(length)) if [str(x) for x in _size_and_time(path)] == before else None
    except (ValueError, OSError):
        return None


def _size_and_time(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _read_header(read, path: str) -> tuple[int | str, int, int]:
    """Length or the reason why there is none, size in bytes and time of the last change."""
    try:
        size_and_time = _size_and_time(path)  # before: what changes meanwhile is read again
        return read(path).num_frames, *size_and_time
    except (ValueError, OSError) as error:
        return str(error), 0, 0
