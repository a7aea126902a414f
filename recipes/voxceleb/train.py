"""Train a Matryoshka student, verify it at every size, report and export it.

python recipes/voxceleb/train.py hparams/mrl_distill.yaml --data_folder=/data/VoxCeleb

Without ``--data_folder`` it runs a demo on synthetic voices with small teachers.
"""

import csv
import io
import sys
import time
from collections import defaultdict
from pathlib import Path

import speechbrain as sb
import torch
from demo_voices import make_demo_corpus
from hyperpyyaml import load_hyperpyyaml, resolve_references
from rirs import prepare_rirs
from ruamel.yaml import YAML
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.distributed import ddp_init_group, if_main_process, run_on_main
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl import (
    ReDimNetMRL,
    export_model,
    load_pretrained_redimnet,
    matryoshka_rotation,
    push_to_hub,
)
from speechbrain_mrl.card import Provenance
from speechbrain_mrl.embedding import embed_clips, read_clips
from speechbrain_mrl.plots import write_plots
from speechbrain_mrl.pretrained import RELEASES
from speechbrain_mrl.report import make_report, print_report, teacher_baselines, write_report
from speechbrain_mrl.rotation import aligning_rotation
from speechbrain_mrl.teachers import TeacherStore, load_teachers
from speechbrain_mrl.training import fit_objective, train_dataset, train_student, valid_dataset
from speechbrain_mrl.verification import evaluate, read_trials, score_trials

HEAD_CLIPS = 2000  # training clips that give the principal axes of a pretrained student
ENROLMENT_CLIPS = 5  # a training speaker's, for the exported classifier
RECIPE = Path(__file__).resolve().parent
DEMO = "demo: synthetic voices and small demo teachers, no figure here is a VoxCeleb figure"


def load_hparams(hparams_file, overrides):
    """The loaded YAML with its overrides, or the demo's where no data is given, and its text."""
    yaml = YAML()
    document = yaml.load(Path(hparams_file))
    if "base" in document:
        changes = document
        document = yaml.load(Path(hparams_file).with_name(changes.pop("base")))
        for key, value in changes.items():
            document[key] = value
    given = yaml.load(overrides) or {}
    if given.get("data_folder") is None:
        checkpoints = sorted(
            (RECIPE / "demo_teachers").glob("*.pt"), key=lambda p: p.stat().st_size
        )
        demo = {**yaml.load(RECIPE / "demo.yaml"), "backbone": str(checkpoints[-1])}
        if document["teachers"] is not None:
            demo["teachers"] = [str(path) for path in checkpoints]
        given = {**demo, **given}
    for key, value in list(given.items()):
        # HyperPyYAML merges mappings into mappings, but does not put one in the place of a list.
        if key in document and isinstance(value, dict) != isinstance(document[key], dict):
            document[key] = given.pop(key)
    text = resolve_references(
        _dumped(yaml, document), _dumped(yaml, given), overrides_must_match=True
    ).getvalue()
    return load_hyperpyyaml(text), text


def _dumped(yaml, document):
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()


def prepare(hparams, debug):
    """The corpus' lists; on the main process first."""
    arguments = {
        "data_folder": hparams["data_folder"],
        "save_folder": str(Path(hparams["output_folder"]) / "lists"),
        "trials": hparams["trials"],
        "train_speakers": hparams["train_speakers"],
        "valid_speakers": hparams["valid_speakers"],
        "test_speakers": hparams["test_speakers"],
        "seed": hparams["seed"],
        "skip_bad_files": hparams["skip_bad_files"],
    }
    if hparams["data_folder"] is None:
        arguments["data_folder"] = str(Path(hparams["output_folder"]) / "voices")
        run_on_main(make_demo_corpus, kwargs={"folder": arguments["data_folder"]})
    run_on_main(prepare_voxceleb, kwargs=arguments)
    run_on_main(prepare_rirs, kwargs={"csv_path": hparams["rir_csv"]})
    corpus = prepare_voxceleb(**arguments, skip_prep=True)
    return shrink(corpus, 2 * hparams["batch_size"]) if debug else corpus


def shrink(corpus, n_clips):
    """The first training clips and a few trials of a corpus, for ``--debug``."""
    paths = {}
    for split in ("valid", "test"):
        trials = Path(getattr(corpus, f"{split}_trials"))
        lines = trials.read_text().splitlines()
        few = [line for label in "10" for line in [x for x in lines if x[0] == label][:8]]
        paths[f"{split}_trials"] = str(trials.with_name(f"debug_{trials.name}"))
        Path(paths[f"{split}_trials"]).write_text("\n".join(few) + "\n")
        ids = {clip for line in few for clip in line.split()[1:]}
        paths[f"{split}_csv"] = _copy_rows(
            getattr(corpus, f"{split}_csv"), lambda row, ids=ids: row["ID"] in ids
        )
    paths["train_csv"] = _copy_rows(corpus.train_csv, lambda row: True, n_clips)
    return corpus._replace(**paths)


