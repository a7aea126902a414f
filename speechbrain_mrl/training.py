"""Trains a Matryoshka student: the data pipelines, the Brain and the order of events."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
import torch.distributed as dist
import yaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.nnet.schedulers import WarmCoolDecayLRSchedule
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.data_pipeline import DynamicItem
from speechbrain.utils.epoch_loop import EpochCounter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from speechbrain_mrl.audio import read_audio
from speechbrain_mrl.checkpoints import AtomicCheckpointer
from speechbrain_mrl.draws import SeededClips, batch_statistics, draw_recordings, seed_draws
from speechbrain_mrl.embedding import (
    SAMPLE_RATE,
    Clip,
    embed_clips,
    find_clips,
    read_clips,
    write_clips,
)
from speechbrain_mrl.files import only_run
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.pretrained import ReDimNetMRL
from speechbrain_mrl.redimnet import MatryoshkaReDimNet, ReDimNet
from speechbrain_mrl.report import agreement
from speechbrain_mrl.rotation import aligning_rotation, matryoshka_rotation
from speechbrain_mrl.shards import ShardedClips
from speechbrain_mrl.teachers import LiveTeachers, TeacherStore, load_teachers
from speechbrain_mrl.verification import Trials, evaluate
from speechbrain_mrl.watch import TrainingLog

logger = logging.getLogger(__name__)

AUDIO_KEYS = ["wav", "start", "stop"]  # of a row, for what reads its clip
FIT_CLIPS = 50_000  # clips that rotations are fitted on, at most
AGREEMENT_CLIPS = 1_000  # validation clips whose pairs are compared with the teachers', at most
HEAD_CLIPS = 4_000  # training clips that a head is fitted on, at most


def train_dataset(
    csv_path: str | os.PathLike[str],
    chunk_seconds: float,
    chunks_per_clip: int = 1,
    label_encoder: CategoricalEncoder | None = None,
) -> SeededClips:
    """Random chunks of the clips of a CSV, with their speaker's index if there is an encoder.

    Which chunk follows from the seed, the epoch and the position in ``data_ids``.

    Arguments
    ---------
    csv_path : path
        Columns ID, wav, start and stop (samples at 16 kHz), and spk_id for labels.
    chunk_seconds : float
        Length of a chunk; a shorter clip is repeated to that length.
    chunks_per_clip : int
        How many random chunks of each clip make an epoch.
    label_encoder : CategoricalEncoder, optional
        Of the speakers. None: no label is read.
    """
    length = round(chunk_seconds * SAMPLE_RATE)
    items, keys = [DynamicItem(AUDIO_KEYS, partial(_chunk, length), ["sig"])], ["id", "sig"]
    if label_encoder is not None:
        items.append(DynamicItem(["spk_id"], label_encoder.encode_label, ["label"]))
        keys.append("label")
    dataset = SeededClips(csv_path, items, keys)
    dataset.data_ids = np.tile(dataset.data_ids, chunks_per_clip)
    return dataset


def valid_dataset(csv_path: str | os.PathLike[str], max_seconds: float) -> DynamicItemDataset:
    """Whole clips of a CSV, longest first; of each at most its first ``max_seconds``."""
    beginning = partial(_beginning, round(max_seconds * SAMPLE_RATE))
    items = [DynamicItem(AUDIO_KEYS, beginning, ["sig"])]
    dataset = DynamicItemDataset.from_csv(csv_path, {}, items, ["id", "sig"])
    return dataset.filtered_sorted(sort_key="duration", reverse=True)


# Functions of the module, so that workers can be sent them where they are not forks (macOS).
def _chunk(length: int, wav: str, start: Any, stop: Any) -> Tensor:
    """Somewhere in a clip, ``length`` samples."""
    start, stop = int(start), int(stop)
    spare = stop - start - length
    if spare > 0:
        start += torch.randint(spare + 1, (1,)).item()
    signal = read_audio(wav, start, min(length, stop - start))
    return signal.repeat(-(-length // len(signal)))[:length]


def _beginning(length: int, wav: str, start: Any, stop: Any) -> Tensor:
    """At most ``length`` samples of a clip, from its start."""
    start, stop = int(start), int(stop)
    return read_audio(wav, start, min(stop - start, length))


@register_checkpoint_hooks
class MRLBrain(sb.Brain):
    """Trains ``modules.student`` by ``modules.objective``, validates by EER at every size.

    A killed training that is started again ends in the weights of one that was not killed: what is
    random in a step follows from the seed, the epoch and the step. A batch whose loss or gradients
    are not finite is reported and changes nothing; more than ``nonfinite_patience`` of them in an
    epoch (a run option) stop the training.

    Takes from ``hparams``: ``mrl_dims``, ``labels``, ``wav_augment`` (or None), ``train_logger``,
    ``stage``. The checkpoint with the lowest ``valid_error`` is kept: the mean EER over sizes, or
    without trials the objective's loss, which is the disagreement with the teachers.

    Arguments
    ---------
    stores : dict of Stage to TeacherStore or LiveTeachers
        Teachers' embeddings of training and validation clips.
    valid_trials : Trials or None
        Of validation clips.
    lr_schedule : callable
        Called as ``lr_schedule(optimizer, number_of_the_step)`` before each step.
    margin_steps : int
        Steps over which the margins of the term ``aam`` rise linearly from 0.
    frozen : sequence of str
        Parts of the student that stay as they are, BatchNorm statistics included.
    part_lrs : mapping of str to float, optional
        Highest learning rate of a part of the student, where it is not that of ``opt_class``.
    **brain_arguments
        Those of ``speechbrain.Brain``.
    """

    optimizer_step_limit: Any
    epoch: Any
    sums: dict[str, float]
    embeddings: dict[str, Tensor]

    def __init__(
        self,
        *,
        stores: Mapping[sb.Stage, Any],
        valid_trials: Trials | None,
        lr_schedule: Callable[..., Any],
        margin_steps: int = 0,
        frozen: Sequence[str] = (),
        part_lrs: Mapping[str, float] | None = None,
        **brain_arguments: Any,
    ) -> None:
        super().__init__(**brain_arguments)
        if self.optimizer_step_limit is not None:  # from the command line SpeechBrain has a string
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self.stores, self.valid_trials, self.lr_schedule = stores, valid_trials, lr_schedule
        self.margin_steps, self.frozen, self.part_lrs = margin_steps, frozen, part_lrs or {}
        self.unwrapped = brain_arguments["modules"]  # neither compiled nor distributed
        self.statistics = batch_statistics(self.modules)
        self.kept_statistics = [buffer.clone() for buffer in self.statistics]

    def fit_batch(self, batch: Any) -> Tensor:
        """One step, or none where the loss or a gradient is not finite."""
        torch._foreach_copy_(self.kept_statistics, self.statistics)
        loss = super().fit_batch(batch)
        if self.finite:
            return loss
        torch._foreach_copy_(self.statistics, self.kept_statistics)
        self.nonfinite_count += 1
        report = f"loss or gradients of these clips are not finite: {', '.join(batch.id)}"
        if self.nonfinite_count > self.nonfinite_patience:
            raise ValueError(
                f"{report}; nonfinite_patience allows {self.nonfinite_patience} such batches in an "
                "epoch. Look at the clips, or lower the learning rate"
            )
        logger.warning("%s; the batch is left out, number %d", report, self.nonfinite_count)
        return loss

    def check_loss_isfinite(self, loss: Tensor) -> None:
        """Remembers it for ``fit_batch``; all processes of a distributed run go on to backward."""
        self.finite = bool(loss.isfinite())

    def optimizers_step(self) -> Any:
        """As SpeechBrain's, but only with finite gradients, which all processes share."""
        grads = [p.grad for p in self.modules.parameters() if p.grad is not None]
        if not self.scaler.is_enabled():  # else it looks itself, and adapts its scale
            self.finite &= bool(torch.stack(torch._foreach_norm(grads)).isfinite().all())
        if self.finite or self.scaler.is_enabled():
            return super().optimizers_step()
        self.zero_grad(set_to_none=True)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Tensor:
        """A batch of waveforms to embeddings (B, D), augmented in training."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        if stage == sb.Stage.TRAIN and self.hparams.wav_augment is not None:
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
        return self._parts(stage)["student"](wavs, wav_lens)

    def _parts(self, stage: sb.Stage) -> Any:
        """Distributed modules must be called equally often on all ranks; shares may differ by one."""
        return self.modules if stage == sb.Stage.TRAIN else self.unwrapped

    def compute_objectives(self, embeddings: Tensor, batch: Any, stage: sb.Stage) -> Tensor:
        """The objective's loss; an augmented copy learns what the clean whole clip gives."""
        if stage != sb.Stage.TRAIN:
            self.embeddings.update(zip(batch.id, embeddings.float().cpu(), strict=True))
        copies = len(embeddings) // len(batch.id)
        targets = {}
        if stage in self.stores:
            found = self.stores[stage].targets(batch)
            targets = {name: x.to(self.device).repeat(copies, 1) for name, x in found.items()}
        labels = None
        if self.hparams.labels and stage == sb.Stage.TRAIN:  # the others' speakers are no classes
            labels = batch.label.repeat(copies)
        loss, values = self._parts(stage)["objective"](embeddings, targets, labels)
        if loss.isfinite():
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.n_batches += 1
        self.n_clips += len(batch.id)
        return loss

    def on_fit_start(self) -> None:
        """As SpeechBrain's; then augmentation draws as ``draw_recordings`` says."""
        super().on_fit_start()
        if self.hparams.wav_augment is not None:
            wavs = torch.zeros(self.hparams.batch_size, SAMPLE_RATE, device=self.device)
            draw_recordings(self.hparams.wav_augment, wavs)

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Forgets the last stage's values, but not those of an epoch that goes on."""
        self.epoch = epoch
        self.n_clips, self.started = 0, time.perf_counter()
        if self.step == 0:
            self.sums, self.n_batches, self.embeddings = {}, 0, {}
        if stage != sb.Stage.TRAIN and dist.is_initialized():
            for buffer in self.unwrapped["student"].buffers():  # ranks' statistics may differ
                dist.broadcast(buffer, 0)

    def init_optimizers(self) -> None:
        """One optimizer; parts with a learning rate of their own are its further groups."""
        if not self.part_lrs:
            return super().init_optimizers()
        parts = {name: getattr(self.unwrapped["student"], name) for name in self.part_lrs}
        apart = {id(p) for part in parts.values() for p in part.parameters()}
        rest = [p for p in self.modules.parameters() if id(p) not in apart and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": rest}]
        for name, part in parts.items():
            groups.append({"params": list(part.parameters()), "highest_lr": self.part_lrs[name]})
        self.optimizer = self.opt_class([group for group in groups if group["params"]])
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Sets seed, learning rates and margins of the step; keeps frozen parts in eval mode."""
        seed_draws(self.epoch, self.step)
        self.lr_schedule(self.optimizer, self.optimizer_step + 1)
        highest_lr = self.optimizer.defaults["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("highest_lr", highest_lr) / highest_lr
        if 0 < self.margin_steps >= self.optimizer_step:
            fraction = self.optimizer_step / self.margin_steps
            self.unwrapped["objective"].scale_margins(fraction)
        for name in self.frozen:
            getattr(self.unwrapped["student"], name).eval()

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Logs the stage; after validation, keeps the checkpoint if it is the best."""
        if stage != sb.Stage.TRAIN and dist.is_initialized():
            stage_loss = self._gather_ranks(stage_loss)
        stats = {"loss": stage_loss}
        stats.update({name: total / self.n_batches for name, total in self.sums.items()})
        if stage == sb.Stage.TRAIN:
            stats["clips_per_second"] = self.n_clips / (time.perf_counter() - self.started)
            self.train_stats = stats
            return
        stats.update(self._eers() | self._agreement())
        self.hparams.train_logger.log_stats(  # writes on the main process, all must call it
            {
                **({"stage": self.hparams.stage} if self.hparams.stage else {}),
                "epoch": epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
            },
            train_stats=self.train_stats,
            valid_stats=stats,
        )
        eers = [value for name, value in stats.items() if name.startswith("eer/")]
        error = sum(eers) / len(eers) if eers else stage_loss
        self.checkpointer.save_and_keep_only(meta={"valid_error": error}, min_keys=["valid_error"])

    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        seed_draws(epoch, 0)  # a DataLoader that shuffles by torch's generator begins here
        dataset = getattr(train_set, "dataset", None)
        if isinstance(dataset, (SeededClips, ShardedClips)):
            dataset.epoch.fill_(epoch)
        if isinstance(dataset, ShardedClips):
            dataset.done.fill_(self.step)
        super()._fit_train(train_set, epoch, enable)

    def _fit_valid(self, valid_set: Any, epoch: int | None, enable: bool) -> None:
        super()._fit_valid(valid_set, epoch, enable)
        if valid_set is None:
            self.checkpointer.save_and_keep_only()

    @mark_as_saver
    def _save(self, path: str | os.PathLike[str]) -> None:
        super()._save(path)
        with open(path, "a", encoding="utf-8") as file:
            yaml.safe_dump({"sums": self.sums, "n_batches": self.n_batches}, file)

    @mark_as_loader
    def _recover(self, path: str | os.PathLike[str], end_of_epoch: bool) -> None:
        super()._recover(path, end_of_epoch)
        with open(path, encoding="utf-8") as file:
            saved = yaml.safe_load(file)
        self.sums, self.n_batches = saved.get("sums", {}), saved.get("n_batches", 0)
        self.embeddings = {}

    def _gather_ranks(self, loss: float) -> float:
        """Every rank's validation clips on every rank; returns the mean loss of all batches."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.embeddings, self.sums, self.n_batches, loss))
        self.embeddings, self.sums, self.n_batches, total = {}, {}, 0, 0.0
        for embeddings, sums, n_batches, mean in found:
            self.embeddings.update(embeddings)
            for name, value in sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.n_batches += n_batches
            total += n_batches * mean
        return total / max(1, self.n_batches)

    def _wrap_distributed(self) -> None:
        """As SpeechBrain does, but on CPUs without SyncBatchNorm, which only GPUs have.

        There each process normalises by its own clips, and rank 0's statistics are kept.
        """
        if not self.distributed_launch or torch.device(self.device).type != "cpu":
            return super()._wrap_distributed()
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )

    def _eers(self) -> dict[str, float]:
        if self.valid_trials is None:
            return {}
        clips = self.valid_trials.stack(self.embeddings)
        results = evaluate(clips, self.valid_trials, self.hparams.mrl_dims)
        return {f"eer/{dim}": result["eer"] for dim, result in results.items()}

    def _agreement(self) -> Any:
        if sb.Stage.VALID not in self.stores or len(self.embeddings) < 2:
            return {}
        ids = sorted(self.embeddings)[:: -(-len(self.embeddings) // AGREEMENT_CLIPS)]
        student = torch.stack([self.embeddings[clip_id] for clip_id in ids])
        found = agreement(student, self.stores[sb.Stage.VALID].lookup(ids), self.hparams.mrl_dims)
        return {f"agreement/{dim}": value for dim, value in found.items()}


def fit_objective(objective: Any, store: TeacherStore | LiveTeachers) -> nn.Module:
    """Fit an objective's rotations on the teachers' embeddings of at most 50,000 clips."""
    embeddings = store.embeddings
    step = -(-len(next(iter(embeddings.values()))) // FIT_CLIPS)
    return objective.fit({name: found[::step] for name, found in embeddings.items()})


def train_student(
    student: MatryoshkaReDimNet,
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
    student : MatryoshkaReDimNet
        Changed in place.
    objective : torch.nn.Module
        Called as ``MatryoshkaDistillationLoss``; fitted on the training clips' embeddings.
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
        Of validation clips. None: the checkpoint that agrees best with the teachers is kept.

    Returns
    -------
    MRLBrain
        Its ``modules.student`` is the best of the run.
    """
    checkpointer = hparams["checkpointer"]
    checkpointer.add_recoverables({"student": student, "objective": objective})
    if valid_set is not None and dist.is_initialized():
        valid_set.data_ids = valid_set.data_ids[dist.get_rank() :: dist.get_world_size()]
    if stores and checkpointer.find_checkpoint() is None and not objective.fitted:
        fit_objective(objective, stores[sb.Stage.TRAIN])
    part_lrs = hparams["unfreeze"] or {}
    frozen = [name for name in hparams["freeze"] or () if name not in part_lrs]
    _freeze(student, frozen, part_lrs)

    n_batches = len(train_set)
    if not isinstance(train_set, DataLoader):
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        n_batches //= hparams["batch_size"] * world_size
        if n_batches == 0:
            raise ValueError(
                f"the training clips give {len(train_set)} chunks, fewer than batch_size "
                f"{hparams['batch_size']} on {world_size} processes; give a smaller batch_size"
            )
    n_steps = hparams["number_of_epochs"] * n_batches
    n_steps = min(n_steps, int(run_opts.get("optimizer_step_limit") or n_steps))
    brain = MRLBrain(
        modules={"student": student, "objective": objective},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
        stores=stores,
        valid_trials=valid_trials,
        lr_schedule=hparams["lr_schedule"](
            warmup=max(1, round(hparams["warmup"] * n_steps)),
            cooldown=max(1, round(hparams["cooldown"] * n_steps)),
            total_steps=n_steps,
        ),
        margin_steps=round(hparams["margin_epochs"] * n_batches),
        frozen=frozen,
        part_lrs=part_lrs,
    )
    with only_run(checkpointer.checkpoints_dir):
        brain.fit(
            hparams["epoch_counter"],
            train_set,
            valid_set,
            train_loader_kwargs=hparams["train_loader"],
            valid_loader_kwargs=hparams["valid_loader"],
        )
    checkpointer.recover_if_possible(min_key="valid_error")
    return brain


def align_head(
    student: MatryoshkaReDimNet,
    n_coordinates: int,
    objective: Any,
    store: TeacherStore,
    clips: Sequence[Clip],
    **embed_options: Any,
) -> None:
    """Turn a pretrained student's first coordinates towards what the teachers will ask of it.

    A rotation: no cosine of these coordinates changes. The objective is fitted first.

    Arguments
    ---------
    student : MatryoshkaReDimNet
        Changed in place.
    n_coordinates : int
        How many came with the pretrained weights, at most ``embed_dim``.
    objective : torch.nn.Module
        Fitted on the ``store``.
    store : TeacherStore
        Holds the ``clips``.
    clips : sequence of Clip
        A few thousand of the training clips.
    **embed_options
        As for ``finish_head``.
    """
    fit_objective(objective, store)
    targets = objective.targets(store.lookup([clip.id for clip in clips]))
    target = targets[max(targets)][:, :n_coordinates]
    target = nn.functional.pad(target, (0, n_coordinates - target.shape[1]))
    found = embed_clips({"student": student}, clips, **embed_options)["student"]
    student.rotate_head(aligning_rotation(found[:, :n_coordinates], target))


def finish_head(
    student: MatryoshkaReDimNet,
    clips: Sequence[Clip],
    held_out: Sequence[Clip] = (),
    trials: Trials | None = None,
    **embed_options: Any,
) -> None:
    """Centre a trained student, and turn it to its principal axes where that makes prefixes better.

    Both go into the linear layer. Centred embeddings have mean zero, so that cosines compare what
    tells clips apart, not what all speech shares. The axes change no cosine of the whole embedding;
    they are taken if the mean EER over sizes on held-out trials falls, and always without trials.
    No label of ``clips`` is read.

    Arguments
    ---------
    student : MatryoshkaReDimNet
        Changed in place.
    clips : sequence of Clip
        A few thousand of the training clips.
    held_out : sequence of Clip
        Those of the trials.
    trials : Trials, optional
        Of validation speakers.
    **embed_options
        ``device``, ``batch_seconds``, ``max_seconds`` and ``num_workers`` of ``embed_clips``.
    """
    embeddings = embed_clips({"student": student}, clips, **embed_options)["student"]
    principal = matryoshka_rotation(embeddings, [student.embed_dim])
    student.rotate_head(torch.eye(student.embed_dim), principal.mean)
    if trials is not None:
        found = embed_clips({"student": student}, held_out, **embed_options)["student"]
        centred = trials.stack(dict(zip((clip.id for clip in held_out), found, strict=True)))
        as_it_is, rotated = (
            np.mean([one["eer"] for one in evaluate(x, trials, student.mrl_dims).values()])
            for x in (centred, centred @ principal.matrix.T)
        )
        if rotated >= as_it_is:
            return
    student.rotate_head(principal.matrix)
    logger.info("The head was turned to the principal axes of %d clips", len(clips))


def spread(clips: Sequence[Clip]) -> Sequence[Clip]:
    """At most 4,000 of the clips, evenly over the list, on which a head is fitted."""
    return clips[:: -(-len(clips) // HEAD_CLIPS)]


def _freeze(student: nn.Module, frozen: Sequence[str], part_lrs: Mapping[str, float]) -> None:
    """Gradients for all parts of the student but the frozen ones."""
    parts = [name for name, _ in student.named_children()]
    unknown = sorted({*frozen, *part_lrs} - set(parts))
    if unknown:
        raise ValueError(f"freeze and unfreeze name parts of the student, {parts}, got {unknown}")
    for name, part in student.named_children():
        part.requires_grad_(name not in frozen)


def train_distilled_mrl(
    teachers: Mapping[str, Any],
    student_config: dict[str, Any],
    data: Any,
    epochs: int = 30,
    *,
    output_folder: str | os.PathLike[str] = "results/distilled",
    objective: nn.Module | None = None,
    wav_augment: Callable[..., Any] | None = None,
    batch_size: int = 64,
    chunk_seconds: float = 3.0,
    max_seconds: float = 20.0,
    lr: float = 1e-3,
    num_workers: int = 0,
    device: str = "cpu",
) -> ReDimNetMRL:
    """Distil teachers into one Matryoshka student, without a YAML and without labels.

    A call that was interrupted goes on where it was when it is made again. One clip in twenty, at
    most 500, is held out; the checkpoint that agrees best with the teachers on those is returned,
    centred on the training clips and turned to their principal axes.

    Arguments
    ---------
    teachers : dict of str to teacher
        What ``load_teacher`` takes: modules, released names, checkpoint files, Hub ids.
    student_config : dict
        Arguments of ``ReDimNetMRL``: ``embed_dim``, ``mrl_dims``, ``backbone``. A ``ReDimNet`` as
        ``backbone`` is where the student starts from.
    data : path or torch.utils.data.DataLoader
        A folder of recordings of any structure, a CSV (ID, wav, start and stop in samples at
        16 kHz), or a DataLoader of SpeechBrain batches with ``id`` and ``sig``, which the teachers
        then hear at every step; with it nothing is held out, and the last weights are returned as
        they are.
    epochs : int
        Passes over the data.
    output_folder : path
        Checkpoints, log and the teachers' embeddings.
    objective : torch.nn.Module, optional
        Default: ``MatryoshkaDistillationLoss``, all teachers for every size, cosine and contrastive.
    wav_augment : callable, optional
        SpeechBrain ``Augmenter``: (wavs, wav_lens) to augmented ones.
    batch_size : int
        Chunks in a step.
    chunk_seconds, max_seconds : float
        Length of a training chunk, and of what teachers and validation hear of a clip at most.
    lr : float
        Largest learning rate (AdamW, warm-up of 5 %, linear cool-down over the second half).
    num_workers : int
        Processes that read and decode.
    device : str
        Where student and teachers are.

    Returns
    -------
    ReDimNetMRL
        In eval mode.
    """
    sizes = {key: value for key, value in student_config.items() if key != "backbone"}
    backbone = student_config.get("backbone", "b2")
    if isinstance(backbone, ReDimNet):
        student = ReDimNetMRL.from_redimnet(backbone, **sizes)
    else:
        student = ReDimNetMRL(backbone=backbone, **sizes)
    if objective is None:
        objective = MatryoshkaDistillationLoss(
            student.mrl_dims, "all", terms={"cosine": 1.0, "contrastive": 0.1}
        )
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    teachers = load_teachers(teachers, device=device)

    valid_set = None
    stores: dict[sb.Stage, Any] = {}
    if isinstance(data, DataLoader):
        train_set: Any = data
        stores[sb.Stage.TRAIN] = LiveTeachers(teachers, data, device)
    else:
        clips = find_clips(data) if Path(data).is_dir() else read_clips(data)
        held_out = clips[::20][:500]
        splits = {
            sb.Stage.TRAIN: [clip for clip in clips if clip not in set(held_out)],
            sb.Stage.VALID: held_out,
        }
        for stage, split in splits.items():
            write_clips(split, folder / f"{stage.name.lower()}.csv")
            stores[stage] = TeacherStore(folder / "teachers" / stage.name.lower())
            stores[stage].fill(
                teachers, split, device, max_seconds=max_seconds, num_workers=num_workers
            )
        train_set = train_dataset(folder / "train.csv", chunk_seconds)
        valid_set = valid_dataset(folder / "valid.csv", max_seconds)

    epoch_counter = EpochCounter(epochs)
    hparams = {
        "mrl_dims": student.mrl_dims,
        "stage": "",
        "labels": False,
        "margin_epochs": 0,
        "freeze": None,
        "unfreeze": None,
        "wav_augment": wav_augment,
        "train_logger": TrainingLog(folder / "train_log.txt"),
        "ckpt_interval_minutes": 0 if valid_set is None else 15,
        "checkpointer": AtomicCheckpointer(
            folder / "checkpoints", {"epoch_counter": epoch_counter}
        ),
        "epoch_counter": epoch_counter,
        "number_of_epochs": epochs,
        "batch_size": batch_size,
        "warmup": 0.05,
        "cooldown": 0.5,
        "opt_class": partial(torch.optim.AdamW, lr=lr, weight_decay=1e-4),
        "lr_schedule": partial(WarmCoolDecayLRSchedule, lr=lr, decay_factor=1.0),
        "train_loader": {
            "batch_size": batch_size,
            "shuffle": True,
            "drop_last": True,
            "num_workers": num_workers,
        },
        "valid_loader": {"batch_size": 16, "num_workers": num_workers},
    }
    run_opts = {"device": device}
    embed_options: dict[str, Any] = {
        "device": device,
        "max_seconds": max_seconds,
        "num_workers": num_workers,
    }
    fresh = hparams["checkpointer"].find_checkpoint() is None
    if isinstance(backbone, ReDimNet) and valid_set is not None and fresh:
        student.to(device)
        some, store = spread(splits[sb.Stage.TRAIN]), stores[sb.Stage.TRAIN]
        align_head(student, backbone.embed_dim, objective, store, some, **embed_options)
    train_student(student, objective, train_set, valid_set, hparams, run_opts, stores)
    if valid_set is not None:
        finish_head(student, spread(splits[sb.Stage.TRAIN]), **embed_options)
    return student.eval()
