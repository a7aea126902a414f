"""Lists VoxCeleb's utterances for training, validation and test, no speaker in two of them.

Any corpus laid out as ``wav/<speaker>/<session>/<utterance>.<wav|flac|m4a|...>`` will do.
"""

import functools
import hashlib
import json
import logging
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from headers import JOURNALS, read_headers
from held_out import eligible_speakers, hold_out, make_trials

from speechbrain_mrl.dataio.clips import (
    SAMPLE_RATE,
    Clip,
    check_names,
    in_threads,
    preference,
    recordings_in,
    speaker_of,
    stem_of,
    write_clips,
)
from speechbrain_mrl.dataio.lists import read_lines
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.utils import replacing

logger = logging.getLogger(__name__)

_ROOTS = ("wav", "aac", "dev/wav", "dev/aac", "test/wav", "test/aac")


class PreparedCorpus(NamedTuple):
    """Where the lists are, and what they hold.

    Arguments
    ---------
    train_csv, valid_csv, test_csv : str
        Clips: ID, duration (seconds), wav (path), start and stop (samples at 16 kHz), spk_id.
    valid_trials, test_trials : str
        Trials in VoxCeleb's format, ``1 a b`` for the same speaker, of IDs in the CSV.
    counts : dict
        ``train``, ``valid`` and ``test``: speakers, utterances and hours, and the latter two their
        target and impostor trials. ``left_out``: utterances that were bad or short, and test
        speakers kept out of training and validation.
    """

    train_csv: str
    valid_csv: str
    test_csv: str
    valid_trials: str
    test_trials: str
    counts: dict


