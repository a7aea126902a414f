"""Augmentation whose draws follow from seed, epoch and step."""

from typing import Any

import torch


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
