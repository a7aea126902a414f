"""Trains a Matryoshka student: the data pipelines and the order of events."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
import torch.distributed as dist
from speechbrain.nnet.schedulers import WarmCoolDecayLRSchedule
from speechbrain.utils.epoch_loop import EpochCounter
from torch import nn
from torch.utils.data import DataLoader

from speechbrain_mrl.dataio.clips import find_clips, read_clips, write_clips
from speechbrain_mrl.dataio.dataset import train_dataset, valid_dataset
from speechbrain_mrl.evaluation.verification import Trials
from speechbrain_mrl.inference.encoders import load_teachers
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.models.pretrained import ReDimNetMRL, load_checkpoint, load_released
from speechbrain_mrl.models.redimnet import MatryoshkaHead, ReDimNet
from speechbrain_mrl.training.brain import MRLBrain
from speechbrain_mrl.training.checkpoints import AtomicCheckpointer
from speechbrain_mrl.training.defaults import DEFAULTS, default_augment
from speechbrain_mrl.training.gradient_checkpointing import checkpoint_gradients
from speechbrain_mrl.training.logger import TrainingLog
from speechbrain_mrl.training.projection import (
    align_head,
    finish_head,
    fit_objective,
    spread,
    start_from,
)
from speechbrain_mrl.training.teachers import LiveTeachers
from speechbrain_mrl.utils import check_device, only_run


def train_student(
    student: MatryoshkaHead,
    objective: nn.Module,
    train_set: Any,
    valid_set: Any,
    hparams: dict[str, Any],
    run_opts: dict[str, Any],
    stores: Mapping[sb.Stage, Any],
    valid_trials: Trials | None = None,
) -> MRLBrain:
    """Train a student, or go on with a killed training, and recover its best checkpoint.

    Arguments
    ---------
    student : ReDimNetMRL or MatryoshkaEncoder
        Changed in place.
    objective : torch.nn.Module
        Called as ``MatryoshkaDistillationLoss``; fitted, unless a checkpoint is there.
    train_set : DynamicItemDataset or DataLoader
        As from ``train_dataset`` or ``shard_loader``.
    valid_set : DynamicItemDataset or None
        As from ``valid_dataset``; each process takes its share of it.
    hparams : dict
        The loaded YAML.
    run_opts : dict
        SpeechBrain's run options. The schedules end with ``optimizer_step_limit``, if it is there.
    stores : dict of Stage to TeacherStore or LiveTeachers
        For TRAIN and VALID; empty for a training without teachers.
    valid_trials : Trials, optional
        Of validation utterances. None: the checkpoint that agrees best with the teachers is kept.

    Returns
    -------
    MRLBrain
        Its ``modules.student`` is the best of the run.
    """
    checkpointer = hparams["checkpointer"]
    checkpointer.add_recoverables({"student": student, "objective": objective})
    if valid_set is not None and dist.is_initialized():
        valid_set.data_ids = valid_set.data_ids[dist.get_rank() :: dist.get_world_size()]
    part_lrs = hparams["unfreeze"] or {}
    frozen = [name for name in hparams["freeze"] or () if name not in part_lrs]
    _freeze(student, frozen, part_lrs)
    if hparams.get("gradient_checkpointing"):
        checkpoint_gradients(student)

    n_batches = len(train_set)
    if not isinstance(train_set, DataLoader):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        n_batches //= hparams["batch_size"] * world_size
        if n_batches == 0:
            raise ValueError(
                f"the training utterances give {len(train_set)} chunks, fewer than batch_size "
                f"{hparams['batch_size']} on {world_size} processes; give a smaller batch_size"
            )
    brain = MRLBrain(
        modules={"student": student, "objective": objective},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
        stores=stores,
        valid_trials=valid_trials,
        frozen=frozen,
        part_lrs=part_lrs,
    )
    steps_per_epoch = n_batches // brain.grad_accumulation_factor
    if steps_per_epoch == 0:
        raise ValueError(
            f"an epoch has {n_batches} batches, fewer than grad_accumulation_factor "
            f"{brain.grad_accumulation_factor}; give a smaller one, or a smaller batch_size"
        )
    n_steps = hparams["number_of_epochs"] * steps_per_epoch
    n_steps = min(n_steps, brain.optimizer_step_limit or n_steps)
    brain.lr_schedule = hparams["lr_schedule"](
        warmup=max(1, round(hparams["warmup"] * n_steps)),
        cooldown=max(1, round(hparams["cooldown"] * n_steps)),
        total_steps=n_steps,
    )
    brain.margin_steps = round(hparams.get("margin_epochs", 0) * steps_per_epoch)
    pinned = {"pin_memory": torch.device(brain.device).type == "cuda"}
    with only_run(checkpointer.checkpoints_dir):
        brain.fit(
            hparams["epoch_counter"],
            train_set,
            valid_set,
            train_loader_kwargs=pinned | hparams["train_loader"],
            valid_loader_kwargs=pinned | hparams["valid_loader"],
        )
    checkpointer.recover_if_possible(min_key="valid_error")
    return brain


def _freeze(student: nn.Module, frozen: Sequence[str], part_lrs: Mapping[str, float]) -> None:
    """No gradients for the frozen parts; what is not trained by construction stays so."""
    parts = [name for name, _ in student.named_children()]
    unknown = sorted({*frozen, *part_lrs} - set(parts))
    if unknown:
        raise ValueError(f"freeze and unfreeze name parts of the student, {parts}, got {unknown}")
    for name, part in student.named_children():
        if name in frozen:
            part.requires_grad_(False)


def train_distilled_mrl(
    teachers: Mapping[str, Any],
    student_config: dict[str, Any],
    data: Any,
    epochs: int = DEFAULTS["number_of_epochs"],
    *,
    output_folder: str | os.PathLike[str] = "results/distilled",
    objective: nn.Module | None = None,
    wav_augment: Callable[..., Any] | str | None = "default",
    batch_size: int = DEFAULTS["batch_size"],
    chunk_seconds: float = DEFAULTS["chunk_seconds"],
    max_seconds: float = DEFAULTS["max_seconds"],
    lr: float = DEFAULTS["lr"],
    num_workers: int = 0,
    device: str | None = None,
) -> MatryoshkaHead:
    """Distil teachers into one Matryoshka student, without a YAML and without labels.

    It trains what ``hparams/mrl_amalgamate.yaml`` trains; defaults are the recipe's. The same call
    resumes an interrupted one. One utterance in twenty, at most 500, is held out. The checkpoint
    that agrees best with the teachers on those is returned, centred on the training utterances and
    rotated to their principal components.

    Arguments
    ---------
    teachers : dict of str to teacher
        What ``load_teacher`` takes: modules, released names, checkpoint files, Hub ids.
    student_config : dict
        ``embed_dim`` and ``mrl_dims`` of ``ReDimNetMRL``, and ``backbone``: a released name, "b2"
        if there is none, whose weights are downloaded once unless ``pretrained`` is False; a
        checkpoint file, a ``ReDimNet`` or a ``MatryoshkaEncoder``, whose sizes are then the
        defaults, from which the student starts too; or a model_config, at random.
    data : path or torch.utils.data.DataLoader
        A folder of recordings of any structure, a CSV (ID, wav, start and stop in samples at
        16 kHz), or a DataLoader of SpeechBrain batches with ``id`` and ``sig``, which the teachers
        then embed at every step; with it nothing is held out, and the last weights are returned as
        they are.
    epochs : int
        Passes over the data.
    output_folder : path
        Checkpoints, log and the teachers' embeddings.
    objective : torch.nn.Module, optional
        Default: ``MatryoshkaDistillationLoss``, all teachers for every size.
    wav_augment : callable, "default" or None
        (wavs, wav_lens) to augmented ones. Default: ``default_augment()``; None: no augmentation.
    batch_size : int
        Chunks in a step; all of a folder that has fewer.
    chunk_seconds, max_seconds : float
        Length of a training segment, and the most of an utterance that teachers and validation
        embed.
    lr : float
        Largest learning rate (AdamW, warm-up, linear cool-down).
    num_workers : int
        Processes that read and decode; 0: this one.
    device : str, optional
        Where student and teachers are. Default: a GPU if there is one.

    Returns
    -------
    ReDimNetMRL or MatryoshkaEncoder
        In eval mode.
    """
    device = check_device(device)
    backbone = student_config.get("backbone", DEFAULTS["backbone"])
    usual = vars(backbone) if isinstance(backbone, MatryoshkaHead) else DEFAULTS
    sizes = {key: student_config.get(key, usual[key]) for key in ("embed_dim", "mrl_dims")}
    if unknown := sorted(set(student_config) - {*sizes, "backbone", "pretrained"}):
        raise ValueError(
            f"student_config takes embed_dim, mrl_dims, backbone and pretrained, got {unknown}"
        )
    if objective is None:
        objective = MatryoshkaDistillationLoss(sizes["mrl_dims"], "all")
    start = _pretrained(backbone, student_config.get("pretrained", DEFAULTS["pretrained"]))
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    release = DEFAULTS["teacher_train_type"], DEFAULTS["teacher_dataset"]
    teachers = load_teachers(teachers, *release, device)
    embed_options: dict[str, Any] = {
        "device": device,
        "batch_seconds": DEFAULTS["batch_seconds"],
        "max_seconds": max_seconds,
        "num_workers": num_workers,
    }

    valid_set = None
    stores: dict[sb.Stage, Any] = {}
    epoch_counter = EpochCounter(epochs)
    checkpointer = AtomicCheckpointer(folder / "checkpoints", {"epoch_counter": epoch_counter})
    if isinstance(data, DataLoader):
        train_set: Any = data
        stores[sb.Stage.TRAIN] = LiveTeachers(teachers, data, device)
    else:
        clips = find_clips(data) if Path(data).is_dir() else read_clips(data)
        held_out = clips[::20][:500]
        kept_out = set(held_out)
        splits = {
            sb.Stage.TRAIN: [clip for clip in clips if clip not in kept_out],
            sb.Stage.VALID: held_out,
        }
        for stage, split in splits.items():
            write_clips(split, folder / f"{stage.name.lower()}.csv")
            stores[stage] = TeacherStore(folder / "teachers" / stage.name.lower())
            stores[stage].fill(teachers, split, **embed_options)
        train_set = train_dataset(folder / "train.csv", chunk_seconds, DEFAULTS["chunks_per_clip"])
        valid_set = valid_dataset(folder / "valid.csv", max_seconds)
        batch_size = min(batch_size, len(train_set))
        some = spread(splits[sb.Stage.TRAIN])
    fresh = checkpointer.find_checkpoint() is None
    if fresh and not objective.fitted:
        fit_objective(objective, stores[sb.Stage.TRAIN])

    def rotate_to_teachers(student: MatryoshkaHead) -> None:
        store, dim = stores[sb.Stage.TRAIN], start.embed_dim
        align_head(student.to(device), dim, objective, store, some, **embed_options)

    student: Any
    if start is None:
        student = ReDimNetMRL(backbone=backbone, **sizes)
    elif valid_set is None:
        student = start_from(start, **sizes)
    else:
        student = start_from(start, **sizes, rotate=rotate_to_teachers if fresh else None)

    hparams = {
        **DEFAULTS,
        "mrl_dims": student.mrl_dims,
        "labels": False,
        "wav_augment": default_augment() if wav_augment == "default" else wav_augment,
        "train_logger": TrainingLog(folder / "train_log.txt"),
        "checkpointer": checkpointer,
        "epoch_counter": epoch_counter,
        "number_of_epochs": epochs,
        "batch_size": batch_size,
        "opt_class": partial(torch.optim.AdamW, lr=lr, weight_decay=DEFAULTS["weight_decay"]),
        "lr_schedule": partial(WarmCoolDecayLRSchedule, lr=lr, decay_factor=1.0),
        "train_loader": {
            "batch_size": batch_size,
            "shuffle": True,
            "drop_last": True,
            "num_workers": num_workers,
        },
        "valid_loader": {"batch_size": 16, "num_workers": num_workers},
    }
    if valid_set is None:
        hparams["ckpt_interval_minutes"] = 0
    train_student(student, objective, train_set, valid_set, hparams, {"device": device}, stores)
    if valid_set is not None:
        finish_head(student, some, **embed_options)
    return student.eval()


def _pretrained(backbone: Any, pretrained: bool) -> Any:
    """The network that a student starts from; None for a random one."""
    if isinstance(backbone, (ReDimNet, MatryoshkaHead)):
        return backbone
    if isinstance(backbone, Mapping) or not pretrained:
        return None
    if Path(backbone).is_file():
        return load_checkpoint(backbone)
    return load_released(backbone, DEFAULTS["student_train_type"], DEFAULTS["student_dataset"])
