"""Who spoke when: SpeechBrain's spectral clustering with the first coordinates of a Matryoshka model.

python examples/diarise.py --model results/mrl_distill/1986/model \\
    --data_folder results/mrl_distill/1986/voices

Mixes conversations from a folder in VoxCeleb's layout (speakers take turns, no overlap), embeds a
window of 1.5 s every 0.75 s once, clusters the windows by each size's coordinates with SpeechBrain's
``do_spec_clustering``, and prints per size the diarisation error rate and the time of clustering.
Speech is taken as known: the error is confusion of speakers. Needs the extra ``diarisation``.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from pyannote.core import Annotation, Segment
from pyannote.metrics.diarization import DiarizationErrorRate
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_mrl.audio import read_audio

with warnings.catch_warnings():  # SpeechBrain 1.1 has moved it, 1.0 knows the old place only
    warnings.simplefilter("ignore", DeprecationWarning)
    from speechbrain.processing.diarization import do_spec_clustering

SAMPLE_RATE = 16000  # Hz
WINDOW, STEP = 1.5, 0.75  # seconds
PRUNING = 0.1  # share of each window's similarities that spectral clustering keeps


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


def windows(n_samples, sample_rate=SAMPLE_RATE):
    """Start and end of every window, in samples; the last one ends with the signal."""
    length, step = round(WINDOW * sample_rate), round(STEP * sample_rate)
    starts = [*range(0, n_samples - length, step), n_samples - length]
    return [(start, start + length) for start in starts]


def embed(encoder, wav, spans, batch_size=64):
    """Full embeddings of the windows, (N, D)."""
    cuts = torch.stack([wav[start:end] for start, end in spans])  # (N, T)
    with torch.no_grad():
        found = [encoder.encode_batch(batch).squeeze(1) for batch in cuts.split(batch_size)]
    return torch.cat(found).cpu().numpy()


def diarise(embeddings, spans, size, n_speakers=None):
    """Who speaks when by the first ``size`` coordinates, and the seconds that clustering took.

    ``n_speakers`` None: estimated from the eigenvalues, 2 to 10.
    """
    ids = [f"mix_{start / SAMPLE_RATE:.4f}_{end / SAMPLE_RATE:.4f}" for start, end in spans]
    # what do_spec_clustering reads of SpeechBrain's StatObject_SB
    stat_object = SimpleNamespace(stat1=embeddings[:, :size], segset=np.array(ids))
    np.random.seed(0)  # of the k-means in it
    with tempfile.TemporaryDirectory() as folder:
        rttm = Path(folder, "mix.rttm")
        start = time.perf_counter()
        do_spec_clustering(stat_object, str(rttm), "mix", n_speakers, PRUNING, "cos", None)
        seconds = time.perf_counter() - start
        rows = [line.split() for line in rttm.read_text().splitlines()]
    found = Annotation(uri="mix")
    for turn, (_, _, _, begin, length, _, _, speaker, *_) in enumerate(rows):
        found[Segment(float(begin), float(begin) + float(length)), turn] = speaker
    return found, seconds


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="exported folder, or id on the Hub")
    parser.add_argument("--data_folder", type=Path, required=True, help="holds wav/<speaker>/")
    parser.add_argument("--speakers", type=Path, help="file of the speakers to use; default: all")
    parser.add_argument("--n_mixes", type=int, default=10, help="conversations; default 10")
    parser.add_argument("--n_speakers", type=int, default=4, help="in each; default 4")
    parser.add_argument("--n_turns", type=int, default=60, help="in each; default 60")
    parser.add_argument("--sizes", type=int, nargs="+", help="coordinates; default: the model's")
    given = parser.parse_args(arguments)

    encoder = EncoderClassifier.from_hparams(source=given.model)
    sizes = given.sizes or encoder.hparams.mrl_dims
    names = given.speakers.read_text().split() if given.speakers else None
    folders = sorted(path for path in (given.data_folder / "wav").iterdir() if path.is_dir())
    folders = [path for path in folders if names is None or path.name in names]
    if len(folders) < given.n_speakers:
        raise ValueError(
            f"n_speakers is {given.n_speakers}, {given.data_folder} has {len(folders)}"
        )

    rng = np.random.default_rng(0)
    kinds = {"given": given.n_speakers, "estimated": None}
    errors = {key: DiarizationErrorRate() for size in sizes for key in ((size, k) for k in kinds)}
    clustering = dict.fromkeys(errors, 0.0)
    spoken = embedding = 0.0
    n_windows = 0
    for _ in range(given.n_mixes):
        chosen = rng.choice(len(folders), given.n_speakers, replace=False)
        clips = {
            folders[i].name: sorted(str(p) for p in folders[i].rglob("*") if p.is_file())
            for i in chosen
        }
        wav, reference = mix(clips, given.n_turns, rng)
        spans = windows(len(wav))
        start = time.perf_counter()
        embeddings = embed(encoder, wav, spans)
        embedding += time.perf_counter() - start
        spoken, n_windows = spoken + len(wav) / SAMPLE_RATE, n_windows + len(spans)
        for size, kind in errors:
            found, seconds = diarise(embeddings, spans, size, kinds[kind])
            errors[size, kind](reference, found, uem=reference.get_timeline())
            clustering[size, kind] += seconds

    print(
        f"{given.n_mixes} conversations of {given.n_speakers} speakers, {spoken / 60:.1f} minutes, "
        f"{n_windows} windows; embedding took {embedding:.1f} s, once for all sizes"
    )
    print(
        "| coordinates | DER %, speakers given | DER %, estimated | clustering, s | bytes/window |"
    )
    print("| --: | --: | --: | --: | --: |")
    for size in sizes:
        rates = " | ".join(f"{100 * abs(errors[size, kind]):.2f}" for kind in kinds)
        print(f"| {size} | {rates} | {clustering[size, 'given']:.3f} | {4 * size} |")
    return {key: abs(metric) for key, metric in errors.items()}


if __name__ == "__main__":
    main()
