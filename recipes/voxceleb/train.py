"""Train a Matryoshka student, verify it at every size, report and export it.

python recipes/voxceleb/train.py hparams/mrl_distill.yaml --data_folder=/data/VoxCeleb

Without ``--data_folder`` it runs a demo on synthetic voices with small teachers.
"""

import json
import time
from functools import partial
from pathlib import Path

import speechbrain as sb
from check_hparams import check_training
from command import LOG_CONFIG, limit_workers, run_command
from corpus import prepare
from hyperpyyaml import load_hyperpyyaml
from read_hparams import (
    dumped,
    help_text,
    is_demo,
    parse,
    read_yaml,
    resolved,
    run_options,
    split_stages,
)
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.distributed import ddp_init_group, if_main_process
from training_results import enrol, export, report_agreement, report_on

from speechbrain_mrl import MatryoshkaEncoder, matryoshka_rotation, push_to_hub
from speechbrain_mrl.dataio.clips import read_clips, speaker_labels
from speechbrain_mrl.dataio.dataset import seed_draws, train_dataset, valid_dataset
from speechbrain_mrl.dataio.lists import read_rows
from speechbrain_mrl.dataio.shards import shard_loader
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.inference.encoders import choose_teachers, load_teachers
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.models.architecture import architecture_of
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
    spread_speakers,
    start_from,
    start_new_dimensions,
)
from speechbrain_mrl.training.teachers import SegmentTeachers
from speechbrain_mrl.utils import (
    check_device,
    choose_device,
    only_run,
    replacing,
    require,
    writing,
)

DEMO = "demo: synthetic voices and small demo teachers, no figure here is a VoxCeleb figure"


def load_stage(document):
    """The objects of a stage; of a pretrained one ``backbone`` is the network it starts from.

    The student has that network's architecture, whatever is usual for its name.
    """
    tree = parse(document)
    if tree.get("pretrained_encoder") is not None:
        network = MatryoshkaEncoder.from_hparams(tree["pretrained_encoder"])
        hparams = load_hyperpyyaml(resolved({**document, "student": None}))
        student = resize_model(network, hparams["mrl_dims"])
        return hparams | {"student": student, "backbone": network, "pretrained": True}
    if not tree.get("pretrained"):
        hparams = load_hyperpyyaml(resolved(document))
        if isinstance(hparams["student"], MatryoshkaEncoder):
            hparams["student"].architecture = architecture_of(dumped(document), "student")
        return hparams
    if Path(tree["backbone"]).is_file():
        network = load_checkpoint(tree["backbone"])
    else:
        release = tree["student_train_type"], tree["student_dataset"]
        network = load_released(tree["backbone"], *release)
    architecture = json.loads(json.dumps(network.model_config))  # lists where it has tuples
    hparams = load_hyperpyyaml(resolved({**document, "backbone": architecture}))
    return hparams | {"backbone": network}


def start_student(hparams, corpus, objective, stores, **embed_options):
    """The YAML's student before its first step: random, or pretrained and rotated.

    The rotation changes no cosine of the checkpoint's dimensions. It puts the teachers' principal
    components first, or without teachers the checkpoint's own.
    """
    student = hparams["student"]
    if hparams["checkpointer"].find_checkpoint() is not None:  # which has the weights
        return student
    if "pretrainer" in hparams:
        hparams["pretrainer"].collect_files()
        hparams["pretrainer"].load_collected()
    if not hparams.get("pretrained"):
        return student
    k, clips = hparams["backbone"].embed_dim, spread(read_clips(corpus.train_csv))

    def rotate(whole):
        whole.to(embed_options["device"])
        if stores:
            align_head(whole, k, objective, stores[sb.Stage.TRAIN], clips, **embed_options)
        else:
            found = embed_clips({"student": whole}, clips, **embed_options)["student"]
            whole.rotate_head(matryoshka_rotation(found[:, :k], [k]).matrix)

    started = start_from(hparams["backbone"], hparams["embed_dim"], hparams["mrl_dims"], rotate)
    student.load_state_dict(started.state_dict())
    return student


