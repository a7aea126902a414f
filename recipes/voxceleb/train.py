"""Train a Matryoshka student, verify it at every size, report and export it.

python recipes/voxceleb/train.py hparams/mrl_distill.yaml --data_folder=/data/VoxCeleb

Without ``--data_folder`` it runs a demo on synthetic voices with small teachers.
"""

import csv
import sys
import time
from functools import partial
from pathlib import Path

import speechbrain as sb
from check_yaml import changed, check_train, dumped, merge
from corpus import prepare
from hyperpyyaml import load_hyperpyyaml, resolve_references
from outcome import enrol, export, report_agreement, report_on
from ruamel.yaml import YAML
from rules import TRAIN
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.distributed import ddp_init_group, if_main_process

from speechbrain_mrl import ReDimNetMRL, matryoshka_rotation, push_to_hub
from speechbrain_mrl.dataio.clips import read_clips
from speechbrain_mrl.dataio.dataset import seed_draws, train_dataset, valid_dataset
from speechbrain_mrl.dataio.shards import shard_loader
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.inference.encoders import load_teachers
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.optimize import prepare_cpu
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.models.pretrained import load_checkpoint, load_released
from speechbrain_mrl.models.resize import resize_model
from speechbrain_mrl.training.checkpoints import starting_point
from speechbrain_mrl.training.distill import train_student
from speechbrain_mrl.training.logger import TrainingLog
from speechbrain_mrl.training.projection import (
    FIT_CLIPS,
    align_head,
    carry_over,
    finish_head,
    fit_objective,
    spread,
    start_new_coordinates,
)
from speechbrain_mrl.utils import choose_device, only_run, replacing

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
    if Path(backbone).is_file():
        redimnet = load_checkpoint(backbone)
    else:
        release = hparams["student_train_type"], hparams["student_dataset"]
        redimnet = load_released(backbone, *release)
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

    Returns its own, the teachers' embeddings of training, validation and test clips, and the
    student before the first step.
    """
    stores = {}
    if teachers:
        lists = dict(zip(sb.Stage, (corpus.train_csv, corpus.valid_csv, corpus.test_csv)))
        for split, path in lists.items():
            if path is None:
                continue
            # by the list's name: what --debug keeps of a few clips is apart from that of all
            stores[split] = TeacherStore(Path(hparams["teacher_store"]) / Path(path).stem)
            options = embed_options
            if split == sb.Stage.TEST:  # an EER is that of whole utterances
                options = {**embed_options, "max_seconds": None}
            stores[split].fill(teachers, read_clips(path), **options)
    label_encoder, n_classes = None, None
    if hparams["labels"]:
        label_encoder = CategoricalEncoder()
        with open(corpus.train_csv, newline="") as file:
            label_encoder.update_from_iterable(row["spk_id"] for row in csv.DictReader(file))
        n_classes = len(label_encoder)
    seed_draws(0)  # whatever a killed run had already done
    objective = hparams["objective"](n_classes=n_classes)
    make = make_student if previous is None else partial(go_on, *previous)
    student = make(hparams, corpus, objective, stores, **embed_options)
    start = starting_point(student, hparams["checkpointer"])
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
    return (student, objective), stores, start


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
        "device": choose_device(run_opts.get("device") or hparams.get("device")),
        "batch_seconds": hparams["teacher_batch_seconds"],
        "max_seconds": hparams["max_seconds"],
        "num_workers": hparams["num_workers"],
    }
    trained, starts, teachers = None, [], {}
    fit_embeddings, test_embeddings = {}, {}
    for stage in stages:
        if debug:  # its rows would stay in the table of the training after it
            stage["train_logger"] = TrainingLog(Path(stage["output_folder"]) / "debug_log.txt")
        taught = load_stage_teachers(stage, embed_options["device"])
        trained, stores, start = train_stage(
            trained, stage, corpus, run_opts, taught, **embed_options
        )
        starts.append(start)
        teachers |= taught
        if taught:
            found = stores[sb.Stage.TRAIN].embeddings
            fit_embeddings |= {n: x[:: -(-len(x) // FIT_CLIPS)] for n, x in found.items()}
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
                student,
                starts[0],
                test_embeddings,
                fit_embeddings,
                corpus,
                hparams,
                started,
                **embed_options,
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
