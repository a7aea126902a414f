"""Reads recordings of any usual format as 16 kHz mono, whole or in segments.

What a file is follows from its content, never from its suffix. WAV, FLAC, Ogg and what else
libsndfile reads exactly is read by soundfile, anything else (MP3, M4A, WebM) by PyAV.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from speechbrain_mrl.dataio.decoders import Recording, by_av, by_soundfile

__all__ = ["AudioInfo", "audio_info", "check_audio", "read_audio", "read_sound", "sound_frames"]

Source = str | os.PathLike[str] | BinaryIO  # a path, or a file that is open and has a name
RATES = 4000, 384000  # Hz, of a recording that may hold speech
FULL_SCALE = 2.0**31  # no format's samples are larger
CANCELLED = 1e-4  # of the channels' power; their mean has less where they are in opposite phase
FRAME = 400  # samples, 25 ms, of which the level tells sound from silence
SILENCE = 1e-4  # RMS of a silent frame, -80 dB of full scale; or 40 dB below a loud frame
LARGEST_KERNEL = 1000  # phases of torchaudio's resampler, which keeps a filter for each


class AudioInfo(NamedTuple):
    """A recording's length and rate."""

    num_frames: int  # samples that ``read_audio`` returns for the whole file, after resampling
    sample_rate: int  # Hz, of the file itself


