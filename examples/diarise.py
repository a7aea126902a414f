"""Who spoke when: SpeechBrain's spectral clustering with prefixes of a Matryoshka model.

python examples/diarise.py --model results/mrl_distill/1986/model \\
    --data_folder results/mrl_distill/1986/voices --trials results/mrl_distill/1986/lists/test_trials.txt

Mixes conversations from a folder in VoxCeleb's layout; speakers take turns without overlap. Embeds a
window of 1.5 s every 0.75 s, once. Clusters the windows by each prefix, as ``speechbrain-mrl
diarize`` does. Prints for each size the diarisation error rate (DER) and the median time of
a clustering. DER is the share of the time that is given to the wrong speaker; speech is taken as
known. Rates are means over conversations, with 95 % intervals by bootstrap over conversations. Needs the extra ``diarisation``.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from pyannote.core import Annotation, Segment
from pyannote.metrics.diarization import DiarizationErrorRate
from tqdm import tqdm

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.inference.diarization import cluster, embed_windows, windows
from speechbrain_mrl.inference.encoders import load_teacher

SAMPLE_RATE = 16000  # Hz


def mix(clips, n_turns, rng, sample_rate=SAMPLE_RATE):
    """A conversation: the signal (T,), and who speaks when.

    ``clips`` maps each speaker to paths of recordings. Each turn is another speaker's recording,
    at equal power, drawn without replacement until all of a speaker's have been used.
    """
    reference, wavs, start, last = Annotation(uri="mix"), [], 0.0, None
    decks = {speaker: [] for speaker in clips}
    for turn in range(n_turns):
        others = [speaker for speaker in clips if speaker != last]
        last = list(clips)[turn] if turn < len(clips) else str(rng.choice(others))
        deck = decks[last] = decks[last] or list(rng.permutation(clips[last]))
        wav = read_audio(deck.pop())
        wavs.append(0.05 * wav / wav.square().mean().sqrt())
        seconds = len(wav) / sample_rate
        reference[Segment(start, start + seconds), turn] = last
        start += seconds
    return torch.cat(wavs), reference


def diarise(embeddings, spans, size, n_speakers=None):
    """Who speaks when by the first ``size`` dimensions, and the seconds that clustering took.

    ``n_speakers`` None: estimated from the eigenvalues, 2 to 10.
    """
    start = time.perf_counter()
    turns = cluster(embeddings[:, :size], spans, n_speakers)
    seconds = time.perf_counter() - start
    found = Annotation(uri="mix")
    for number, turn in enumerate(turns):
        found[Segment(turn.start, turn.end), number] = turn.speaker
    return found, seconds


def mean_and_interval(rates, n_draws=2000):
    """Mean of one rate per conversation, and its 95 % interval over conversations, in percent."""
    rates = 100 * np.asarray(rates)
    draws = np.random.default_rng(0).integers(len(rates), size=(n_draws, len(rates)))
    low, high = np.percentile(rates[draws].mean(axis=1), [2.5, 97.5])
    return rates.mean(), low, high


def find_speakers(data_folder, trials=None):
    """Recordings by speaker: of the folder's subfolders, or of those in a trial list only."""
    folders = sorted(path for path in (data_folder / "wav").iterdir() if path.is_dir())
    if trials is not None:
        wanted = {clip.split("/")[0] for clip in read_trials(trials).clip_ids}
        folders = [path for path in folders if path.name in wanted]
    return {
        folder.name: sorted(str(path) for path in folder.rglob("*") if path.is_file())
        for folder in folders
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="exported folder, or id on the Hub")
    parser.add_argument("--data_folder", type=Path, required=True, help="holds wav/<speaker>/")
    parser.add_argument("--trials", type=Path, help="use only the speakers of this trial list")
    parser.add_argument("--n_mixes", type=int, default=24, help="conversations; default 24")
    parser.add_argument("--n_speakers", type=int, default=4, help="in each; default 4")
    parser.add_argument("--n_turns", type=int, default=60, help="in each; default 60")
    parser.add_argument("--sizes", type=int, nargs="+", help="dimensions; default: the model's")
    given = parser.parse_args(arguments)

    model = load_teacher(given.model)
    sizes = sorted(given.sizes or model.encoder.hparams.mrl_dims)
    speakers = find_speakers(given.data_folder, given.trials)
    if len(speakers) < given.n_speakers:
        raise ValueError(
            f"n_speakers is {given.n_speakers}, {given.data_folder} has {len(speakers)}"
        )

    rng, shuffle = np.random.default_rng(0), random.Random(0)
    kinds = {"given": given.n_speakers, "estimated": None}
    rates = {(size, kind): [] for size in sizes for kind in kinds}
    clustering = {size: [] for size in sizes}
    spoken = embedding = 0.0
    n_windows = 0
    for _ in tqdm(range(given.n_mixes), unit="conversation", disable=None):
        chosen = rng.choice(sorted(speakers), given.n_speakers, replace=False)
        clips = {str(name): speakers[name] for name in chosen}
        wav, reference = mix(clips, given.n_turns, rng)
        spans = windows(len(wav))
        start = time.perf_counter()
        embeddings = embed_windows(model, wav, spans)
        embedding += time.perf_counter() - start
        spoken, n_windows = spoken + len(wav) / SAMPLE_RATE, n_windows + len(spans)
        diarise(embeddings, spans, sizes[0])  # what loads on first use is not timed
        for size, kind in shuffle.sample(list(rates), len(rates)):  # the first are the slowest
            found, seconds = diarise(embeddings, spans, size, kinds[kind])
            metric = DiarizationErrorRate()
            rates[size, kind].append(metric(reference, found, uem=reference.get_timeline()))
            clustering[size].append(seconds)

    print(
        f"{given.n_mixes} conversations of {given.n_speakers} speakers, {len(speakers)} in all; "
        f"{spoken / 60:.1f} minutes, {n_windows} windows; embedding took {embedding:.1f} s, once "
        "for all sizes"
    )
    heads = [f"DER %, speakers {kind} | against {sizes[-1]}" for kind in kinds]
    print(f"| dimensions | {' | '.join(heads)} | clustering, ms | ratio |")
    print("| --: | --: | --: | --: | --: | --: | --: |")
    whole = np.median(clustering[sizes[-1]])
    for size in sizes:
        cells = []
        for kind in kinds:
            mean, low, high = mean_and_interval(rates[size, kind])
            difference = np.subtract(rates[size, kind], rates[sizes[-1], kind])
            cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            cells.append("{:+.2f} ({:+.2f} to {:+.2f})".format(*mean_and_interval(difference)))
        if size == sizes[-1]:
            cells[1] = cells[3] = "–"
        spent = np.median(clustering[size])
        print(f"| {size} | {' | '.join(cells)} | {1000 * spent:.0f} | {spent / whole:.2f} |")
    return rates


if __name__ == "__main__":
    main()