def go_on(previous, previous_objective, hparams, corpus, objective, stores, **embed_options):
    """The YAML's student as the stage before left its own; new dimensions are fitted."""
    student = hparams["student"]
    carry_over(objective, previous_objective)
    if hparams["checkpointer"].find_checkpoint() is not None:
        return student
    grown = resize_model(previous, hparams["mrl_dims"])
    if stores:
        clips = spread(read_clips(corpus.train_csv))
        start_new_dimensions(
            grown.to(embed_options["device"]),
            min(previous.embed_dim, grown.embed_dim),
            objective,
            stores[sb.Stage.TRAIN].lookup([clip.id for clip in clips]),
            clips,
            **embed_options,
        )
    student.load_state_dict(grown.state_dict())
    return student


def fill_stores(hparams, corpus, teachers, **embed_options):
    """The teachers' embeddings of training, validation and test utterances; empty without teachers."""
    stores = {}
    lists = dict(zip(sb.Stage, (corpus.train_csv, corpus.valid_csv, corpus.test_csv)))
    for split, path in lists.items():
        if path is None or not teachers:
            continue
        # by the list's name: what --debug keeps of a few clips is apart from that of all
        stores[split] = TeacherStore(Path(hparams["teacher_store"]) / Path(path).stem)
        options = embed_options
        if split == sb.Stage.TEST:  # an EER is that of whole utterances
            options = {**embed_options, "max_seconds": None}
        stores[split].fill(teachers, read_clips(path), **options)
    return stores


def train_stage(previous, hparams, corpus, trials, run_opts, teachers, stores, **embed_options):
    """Train one stage, from the (student, objective) of the stage before if there is one.

    Returns its own, and the student before the first step.
    """
    if teachers and hparams["teacher_augment"] is not None:
        segments = SegmentTeachers(teachers, stores[sb.Stage.TRAIN], embed_options["device"])
        stores = stores | {sb.Stage.TRAIN: segments}
    label_encoder, n_classes = None, None
    if hparams["labels"]:
        label_encoder = CategoricalEncoder()
        rows = read_rows(corpus.train_csv, ["spk_id"])
        label_encoder.update_from_iterable(row["spk_id"] for _, row in rows)
        n_classes = len(label_encoder)
        label_encoder.expect_len(n_classes)
    seed_draws(0)  # whatever a killed run had already done
    objective = hparams["objective"](n_classes=n_classes)
    if stores and hparams["checkpointer"].find_checkpoint() is None:
        # LDA of natural utterances says nothing of the voices that teacher_augment makes
        natural = hparams["labels"] and hparams["teacher_augment"] is None
        labelled = (stores[sb.Stage.VALID], trials) if natural else ()
        fit_objective(objective, stores[sb.Stage.TRAIN], *labelled)
    make = start_student if previous is None else partial(go_on, *previous)
    student = make(hparams, corpus, objective, stores, **embed_options)
    start = starting_point(student, hparams["checkpointer"])
    train_set = train_dataset(
        corpus.train_csv, hparams["chunk_seconds"], hparams["chunks_per_clip"], label_encoder
    )
    if hparams["shards"] is not None and not run_options(run_opts, hparams).get("debug"):
        train_set = shard_loader(train_set, hparams["shards"], **hparams["train_loader"])
    train_student(
        student,
        objective,
        train_set,
        valid_dataset(corpus.valid_csv, hparams["max_seconds"]),
        hparams,
        run_opts,
        stores,
        trials,
    )
    return (student, objective), start


