"""Steps of a SpeechBrain Brain: devices, accumulation, clipping, and batches that are not finite."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import speechbrain as sb
import torch
from torch import Tensor, nn

from speechbrain_mrl.utils import choose_device

logger = logging.getLogger(__name__)


def batch_statistics(modules: nn.Module) -> list[torch.Tensor]:
    """Running means, variances and counts of all BatchNorm layers."""
    norms = (m for m in modules.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


class SteppingBrain(sb.Brain):
    """A Brain whose steps are taken if all of their batches are finite, and change nothing if not.

    A GPU is waited for only after backward: what is finite stays there until the step needs it. A
    batch whose loss or gradients are not finite is reported, and the step that it would be part of
    is not taken; more than ``nonfinite_patience`` of them in an epoch (a run option) stop the
    training. Gradients of all parameter groups are clipped together.

    Arguments
    ---------
    run_opts, hparams : mapping, optional
        As for ``speechbrain.Brain``, but for the device: "cuda" is the GPU of this process' rank.
    **brain_arguments
        The others of ``speechbrain.Brain``.
    """

    optimizer_step_limit: Any

    def __init__(
        self,
        *,
        run_opts: Mapping[str, Any] | None = None,
        hparams: Mapping[str, Any] | None = None,
        **brain_arguments: Any,
    ) -> None:
        run_opts, hparams = run_opts or {}, hparams or {}
        given = {name: run_opts[name] for name in getattr(run_opts, "overridden_args", run_opts)}
        # SpeechBrain puts all processes that are told "cuda" on the first GPU
        given["device"] = choose_device(given.get("device") or hparams.get("device"))
        super().__init__(run_opts=given, hparams=hparams, **brain_arguments)
        if self.optimizer_step_limit is not None:  # from the command line SpeechBrain has a string
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self.statistics = batch_statistics(self.modules)
        self.kept_statistics = [buffer.clone() for buffer in self.statistics]
        self.nonfinite = False  # whether a batch of the step to come is not finite

    def fit_batch(self, batch: Any) -> Tensor:
        """One batch, and a step after the last of those that share one, if all that is finite."""
        if self.step % self.grad_accumulation_factor == 1 % self.grad_accumulation_factor:
            torch._foreach_copy_(self.kept_statistics, self.statistics)
            self.nonfinite = False
        loss = super().fit_batch(batch)
        if self.finite:
            return loss
        self._restore_statistics()
        self.nonfinite = True
        self.nonfinite_count += 1
        report = f"loss or gradients of these utterances are not finite: {', '.join(batch.id)}"
        if self.nonfinite_count > self.nonfinite_patience:
            raise ValueError(
                f"{report}; nonfinite_patience allows {self.nonfinite_patience} such batches in an "
                "epoch. Look at the utterances, or lower the learning rate"
            )
        logger.warning("%s; their step is left out, number %d", report, self.nonfinite_count)
        return loss

    def check_loss_isfinite(self, loss: Tensor) -> None:
        """Remembers it for ``fit_batch``; all processes of a distributed run go on to backward."""
        self.finite: Any = loss.detach().isfinite()

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Tensor, should_step: bool) -> None:
        """Where no step follows at once, looks for the batch whose gradients are not finite."""
        if not should_step and not self.nonfinite and not self.scaler.is_enabled():
            grads = [p.grad for p in self.modules.parameters() if p.grad is not None]
            self.finite = self.finite & torch.stack(torch._foreach_norm(grads)).isfinite().all()

    def optimizers_step(self) -> None:
        """Clips the gradients of all groups by their common norm, and steps if it is finite.

        SpeechBrain's own clips the first group alone. With a scaler, which looks itself and
        adapts its scale, a step that it skips leaves the BatchNorm statistics as they were, too.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        max_norm = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        if not self.scaler.is_enabled() and not norm.isfinite():  # on all processes alike
            # An earlier batch is to blame, if one is.
            self.finite = bool(self.finite) and self.nonfinite
            return self.zero_grad(set_to_none=True)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self._restore_statistics()
        self.zero_grad(set_to_none=True)
        self.optimizer_step += 1

    def _restore_statistics(self) -> None:
        torch._foreach_copy_(self.statistics, self.kept_statistics)

    def _should_save_intra_epoch_ckpt(self, *arguments: Any) -> bool:
        """As SpeechBrain's, but only after a step: gradients are in no checkpoint."""
        between = self.step % self.grad_accumulation_factor != 0
        return not between and super()._should_save_intra_epoch_ckpt(*arguments)
