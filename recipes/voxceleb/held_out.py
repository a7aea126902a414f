"""Speakers that are held out for validation and test, and the trials that are made of them."""

import itertools
import logging
import os

from speechbrain_mrl.dataio.clips import Clip, speaker_of

logger = logging.getLogger(__name__)

CLIPS_PER_HELD_OUT_SPEAKER = 10  # in generated trials
IMPOSTORS_PER_TARGET = 10  # in generated trials, as far as there are enough pairs


def eligible_speakers(pool: dict[str, list]) -> list[str]:
    """Speakers that can be in a target trial."""
    return sorted(speaker for speaker, clips in pool.items() if len(clips) > 1)


def hold_out(pool: dict[str, list], wanted: int, key: str, rng, most: int) -> list[Clip]:
    """Some utterances of random speakers with two or more: ``wanted``, at most ``most``."""
    eligible, count = eligible_speakers(pool), max(2, min(wanted, most))
    if len(eligible) < count:
        raise ValueError(
            f"{key} needs {count} speakers with two or more utterances, and {len(eligible)} of "
            f"{len(pool)} have them; give a data_folder of more speakers, or set {key} lower"
        )
    if count < wanted:
        logger.info("%s is %d instead of %d, of %d speakers", key, count, wanted, len(pool))
    return [
        clip
        for speaker in sorted(rng.sample(eligible, count))
        for clip in sorted(
            rng.sample(pool[speaker], min(CLIPS_PER_HELD_OUT_SPEAKER, len(pool[speaker])))
        )
    ]


def make_trials(clips: list[Clip], rng) -> list[tuple[str, str, str]]:
    """Every target pair across sessions (within, for a speaker of one), and random impostors."""
    by_speaker = {s: list(c) for s, c in itertools.groupby(clips, lambda c: speaker_of(c.id))}
    targets = []
    for own in by_speaker.values():
        pairs = list(itertools.combinations(own, 2))
        across = [(a, b) for a, b in pairs if os.path.dirname(a.id) != os.path.dirname(b.id)]
        targets += across or pairs
    possible = (len(clips) ** 2 - sum(len(own) ** 2 for own in by_speaker.values())) // 2
    drawn = set(rng.sample(range(possible), min(IMPOSTORS_PER_TARGET * len(targets), possible)))
    pairs = itertools.combinations(clips, 2)
    others = ((a, b) for a, b in pairs if speaker_of(a.id) != speaker_of(b.id))
    impostors = [pair for number, pair in enumerate(others) if number in drawn]
    labelled = [("1", targets), ("0", impostors)]
    return [(label, a.id, b.id) for label, pairs in labelled for a, b in pairs]
