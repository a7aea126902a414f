"""Reads recordings of any usual format as 16 kHz mono, whole or in segments.

WAV, FLAC, Ogg and what else libsndfile knows by its suffix is read by soundfile,
anything else (VoxCeleb2's .m4a) by PyAV, which the extra ``m4a`` installs.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_mrl.utils import require

__all__ = ["AudioInfo", "audio_info", "check_audio", "read_audio"]

_SOUNDFILE_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus"}

Source = str | os.PathLike[str] | BinaryIO  # a path, or a file that is open and has a name
CHECKED_SAMPLES = 60 * 16000  # of a long recording that are decoded at a time


class AudioInfo(NamedTuple):
    """What a file's header says about its length.

    Arguments
    ---------
    num_frames : int
        Samples that ``read_audio`` returns for the whole file, after resampling.
    sample_rate : int
        Hz, of the file itself.

    Example
    -------
    >>> AudioInfo(num_frames=16000, sample_rate=44100).sample_rate
    44100
    """

    num_frames: int
    sample_rate: int


def read_audio(
    path: Source, start: int = 0, num_frames: int = -1, sample_rate: int = 16000
) -> torch.Tensor:
    """One recording, or a segment of it, as mono at ``sample_rate``.

    Channels are averaged. A segment is the same, to rounding, whether it is
    read alone or cut from the whole recording, also where the rate changes.

    Arguments
    ---------
    path : str | os.PathLike[str] | BinaryIO
        The file, or one that is open in binary and has a ``name``. The suffix decides which library
        reads it.
    start : int
        First sample, counted at ``sample_rate``.
    num_frames : int
        Samples wanted, counted at ``sample_rate``; -1 is up to the end. A file
        that ends sooner gives fewer.
    sample_rate : int
        Hz, of the returned signal.

    Returns
    -------
    torch.Tensor
        Float32, (T,), full scale is [-1, 1].

    Raises
    ------
    ValueError
        If the file cannot be decoded, holds no sample from ``start`` on, or one that is NaN or
        infinite.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "silence.wav"
    >>> soundfile.write(path, np.zeros((8000, 2)), samplerate=8000)  # one second, stereo
    >>> read_audio(path).shape
    torch.Size([16000])
    >>> read_audio(path, start=4000, num_frames=800).shape
    torch.Size([800])
    """
    if start < 0 or (num_frames < 1 and num_frames != -1):
        raise ValueError(
            f"start must be 0 or more and num_frames 1 or more (or -1, up to the end); "
            f"got start={start}, num_frames={num_frames}"
        )
    with _decoding(path):
        read = _read_soundfile if _is_for_soundfile(path) else _read_av
        samples, native_rate, skipped_seconds = read(path, start, num_frames, sample_rate)
    wav = torch.from_numpy(samples)  # (T,)
    if native_rate != sample_rate and len(wav):
        first = start - skipped_seconds * sample_rate
        wav = resample(wav, native_rate, sample_rate)[first:]
        wav = wav if num_frames == -1 else wav[:num_frames]
    if not len(wav):
        raise ValueError(f"{_name(path)} holds no audio from sample {start} on")
    if not wav.isfinite().all():
        raise ValueError(f"{_name(path)} holds samples that are NaN or infinite")
    return wav


def audio_info(path: str | os.PathLike[str], sample_rate: int = 16000) -> AudioInfo:
    """A recording's length from its header, without decoding it.

    Arguments
    ---------
    path : str | os.PathLike[str]
        The file.
    sample_rate : int
        Hz, at which the length is counted.

    Returns
    -------
    AudioInfo
        Length at ``sample_rate`` and the file's own rate. The header of a .m4a
        can be off by one AAC frame (1024 samples).

    Raises
    ------
    ValueError
        If the header cannot be read.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "silence.flac"
    >>> soundfile.write(path, np.zeros(44100), samplerate=44100)
    >>> audio_info(path)
    AudioInfo(num_frames=16000, sample_rate=44100)
    """
    with _decoding(path):
        if _is_for_soundfile(path):
            with soundfile.SoundFile(path) as file:
                native_rate, seconds = file.samplerate, Fraction(file.frames, file.samplerate)
        else:
            with _open_av(path) as container:
                stream = container.streams.audio[0]
                if stream.duration is None:
                    raise ValueError("its header gives no duration")
                native_rate, seconds = stream.rate, stream.duration * stream.time_base
    return AudioInfo(math.ceil(seconds * sample_rate), native_rate)


def check_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """``audio_info`` of a recording that was decoded to its end.

    Other rates than 16 kHz, several channels, clipping and any length are no fault.

    Arguments
    ---------
    path : str | os.PathLike[str]
        The file.

    Returns
    -------
    AudioInfo
        As its header says.

    Raises
    ------
    ValueError
        If it cannot be decoded, ends 0.1 s or more before its header says, holds only zeros, or a
        sample that is NaN or infinite.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "silence.wav"
    >>> soundfile.write(path, np.zeros(16000), samplerate=16000)
    >>> check_audio(path)
    Traceback (most recent call last):
        ...
    ValueError: /...silence.wav holds only zeros
    """
    info = audio_info(path)
    found, silent = 0, True
    for start in range(0, info.num_frames, CHECKED_SAMPLES):
        count = min(CHECKED_SAMPLES, info.num_frames - start)
        try:
            wav = read_audio(path, start, count)
        except ValueError as error:
            if start and "holds no audio" in str(error):
                break
            raise
        found, silent = found + len(wav), silent and not wav.any()
    if found == 0 or found < info.num_frames - 1600:
        raise ValueError(
            f"{path} ends after {found / 16000:.1f} of the {info.num_frames / 16000:.1f} s that "
            "its header promises"
        )
    if silent:
        raise ValueError(f"{path} holds only zeros")
    return info


def _name(path: Source) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else path.name


def _is_for_soundfile(path: Source) -> bool:
    return Path(_name(path)).suffix.lower() in _SOUNDFILE_SUFFIXES


@contextlib.contextmanager
def _decoding(path: Source) -> Iterator[None]:
    """Errors of either library become one sentence with the path and the reason."""
    try:
        yield
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        if isinstance(path, (str, os.PathLike)) and not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path}") from error
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise ValueError(f"cannot decode {_name(path)}: {reason}") from error


def _native_segment(
    start: int, num_frames: int, sample_rate: int, native_rate: int
) -> tuple[int, int]:
    """First sample and count (-1: up to the end) to read at the file's own rate.

    Where the rate changes, that is whole seconds, which begin on a sample at
    either rate, with at least one more on each side for the resampler's filter.
    """
    if native_rate == sample_rate:
        return start, num_frames
    first_second = max(0, start // sample_rate - 1)
    if num_frames == -1:
        return first_second * native_rate, -1
    last_second = (start + num_frames) // sample_rate + 2
    return first_second * native_rate, (last_second - first_second) * native_rate


def _read_soundfile(
    path: Source, start: int, num_frames: int, sample_rate: int
) -> tuple[np.ndarray, int, int]:
    """Mono samples at the file's own rate, that rate, and how many seconds were skipped."""
    with soundfile.SoundFile(path) as file:
        first, count = _native_segment(start, num_frames, sample_rate, file.samplerate)
        file.seek(min(first, file.frames))
        samples = file.read(count, dtype="float32", always_2d=True)  # (T, channels)
        return samples.mean(axis=1), file.samplerate, first // file.samplerate


