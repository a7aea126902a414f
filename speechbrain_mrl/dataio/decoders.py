"""Opens a recording with the library that reads its format exactly: soundfile, else PyAV."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from speechbrain_mrl.utils import require

BLOCK = 2**20  # samples that are decoded at a time
STREAMED = 0x7F000000  # bytes; a header with so many was written before its end was known


class Recording(NamedTuple):
    """An open recording: ``blocks(first, count)`` decodes it, float32 (channels, T) at ``rate``."""

    rate: int
    frames: int | None  # samples, as far as the header counts them
    promised_seconds: float  # of the whole recording where the header says it, else 0
    blocks: Callable[..., Iterator[np.ndarray]]


def by_soundfile(file: BinaryIO, stack: contextlib.ExitStack) -> Recording | None:
    """None for what libsndfile cannot read, or not exactly."""
    head = file.read(3)
    if head == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return None  # MP3: it takes an estimate for the length
    if head == b"Ogg" and b"OggS\0\2" in file.read():
        return None  # several streams one after the other: it reads the first
    file.seek(0)
    try:  # a number in place of the path, or its suffix would count
        # A duplicate: libsndfile before 1.2.1 closes what it cannot read, whatever it is told.
        handle = os.dup(file.fileno()) if _has_number(file) else file
        found = stack.enter_context(soundfile.SoundFile(handle))
    except (soundfile.SoundFileError, TypeError):
        return None
    if not found.seekable() or not 0 < found.frames < 2**62:  # a header without a count
        return None
    frames, rate = found.frames, found.samplerate

    def blocks(first: int = 0, count: int = -1) -> Iterator[np.ndarray]:
        left = frames - first if count == -1 else min(count, frames - first)
        found.seek(min(first, frames))
        while left > 0 and len(block := found.read(min(left, BLOCK), "float32", always_2d=True)):
            left -= len(block)
            yield block.T

    seconds = frames / rate
    sizes = re.findall(r"(\d+) \(should be (\d+)\)", found.extra_info)
    if sizes and int(sizes[-1][0]) < STREAMED:  # bytes in the header, and in the file
        seconds *= int(sizes[-1][0]) / max(1, int(sizes[-1][1]))
    return Recording(rate, frames, seconds, blocks)


def _has_number(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:  # in memory
        return False


def by_av(file: BinaryIO, stack: contextlib.ExitStack) -> Recording:
    purpose = f"reading {file.name}, which is no WAV, FLAC or Ogg that soundfile reads,"
    av = require("av", purpose)
    file.seek(0)
    # From a playlist nothing else is opened.
    container = stack.enter_context(av.open(file, options={"protocol_whitelist": "none"}))
    if not container.streams.audio:
        raise ValueError("it holds no audio stream")
    stream = container.streams.audio[0]
    rate, name, seconds, frames = stream.rate, container.format.name, Fraction(0), None
    if name.startswith("mov") and stream.duration:  # M4A and MP4 list every packet
        seconds = stream.duration * stream.time_base
        frames = math.ceil(seconds * rate)
    elif name.startswith("matroska") and len(container.streams) == 1:
        seconds = Fraction(container.duration or 0, av.time_base)

    def blocks(first: int = 0, count: int = -1) -> Iterator[np.ndarray]:
        """From the beginning: an AAC decoder's noise (PNS) depends on all frames before."""
        end, position, kind = math.inf if count == -1 else first + count, 0, None
        for frame in _frames(av, container, name):
            if frame.sample_rate != rate:
                raise ValueError(f"its sample rate changes from {rate} to {frame.sample_rate} Hz")
            if (frame.format.name, frame.layout.name) != kind:
                kind = frame.format.name, frame.layout.name
                to_float = av.AudioResampler(format="fltp")  # sample format only
            if position + frame.samples <= first:
                position += frame.samples
                continue
            for part in to_float.resample(frame):
                block = part.to_ndarray()
                begin, position = position, position + block.shape[1]
                if position > first:
                    yield block[:, max(0, first - begin) : int(min(end - begin, block.shape[1]))]
            if position >= end:
                return

    return Recording(rate, frames, float(seconds), blocks)


def _frames(av: Any, container: Any, name: str) -> Iterator[Any]:
    """Decoded frames; of MP3s that were joined, the one is left out that lacks what it builds on."""
    broken = 0
    for packet in container.demux(audio=0):
        try:
            yield from packet.decode()
            broken = 0
        except av.error.InvalidDataError:
            broken += 1
            if name != "mp3" or broken > 2:
                raise
