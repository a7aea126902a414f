"""Fits a student's output layer in closed form: before the first step, when it grows, and at the end."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from speechbrain_mrl.dataio.clips import Clip, speaker_labels, speaker_of
from speechbrain_mrl.evaluation.verification import Trials, evaluate
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.models.pretrained import ReDimNetMRL
from speechbrain_mrl.models.redimnet import MatryoshkaHead, ReDimNet
from speechbrain_mrl.models.resize import resize_model
from speechbrain_mrl.rotation import aligning_rotation, matryoshka_rotation

logger = logging.getLogger(__name__)

FIT_CLIPS = 50_000  # utterances that rotations are fitted on, at most
HEAD_CLIPS = 10_000  # training utterances that a head is fitted on, at most
SPEAKER_CLIPS = 10  # of these from one speaker at least, where the fit is to labels


def fit_objective(
    objective: Any,
    store: Any,
    valid_store: TeacherStore | None = None,
    trials: Trials | None = None,
) -> None:
    """Fit an objective's rotations on the teachers' embeddings of at most 50,000 utterances.

    The target is rotated by PCA. With trials of validation speakers, LDA of the training speakers
    takes its place if that has the lower mean EER over sizes. Rank 0 decides, so that all processes
    distil to one target.

    Arguments
    ---------
    objective : torch.nn.Module
        Called as ``MatryoshkaDistillationLoss``.
    store : TeacherStore, SegmentTeachers or LiveTeachers
        Of the training utterances; with ``trials``, not the last, and ids name the speakers.
    valid_store : TeacherStore, optional
        Of the trials' utterances.
    trials : Trials, optional
        Of validation speakers.
    """
    clip_ids, found = store.sample(FIT_CLIPS)
    objective.fit(found)
    if valid_store is not None and trials is not None and "gram" not in objective.terms:
        labels = speaker_labels(clip_ids)
        held_out = valid_store.lookup(trials.clip_ids)
        pca = _mean_eer(objective.targets(held_out), trials)
        lda = _mean_eer(objective.fit(found, labels).targets(held_out), trials)
        if lda >= pca:
            objective.fit(found)
        message = "Target of the validation trials: mean EER %.2f %% by PCA, %.2f %% by LDA"
        logger.info(message, 100 * pca, 100 * lda)
    _same_on_all_ranks(objective)


def _mean_eer(prefixes: Mapping[int, Tensor], trials: Trials) -> float:
    """Over sizes d, of embeddings (N, d) of the trials' utterances."""
    eers = [evaluate(x, trials, [d])[str(d)]["eer"] for d, x in prefixes.items()]
    return float(np.mean(eers))


def start_from(
    network: ReDimNet | MatryoshkaHead,
    embed_dim: int,
    mrl_dims: Sequence[int],
    rotate: Callable[[MatryoshkaHead], Any] | None = None,
) -> MatryoshkaHead:
    """A student with all weights of a pretrained network, rotated, then truncated if it is smaller.

    Arguments
    ---------
    network : ReDimNet or MatryoshkaEncoder
        What it starts from; not changed.
    embed_dim : int
        Dimensions of the student; those that the network lacks are small and random.
    mrl_dims : sequence of int
        Its sizes.
    rotate : callable, optional
        Called with a student of at least the network's size, to put first what matters most.
    """
    k = network.embed_dim
    sizes = mrl_dims if embed_dim >= k else [k]
    student: MatryoshkaHead
    if isinstance(network, ReDimNet):
        student = ReDimNetMRL.from_redimnet(network, sizes[-1], sizes)
    else:
        student = resize_model(network, sizes)
    if rotate is not None:
        rotate(student)
    return student if embed_dim >= k else resize_model(student, mrl_dims)


def align_head(
    student: MatryoshkaHead,
    n_dims: int,
    objective: Any,
    store: TeacherStore,
    clips: Sequence[Clip],
    **embed_options: Any,
) -> None:
    """Rotate a pretrained student's first dimensions towards the teachers' target.

    A rotation: no cosine of these dimensions changes.

    Arguments
    ---------
    student : ReDimNetMRL or MatryoshkaEncoder
        Changed in place.
    n_dims : int
        How many came with the pretrained weights, at most ``embed_dim``.
    objective : torch.nn.Module
        Fitted.
    store : TeacherStore
        Holds the ``clips``.
    clips : sequence of Clip
        A few thousand of the training utterances.
    **embed_options
        As for ``finish_head``.
    """
    targets = objective.targets(store.lookup([clip.id for clip in clips]))
    target = targets[max(targets)][:, :n_dims]
    target = nn.functional.pad(target, (0, n_dims - target.shape[1]))
    found = embed_clips({"student": student}, clips, **embed_options)["student"]
    student.rotate_head(aligning_rotation(found[:, :n_dims], target))


