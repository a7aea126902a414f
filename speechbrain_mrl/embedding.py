"""Embeds the clips of a CSV with one or several encoders, reading each file once."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from speechbrain_mrl.audio import audio_info, read_audio
from speechbrain_mrl.fast import arrange
from speechbrain_mrl.files import replacing

SAMPLE_RATE = 16000  # Hz
Encoder = Callable[[Tensor, Tensor], Tensor]  # wavs (B, T) and wav_lens (B,) to embeddings (B, D)
THREADS = 16  # header reading waits for the disk more than it computes
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")


class Clip(NamedTuple):
    """A segment of a recording.

    Arguments
    ---------
    id : str
        Its name in trial lists, ``speaker/session/utterance.wav``.
    wav : str
        Path of the file.
    start, stop : int
        First sample and the one after the last, at 16 kHz.
    """

    id: str
    wav: str
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def iter_clips(path: str | os.PathLike[str]) -> Iterator[Clip]:
    """One by one, the clips of a SpeechBrain CSV: ID, wav, start and stop (samples at 16 kHz)."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield Clip(row["ID"], row["wav"], int(row["start"]), int(row["stop"]))


def read_clips(path: str | os.PathLike[str]) -> list[Clip]:
    """All clips of a CSV, as from ``iter_clips``."""
    return list(iter_clips(path))


def write_clips(clips: Sequence[Clip], path: str | os.PathLike[str]) -> None:
    """Write clips as the CSV that ``read_clips`` and SpeechBrain's datasets read."""
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "start", "stop"])
        for clip in clips:
            writer.writerow([clip.id, clip.num_frames / SAMPLE_RATE, *clip[1:]])


def find_clips(folder: str | os.PathLike[str]) -> list[Clip]:
    """Every recording below a folder, whatever its structure, in the order of their paths.

    Raises
    ------
    ValueError
        If there is none, or one cannot be read.
    """
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no recording ({', '.join(AUDIO_SUFFIXES)})")
    with ThreadPool(THREADS) as pool:
        headers = pool.imap(audio_info, paths, chunksize=16)
        headers = tqdm(headers, "Reading headers", len(paths), unit="file", disable=None)
        return [
            Clip(str(path.relative_to(root)), str(path), 0, header.num_frames)
            for path, header in zip(paths, headers)
        ]


class _Batches(torch.utils.data.Dataset[Any]):
    """Padded batches of clips, their relative lengths and their indices."""

    def __init__(
        self, clips: Sequence[Clip], batches: Sequence[list[int]], max_samples: int
    ) -> None:
        self.clips, self.batches, self.max_samples = clips, batches, max_samples

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        wavs = []
        for index in self.batches[i]:
            clip = self.clips[index]
            wav = read_audio(clip.wav, clip.start, min(clip.num_frames, self.max_samples))
            if not wav.any():
                raise ValueError(f"{clip.wav} holds only zeros, nobody's voice; leave it out")
            wavs.append(wav)
        lengths = torch.tensor([len(wav) for wav in wavs])
        padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True)  # (B, T)
        return padded, lengths / padded.shape[1], self.batches[i]


def embed_clips(
    encoders: Mapping[str, Encoder],
    clips: Sequence[Clip],
    device: str = "cpu",
    batch_seconds: float = 60.0,
    max_seconds: float = 30.0,
    num_workers: int = 0,
    progress: tqdm | None = None,
) -> dict[str, Tensor]:
    """Embeddings of all clips by all encoders; each file is read and decoded once.

    Arguments
    ---------
    encoders : dict of str to torch.nn.Module or callable
        Called as ``encoder(wavs (B, T), wav_lens (B,))``, to give (B, D). A module is put into
        eval mode for the time of the call. On a CPU a ReDimNet runs as ``optimize_for_inference``
        arranges it.
    clips : sequence of Clip
        N clips.
    device : str
        Where the encoders are.
    batch_seconds : float
        Seconds of audio in a batch, padding included. Clips of like length travel together.
    max_seconds : float
        Only that much of the beginning of a clip is read.
    num_workers : int
        Processes that read and decode; 0: this one.
    progress : tqdm, optional
        A bar that is moved on by the number of clips done.

    Returns
    -------
    dict of str to torch.Tensor
        (N, D) float32 on the CPU for each encoder, in the order of ``clips``.

    Raises
    ------
    ValueError
        If a file cannot be decoded or holds only zeros, or an embedding is not finite; names the
        clip.
    """
    max_samples = int(max_seconds * SAMPLE_RATE)
    lengths = [min(clip.num_frames, max_samples) for clip in clips]
    batches = _batches_by_length(lengths, batch_seconds * SAMPLE_RATE)
    loader = DataLoader(
        _Batches(clips, batches, max_samples), batch_size=None, num_workers=num_workers
    )
    modules = [encoder for encoder in encoders.values() if isinstance(encoder, nn.Module)]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    encoders = arrange(encoders, device)
    results: dict[str, Tensor] = {}
    with torch.inference_mode():
        for wavs, wav_lens, indices in loader:
            wavs, wav_lens = wavs.to(device), wav_lens.to(device)
            for name, encoder in encoders.items():
                embeddings = encoder(wavs, wav_lens).float().cpu()  # (B, D)
                broken = ~embeddings.isfinite().all(dim=1)
                if broken.any():
                    clip = clips[indices[broken.int().argmax().item()]]
                    raise ValueError(f"{name} gives an embedding that is not finite for {clip.wav}")
                if name not in results:
                    results[name] = torch.empty(len(clips), embeddings.shape[1])
                results[name][indices] = embeddings
            if progress is not None:
                progress.update(len(indices))
    for module, mode in zip(modules, training):
        module.train(mode)
    return results


def _batches_by_length(lengths: Sequence[int], max_samples: float) -> list[list[int]]:
    """Lists of indices, longest clips first, each list at most ``max_samples`` when padded.

    No clip is padded by more than a quarter: that costs more than another batch saves.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = len(batches[-1]) + 1 if batches else 0
        if not count or count * longest > max_samples or lengths[index] < 0.8 * longest:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches
