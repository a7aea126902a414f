"""Train a Matryoshka student, verify it at every size, report and export it.

python recipes/voxceleb/train.py hparams/mrl_distill.yaml --data_folder=/data/VoxCeleb

Without ``--data_folder`` it runs a demo on synthetic voices with small teachers.
"""

import csv
import json
import os
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from check_yaml import changed, check_train, dumped, merge
from corpus import prepare
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from rules import TRAIN
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.distributed import ddp_init_group, if_main_process

from speechbrain_mrl import (
    ReDimNetMRL,
    export_model,
    load_pretrained_redimnet,
    matryoshka_rotation,
    push_to_hub,
)
from speechbrain_mrl.dataio.clips import iter_clips, read_clips
from speechbrain_mrl.dataio.dataset import seed_draws, train_dataset, valid_dataset
from speechbrain_mrl.dataio.shards import shard_loader
from speechbrain_mrl.evaluation.plots import write_plots
from speechbrain_mrl.evaluation.report import (
    agreement,
    make_report,
    print_report,
    teacher_baselines,
    write_report,
)
from speechbrain_mrl.evaluation.verification import evaluate, read_trials, score_trials
from speechbrain_mrl.inference.encoders import load_teachers
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.optimize import prepare_cpu
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.models.pretrained import RELEASES
from speechbrain_mrl.models.resize import resize_model
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.training.distill import train_student
from speechbrain_mrl.training.logger import TrainingLog
from speechbrain_mrl.training.projection import (
    align_head,
    carry_over,
    finish_head,
    fit_objective,
    spread,
    start_new_coordinates,
)
from speechbrain_mrl.utils import only_run, replacing

ENROLMENT_CLIPS = 5  # a training speaker's, for the exported classifier
RECIPE = Path(__file__).resolve().parent
DEMO = "demo: synthetic voices and small demo teachers, no figure here is a VoxCeleb figure"


def read_yaml(hparams_file, overrides):
    """The YAML on its base, with the command line's overrides; the demo's where no data is given."""
    yaml = YAML()
    document = yaml.load(Path(hparams_file))
    own_demo = document.pop("demo", {})
    if "base" in document:
        changes = document
        document = yaml.load(Path(hparams_file).with_name(changes.pop("base")))
        merge(document, changes)
    given = yaml.load(overrides) or {}
    if given.get("data_folder") is None:
        checkpoints = sorted(
            (RECIPE / "demo_teachers").glob("*.pt"), key=lambda p: p.stat().st_size
        )
        demo = {**yaml.load(RECIPE / "demo.yaml"), "backbone": str(checkpoints[-1]), **own_demo}
        if document["teachers"] is not None:
            demo["teachers"] = [str(path) for path in checkpoints]
        given = {**demo, **given}
    return changed(document, given)


def resolve_stages(document):
    """The text of each stage: the YAML with that stage's changes, all references resolved.

    Without ``stages`` it is one, without a name.
    """
    stages, rule = document["stages"], TRAIN["stages"]
    if not rule.holds(stages):
        raise ValueError(f"stages must be {rule.text}, got {stages!r}")
    texts = {}
    for number, stage in enumerate(stages or [{"stage": ""}], start=1):
        stage = {"stage": str(number), **stage}
        if stage["stage"] in texts:
            raise ValueError(f"two stages are called {stage['stage']!r}; give each its own name")
        texts[stage["stage"]] = resolve(changed({**document, "stages": None}, stage))
    return list(texts.values())


def resolve(document):
    """The document's text, without references."""
    return resolve_references(dumped(document)).getvalue()


def make_student(hparams, corpus, objective, stores, **embed_options):
    """The student before its first step: random, or pretrained and rotated.

    The rotation changes no cosine of the checkpoint's coordinates. It puts the teachers' principal
    axes first, or without teachers the checkpoint's own.
    """
    embed_dim, mrl_dims = hparams["embed_dim"], hparams["mrl_dims"]
    backbone = hparams["backbone"]
    if not hparams["pretrained"]:
        return ReDimNetMRL(embed_dim, mrl_dims, backbone)
    file = backbone if Path(backbone).is_file() else None
    redimnet = load_pretrained_redimnet(
        backbone, hparams["student_train_type"], hparams["student_dataset"], source=file
    )
    k = redimnet.embed_dim
    cut = embed_dim < k
    student = ReDimNetMRL.from_redimnet(redimnet, *((k, [k]) if cut else (embed_dim, mrl_dims)))
    if hparams["checkpointer"].find_checkpoint() is None:
        clips = spread(read_clips(corpus.train_csv))
        student.to(embed_options.get("device", "cpu"))
        if stores:
            align_head(student, k, objective, stores[sb.Stage.TRAIN], clips, **embed_options)
        else:
            found = embed_clips({"backbone": student}, clips, **embed_options)["backbone"]
            student.rotate_head(matryoshka_rotation(found[:, :k], [k]).matrix)
    return resize_model(student, mrl_dims) if cut else student


