"""What a training does unless it is told otherwise: for ``train_distilled_mrl`` and the recipe.

Keys are those of ``hparams/mrl_distill.yaml``, which says what they mean.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechbrain_mrl.training.augment import UtteranceAugmenter

DEFAULTS: dict[str, Any] = {
    "chunk_seconds": 3.0,
    "chunks_per_clip": 1,
    "max_seconds": 20.0,
    "teacher_train_type": "ft_lm",
    "teacher_dataset": "vox2",
    "batch_seconds": 120.0,
    "backbone": "b2",
    "pretrained": True,
    "student_train_type": "ptn",
    "student_dataset": "vox2",
    "embed_dim": 256,
    "mrl_dims": [64, 128, 192, 256],
    "freeze": None,
    "unfreeze": None,
    "margin_epochs": 0,
    "number_of_epochs": 30,
    "nonfinite_patience": 3,
    "batch_size": 128,
    "gradient_checkpointing": False,
    "lr": 0.0003,
    "weight_decay": 0.0001,
    "warmup": 0.05,
    "cooldown": 0.5,
    "augment_prob": 0.8,
    "ckpt_interval_minutes": 15,
    "stage": "",
}


def default_augment(
    noise_csv: str | os.PathLike[str] | None = None,
    rir_csv: str | os.PathLike[str] | None = None,
) -> UtteranceAugmenter:
    """The augmentation of a training.

    Arguments
    ---------
    noise_csv, rir_csv : path, optional
        CSV with a column ``wav``, or a folder, of noises (MUSAN) and of room impulse responses
        (RIRS_NOISES). Default: coloured noise and synthetic rooms.
    """
    from speechbrain.augment.time_domain import AddNoise  # slow to import

    from speechbrain_mrl.training import augment

    return augment.UtteranceAugmenter(
        [
            augment.Reverb(rir_csv),
            AddNoise(noise_funct=augment.Noise(noise_csv), snr_low=0, snr_high=15),
            AddNoise(noise_funct=augment.babble, snr_low=10, snr_high=20),
            augment.LowPass(),
            augment.Telephone(),
            augment.DropBands(),
            augment.DropChunks(),
        ],
        DEFAULTS["augment_prob"],
    )
