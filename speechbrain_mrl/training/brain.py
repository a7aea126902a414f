"""SpeechBrain's Brain for a Matryoshka student: steps, validation, checkpoints."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import speechbrain as sb
import torch
import torch.distributed as dist
import yaml
from speechbrain.dataio.batch import PaddedData
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from speechbrain_mrl.dataio.dataset import SeededClips, seed_draws
from speechbrain_mrl.dataio.shards import ShardedClips
from speechbrain_mrl.evaluation.report import agreement
from speechbrain_mrl.evaluation.verification import Trials, evaluate
from speechbrain_mrl.models.redimnet import ReDimNet
from speechbrain_mrl.training.steps import SteppingBrain

logger = logging.getLogger(__name__)

AGREEMENT_CLIPS = (
    1_000  # validation utterances, at most, whose pairs are compared with the teachers'
)


@register_checkpoint_hooks
class MRLBrain(SteppingBrain):
    """Trains ``modules.student`` by ``modules.objective``, validates by EER at every size.

    A killed training that is started again ends in the weights of one that was not killed: what is
    random in a step follows from the seed, the epoch and the step.

    The student before its first step is validated as epoch 0, so that the log shows what training
    brings.

    Takes from ``hparams``: ``mrl_dims``, ``labels``, ``wav_augment`` and ``teacher_augment`` (each
    may be None), ``train_logger``, ``stage``. The checkpoint with the lowest ``valid_error`` is
    kept: the mean EER over sizes, or without trials the objective's loss, which is the disagreement
    with the teachers.

    Arguments
    ---------
    stores : dict of Stage to TeacherStore or LiveTeachers
        Teachers' embeddings of training and validation utterances.
    valid_trials : Trials or None
        Of validation utterances.
    lr_schedule : callable, optional
        Called as ``lr_schedule(optimizer, number_of_the_step)`` before each batch; a step of the
        optimizer may take several. ``train_student`` sets it once the run options are known.
    margin_steps : int
        Steps over which the margins of the term ``aam`` rise linearly from 0.
    frozen : sequence of str
        Parts of the student that stay as they are, BatchNorm statistics included.
    part_lrs : mapping of str to float, optional
        Highest learning rate of a part of the student, where it is not that of ``opt_class``.
    **brain_arguments
        Those of ``speechbrain.Brain``.
    """

    epoch: Any
    sums: dict[str, Any]
    n_batches: Any
    embeddings: dict[str, Tensor]

    def __init__(
        self,
        *,
        stores: Mapping[sb.Stage, Any],
        valid_trials: Trials | None,
        lr_schedule: Callable[..., Any] | None = None,
        margin_steps: int = 0,
        frozen: Sequence[str] = (),
        part_lrs: Mapping[str, float] | None = None,
        **brain_arguments: Any,
    ) -> None:
        super().__init__(**brain_arguments)
        self.stores, self.valid_trials, self.lr_schedule = stores, valid_trials, lr_schedule
        self.margin_steps, self.frozen, self.part_lrs = margin_steps, frozen, part_lrs or {}
        self.unwrapped = brain_arguments["modules"]  # neither compiled nor distributed
        self.unwrapped["objective"].values_as_tensors = True

    def fit(
        self,
        epoch_counter: Any,
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] | None = None,
        valid_loader_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """As SpeechBrain's; a training that begins is validated first, as epoch 0."""
        if valid_set is not None and not isinstance(valid_set, DataLoader):
            loader_kwargs = {"ckpt_prefix": None, **(valid_loader_kwargs or {})}
            valid_set = self.make_dataloader(valid_set, sb.Stage.VALID, **loader_kwargs)
        epochs = self._epochs(epoch_counter, getattr(train_set, "dataset", train_set), valid_set)
        super().fit(epochs, train_set, valid_set, progressbar, train_loader_kwargs or {})

    def _epochs(self, epoch_counter: Any, train_data: Any, valid_set: Any) -> Any:
        """Those of the counter, the validation before the first step in front of them.

        The training data are told each epoch, from which their draws follow.
        """
        if valid_set is not None and self.checkpointer.find_checkpoint() is None:
            self.train_stats: dict[str, float] = {}
            self._fit_valid(valid_set, 0, enable=False)
        for epoch in epoch_counter:
            seed_draws(epoch, 0)  # a DataLoader that shuffles by torch's generator begins here
            if isinstance(train_data, (SeededClips, ShardedClips)):
                train_data.epoch.fill_(epoch)
            if isinstance(train_data, ShardedClips):
                train_data.done.fill_(self.step)
            yield epoch

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Tensor:
        """A batch of waveforms to embeddings (B, D), augmented in training."""
        batch = batch.to(self.device, non_blocking=True)
        if stage != sb.Stage.TRAIN:
            return self._parts(stage)["student"](*batch.sig)
        # Without autocast, for half precision is noise, too.
        with torch.autocast(batch.sig[0].device.type, enabled=False):
            if (augment := getattr(self.hparams, "teacher_augment", None)) is not None:
                batch.sig = PaddedData(*augment(batch.sig[0].float(), batch.sig[1]))
            wavs, wav_lens = batch.sig
            if self.hparams.wav_augment is not None:
                wavs, wav_lens = self.hparams.wav_augment(wavs.float(), wav_lens)
        return self._parts(stage)["student"](wavs, wav_lens)

    def _parts(self, stage: sb.Stage) -> Any:
        """Distributed modules must be called equally often on all ranks; shares may differ by one."""
        return self.modules if stage == sb.Stage.TRAIN else self.unwrapped

    def compute_objectives(self, embeddings: Tensor, batch: Any, stage: sb.Stage) -> Tensor:
        """The objective's loss; targets are the teachers' embeddings of the clean utterances."""
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
        finite = loss.detach().isfinite()  # read at the stage's end, so that no step waits for it
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(finite, value, 0.0)
        self.n_batches = self.n_batches + finite.long()
        self.n_clips += len(batch.id)
        return loss

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
        if self.lr_schedule is not None:
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
        self._read_sums()
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
                "lr": self.optimizer.param_groups[0]["lr"] if epoch else 0.0,
            },
            train_stats=self.train_stats or None,
            valid_stats=stats,
        )
        eers = [value for name, value in stats.items() if name.startswith("eer/")]
        error = sum(eers) / len(eers) if eers else stage_loss
        if epoch == 0:  # kept to go on from, and never the best
            self.checkpointer.save_and_keep_only()
            return
        self.checkpointer.save_and_keep_only(meta={"valid_error": error}, min_keys=["valid_error"])

    def _fit_valid(self, valid_set: Any, epoch: int | None, enable: bool) -> None:
        """Without validation data the epoch ends, and its checkpoint is saved, here."""
        super()._fit_valid(valid_set, epoch, enable)
        if valid_set is None:
            self.checkpointer.save_and_keep_only()

    @mark_as_saver
    def _save(self, path: str | os.PathLike[str]) -> None:
        """With the sums so far: the log of an epoch that is resumed is of all of it."""
        super()._save(path)
        self._read_sums()
        with open(path, "a", encoding="utf-8") as file:
            yaml.safe_dump({"sums": self.sums, "n_batches": self.n_batches}, file)

    @mark_as_loader
    def _recover(self, path: str | os.PathLike[str], end_of_epoch: bool) -> None:
        super()._recover(path, end_of_epoch)
        with open(path, encoding="utf-8") as file:
            saved = yaml.safe_load(file)
        self.sums, self.n_batches = saved.get("sums", {}), saved.get("n_batches", 0)
        self.embeddings = {}

    def _read_sums(self) -> None:
        """From the device to the host."""
        self.sums = {name: float(value) for name, value in self.sums.items()}
        self.n_batches = int(self.n_batches)

    def _gather_ranks(self, loss: float) -> float:
        """All ranks' validation utterances on every rank; returns the mean loss of all batches."""
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
        """As SpeechBrain does, but on CPUs only a ReDimNet has SyncBatchNorm; torch's needs a GPU.

        There any other student's processes normalise by their own utterances, and rank 0's
        statistics are kept.
        """
        if not self.distributed_launch or torch.device(self.device).type != "cpu":
            return super()._wrap_distributed()
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )
                if isinstance(module, ReDimNet):  # in place, where DDP no longer looks for a GPU
                    nn.SyncBatchNorm.convert_sync_batchnorm(module)

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