def main(argv):
    """Everything from the command line to the report."""
    if {"-h", "--help"}.intersection(argv):
        return print(help_text(__doc__, argv, "mrl_distill.yaml"))
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    document = read_yaml(hparams_file, overrides)
    stages = split_stages(document)
    for stage in stages:
        check_training(parse(stage))
    stages = [load_stage(stage) for stage in stages]
    for stage in stages:
        limit_workers(stage)
    options = run_options(run_opts, stages[-1])
    check_device(options.get("device"))
    if options.get("compile") and any(stage.get("gradient_checkpointing") for stage in stages):
        raise ValueError("gradient_checkpointing does not go with --compile; leave one of them out")
    ddp_init_group(options)
    with only_run(stages[-1]["output_folder"]):
        return run(document, stages, run_opts)


def run(document, stages, run_opts):
    """All stages, the report and the model folder."""
    started = time.time()
    hparams = stages[-1]
    options = run_options(run_opts, hparams)
    demo, debug = is_demo(hparams), options.get("debug", False)
    if demo and if_main_process():
        print(DEMO)
    kept = Path(hparams["output_folder"]) / "resolved.yaml"
    if if_main_process():
        with replacing(kept) as part:
            part.write_text(dumped(document))
    with writing(hparams["output_folder"]):
        sb.create_experiment_directory(hparams["output_folder"], kept, log_config=LOG_CONFIG)
    corpus = prepare(hparams, debug)
    trials = None if corpus.valid_trials is None else read_trials(corpus.valid_trials)
    if corpus.test_trials is not None:
        require("matplotlib", "the report")  # said now, not after the training

    embed_options = {
        "device": choose_device(options.get("device")),
        "batch_seconds": hparams["batch_seconds"],
        "max_seconds": hparams["max_seconds"],
        "num_workers": hparams["num_workers"],
    }
    trained, starts, teachers = None, [], {}
    fit_embeddings, fit_labels, test_embeddings = {}, None, {}
    for stage in stages:
        if debug:  # its rows would stay in the table of the training after it
            stage["train_logger"] = TrainingLog(Path(stage["output_folder"]) / "debug_log.txt")
        taught = {}
        if stage.get("teachers") is not None:
            taught = load_teachers(
                choose_teachers(stage["teachers"], stage["taught_by"]),
                stage["teacher_train_type"],
                stage["teacher_dataset"],
                embed_options["device"],
            )
        stores = fill_stores(stage, corpus, taught, **embed_options)
        if stage["prepare_only"]:
            continue
        trained, start = train_stage(
            trained, stage, corpus, trials, run_opts, taught, stores, **embed_options
        )
        starts.append(start)
        teachers |= taught
        if taught:
            clip_ids, found = stores[sb.Stage.TRAIN].sample(FIT_CLIPS)
            fit_embeddings |= found
            if stage["labels"]:
                fit_labels = speaker_labels(clip_ids)
        if taught and corpus.test_csv is not None:
            clip_ids = [clip.id for clip in read_clips(corpus.test_csv)]
            test_embeddings |= stores[sb.Stage.TEST].lookup(clip_ids)
    if hparams["prepare_only"]:
        print(
            "Lists and teachers' embeddings are ready: start again without prepare_only to train."
        )
        return None
    student, _ = trained
    if if_main_process():
        report, speakers = None, {}
        held_out = () if trials is None else read_clips(corpus.valid_csv)
        choose = spread_speakers if hparams["labels"] else spread
        clips = choose(read_clips(corpus.train_csv))
        finish_head(student, clips, held_out, trials, hparams["labels"], **embed_options)
        if corpus.test_trials is not None:
            report = report_on(
                student,
                starts[0],
                test_embeddings,
                fit_embeddings,
                fit_labels,
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
            one, two, *_ = (clip.wav for clip in read_clips(corpus.test_csv))
            print("Next:")
            print(f"  speechbrain-mrl info {model}")
            print(f"  speechbrain-mrl verify {model} {one} {two}")
            print(f"  speechbrain-mrl publish {model} ORG/NAME --dry_run")
        if demo:
            print(DEMO)
    return student


if __name__ == "__main__":
    run_command(main)