def prepare_voxceleb(
    data_folder: str | list[str],
    save_folder: str,
    trials: str | None = None,
    train_speakers: str | None = None,
    valid_speakers: int = 40,
    test_speakers: int = 40,
    min_seconds: float = 1.0,
    seed: int = 0,
    skip_bad_files: bool = False,
    skip_prep: bool = False,
) -> PreparedCorpus:
    """Writes the CSV files and trials that training and verification read.

    Speakers of the trials are in neither train nor valid. Does nothing when
    ``save_folder`` holds the lists of the same arguments and the same files.

    Arguments
    ---------
    data_folder : str | list[str]
        VoxCeleb 1, 2 or both: each folder holds ``wav/<speaker>/<session>/<utterance>``
        (or ``aac/``, or either below ``dev/`` and ``test/``), or is that ``wav`` itself.
    save_folder : str
        Where the lists go.
    trials : str | None
        Test trials in VoxCeleb's format, paths below ``wav/``; their suffix need not be
        the file's. None holds ``test_speakers`` speakers out and makes trials of them.
    train_speakers : str | None
        File with one speaker per line; None is every speaker that is not tested.
    valid_speakers : int
        Speakers to hold out for validation: at most this many, and fewer in a small
        folder: a tenth of the training speakers, or of few two fifths and at most 4.
    test_speakers : int
        Speakers to hold out for the test where no trials are given: at most this many, and
        at most a third of those that have two or more utterances if train_speakers is None.
    min_seconds : float
        Shorter utterances are left out, except in given trials.
    seed : int
        Decides who is held out and which trials are made.
    skip_bad_files : bool
        Decode every file to its end, leave out what ``check_audio`` refuses and list it in
        ``bad_files.txt``. False stops at a bad header now, at bad samples when they are read. A
        given trial's utterance is never left out.
    skip_prep : bool
        Trust what ``save_folder`` holds, for ranks that wait while another prepares.

    Raises
    ------
    ValueError
        If a folder has no audio in the expected layout, files cannot be read, an utterance of
        the trials is missing, or too few speakers remain.

    Example
    -------
    >>> import numpy as np, soundfile
    >>> folder = getfixture("tmp_path")
    >>> for speaker, clip in itertools.product(range(10), range(3)):
    ...     path = folder / f"wav/id{speaker}/session/{clip}.wav"
    ...     path.parent.mkdir(parents=True, exist_ok=True)
    ...     soundfile.write(path, np.zeros(16000), 16000)
    >>> prepared = prepare_voxceleb(str(folder), str(folder / "lists"), test_speakers=2)
    >>> prepared.counts["train"]["speakers"], prepared.counts["valid"]["target"]
    (5, 9)
    """
    save_folder = Path(save_folder).absolute()
    if skip_prep:
        return _prepared(save_folder)
    if min(valid_speakers, test_speakers) < 2:
        raise ValueError(
            "valid_speakers and test_speakers must be 2 or more, impostor trials need two; "
            f"got {valid_speakers} and {test_speakers}"
        )
    folders = [data_folder] if isinstance(data_folder, (str, os.PathLike)) else data_folder
    folders = [os.path.abspath(folder) for folder in folders]
    arguments = {
        "data_folder": folders,
        "trials": trials and os.path.abspath(trials),
        "train_speakers": train_speakers and os.path.abspath(train_speakers),
        "valid_speakers": valid_speakers,
        "test_speakers": test_speakers,
        "min_seconds": min_seconds,
        "seed": seed,
        "skip_bad_files": skip_bad_files,
    }
    unfit = []  # why names cannot stand in a list
    paths = find_recordings(folders, unfit if skip_bad_files else None)
    state = {"arguments": arguments, "files": _fingerprint(paths, trials, train_speakers)}
    if _done(save_folder, state):
        logger.info("%s is up to date; delete it to prepare again", save_folder)
        return _prepared(save_folder)

    speakers = _train_speakers(train_speakers, paths)
    trial_list, test_ids = _given_trials(trials, paths)
    tested = {speaker_of(ID) for ID in test_ids}

    needed = {stem for stem in paths if not trials or stem.split("/")[0] in speakers - tested}
    listed = {s: paths[s] for s in needed.union(test_ids.values())}
    save_folder.mkdir(parents=True, exist_ok=True)
    frames = read_headers(listed, save_folder, decode=skip_bad_files)
    bad = {stem: reason for stem, reason in frames.items() if isinstance(reason, str)}
    _refuse_bad_files(bad, len(frames), set(test_ids.values()), skip_bad_files)
    short = {
        s: f"{paths[s]} has {frames[s] / SAMPLE_RATE:.2f} s, min_seconds is {min_seconds}"
        for s in needed - set(bad)
        if frames[s] < min_seconds * SAMPLE_RATE
    }
    usable = defaultdict(list)  # speaker -> utterances
    for stem in sorted(needed - set(bad) - set(short)):
        ID = stem + os.path.splitext(paths[stem])[1]
        usable[stem.split("/")[0]].append(Clip(ID, paths[stem], 0, frames[stem]))

    rng = random.Random(seed)
    if trials:
        test = [Clip(ID, paths[stem], 0, frames[stem]) for ID, stem in test_ids.items()]
    else:
        pool = {s: c for s, c in usable.items() if not train_speakers or s not in speakers}
        most = len(pool) if train_speakers else len(eligible_speakers(pool)) // 3
        test = hold_out(pool, test_speakers, "test_speakers", rng, most)
        trial_list = make_trials(test, rng)
        tested = {speaker_of(clip.id) for clip in test}

    overlap = speakers & tested
    logger.info("%d test speakers are kept out of training and validation", len(overlap))
    pool = {s: usable[s] for s in sorted(speakers - tested) if s in usable}
    most = max(len(pool) // 10, min(4, 2 * len(pool) // 5))
    count = max(2, min(valid_speakers, most))
    if len(pool) < count + 2:
        raise ValueError(
            f"{len(pool)} speakers remain for training after {len(overlap)} of {len(speakers)} "
            f"are kept for the test; {count} for validation and at least 2 others are needed. "
            "Give a data_folder of more speakers, or trials of another corpus: those of a corpus' "
            "own training speakers (VoxCeleb1-E, VoxCeleb1-H) need another corpus to train on"
        )
    valid = hold_out(pool, valid_speakers, "valid_speakers", rng, most)
    valid_trials = make_trials(valid, rng)
    validated = {speaker_of(clip.id) for clip in valid}
    train = [clip for s, clips in pool.items() if s not in validated for clip in clips]

    n_bad = len(bad) + len(unfit)
    state["test_trials"] = os.path.abspath(trials or save_folder / "test_trials.txt")
    state["counts"] = {
        "train": _count(train),
        "valid": _count(valid) | _count_trials(valid_trials),
        "test": _count(test) | _count_trials(trial_list),
        "left_out": {"bad": n_bad, "short": len(short), "test_speakers": len(overlap)},
    }
    logger.info("left out: %d bad utterances, %d under %s s", n_bad, len(short), min_seconds)

    (save_folder / "prepare.json").unlink(missing_ok=True)
    for name, clips in (("train", train), ("valid", valid), ("test", test)):
        write_clips(clips, save_folder / f"{name}.csv", speakers=True)
    _write_trials(save_folder / "valid_trials.txt", valid_trials)
    if not trials:
        _write_trials(save_folder / "test_trials.txt", trial_list)
    reasons = [*(reason for _, reason in sorted((bad | short).items())), *unfit]
    _write(save_folder / "bad_files.txt", "".join(f"{reason}\n" for reason in reasons))
    _write(save_folder / "prepare.json", json.dumps(state, indent=2))
    for journal in JOURNALS:
        (save_folder / journal).unlink(missing_ok=True)
    return _prepared(save_folder)


def _prepared(save_folder: Path) -> PreparedCorpus:
    try:
        state = json.loads((save_folder / "prepare.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{save_folder} is not prepared; run without skip_prep first") from None
    names = ("train.csv", "valid.csv", "test.csv", "valid_trials.txt")
    lists = [str(save_folder / name) for name in names]
    return PreparedCorpus(*lists, state["test_trials"], state["counts"])


def _done(save_folder: Path, state: dict) -> bool:
    try:
        stored = json.loads((save_folder / "prepare.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all(stored.get(key) == value for key, value in state.items())


def find_recordings(folders: list[str], unfit: list[str] | None = None) -> dict[str, str]:
    """Path of each utterance by its stem, ``<speaker>/<session>/<utterance>``.

    Why a name cannot stand in a list goes to ``unfit``; without it, that is a ValueError.
    """
    list_speaker = functools.partial(_list_speaker, unfit=unfit)
    found = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"data_folder {folder} is not a folder")
        roots = [os.path.join(folder, root) for root in _ROOTS]
        roots = [root for root in roots if os.path.isdir(root)] or [folder]
        speakers = [speaker for root in roots for speaker in _subfolders(root)]
        before = len(found)
        for clips in in_threads(list_speaker, speakers, f"list {folder}"):
            for stem, path in clips:
                if stem not in found or preference(path) < preference(found[stem]):
                    found[stem] = path
        if len(found) == before:
            raise ValueError(
                f"data_folder {folder} adds no utterance; expected "
                f"{folder}/wav/<speaker>/<session>/<utterance>.<wav|flac|m4a|...>"
            )
    return found


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir())


def _list_speaker(folder: str, unfit: list[str] | None) -> list[tuple[str, str]]:
    clips = []
    for session in _subfolders(folder):
        for path in check_names(recordings_in(session), unfit):
            name = os.path.splitext(os.path.basename(path))[0]
            stem = f"{os.path.basename(folder)}/{os.path.basename(session)}/{name}"
            if stem.split() != [stem]:
                raise ValueError(
                    f"the name of {path!r} holds a space, at which trial lists end a name; rename it"
                )
            clips.append((stem, path))
    return clips


def _fingerprint(paths: dict[str, str], *lists: str | None) -> str:
    digest = hashlib.sha256("\n".join(sorted(paths.values())).encode())
    for path in filter(None, lists):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _train_speakers(path: str | None, paths: dict[str, str]) -> set[str]:
    present = {stem.split("/")[0] for stem in paths}
    if path is None:
        return present
    wanted = set(" ".join(read_lines(path)).split())
    if missing := sorted(wanted - present):
        raise ValueError(
            f"{len(missing)} of {len(wanted)} speakers in {path} have no utterance in data_folder, "
            f"such as {', '.join(missing[:5])}"
        )
    return wanted


def _given_trials(path: str | None, paths: dict[str, str]) -> tuple[list, dict[str, str]]:
    """Labels of the trials, and the stems of their utterances in the order of their names."""
    if path is None:
        return [], {}
    trials = read_trials(path)
    stems = {ID: stem_of(ID) for ID in trials.clip_ids}
    trials.check_clips({ID for ID, stem in stems.items() if stem in paths})
    return [(str(int(label)),) for label in trials.labels], stems


def _refuse_bad_files(bad: dict[str, str], total: int, test_stems: set[str], skip: bool):
    in_trials = sorted(bad.keys() & test_stems)
    if in_trials:
        raise ValueError(f"{len(in_trials)} utterances of the trials are bad: {bad[in_trials[0]]}")
    if bad and not skip:
        first = "\n".join(reason for _, reason in sorted(bad.items())[:5])
        raise ValueError(
            f"{len(bad)} of {total} files are bad; skip_bad_files=True leaves them out. "
            f"The first:\n{first}"
        )


def _count(clips: list[Clip]) -> dict:
    return {
        "speakers": len({speaker_of(clip.id) for clip in clips}),
        "clips": len(clips),
        "hours": round(sum(clip.num_frames for clip in clips) / SAMPLE_RATE / 3600, 3),
    }


def _count_trials(trials) -> dict:
    target = sum(label == "1" for label, *_ in trials)
    return {"target": target, "impostor": len(trials) - target}


def _write_trials(path: Path, trials):
    _write(path, "".join(f"{label} {a} {b}\n" for label, a, b in trials))


def _write(path: Path, text: str):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
