"""Which way to a Matryoshka model is best: all on one corpus, with one budget of student steps.

python benchmarks/ways.py --data_folder=/data/VoxCeleb --trials=/data/veri_test2.txt --steps=50000

Any key of hparams/mrl_distill.yaml may follow (--backbone=b2 --batch_size=128). Without data_folder
it runs on the demo's voices and teachers. A killed run resumes; one that ended is kept.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "voxceleb"
sys.path.insert(0, str(RECIPE))

import train  # noqa: E402
from corpus import prepare  # noqa: E402
from read_hparams import is_demo, read_yaml  # noqa: E402

from speechbrain_mrl.dataio.clips import read_clips, speaker_labels  # noqa: E402
from speechbrain_mrl.evaluation.baselines import truncation_scores  # noqa: E402
from speechbrain_mrl.evaluation.metrics import Ranking  # noqa: E402
from speechbrain_mrl.evaluation.verification import (  # noqa: E402
    BOOTSTRAP_SEED,
    bootstrap,
    evaluate,
    evaluate_scores,
    interval,
    read_trials,
    score_trials,
)
from speechbrain_mrl.inference.encoders import load_teachers  # noqa: E402
from speechbrain_mrl.inference.extract import embed_clips  # noqa: E402
from speechbrain_mrl.inference.store import TeacherStore  # noqa: E402

HPARAMS = RECIPE.parents[1] / "hparams"
N_STAGES = 3  # of progressive expansion, as far as there are sizes


def terms(**weights):
    """Overrides that leave only these terms, which read no labels, in the objective."""
    others = {"cosine": 0, "contrastive": 0, "aam": 0}
    return {"labels": False, "objective": {"terms": others | weights}}


WAYS = {  # YAML and what it changes
    "distill": ("mrl_distill", {}),
    "amalgamate": ("mrl_amalgamate", {}),
    "progressive": ("mrl_progressive", {}),
    "supervised": ("mrl_supervised", {"stages": None, "margin_epochs": 0}),
    "separate": ("mrl_distill", {}),  # one model for each size, each with the whole budget
    "best_teacher": ("mrl_distill", {}),  # the one with the lowest EER, alone
    # Terms of mrl_distill
    "cosine+contrastive": ("mrl_distill", terms(cosine=1.0, contrastive=0.1)),
    "cosine": ("mrl_distill", terms(cosine=1.0)),
    "cosine+gram": ("mrl_distill", terms(cosine=1.0, gram=1.0)),
    "gram": ("mrl_distill", terms(gram=1.0)),
    "contrastive": ("mrl_distill", terms(contrastive=1.0)),
    "mse": ("mrl_distill", terms(mse=1.0)),
    "map": ("mrl_distill", {}),  # small sizes follow the first teachers, large ones the last
    # Supervised, and the second half of the steps is large-margin fine-tuning
    "large_margin": ("mrl_supervised", {"margin_epochs": 0}),
}
DEFAULT_WAYS = ["distill", "amalgamate", "progressive", "supervised", "separate"]


def common_options(given, folder):
    """What every run is called with, the corpus, and the teachers: the demo's if no data is given."""
    overrides = "".join(f"{key}: {value}\n" for key, value in given.items())
    document = read_yaml(HPARAMS / "mrl_distill.yaml", overrides)
    document["output_folder"] = str(folder)
    hparams = train.load_stage(document)
    corpus = prepare(hparams, debug=False)
    if is_demo(hparams):
        demo = YAML().load(RECIPE / "demo.yaml").keys() & document.keys() - {"data_folder"}
        given = {**{key: dump(document[key]) for key in demo}, **given}
        given["data_folder"] = hparams["data_folder"]
    if given.get("trials") is None:  # the same for all runs
        given["trials"] = str(folder / "trials.txt")
        Path(given["trials"]).write_text(Path(corpus.test_trials).read_text())
        hparams |= {"data_folder": given["data_folder"], "trials": given["trials"]}
        corpus = prepare(hparams, debug=False)
    given["teacher_store"] = str(folder / "teachers")
    given["split_seed"] = hparams["split_seed"]
    return given, corpus, hparams