def go_on(student, previous_objective, hparams, corpus, objective, stores, **embed_options):
    """The student of the stage before, in the sizes of this one; its new coordinates are fitted."""
    grown = resize_model(student, hparams["mrl_dims"])
    carry_over(objective, previous_objective)
    if stores and hparams["checkpointer"].find_checkpoint() is None:
        fit_objective(objective, stores[sb.Stage.TRAIN])
        clips = spread(read_clips(corpus.train_csv))
        start_new_coordinates(
            grown.to(embed_options["device"]),
            min(student.embed_dim, grown.embed_dim),
            objective,
            stores[sb.Stage.TRAIN].lookup([clip.id for clip in clips]),
            clips,
            **embed_options,
        )
    return grown


def load_stage_teachers(hparams, device):
    """The teachers of a stage, by name; none without ``teachers``."""
    named = hparams["teachers"]
    if named is None:
        return {}
    if hparams["taught_by"] is not None:
        pairs = list(named.items() if isinstance(named, dict) else enumerate(named))
        if not all(-len(pairs) <= position < len(pairs) for position in hparams["taught_by"]):
            raise ValueError(
                f"taught_by {hparams['taught_by']} must be positions in the {len(pairs)} teachers "
                f"{[str(name) for name in named]}, the first is 0"
            )
        chosen = [pairs[position] for position in hparams["taught_by"]]
        named = dict(chosen) if isinstance(named, dict) else [teacher for _, teacher in chosen]
    return load_teachers(named, hparams["teacher_train_type"], hparams["teacher_dataset"], device)


def train_stage(previous, hparams, corpus, run_opts, teachers, **embed_options):
    """Train one stage, from the (student, objective) of the stage before if there is one.

    Returns its own, and the teachers' embeddings of training, validation and test clips.
    """
    stores = {}
    if teachers:
        lists = dict(zip(sb.Stage, (corpus.train_csv, corpus.valid_csv, corpus.test_csv)))
        for split, path in lists.items():
            if path is None:
                continue
            # by the list's name: what --debug keeps of a few clips is apart from that of all
            stores[split] = TeacherStore(Path(hparams["teacher_store"]) / Path(path).stem)
            stores[split].fill(teachers, read_clips(path), **embed_options)
    label_encoder, n_classes = None, None
    if hparams["labels"]:
        label_encoder = CategoricalEncoder()
        with open(corpus.train_csv, newline="") as file:
            label_encoder.update_from_iterable(row["spk_id"] for row in csv.DictReader(file))
        n_classes = len(label_encoder)
    seed_draws(0)  # whatever a killed run had already done
    objective = hparams["objective"](n_classes=n_classes)
    start = make_student if previous is None else partial(go_on, *previous)
    student = start(hparams, corpus, objective, stores, **embed_options)
    train_set = train_dataset(
        corpus.train_csv, hparams["chunk_seconds"], hparams["chunks_per_clip"], label_encoder
    )
    if hparams["shards"] is not None and not run_opts.get("debug"):
        train_set = shard_loader(train_set, hparams["shards"], **hparams["train_loader"])
    train_student(
        student,
        objective,
        train_set,
        valid_dataset(corpus.valid_csv, hparams["max_seconds"]),
        hparams,
        run_opts,
        stores,
        None if corpus.valid_trials is None else read_trials(corpus.valid_trials),
    )
    return (student, objective), stores


