"""Gradient checkpointing: a stage's activations are computed again in backward, and not kept."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechbrain_mrl.models.redimnet import ReDimNet


class _KeepsBuffers:
    """A context in which a module's buffers may change, and after which they are as before."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(module.buffers())

    def __enter__(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *_: Any) -> None:
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)


def checkpoint_gradients(student: nn.Module) -> None:
    """Let the stages of a ReDimNet keep their inputs alone for backward, which computes the rest.

    Losses, gradients and BatchNorm statistics stay what they are; those of BatchNorm are updated by
    the first pass only.

    Arguments
    ---------
    student : ReDimNet
        Changed in place; of the second generation too.

    Raises
    ------
    ValueError
        If it is another network.
    """
    if not isinstance(student, ReDimNet):
        raise ValueError(
            f"gradient_checkpointing is for ReDimNets, got {type(student).__name__}; "
            "set it to False and take a smaller batch_size"
        )
    for name, stage in student.backbone.named_children():
        if name.startswith("stage"):
            stage.forward = partial(_checkpointed, stage, stage.forward)


def _checkpointed(
    stage: nn.Module,
    forward: Callable[..., Tensor],
    x: Tensor | list[Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    if not stage.training or not torch.is_grad_enabled():
        return forward(x, mask)
    if isinstance(x, list):
        x = x[:]  # later stages add their maps to it
    contexts = partial(_contexts, stage)
    out: Tensor = checkpoint(forward, x, mask, use_reentrant=False, context_fn=contexts)
    return out


def _contexts(stage: nn.Module) -> tuple[Any, Any]:
    """Of the first pass, and of the one in backward."""
    return nullcontext(), _KeepsBuffers(stage)
