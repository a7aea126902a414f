"""How often a registry names the right speaker, and how often somebody who is not enrolled.

python benchmarks/identification.py --model results/mrl_distill/1986/model \\
    --data_folder results/mrl_distill/1986/voices --trials results/mrl_distill/1986/lists/test_trials.txt

The speakers of the trial list are halved at random. Thresholds come from all pairs of recordings of
the one half. Of the other half as many speakers as possible are enrolled with ``--enrolled``
recordings, and as many are not; the rest of the recordings is identified. Prints for each size the
rates in percent: means over ``--draws`` such halves, with the range of 95 % of them.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_mrl import VoiceRegistry, read_trials
from speechbrain_mrl.dataio.clips import find_recordings, speaker_of
from speechbrain_mrl.evaluation.metrics import Ranking

OUTCOMES = ("right", "nobody", "another speaker", "impostors named")


def fitted_thresholds(registry, recordings):
    """As a report has them, from all pairs of these speakers' recordings."""
    found = [(s, registry._embed(path)[1]) for s, paths in recordings.items() for path in paths]
    pairs = list(itertools.combinations([one for one in found if one[1] is not None], 2))
    ranking = Ranking(
        [float(x @ y) for (_, x), (_, y) in pairs], [a == b for (a, _), (b, _) in pairs]
    )
    return {"eer": ranking.eer()[1], **ranking.far_thresholds()}


def identify_all(registry, recordings, n_enrolled, rng):
    """Rates of the outcomes, with half of these speakers enrolled."""
    names = rng.permutation(sorted(recordings)).tolist()
    known, impostors = names[: len(names) // 2], names[len(names) // 2 :]
    for name in [*registry.speakers]:
        registry.remove(name)
    for name in known:
        registry.enroll(name, recordings[name][:n_enrolled])
    tests = [(name, path) for name in known for path in recordings[name][n_enrolled:]]
    found = [(name, registry.identify(path).name) for name, path in tests]
    named = [bool(registry.identify(path)) for name in impostors for path in recordings[name]]
    right, nobody = ([own == name for own, name in found], [name is None for _, name in found])
    another = [name not in (own, None) for own, name in found]
    return [np.mean(one) for one in (right, nobody, another, named)]


def main(arguments=None):
    """The table, and what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="exported folder, or id on the Hub")
    parser.add_argument("--data_folder", type=Path, required=True, help="holds wav/<speaker>/")
    parser.add_argument("--trials", required=True, help="its speakers, whom training has not seen")
    parser.add_argument("--enrolled", type=int, default=3, help="recordings of each; default 3")
    parser.add_argument("--draws", type=int, default=20, help="default 20")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="default 64 256")
    parser.add_argument("--output", type=Path, help="write the rates as JSON")
    given = parser.parse_args(arguments)

    speakers = sorted({speaker_of(clip) for clip in read_trials(given.trials).clip_ids})
    recordings = {name: find_recordings(given.data_folder / "wav" / name) for name in speakers}
    print(f"| dimensions | {' | '.join(f'{name}, %' for name in OUTCOMES)} |")
    print("| --: |" + " --: |" * len(OUTCOMES))
    results = {}
    for size in given.sizes:
        registry, rates = VoiceRegistry(given.model, target_dim=size, threshold=0.0), []
        registry.threshold, registry._embed = None, functools.cache(registry._embed)
        for seed in tqdm(range(given.draws), unit="draw", disable=None):
            rng = np.random.default_rng(seed)
            halves = np.array_split(rng.permutation(speakers), 2)
            fit, test = ({name: recordings[name] for name in half.tolist()} for half in halves)
            registry.thresholds = fitted_thresholds(registry, fit)
            rates.append(identify_all(registry, test, given.enrolled, rng))
        found = 100 * np.array(rates)
        low, high = np.percentile(found, (2.5, 97.5), axis=0)
        cells = [f"{m:.1f} ({a:.1f} to {b:.1f})" for m, a, b in zip(found.mean(0), low, high)]
        print(f"| {size} | {' | '.join(cells)} |")
        results[size] = dict(zip(OUTCOMES, found.mean(axis=0).round(2).tolist()))
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