def finish_head(
    student: MatryoshkaHead,
    clips: Sequence[Clip],
    held_out: Sequence[Clip] = (),
    trials: Trials | None = None,
    labelled: bool = False,
    **embed_options: Any,
) -> None:
    """Centre a trained student's embeddings and choose their axes, inside its linear layer.

    Centred embeddings have mean zero, so that cosines compare what separates utterances, not what
    all speech shares. The axes are those with the lowest mean EER over sizes on held-out trials: as
    trained, principal components, or if ``labelled`` those of LDA. Without trials they are
    principal components, which change no cosine of the whole embedding.

    Arguments
    ---------
    student : ReDimNetMRL or MatryoshkaEncoder
        Changed in place.
    clips : sequence of Clip
        A few thousand of the training utterances.
    held_out : sequence of Clip
        Those of the trials.
    trials : Trials, optional
        Of validation speakers.
    labelled : bool
        Whether the ids of ``clips`` name their speakers, who have several each.
    **embed_options
        ``device``, ``batch_seconds``, ``max_seconds`` and ``num_workers`` of ``embed_clips``.
    """
    embeddings = embed_clips({"student": student}, clips, **embed_options)["student"]
    whole = [student.embed_dim]
    principal = matryoshka_rotation(embeddings, whole)
    candidates = {"principal components": principal.matrix}
    if trials is not None:
        candidates = {"axes as trained": torch.eye(student.embed_dim)} | candidates
        if labelled:
            labels = speaker_labels([clip.id for clip in clips])
            candidates["LDA"] = matryoshka_rotation(embeddings, whole, labels).matrix
    student.rotate_head(torch.eye(student.embed_dim), principal.mean)
    chosen = "principal components"
    if trials is not None:
        found = embed_clips({"student": student}, held_out, **embed_options)["student"]
        centred = trials.stack(dict(zip((clip.id for clip in held_out), found, strict=True)))
        eers = {}
        for name, axes in candidates.items():
            rotated = centred @ axes.T
            eers[name] = _mean_eer({d: rotated[:, :d] for d in student.mrl_dims}, trials)
        chosen = min(candidates, key=eers.__getitem__)
    student.rotate_head(candidates[chosen])
    logger.info("Output layer: centred, %s, fitted on %d utterances", chosen, len(clips))


def spread(clips: Sequence[Clip]) -> Sequence[Clip]:
    """At most 10,000 of the utterances, evenly over the list, on which a head is fitted."""
    return clips[:: -(-len(clips) // HEAD_CLIPS)]


def spread_speakers(clips: Sequence[Clip]) -> list[Clip]:
    """At most 10,000 of the utterances: as many of each speaker as that allows.

    Of more than 1,000 speakers, ten utterances of some of them, evenly over the list.
    """
    by_speaker = defaultdict(list)
    for clip in clips:
        by_speaker[speaker_of(clip.id)].append(clip)
    most = max(SPEAKER_CLIPS, HEAD_CLIPS // len(by_speaker))
    few = [found[:: -(-len(found) // most)] for found in by_speaker.values()]
    step = -(-sum(map(len, few)) // HEAD_CLIPS)
    return [clip for found in few[::step] for clip in found]


RIDGE = 0.01  # of the mean variance of a pooled feature


def start_new_dimensions(
    student: MatryoshkaHead,
    old_dim: int,
    objective: MatryoshkaDistillationLoss,
    teacher_embeddings: Mapping[str, Tensor],
    clips: Sequence[Clip],
    **embed_options: Any,
) -> None:
    """Fit a grown student's new dimensions, in closed form, to what its old ones do not explain.

    The objective's nested target is first rotated (``EnsembleRotation.align``), which changes no
    cosine of the whole. Its first dimensions become what the old prefix already has, the others the
    principal components of the residual. The new rows of the linear layer are then the ridge
    regression of those axes on the student's pooled features. Old rows stay bit for bit.

    Arguments
    ---------
    student : ReDimNetMRL or MatryoshkaEncoder
        As from ``expand_model``; changed in place.
    old_dim : int
        Dimensions that it had before.
    objective : MatryoshkaDistillationLoss
        Fitted to the teachers; its targets are rotated in place.
    teacher_embeddings : mapping of str to torch.Tensor
        Of the utterances, {name: (N, D_t)}.
    clips : sequence of Clip
        N clean training utterances.
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


def pooled_features(student: MatryoshkaHead, clips: Sequence[Clip], **embed_options: Any) -> Tensor:
    """Inputs of a student's linear layer for each utterance, (N, in_features), on the CPU."""
    pooled = _Pooled(student).train(student.training)
    return embed_clips({"student": pooled}, clips, **embed_options)["student"]


class _Pooled(nn.Module):
    """A student up to the input of its linear layer."""

    def __init__(self, student: MatryoshkaHead) -> None:
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

    Of the classifier the dimensions that both have, and the linear maps of the sizes that both
    have.
    """
    new, old = objective.state_dict(), previous.state_dict()
    for key, value in new.items():
        if key == "classifier.weight" and key in old and len(value) == len(old[key]):
            shared = min(value.shape[1], old[key].shape[1])
            value[:, :shared] = old[key][:, :shared]
        elif key.startswith("maps.") and key in old:
            value.copy_(old[key])


def _scaled_like(target: Tensor, prefix: Tensor) -> Tensor:
    """``target`` times the factor that brings its first dimensions nearest to ``prefix``."""
    known = target[:, : prefix.shape[1]]
    return target * ((known * prefix).sum() / known.square().sum())


def _same_on_all_ranks(*modules: nn.Module) -> None:
    """Rank 0's tensors everywhere: axes of nearly equal variance may differ between processes."""
    if not dist.is_initialized():
        return
    states = [[{key: x.cpu() for key, x in module.state_dict().items()} for module in modules]]
    dist.broadcast_object_list(states)
    for module, state in zip(modules, states[0]):
        module.load_state_dict(state)