def read_audio(
    path: Source, start: int = 0, num_frames: int = -1, sample_rate: int = 16000
) -> torch.Tensor:
    """One recording, or a segment of it, as mono at ``sample_rate``.

    Channels are averaged; of channels in opposite phase, which would cancel, the first is taken.
    A segment is the same, to rounding, whether it is read alone or taken from the whole recording,
    also where the rate changes. What PyAV reads is decoded from its beginning.

    Arguments
    ---------
    path : str | os.PathLike[str] | BinaryIO
        The file, or one that is open in binary and has a ``name``.
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
        If the file cannot be decoded, its rate is outside 4 to 384 kHz, it holds no sample from
        ``start`` on, or one that is NaN, infinite or beyond any format's full scale.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> import soundfile
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
            f"got start={start}, num_frames={num_frames} for {_name(path)}"
        )
    with _opened(path) as recording:
        rate = recording.rate
        first, count = _native_segment(start, num_frames, sample_rate, rate)
        wav = torch.from_numpy(_mono(recording.blocks(first, count)))  # (T,)
    if rate != sample_rate and len(wav):
        wav = _resample(wav, rate, sample_rate)[start - first // rate * sample_rate :]
        wav = wav if num_frames == -1 else wav[:num_frames]
    if not len(wav):
        raise ValueError(f"{_name(path)} holds no audio from sample {start} on")
    if not (wav.abs() <= FULL_SCALE).all():
        raise ValueError(f"{_name(path)} {_BEYOND}")
    return wav


def read_sound(path: Source, start: int, stop: int, length: int) -> torch.Tensor:
    """At most ``length`` samples of an utterance at 16 kHz, (T,): its first that are not all zeros.

    Then those from its first sample that is not zero, or its last ``length`` if fewer are left.

    Raises
    ------
    ValueError
        If the whole utterance is zeros, or ``read_audio`` refuses it.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "late.wav"
    >>> soundfile.write(path, np.repeat([0, 0.5], [40000, 8000]), 16000)
    >>> read_sound(path, 0, 48000, length=16000).count_nonzero().item()
    8000
    """
    for first in range(start, stop, length):
        wav = read_audio(path, first, min(length, stop - first))
        if wav.any():
            if first == start:
                return wav
            sound = first + int(wav.ne(0).int().argmax())
            return read_audio(path, max(start, min(sound, stop - length)), length)
        if len(wav) < length:  # the file ends
            break
    raise ValueError(f"{_name(path)} holds only zeros; leave it out")


def sound_frames(wav: Tensor) -> Tensor:
    """Which frames of 25 ms of a waveform (T,) at 16 kHz are not silent, bool (⌈T / 400⌉,).

    Example
    -------
    >>> sound_frames(torch.tensor([0.0] * 800 + [0.5, -0.5] * 400)).tolist()
    [False, False, True, True]
    """
    frames = torch.nn.functional.pad(wav, (0, -len(wav) % FRAME)).reshape(-1, FRAME)
    levels = frames.square().mean(dim=1).sqrt()
    return levels > max(SILENCE, 0.01 * levels.quantile(0.95).item())


def audio_info(path: str | os.PathLike[str], sample_rate: int = 16000) -> AudioInfo:
    """A recording's length, from its header where that counts samples, else by decoding it.

    Headers of WAV, FLAC, Ogg and M4A count; those of MP3 and WebM estimate or say nothing. The length
    is counted at ``sample_rate``, Hz; that of a .m4a can be off by one AAC frame (1024 samples).

    Raises
    ------
    ValueError
        If the file cannot be read or holds no sample.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "silence.flac"
    >>> soundfile.write(path, np.zeros(44100), samplerate=44100)
    >>> audio_info(path)
    AudioInfo(num_frames=16000, sample_rate=44100)
    """
    with _opened(path) as recording:
        frames = recording.frames
        if frames is None:
            frames = sum(block.shape[1] for block in recording.blocks())
        return _info(recording, frames, sample_rate)


def check_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """``audio_info`` of a recording that was decoded to its end.

    Other rates than 16 kHz, several channels, clipping and any length are no fault.

    Raises
    ------
    ValueError
        If it cannot be decoded, ends 0.1 s or more before its header says, holds only zeros, or a
        sample that ``read_audio`` refuses.
    FileNotFoundError
        If there is no such file.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "silence.wav"
    >>> soundfile.write(path, np.zeros(16000), samplerate=16000)
    >>> check_audio(path)
    Traceback (most recent call last):
        ...
    ValueError: /...silence.wav holds only zeros
    """
    found, silent = 0, True
    with _opened(path) as recording:
        for block in recording.blocks():
            if not (np.abs(block) <= FULL_SCALE).all():
                raise ValueError(f"it {_BEYOND}")
            found, silent = found + block.shape[1], silent and not block.any()
        info = _info(recording, recording.frames or found)
        seconds, promised = found / recording.rate, recording.promised_seconds
    if seconds <= promised - 0.1:
        raise ValueError(
            f"{path} ends after {seconds:.1f} of the {promised:.1f} s that its header promises"
        )
    if silent:
        raise ValueError(f"{path} holds only zeros")
    return info


_BEYOND = "holds samples that are NaN, infinite or beyond any format's full scale"


def _name(path: Source) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else path.name


@contextlib.contextmanager
def _opened(path: Source) -> Iterator[Recording]:
    """A recording; whatever a library says of it is one sentence with the path and the reason."""
    with contextlib.ExitStack() as stack:
        if isinstance(path, (str, os.PathLike)) and not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path}")
        try:
            if isinstance(path, (str, os.PathLike)):
                file: BinaryIO = stack.enter_context(open(path, "rb", buffering=0))
            else:
                file = path
            recording = by_soundfile(file, stack) or by_av(file, stack)
            if not RATES[0] <= recording.rate <= RATES[1]:
                raise ValueError(
                    f"its sample rate is {recording.rate} Hz, it must be {RATES[0]} to {RATES[1]}"
                )
            yield recording
        except ImportError:
            raise
        except Exception as error:  # of libsndfile, or of any of FFmpeg's decoders
            found = getattr(error, "error_string", None) or getattr(error, "strerror", None)
            raise ValueError(f"cannot decode {_name(path)}: {found or error}") from error


def _info(recording: Recording, frames: int, sample_rate: int = 16000) -> AudioInfo:
    if frames == 0:
        raise ValueError("it holds no sample")
    return AudioInfo(math.ceil(Fraction(frames * sample_rate, recording.rate)), recording.rate)


def _mono(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of the channels, or the first if they cancel each other; (T,)."""
    means, firsts = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    together = apart = 0.0  # power of the mean, and of the channels
    for block in blocks:  # (channels, T)
        means.append(block.mean(axis=0))
        firsts.append(block[0])
        if len(block) > 1:
            together += float(np.vdot(means[-1], means[-1]))
            apart += float(np.vdot(block, block)) / len(block)
    return np.concatenate(firsts if together < CANCELLED * apart else means)


def _resample(wav: Tensor, rate: int, sample_rate: int) -> Tensor:
    period = math.gcd(rate, sample_rate)
    if max(rate, sample_rate) // period <= LARGEST_KERNEL:
        return resample(wav, rate, sample_rate)
    from scipy.signal import resample_poly  # slow to import

    return torch.from_numpy(
        resample_poly(wav.numpy(), sample_rate // period, rate // period)
    ).float()


def _native_segment(
    start: int, num_frames: int, sample_rate: int, native_rate: int
) -> tuple[int, int]:
    """First sample and count (-1: up to the end) to read at the file's own rate.

    Where the rate changes, whole seconds are read, which begin on a sample at either rate. There is
    at least one more on each side, for the resampler's filter.
    """
    if native_rate == sample_rate:
        return start, num_frames
    first_second = max(0, start // sample_rate - 1)
    if num_frames == -1:
        return first_second * native_rate, -1
    last_second = (start + num_frames) // sample_rate + 2
    return first_second * native_rate, (last_second - first_second) * native_rate