def _read_av(
    path: Source, start: int, num_frames: int, sample_rate: int
) -> tuple[np.ndarray, int, int]:
    """The same as ``_read_soundfile``, decoding from the beginning.

    A seek in AAC lands on a frame that lacks its overlap with the one before, and
    decoding is some thousand times faster than real time.
    """
    av = _av(path)
    with _open_av(path) as container:
        native_rate = container.streams.audio[0].rate
        first, count = _native_segment(start, num_frames, sample_rate, native_rate)
        last = None if count == -1 else first + count
        to_float = av.AudioResampler(format="fltp")  # sample format only, the rate stays
        blocks, decoded = [np.zeros(0, np.float32)], 0
        for frame in container.decode(audio=0):
            blocks += [part.to_ndarray().mean(axis=0) for part in to_float.resample(frame)]
            decoded += frame.samples
            if last is not None and decoded >= last:
                break
    return np.concatenate(blocks)[first:last], native_rate, first // native_rate


def _open_av(path: Source) -> Any:
    container = _av(path).open(os.fspath(path) if isinstance(path, os.PathLike) else path)
    if not container.streams.audio:
        container.close()
        raise ValueError("it holds no audio stream")
    return container


def _av(path: Source) -> Any:
    return require("av", "m4a", f"reading {_name(path)}")
