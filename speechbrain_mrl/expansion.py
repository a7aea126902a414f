"""Gives a student more coordinates, or fewer, and starts the new ones from what they are to learn."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speechbrain_mrl.embedding import Clip, embed_clips
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.rotation import check_mrl_dims

RIDGE = 0.01  # of the mean variance of a pooled feature


def expand_model(model: MatryoshkaReDimNet, new_dim: int) -> MatryoshkaReDimNet:
    """A copy with ``new_dim`` coordinates: the old ones as they were, new ones small and random.

    ``start_new_coordinates`` gives the new ones a better start.

    Arguments
    ---------
    model : MatryoshkaReDimNet
        Not changed.
    new_dim : int
        More than ``model.embed_dim``; becomes the last of ``mrl_dims``.

    Raises
    ------
    ValueError
        If ``new_dim`` is not larger.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> small = ReDimNetMRL(embed_dim=64, mrl_dims=(64,), backbone="b0")
    >>> expand_model(small, 128).mrl_dims
    (64, 128)
    """
    if new_dim <= model.embed_dim:
        raise ValueError(
            f"new_dim must be larger than the model's embed_dim {model.embed_dim}, got {new_dim}"
        )
    return resize_model(model, (*model.mrl_dims, new_dim))


def resize_model(model: MatryoshkaReDimNet, mrl_dims: Sequence[int]) -> MatryoshkaReDimNet:
    """A copy with other sizes: coordinates past the last are cut, missing ones small and random.

    Arguments
    ---------
    model : MatryoshkaReDimNet
        Not changed.
    mrl_dims : sequence of int
        Ascending; the last one becomes ``embed_dim``.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(64,), backbone="b0")
    >>> resize_model(model, (16, 32)).linear.weight.equal(model.linear.weight[:32])
    True
    """
    mrl_dims = check_mrl_dims(mrl_dims)
    embed_dim = mrl_dims[-1]
    model = copy.deepcopy(model).cpu()
    if embed_dim >= model.embed_dim:
        return type(model).from_redimnet(model, embed_dim, mrl_dims)
    smaller = type(model)(embed_dim, mrl_dims, model.model_config)
    state_dict = model.state_dict()
    state_dict |= {key: state_dict[key][:embed_dim] for key in ("linear.weight", "linear.bias")}
    smaller.load_state_dict(state_dict)
    return smaller


def start_new_coordinates(
    student: MatryoshkaReDimNet,
    old_dim: int,
    objective: MatryoshkaDistillationLoss,
    teacher_embeddings: Mapping[str, Tensor],
    clips: Sequence[Clip],
    **embed_options: Any,
) -> None:
    """Fit a grown student's new coordinates, in closed form, to what its old ones do not explain.

    The objective's nested target is first turned, without changing a cosine of the whole, so that
    its first coordinates are what the old prefix already has and the rest are the principal axes of
    the residual (``EnsembleRotation.align``). The new rows of the linear layer are then the ridge
    regression of those axes on the student's pooled features. Old rows stay bit for bit.

    Arguments
    ---------
    student : MatryoshkaReDimNet
        As from ``expand_model``; changed in place.
    old_dim : int
        Coordinates that it had before.
    objective : MatryoshkaDistillationLoss
        Fitted to the teachers; its targets are turned in place.
    teacher_embeddings : mapping of str to torch.Tensor
        Of the clips, {name: (N, D_t)}.
    clips : sequence of Clip
        N clean training clips.
    **embed_options
        Of ``embed_clips``.
    """
    pooled = pooled_features(student, clips, **embed_options)
    with torch.no_grad():
        weight, bias = student.linear.weight.cpu(), student.linear.bias.cpu()
        prefix = pooled @ weight[:old_dim].T + bias[:old_dim]  # (N, old_dim)
        objective.align(teacher_embeddings, prefix)
        target = objective.targets(teacher_embeddings)[student.embed_dim]
        fit_new_rows(student.linear, old_dim, pooled, _scaled_like(target, prefix)[:, old_dim:])
    _same_on_all_ranks(student, objective)


def pooled_features(
    student: MatryoshkaReDimNet, clips: Sequence[Clip], **embed_options: Any
) -> Tensor:
    """What the linear layer of a student hears of each clip, (N, 2 * channels), on the CPU."""
    pooled = _Pooled(student).train(student.training)
    return embed_clips({"student": pooled}, clips, **embed_options)["student"]


class _Pooled(nn.Module):
    """A student up to the input of its linear layer."""

    def __init__(self, student: MatryoshkaReDimNet) -> None:
        super().__init__()
        self.student = student

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        found = []
        hook = self.student.linear.register_forward_pre_hook(
            lambda module, arguments: found.append(arguments[0])
        )
        try:
            self.student(wavs, wav_lens)
        finally:
            hook.remove()
        return found[0]


@torch.no_grad()
def fit_new_rows(
    linear: nn.Linear, old_dim: int, features: Tensor, targets: Tensor, ridge: float = RIDGE
) -> None:
    """Set a linear layer's rows from ``old_dim`` on to the ridge regression of targets on features.

    Arguments
    ---------
    linear : torch.nn.Linear
        Changed in place; its first ``old_dim`` rows are not.
    old_dim : int
        Rows to leave.
    features : torch.Tensor
        Inputs of the layer, (N, in_features).
    targets : torch.Tensor
        What the new rows shall give, (N, out_features - old_dim).
    ridge : float
        Penalty on the squared weights, as a fraction of the mean variance of a feature.

    Example
    -------
    >>> linear, features = nn.Linear(2, 2), torch.randn(50, 2)
    >>> fit_new_rows(linear, 1, features, features[:, :1] + 3 * features[:, 1:] + 4, ridge=0)
    >>> round(linear(torch.tensor([[1.0, 2.0]]))[0, 1].item(), 3)
    11.0
    """
    x, y = features.double(), targets.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    moment = x.T @ x
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    weight = torch.linalg.solve(moment, x.T @ y).T  # (out - old_dim, in)
    linear.weight[old_dim:] = weight.to(linear.weight)
    linear.bias[old_dim:] = (y_mean - weight @ x_mean).to(linear.bias)


@torch.no_grad()
def carry_over(objective: nn.Module, previous: nn.Module) -> None:
    """What an earlier stage's objective learned, as far as sizes and classes are the same.

    Of the classifier the coordinates that both have, and the linear maps of the sizes that both have.
    """
    new, old = objective.state_dict(), previous.state_dict()
    for key, value in new.items():
        if key == "classifier.weight" and key in old and len(value) == len(old[key]):
            shared = min(value.shape[1], old[key].shape[1])
            value[:, :shared] = old[key][:, :shared]
        elif key.startswith("maps.") and key in old:
            value.copy_(old[key])


def _scaled_like(target: Tensor, prefix: Tensor) -> Tensor:
    """``target`` times the factor that brings its first coordinates nearest to ``prefix``."""
    known = target[:, : prefix.shape[1]]
    return target * ((known * prefix).sum() / known.square().sum())


def _same_on_all_ranks(*modules: nn.Module) -> None:
    """Rank 0's tensors everywhere: axes of nearly equal variance may differ between processes."""
    if not dist.is_initialized():
        return
    states = [[module.state_dict() for module in modules]]
    dist.broadcast_object_list(states)
    for module, state in zip(modules, states[0]):
        module.load_state_dict(state)
