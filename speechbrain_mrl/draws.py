"""Random draws that follow from the seed, the epoch and the step alone.

A training that goes on in the middle of an epoch draws what it would have drawn, without a random
state in its checkpoints and however many processes read.
"""

import os
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from speechbrain_mrl.lists import ClipDataset


def draw_seed(*numbers: int) -> int:
    """32 bits of SpeechBrain's seed (``seed_everything``; its default without) and the numbers."""
    seed = int(os.environ.get("SB_GLOBAL_SEED", 563375142))
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0])


def seed_draws(*numbers: int) -> None:
    """Seed Python, numpy and torch by SpeechBrain's seed, this process' rank and some numbers.

    Example
    -------
    >>> seed_draws(3, 250)  # an epoch and a step in it
    >>> first = torch.rand(2)
    >>> seed_draws(3, 250)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    seed = draw_seed(int(os.environ.get("RANK", 0)), *numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededClips(ClipDataset):
    """A dataset whose items draw by seed, epoch and position, in whichever process.

    ``epoch`` is a tensor that reading processes see change.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, index: Any) -> Any:
        return self.draw(index, self.data[self.data_ids[index]])

    def draw(self, index: int, row: dict[str, Any]) -> Any:
        """The item of a row, drawn as that position's."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.epoch.item(), index))
            return self.pipeline.compute_outputs(row)


class _RandomBatches:
    """Endless batches of a loader's dataset, drawn by torch's generator."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __next__(self) -> Any:
        loader = self.loader
        chosen = torch.randint(len(loader.dataset), (loader.batch_size,)).tolist()
        return loader.collate_fn([loader.dataset[index] for index in chosen])


def draw_recordings(wav_augment: Any, wavs: torch.Tensor) -> None:
    """Let SpeechBrain's AddNoise and AddReverb draw recordings by torch's generator.

    Their own order would begin anew in a run that goes on.

    Arguments
    ---------
    wav_augment : Augmenter or callable
        Changed in place, those augmentations of it that have ``sorting="random"``.
    wavs : torch.Tensor
        Like the ones to come, (B, T): the CSV files are opened for them.
    """
    for key, augmentation in getattr(wav_augment, "augmentations", {}).items():
        if getattr(augmentation, "csv_file", None) is None or augmentation.sorting != "random":
            continue
        lengths = [wavs.new_ones(len(wavs))] if wav_augment.require_lengths[key] else []
        augmentation(wavs, *lengths)
        for name in ("noise_data", "rir_data"):
            if hasattr(augmentation, name):
                setattr(augmentation, name, _RandomBatches(augmentation.data_loader))


def batch_statistics(modules: nn.Module) -> list[torch.Tensor]:
    """Running means, variances and counts of all BatchNorm layers."""
    norms = (m for m in modules.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]