def report_agreement(student, teachers, corpus, hparams, **embed_options):
    """Write and print how well the student agrees with its teachers on the validation clips."""
    clips = read_clips(corpus.valid_csv)
    found = embed_clips({"student": student, **teachers}, clips, **embed_options)
    result = agreement(found.pop("student"), found, hparams["mrl_dims"])
    path = Path(hparams["output_folder"]) / "agreement.json"
    text = json.dumps({"clips": len(clips), "dims": result}, indent=2, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n")
    print(
        f"agreement with the teachers on {len(clips)} clips without labels (correlation of cosines)"
    )
    for dim, value in result.items():
        print(f"{dim:>6}{value:9.3f}")


def report_on(student, teachers, fit_embeddings, corpus, hparams, started, **embed_options):
    """Verify student, teachers and cuts on the test trials; write and print the report.

    ``teachers`` and ``fit_embeddings`` are the teachers' embeddings of test and training clips.
    """
    trials = read_trials(corpus.test_trials)
    clips = read_clips(corpus.test_csv)
    trials.check_clips({clip.id for clip in clips})
    found = embed_clips({"student": student}, clips, **embed_options) | teachers
    found = {
        name: trials.stack(dict(zip((clip.id for clip in clips), embeddings, strict=True)))
        for name, embeddings in found.items()
    }
    mrl_dims = hparams["mrl_dims"]
    student_embeddings = found.pop("student")
    report = make_report(
        evaluate(student_embeddings, trials, mrl_dims, n_bootstrap=200),
        trials,
        teacher_baselines(found, fit_embeddings, trials, mrl_dims) if teachers else {},
        corpus=hparams["data_folder"] or "demo",
        params=sum(p.numel() for p in student.parameters()),
        seconds=round(time.time() - started, 1),
    )
    folder = Path(hparams["output_folder"])
    write_report(report, folder)
    write_plots(report, score_trials(student_embeddings, trials, mrl_dims), trials.labels, folder)
    print_report(report)
    return report


def enrol(student, corpus, **embed_options):
    """Embeddings of a few clips of each training speaker, for the exported classifier."""
    clips = defaultdict(list)
    for clip in iter_clips(corpus.train_csv):
        found = clips[clip.id.split("/")[0]]
        if len(found) < ENROLMENT_CLIPS:
            found.append(clip)
    chosen = [clip for found in clips.values() for clip in found]
    embeddings = embed_clips({"student": student}, chosen, **embed_options)["student"]
    speakers = defaultdict(list)
    for clip, embedding in zip(chosen, embeddings, strict=True):
        speakers[clip.id.split("/")[0]].append(embedding)
    return {speaker: torch.stack(found) for speaker, found in speakers.items()}


def export(student, speakers, teachers, report, corpus, hparams):
    """Write the model folder."""
    released = RELEASES[hparams["teacher_dataset"]]
    licenses = {
        name: released["license"] if name in released["model_names"] else "not stated"
        for name in teachers
    }
    first_clips = {}
    for clip in iter_clips(corpus.train_csv) if speakers else ():
        first_clips.setdefault(clip.id.split("/")[0], clip.wav)
    folder = Path(hparams["output_folder"])
    export_model(
        student,
        folder / "model",
        Provenance(
            hparams["model_title"],
            hparams["license"],
            hparams["training_data"],
            teachers=licenses,
            trials=str(hparams["trials"] or "made from held-out speakers of the same corpus"),
        ),
        report=report,
        plot=None if report is None else folder / "eer_by_dim.png",
        speakers=speakers,
        examples=dict(list(first_clips.items())[: hparams["card_examples"]]),
    )


def default_device():
    """Where SpeechBrain puts the student if no ``--device`` is given; teachers go there too."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def main(argv):
    """Everything from the command line to the report."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    document = read_yaml(hparams_file, overrides)
    texts = resolve_stages(document)
    for text in texts:
        check_train(text)
    stages = [load_hyperpyyaml(text) for text in texts]
    ddp_init_group(run_opts)
    with only_run(stages[-1]["output_folder"]):
        return run(document, stages, run_opts)


def run(document, stages, run_opts):
    """All stages, the report and the model folder."""
    started = time.time()
    hparams = stages[-1]
    demo = hparams["data_folder"] is None
    if demo and if_main_process():
        print(DEMO)
    resolved = Path(hparams["output_folder"]) / "resolved.yaml"
    if if_main_process():
        with replacing(resolved) as part:
            part.write_text(resolve(document))
    sb.create_experiment_directory(hparams["output_folder"], resolved)
    debug = run_opts.get("debug", False)
    corpus = prepare(hparams, debug)

    embed_options = {
        "device": run_opts.get("device") or default_device(),
        "batch_seconds": hparams["teacher_batch_seconds"],
        "max_seconds": hparams["max_seconds"],
        "num_workers": hparams["num_workers"],
    }
    trained, teachers = None, {}
    fit_embeddings, test_embeddings = {}, {}
    for stage in stages:
        if debug:  # its rows would stay in the table of the training after it
            stage["train_logger"] = TrainingLog(Path(stage["output_folder"]) / "debug_log.txt")
        taught = load_stage_teachers(stage, embed_options["device"])
        trained, stores = train_stage(trained, stage, corpus, run_opts, taught, **embed_options)
        teachers |= taught
        if taught:
            fit_embeddings |= stores[sb.Stage.TRAIN].embeddings
        if taught and corpus.test_csv is not None:
            clip_ids = [clip.id for clip in read_clips(corpus.test_csv)]
            test_embeddings |= stores[sb.Stage.TEST].lookup(clip_ids)
    student, _ = trained
    if if_main_process():
        report, speakers = None, {}
        held_out, trials = (), None
        if corpus.valid_trials is not None:
            held_out, trials = read_clips(corpus.valid_csv), read_trials(corpus.valid_trials)
        fitted_on = spread(read_clips(corpus.train_csv))
        finish_head(student, fitted_on, held_out, trials, **embed_options)
        if corpus.test_trials is not None:
            report = report_on(
                student, test_embeddings, fit_embeddings, corpus, hparams, started, **embed_options
            )
        if hparams["speaker_folders"]:
            speakers = enrol(student, corpus, **embed_options)
        else:
            report_agreement(student, teachers, corpus, hparams, **embed_options)
        export(student, speakers, teachers, report, corpus, hparams)
        if hparams["push_to_hub"] is not None and not debug:
            push_to_hub(Path(hparams["output_folder"]) / "model", hparams["push_to_hub"])
        print(f"Report, plots and model/: {hparams['output_folder']}")
        if report is not None:
            model = f"{hparams['output_folder']}/model"
            print(f"Next: python -m speechbrain_mrl publish {model} ORG/NAME --dry_run")
        if demo:
            print(DEMO)
    return student


if __name__ == "__main__":
    prepare_cpu()
    main(sys.argv[1:])
