"""Synthetic room impulse responses, for augmentation where no recorded ones are given."""

import csv
from pathlib import Path

import soundfile
import torch

from speechbrain_mrl.utils import replacing

SAMPLE_RATE = 16000  # Hz


def prepare_rirs(csv_path: str, n_rirs: int = 64, seed: int = 0):
    """Write noise that decays by 60 dB in 0.15 to 0.8 s, behind a direct path, and a CSV of it.

    Does nothing if ``csv_path`` exists.

    Arguments
    ---------
    csv_path : str
        SpeechBrain CSV to write; the recordings go beside it.
    n_rirs : int
        How many.
    seed : int
        Decides all of them.
    """
    path = Path(csv_path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n_rirs):
        rt60, gap, ratio = torch.rand(3, generator=generator).tolist()
        rt60 = 0.15 + 0.65 * rt60  # seconds
        times = torch.arange(round(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
        tail = torch.randn(len(times), generator=generator) * 10 ** (-3 * times / rt60)
        tail[: round((0.002 + 0.02 * gap) * SAMPLE_RATE)] = 0  # until the first reflection
        tail *= (
            10 ** (-0.6 * ratio) / tail.square().sum().sqrt()
        )  # 0 to 12 dB below the direct path
        tail[0] = 1.0
        wav = path.parent / f"{i:03d}.wav"
        soundfile.write(wav, (0.5 * tail).numpy(), SAMPLE_RATE)
        rows.append([f"rir{i:03d}", len(tail) / SAMPLE_RATE, wav, "wav", ""])
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "wav_format", "wav_opts"])
        writer.writerows(rows)
