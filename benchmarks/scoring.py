"""Time and memory of scoring as many trials as VoxCeleb1-E (cleaned) has, at four sizes.

python benchmarks/scoring.py --output=results/scoring.json

Embeddings are synthetic: speakers are clouds of points. Beside it, the same with one product per
size, and SpeechBrain's EER, which tries every threshold, on a list that it can finish.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from speechbrain.utils.metric_stats import EER

from speechbrain_mrl.evaluation.calibration import s_norm
from speechbrain_mrl.evaluation.metrics import eer
from speechbrain_mrl.evaluation.verification import evaluate_scores, read_trials, score_trials

SIZES = (64, 128, 192, 256)
# Clips, speakers and trials of VoxCeleb1-E (cleaned), by its published list.
N_CLIPS, N_SPEAKERS, N_TRIALS = 145_160, 1251, 579_818


def make_list(path, rng):
    """Half target trials, half impostor trials, among random utterances."""
    speaker = np.sort(rng.integers(0, N_SPEAKERS, N_CLIPS))
    first = np.searchsorted(speaker, np.arange(N_SPEAKERS + 1))
    enrol = rng.integers(0, N_CLIPS, N_TRIALS)
    low, high = first[speaker[enrol]], first[speaker[enrol] + 1]
    same = rng.random(N_TRIALS) < 0.5
    test = np.where(same, rng.integers(low, high), rng.integers(0, N_CLIPS, N_TRIALS))
    names = [f"id{one:05d}/s/{number:06d}.wav" for number, one in enumerate(speaker)]
    with open(path, "w") as file:
        for a, b in zip(enrol, test):
            file.write(f"{int(speaker[a] == speaker[b])} {names[a]} {names[b]}\n")


def make_embeddings(clip_ids, rng):
    """Unequal variances, and speakers as far apart as their utterances."""
    spread = torch.linspace(1.5, 0.5, SIZES[-1])
    centres = torch.from_numpy(rng.normal(size=(N_SPEAKERS, SIZES[-1]))).float()
    speaker = torch.tensor([int(clip_id[2:7]) for clip_id in clip_ids])
    noise = torch.from_numpy(rng.normal(size=(len(clip_ids), SIZES[-1])).astype(np.float32))
    return spread * (centres[speaker] + 2.5 * noise)


def score_size_by_size(embeddings, trials):
    """Normalise each prefix, multiply each pair."""
    scores = {}
    for size in SIZES:
        prefixes = F.normalize(embeddings[:, :size], dim=1)
        enrol, test = torch.from_numpy(trials.enrol), torch.from_numpy(trials.test)
        scores[size] = torch.cat(
            [
                (prefixes[a] * prefixes[b]).sum(1)
                for a, b in zip(enrol.split(1024), test.split(1024))
            ]
        )
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/scoring.json"))
    output = parser.parse_args().output
    rng = np.random.default_rng(0)
    results = {"threads": torch.get_num_threads(), "trials": N_TRIALS, "sizes": SIZES, "steps": []}

    def timed(name, function, *arguments):
        started = time.perf_counter()
        value = function(*arguments)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB so far
        results["steps"].append({"step": name, "seconds": seconds, "peak_gb": peak})
        print(f"{name:52}{seconds:9.2f} s{peak:8.2f} GB", flush=True)
        return value

    print(
        f"{N_TRIALS} trials, {N_CLIPS} utterances, sizes {SIZES}, {torch.get_num_threads()} threads"
    )
    print(f"{'':52}{'time':>11}{'peak so far':>14}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trials.txt")
        make_list(path, rng)
        trials = timed("read the list", read_trials, path)
    embeddings = make_embeddings(trials.clip_ids, rng)
    scores = timed("score all sizes in one pass", score_trials, embeddings, trials, SIZES)
    timed("EER, minDCF, thresholds", evaluate_scores, scores, trials)
    cohort = torch.from_numpy(rng.normal(size=(1000, SIZES[-1]))).float()
    timed("adaptive s-norm, 300 of 1000", s_norm, scores, embeddings, trials, cohort, 300)
    timed("their 95 % intervals, 100 draws", evaluate_scores, scores, trials, 100)
    timed("for comparison: score size by size", score_size_by_size, embeddings, trials)
    few, labels = torch.from_numpy(scores[256][:5000]), torch.from_numpy(trials.labels[:5000])
    timed("EER of 5000 trials", eer, few, labels)
    timed("for comparison: SpeechBrain's EER of 5000 trials", EER, few[labels], few[~labels])

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