def _copy_rows(path, wanted, limit=None):
    path = Path(path)
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if wanted(row)][:limit]
    copy = path.with_name(f"debug_{path.name}")
    with open(copy, "w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    return str(copy)


def make_student(hparams, corpus, objective, stores, **embed_options):
    """The student before its first step: random, or pretrained and rotated.

    The rotation changes no cosine of the checkpoint's coordinates. It puts the teachers' principal
    axes first, or without teachers the checkpoint's own.
    """
    sizes = {"embed_dim": hparams["embed_dim"], "mrl_dims": hparams["mrl_dims"]}
    backbone = hparams["backbone"]
    if not hparams["pretrained"]:
        return ReDimNetMRL(backbone=backbone, **sizes)
    file = backbone if Path(backbone).is_file() else None
    redimnet = load_pretrained_redimnet(
        backbone, hparams["student_train_type"], hparams["student_dataset"], source=file
    )
    student = ReDimNetMRL.from_redimnet(redimnet, **sizes)
    if hparams["checkpointer"].find_checkpoint() is None:
        clips = read_clips(corpus.train_csv)[:HEAD_CLIPS]
        found = embed_clips({"backbone": redimnet}, clips, **embed_options)["backbone"]
        k = redimnet.embed_dim
        if stores:
            store = stores[sb.Stage.TRAIN]
            fit_objective(objective, store)
            targets = objective.targets(store.lookup([clip.id for clip in clips]))
            student.rotate_head(aligning_rotation(found, targets[hparams["embed_dim"]][:, :k]))
        else:
            student.rotate_head(matryoshka_rotation(found, [k]).matrix)
    return student


def report_on(student, teachers, fit_embeddings, corpus, hparams, started, **embed_options):
    """Verify student, teachers and cuts on the test trials; write and print the report."""
    trials = read_trials(corpus.test_trials)
    clips = read_clips(corpus.test_csv)
    trials.check_clips({clip.id for clip in clips})
    found = embed_clips({"student": student, **teachers}, clips, **embed_options)
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
    for clip in read_clips(corpus.train_csv):
        clips[clip.id.split("/")[0]].append(clip)
    chosen = [clip for found in clips.values() for clip in found[:ENROLMENT_CLIPS]]
    embeddings = embed_clips({"student": student}, chosen, **embed_options)["student"]
    speakers = defaultdict(list)
    for clip, embedding in zip(chosen, embeddings, strict=True):
        speakers[clip.id.split("/")[0]].append(embedding)
    return {speaker: torch.stack(found) for speaker, found in speakers.items()}


def export(student, speakers, teachers, report, corpus, hparams):
    """Write the model folder, and publish it if the YAML says where."""
    released = RELEASES[hparams["teacher_dataset"]]
    licenses = {
        name: released["license"] if name in released["model_names"] else "not stated"
        for name in teachers
    }
    first_clips = {}
    for clip in read_clips(corpus.train_csv):
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
        plot=folder / "eer_by_dim.png",
        speakers=speakers,
        examples=dict(list(first_clips.items())[: hparams["card_examples"]]),
    )
    if hparams["push_to_hub"] is not None:
        push_to_hub(folder / "model", hparams["push_to_hub"])


def main(argv):
    """Everything from the command line to the report."""
    started = time.time()
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    hparams, text = load_hparams(hparams_file, overrides)
    demo = hparams["data_folder"] is None
    if demo and if_main_process():
        print(DEMO)
    ddp_init_group(run_opts)
    resolved = Path(hparams["output_folder"]) / "resolved.yaml"
    if if_main_process():
        resolved.parent.mkdir(parents=True, exist_ok=True)
        resolved.write_text(text)
    sb.create_experiment_directory(hparams["output_folder"], resolved)
    corpus = prepare(hparams, run_opts.get("debug", False))

    embed_options = {
        "device": run_opts.get("device") or "cpu",
        "batch_seconds": hparams["teacher_batch_seconds"],
        "max_seconds": hparams["max_seconds"],
        "num_workers": hparams["num_workers"],
    }
    teachers, stores = {}, {}
    if hparams["teachers"] is not None:
        kind = hparams["teacher_train_type"], hparams["teacher_dataset"]
        teachers = load_teachers(hparams["teachers"], *kind, embed_options["device"])
        for stage, path in ((sb.Stage.TRAIN, corpus.train_csv), (sb.Stage.VALID, corpus.valid_csv)):
            stores[stage] = TeacherStore(Path(hparams["teacher_store"]) / stage.name.lower())
            stores[stage].fill(teachers, read_clips(path), **embed_options)

    label_encoder, n_classes = None, None
    if hparams["labels"]:
        label_encoder = CategoricalEncoder()
        with open(corpus.train_csv, newline="") as file:
            label_encoder.update_from_iterable(row["spk_id"] for row in csv.DictReader(file))
        n_classes = len(label_encoder)
    objective = hparams["objective"](n_classes=n_classes)
    student = make_student(hparams, corpus, objective, stores, **embed_options)
    train_student(
        student,
        objective,
        train_dataset(
            corpus.train_csv, hparams["chunk_seconds"], hparams["chunks_per_clip"], label_encoder
        ),
        valid_dataset(corpus.valid_csv, hparams["max_seconds"]),
        hparams,
        run_opts,
        stores,
        read_trials(corpus.valid_trials),
    )
    if if_main_process():
        fit_embeddings = stores[sb.Stage.TRAIN].embeddings if teachers else {}
        report = report_on(
            student, teachers, fit_embeddings, corpus, hparams, started, **embed_options
        )
        speakers = enrol(student, corpus, **embed_options)
        export(student, speakers, teachers, report, corpus, hparams)
        print(
            f"Report, plots and model/: {hparams['output_folder']}\nNext: python "
            f"recipes/voxceleb/publish.py {hparams['output_folder']}/model ORG/NAME --dry_run"
        )
        if demo:
            print(DEMO)
    return student


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main(sys.argv[1:])
