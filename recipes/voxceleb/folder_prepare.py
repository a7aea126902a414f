"""Lists the recordings of any folder for training without labels; knows nothing of speakers."""

import os
import random
from pathlib import Path

from headers import read_headers
from voxceleb_prepare import PreparedCorpus

from speechbrain_mrl.dataio.clips import (
    SAMPLE_RATE,
    Clip,
    find_listed,
    find_recordings,
    iter_clips,
    read_clips,
    write_clips,
)
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.utils import replacing

VALID_SHARE, MAX_VALID_CLIPS = 1 / 20, 500


def prepare_folder(
    data_folder: str,
    save_folder: str,
    trials: str | None = None,
    test_folder: str | None = None,
    min_seconds: float = 1.0,
    seed: int = 0,
    skip_bad_files: bool = False,
    skip_prep: bool = False,
) -> PreparedCorpus:
    """Writes the CSV files that training reads; validation has utterances and no trials.

    Headers of files that have not changed since the last call are not read again.

    Arguments
    ---------
    data_folder : str
        Folder of recordings in any structure, or a CSV with columns ID, wav, start and stop
        (samples at 16 kHz), of which no other column is read.
    save_folder : str
        Where the lists go.
    trials : str | None
        Test trials, ``1 a b`` a line. Their utterances, not their speakers, are kept out of
        training.
    test_folder : str | None
        Folder or CSV of the trials' utterances; None: ``data_folder``. An utterance is named by its
        path below the folder, or below its ``wav/``; its suffix need not be the file's.
    min_seconds : float
        Shorter utterances are left out.
    seed : int
        Decides which utterances, one in 20 and at most 500, are for validation.
    skip_bad_files : bool
        Decode every file of a folder to its end, leave out what ``check_audio`` refuses and list
        it in ``bad_files.txt``, instead of stopping.
    skip_prep : bool
        Trust what ``save_folder`` holds, for ranks that wait while another prepares.

    Returns
    -------
    PreparedCorpus
        ``valid_trials`` is None, and without ``trials`` so are ``test_csv`` and ``test_trials``.

    Raises
    ------
    ValueError
        If a file cannot be read, an utterance of the trials is missing, or fewer than 3 utterances
        are there.

    Example
    -------
    >>> import numpy as np, soundfile
    >>> folder = getfixture("tmp_path")
    >>> for clip in range(20):
    ...     soundfile.write(folder / f"{clip}.wav", np.zeros(16000), 16000)
    >>> prepare_folder(str(folder), str(folder / "lists")).counts
    {'train': {'clips': 18}, 'valid': {'clips': 2}, 'test': {'clips': 0}}
    """
    folder = Path(save_folder).absolute()
    paths = {split: folder / f"{split}.csv" for split in ("train", "valid", "test")}
    if not skip_prep:
        folder.mkdir(parents=True, exist_ok=True)
        test, bad = [], []
        if trials is not None:
            found = _clips(test_folder or data_folder, folder, skip_bad_files, bad)
            test = _test_clips(read_trials(trials), found)
        tested = {os.path.realpath(clip.wav) for clip in test}
        clips = [
            clip
            for clip in _clips(data_folder, folder, skip_bad_files, bad)
            if clip.num_frames >= min_seconds * SAMPLE_RATE
            and os.path.realpath(clip.wav) not in tested
        ]
        if len(clips) < 3:
            raise ValueError(
                f"{data_folder} has {len(clips)} utterances of {min_seconds} s or more outside the "
                "trials; 3 are needed at least"
            )
        n_valid = min(MAX_VALID_CLIPS, max(2, round(VALID_SHARE * len(clips))))
        held_out = set(random.Random(seed).sample(range(len(clips)), n_valid))
        write_clips([clip for i, clip in enumerate(clips) if i not in held_out], paths["train"])
        write_clips([clip for i, clip in enumerate(clips) if i in held_out], paths["valid"])
        write_clips(test, paths["test"])
        with replacing(folder / "bad_files.txt") as part:
            part.write_text("".join(f"{reason}\n" for reason in sorted(set(bad))), encoding="utf-8")
    return PreparedCorpus(
        str(paths["train"]),
        str(paths["valid"]),
        str(paths["test"]) if trials is not None else None,
        None,
        trials,
        {split: {"clips": sum(1 for _ in iter_clips(path))} for split, path in paths.items()},
    )


def _clips(source, save_folder, skip_bad_files, bad) -> list[Clip]:
    """Utterances of a CSV, or of a folder in the order of paths; ``bad`` gets the reasons."""
    if os.path.isfile(source):
        return read_clips(source)
    root = Path(source, "wav") if Path(source, "wav").is_dir() else Path(source)
    found = find_recordings(root, bad if skip_bad_files else None)
    paths = {os.path.relpath(path, root): path for path in found}
    frames = read_headers(paths, save_folder, decode=skip_bad_files)
    bad += [reason for reason in frames.values() if isinstance(reason, str)]
    if bad and not skip_bad_files:
        raise ValueError(
            f"{len(bad)} of {len(paths)} files are bad; skip_bad_files=True leaves them out. "
            f"The first: {bad[0]}"
        )
    return [
        Clip(name, paths[name], 0, length)
        for name, length in frames.items()
        if not isinstance(length, str)
    ]


def _test_clips(trials, clips) -> list[Clip]:
    """The utterances of the trials, under the trials' names."""
    found = find_listed(trials.clip_ids, clips)
    trials.check_clips({clip.id for clip in found})
    return found
