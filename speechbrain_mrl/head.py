"""Fits a student's linear head in closed form: before its first step, and after its last."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from speechbrain_mrl.embedding import Clip, embed_clips
from speechbrain_mrl.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.rotation import aligning_rotation, matryoshka_rotation
from speechbrain_mrl.teachers import LiveTeachers, TeacherStore
from speechbrain_mrl.verification import Trials, evaluate

logger = logging.getLogger(__name__)

FIT_CLIPS = 50_000  # clips that rotations are fitted on, at most
HEAD_CLIPS = 4_000  # training clips that a head is fitted on, at most


def fit_objective(objective: Any, store: TeacherStore | LiveTeachers) -> nn.Module:
    """Fit an objective's rotations on the teachers' embeddings of at most 50,000 clips."""
    embeddings = store.embeddings
    step = -(-len(next(iter(embeddings.values()))) // FIT_CLIPS)
    return objective.fit({name: found[::step] for name, found in embeddings.items()})


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