def options_of(way, corpus, steps, hparams):
    """The changes of a way's runs: one mapping, or for ``separate`` one for each size."""
    changes = WAYS[way][1] | {"optimizer_step_limit": steps}
    mrl_dims = list(hparams["mrl_dims"])
    if way == "separate":
        return [changes | {"embed_dim": dim, "mrl_dims": [dim]} for dim in mrl_dims]
    if way == "amalgamate":
        changes |= {"data_folder": corpus.train_csv, "test_folder": corpus.test_csv}
        changes |= {"teacher_store": f"{corpus.train_csv}.teachers"}
    if way == "map":
        names = [Path(str(teacher)).stem for teacher in hparams["teachers"]]
        share = len(names) / len(mrl_dims)
        pairs = [f"{dim}: {names[int(i * share)]}" for i, dim in enumerate(mrl_dims)]
        changes |= {"objective": f"{{teacher_map: {{{', '.join(pairs)}}}}}"}
    if way == "best_teacher":
        changes |= {"taught_by": [hparams["best_teacher"]]}
    if way == "large_margin":
        changes |= {"optimizer_step_limit": steps // 2}  # of each stage
        changes |= {"large_margin_epochs": steps}  # the limit comes first
        changes |= {"large_margin_seconds": 2 * hparams["chunk_seconds"]}
        changes |= {"large_margin_lr": hparams["lr"] / 10}
    if way == "progressive":
        stages = progressive_stages(mrl_dims, len(hparams["teachers"]))
        changes |= {"stages": stages, "optimizer_step_limit": steps // len(stages)}
    return [changes]


def progressive_stages(mrl_dims, n_teachers):
    """At most three stages, that end at about a third and two thirds of the sizes.

    >>> progressive_stages([64, 128, 256], n_teachers=2)[1]
    {'stage': 'to_128', 'embed_dim': 128, 'mrl_dims': [64, 128], 'taught_by': [0]}
    >>> progressive_stages([64, 128, 256], n_teachers=2)[2]  # all sizes, those of the YAML
    {'stage': 'to_256', 'taught_by': [1]}
    """
    n_stages = min(N_STAGES, len(mrl_dims))
    stages = []
    for number in range(1, n_stages + 1):
        dims = mrl_dims[: math.ceil(number * len(mrl_dims) / n_stages)]
        teacher = round((number - 1) * (n_teachers - 1) / max(1, n_stages - 1))
        sizes = {"embed_dim": dims[-1], "mrl_dims": dims} if number < n_stages else {}
        stages.append({"stage": f"to_{dims[-1]}", **sizes, "taught_by": [teacher]})
    return stages


def scores_of(way, seed, common, corpus, steps, hparams, device, trials, folder):
    """{size: scores} of a way's student, trained if its scores are not there, and its seconds."""
    path = folder / way / str(seed) / "scores.npz"
    if not path.exists():
        started, scores = time.time(), {}
        for number, changes in enumerate(options_of(way, corpus, steps, hparams)):
            options = {**common, **changes, "seed": seed, "device": device}
            options["output_folder"] = str(path.parent / str(number))
            n_batches = len(read_clips(corpus.train_csv)) * hparams["chunks_per_clip"]
            n_batches = max(1, round(0.9 * n_batches) // hparams["batch_size"])
            options["number_of_epochs"] = math.ceil(changes["optimizer_step_limit"] / n_batches)
            yaml = HPARAMS / f"{WAYS[way][0]}.yaml"
            known = {"device", "optimizer_step_limit", *YAML().load(yaml)}
            arguments = [f"--{k}={dump(value)}" for k, value in options.items() if k in known]
            student = train.main([str(yaml), *arguments])
            found = embed(student, corpus, trials, hparams, device)
            scores |= score_trials(found, trials, student.mrl_dims)
        seconds = time.time() - started
        np.savez(path, seconds=seconds, **{str(dim): values for dim, values in scores.items()})
    with np.load(path) as stored:
        scores = {int(dim): stored[dim] for dim in stored.files if dim != "seconds"}
        return scores, float(stored["seconds"])


def embed(model, corpus, trials, hparams, device):
    """Embeddings of the trials' utterances, in the order of the trials."""
    clips = read_clips(corpus.test_csv)
    found = embed_clips({"model": model}, clips, device, max_seconds=None)["model"]
    return trials.stack(dict(zip((clip.id for clip in clips), found)))


def baselines(teachers, corpus, trials, hparams, device, n_bootstrap, folder):
    """Each teacher whole, and truncated as it is, after PCA and after LDA."""
    stores = {}
    for split in ("train", "test"):
        stores[split] = TeacherStore(folder / "teachers" / split)
        stores[split].fill(
            teachers,
            read_clips(getattr(corpus, f"{split}_csv")),
            device,
            hparams["batch_seconds"],
            hparams["max_seconds"] if split == "train" else None,  # test utterances are whole
            hparams["num_workers"],
        )
    test_embeddings = stores["test"].lookup(trials.clip_ids)
    labels = speaker_labels(stores["train"].rows)
    results = {}
    for name, fit in stores["train"].embeddings.items():
        test = test_embeddings[name]
        sizes = [dim for dim in hparams["mrl_dims"] if dim <= fit.shape[1]]
        whole = evaluate(test, trials, [test.shape[1]], n_bootstrap)
        truncated = truncation_scores(test, fit, trials, sizes, labels).values()
        truncated = [evaluate_scores(scores, trials, n_bootstrap) for scores in truncated]
        ways = ("truncated", "PCA truncated", "LDA truncated")
        results[name] = {"whole": whole, **dict(zip(ways, truncated, strict=True))}
    return results


def evaluate_runs(runs, trials, n_bootstrap):
    """Mean error rates and costs of several trainings of one kind, with their intervals.

    Each draw of speakers is also a draw of trainings, so that the intervals tell of both.

    >>> from speechbrain_mrl.evaluation.verification import Trials
    >>> trials = Trials.parse(["1 a/1 a/2", "0 a/1 b/1", "1 b/1 b/2"])
    >>> runs = [{2: np.array([0.9, 0.1, 0.8])}, {2: np.array([0.1, 0.9, 0.1])}]
    >>> result = evaluate_runs(runs, trials, n_bootstrap=200)["2"]
    >>> result["eer"], result["eer_ci"], result["eer_runs"]
    (0.5, [0.0, 1.0], [0.0, 1.0])
    """
    rankings = [
        {str(size): Ranking(values, trials.labels) for size, values in run.items()} for run in runs
    ]
    rng = np.random.default_rng(BOOTSTRAP_SEED)

    def means(weights=None):
        drawn, found = rankings, {}
        if weights is not None:
            drawn = [rankings[i] for i in rng.integers(len(rankings), size=len(rankings))]
        for run in drawn:
            for size, ranking in run.items():
                for name, value in ranking.summary(weights).items():
                    found.setdefault((size, name), []).append(value)
        return {key: float(np.mean(values)) for key, values in found.items()}

    results = {size: {"eer_runs": [run[size].eer()[0] for run in rankings]} for size in rankings[0]}
    for (size, name), value in means().items():
        results[size][name] = value
    for (size, name), values in bootstrap(trials, n_bootstrap, means).items():
        results[size][f"{name}_ci"] = interval(values)
    return results


def table(rows, sizes, metric, scale):
    """Markdown: one row for each name, mean and interval at each size."""
    lines = ["| | " + " | ".join(sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for name, results in rows.items():
        cells = []
        for size in sizes:
            if size not in results:
                cells.append("")
                continue
            low, high = (scale * bound for bound in results[size][f"{metric}_ci"])
            cells.append(f"{scale * results[size][metric]:.3g} ({low:.3g}–{high:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_tables(results, path):
    """The JSON's figures as Markdown."""
    rows = dict(results["ways"])
    for teacher, baselines in results["baselines"].items():
        rows |= {f"{teacher}, {how}": found for how, found in baselines.items()}
    sizes = sorted({size for found in rows.values() for size in found}, key=int)
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    hours = ", ".join(f"{way} {found / 3600:.2f}" for way, found in results["seconds"].items())
    path.write_text(
        f"{settings}. Mean over seeds; 95 % intervals by bootstrap over speakers and seeds.\n"
        f"Hours of one training, its test included: {hours}.\n\n"
        f"EER in percent\n\n{table(rows, sizes, 'eer', 100)}\n"
        f"minDCF (p = 0.01)\n\n{table(rows, sizes, 'min_dcf', 1)}"
    )


def dump(value):
    """One line of YAML, as the command line of train.py takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def main(argv=None):
    """Run what is missing and write <output_folder>/ways.json and ways.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("results/ways"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=DEFAULT_WAYS)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each way")
    parser.add_argument("--steps", type=int, default=300, help="student steps of each training")
    parser.add_argument("--n_bootstrap", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args, others = parser.parse_known_args(argv)
    given = {}
    for argument in others:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not separator:
            parser.error(f"{argument}: a key of mrl_distill.yaml is given as --key=value")
        given[key] = value

    folder = args.output_folder.absolute()
    common, corpus, hparams = common_options(given, folder / "common")
    trials = read_trials(corpus.test_trials)
    n_stages = min(N_STAGES, len(hparams["mrl_dims"]))
    steps = math.ceil(args.steps / n_stages) * n_stages  # so that stages share them evenly
    results = {
        "settings": {
            "corpus": given.get("data_folder") or "demo",
            "steps": steps,
            "batch_size": hparams["batch_size"],
            "seeds": args.seeds,
        },
        "seconds": {},
        "ways": {},
        "baselines": {},
    }
    teachers = load_teachers(
        hparams["teachers"],
        hparams["teacher_train_type"],
        hparams["teacher_dataset"],
        args.device,
    )
    results["baselines"] = baselines(
        teachers, corpus, trials, hparams, args.device, args.n_bootstrap, folder / "common"
    )
    errors = [
        one["eer"] for found in results["baselines"].values() for one in found["whole"].values()
    ]
    hparams["best_teacher"] = errors.index(min(errors))
    for way in args.ways:
        runs = [
            scores_of(way, 1986 + i, common, corpus, steps, hparams, args.device, trials, folder)
            for i in range(args.seeds)
        ]
        scores = [scores for scores, _ in runs]
        results["ways"][way] = evaluate_runs(scores, trials, args.n_bootstrap)
        results["seconds"][way] = sum(seconds for _, seconds in runs) / args.seeds
        (folder / "ways.json").write_text(json.dumps(results, indent=2) + "\n")
        write_tables(results, folder / "ways.md")
    print((folder / "ways.md").read_text())
    return results


if __name__ == "__main__":
    main()
