"""Augmentation that every utterance of a batch draws for itself, by torch's generator alone."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from speechbrain.augment.time_domain import pink_noise_like
from speechbrain.utils.callchains import lengths_arg_exists
from torch import Tensor, nn
from torchaudio.functional import mu_law_decoding, mu_law_encoding, resample

from speechbrain_mrl.dataio.audio import audio_info, read_audio
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, find_recordings
from speechbrain_mrl.dataio.lists import read_rows

KEPT_RIRS = 1024  # room impulse responses that stay in memory
KEPT_LENGTHS = 2**16  # recordings whose length is asked for once
READERS = 8  # threads that read recorded noise
LONGEST_ROOM = 0.8  # seconds in which a synthetic room decays by 60 dB, at most
BUTTERWORTH_ORDER = 8


class UtteranceAugmenter(nn.Module):
    """Draws for each utterance of a batch whether it is augmented, and by what.

    SpeechBrain's ``Augmenter`` draws once for a whole batch. An objective that compares the
    utterances of a batch would then see what they were given in common. Here each augmentation is
    called once, with those utterances that drew it, in the order of the list.

    Arguments
    ---------
    augmentations : sequence of torch.nn.Module
        Called as SpeechBrain's, with waveforms (n, T), and ``lengths`` (n,) if they take it; they
        return (n, T).
    augment_prob : float
        Probability that an utterance is augmented at all.
    min_augmentations, max_augmentations : int
        How many of the augmentations an augmented utterance gets, all numbers equally likely.

    Raises
    ------
    ValueError
        If arguments do not belong together, or an augmentation changes the length.

    Example
    -------
    >>> from speechbrain.augment.time_domain import AddNoise
    >>> augment = UtteranceAugmenter([Telephone(), AddNoise(snr_high=15)], max_augmentations=2)
    >>> wavs, wav_lens = augment(torch.rand(8, 16000), torch.ones(8))
    >>> wavs.shape
    torch.Size([8, 16000])
    """

    def __init__(
        self,
        augmentations: Sequence[nn.Module],
        augment_prob: float = 0.8,
        min_augmentations: int = 1,
        max_augmentations: int = 3,
    ) -> None:
        super().__init__()
        if not 1 <= min_augmentations <= max_augmentations <= len(augmentations):
            raise ValueError(
                f"min_augmentations {min_augmentations} and max_augmentations {max_augmentations} "
                f"must be from 1 to the {len(augmentations)} augmentations, in this order"
            )
        if not 0 <= augment_prob <= 1:
            raise ValueError(f"augment_prob must be from 0 to 1, got {augment_prob}")
        self.augment_prob = augment_prob
        self.min_augmentations, self.max_augmentations = min_augmentations, max_augmentations
        self.augmentations = {f"{type(a).__name__}{i}": a for i, a in enumerate(augmentations)}
        self.require_lengths = {
            name: lengths_arg_exists(one.forward) for name, one in self.augmentations.items()
        }

    def forward(self, wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, T) and their relative lengths (B,) to augmented ones of the same shapes."""
        drawn = self._draw(len(wavs))
        augmented = wavs
        for chosen, (name, augmentation) in zip(drawn.T, self.augmentations.items()):
            if not chosen.any():
                continue
            rows = chosen.nonzero().squeeze(1).to(wavs.device, non_blocking=True)
            more = {"lengths": lengths[rows]} if self.require_lengths[name] else {}
            found = augmentation(augmented[rows], **more)
            if found.shape[1:] != wavs.shape[1:]:
                raise ValueError(f"{name} must keep the length {wavs.shape[1]}, got {found.shape}")
            augmented = augmented.index_copy(0, rows, found)
        return augmented * _inside(wavs, lengths), lengths

    def _draw(self, n_utterances: int) -> Tensor:
        """Which utterance gets which augmentation, bool (B, K), on the CPU."""
        numbers = torch.randint(self.min_augmentations, self.max_augmentations + 1, (n_utterances,))
        numbers[torch.rand(n_utterances) >= self.augment_prob] = 0
        places = torch.rand(n_utterances, len(self.augmentations)).argsort(1).argsort(1)
        return places < numbers[:, None]


def _inside(wavs: Tensor, lengths: Tensor) -> Tensor:
    """Whether a sample is the utterance's, not padding, (B, T)."""
    positions = torch.arange(wavs.shape[1], device=wavs.device)
    return positions < (lengths * wavs.shape[1]).round()[:, None]


def _recordings(source: str | os.PathLike[str]) -> list[str]:
    """Paths of the recordings of a folder, or of a CSV with a column ``wav`` (SpeechBrain's)."""
    if Path(source).is_dir():
        return find_recordings(source)
    if found := sorted(row["wav"] for _, row in read_rows(source, ["wav"])):
        return found
    raise ValueError(f"{source} holds no recording")


class Noise:
    """Noise for SpeechBrain's ``AddNoise`` as its ``noise_funct``: recorded, or coloured.

    Of a recording only the piece that is added is read. Coloured noise is between white and brown.

    Arguments
    ---------
    csv_file : path, optional
        CSV with a column ``wav``, or a folder. Default: coloured noise.

    Example
    -------
    >>> Noise()(torch.zeros(2, 16000)).shape
    torch.Size([2, 16000])
    """

    def __init__(self, csv_file: str | os.PathLike[str] | None = None) -> None:
        self.paths = None if csv_file is None else _recordings(csv_file)

    def __call__(self, wavs: Tensor) -> Tensor:
        """Noise for waveforms (n, T), of their shape, a recording for each."""
        if self.paths is None:
            coloured: Tensor = pink_noise_like(wavs, 0.0, 1.0, SAMPLE_RATE)
            return coloured
        chosen = torch.randint(len(self.paths), (len(wavs),)).tolist()
        paths, length = [self.paths[number] for number in chosen], wavs.shape[1]
        spare = [max(0, _num_frames(path) - length) for path in paths]
        starts = [int(torch.randint(n + 1, ())) for n in spare]
        with ThreadPoolExecutor(READERS) as pool:  # a GPU would wait for one reader
            pieces = pool.map(partial(_piece, length=length), paths, starts)
            return torch.stack(list(pieces)).to(wavs.device)


@lru_cache(KEPT_LENGTHS)
def _num_frames(path: str) -> int:
    return audio_info(path).num_frames


def _piece(path: str, start: int, length: int) -> Tensor:
    """Samples (length,) of a recording; a shorter one is repeated."""
    wav = read_audio(path, start, length)
    return wav.repeat(-(-length // len(wav)))[:length]


def babble(wavs: Tensor, n_voices: int = 5) -> Tensor:
    """Noise for SpeechBrain's ``AddNoise``: other utterances of the batch, mixed (babble).

    Waveforms (n, T) give noise (n, T) of ``n_voices`` each, every voice at a level of its own. An
    utterance alone gets its own voice, at another time.
    """
    unit = wavs / _rms(wavs)
    noise = torch.zeros_like(wavs)
    for _ in range(n_voices):
        others = int(torch.randint(1, max(len(wavs), 2), ()))
        samples = int(torch.randint(wavs.shape[1], ()))
        levels = torch.rand(len(wavs), 1, device=wavs.device)
        noise += levels * unit.roll((others, samples), (0, 1))
    return noise


class Reverb(nn.Module):
    """Puts each utterance into a room of its own, at the level that it had.

    Arguments
    ---------
    csv_file : path, optional
        CSV with a column ``wav``, or a folder, of room impulse responses. Default: synthetic ones,
        noise that decays by 60 dB in 0.15 to 0.8 s, 0 to 12 dB below the direct path.

    Example
    -------
    >>> Reverb()(torch.rand(2, 16000)).shape
    torch.Size([2, 16000])
    """

    def __init__(self, csv_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.paths = None if csv_file is None else _recordings(csv_file)

    def forward(self, wavs: Tensor) -> Tensor:
        """Waveforms (n, T) to reverberant ones, whose direct path is not delayed."""
        rirs = self._synthetic(wavs) if self.paths is None else self._recorded(wavs)
        n_fft = 2 ** (wavs.shape[1] + rirs.shape[1] - 1).bit_length()
        spectrum = torch.fft.rfft(wavs, n_fft) * torch.fft.rfft(rirs, n_fft)
        reverberant = torch.fft.irfft(spectrum, n_fft)[:, : wavs.shape[1]]
        return reverberant * (_rms(wavs) / _rms(reverberant))

    def _recorded(self, wavs: Tensor) -> Tensor:
        assert self.paths is not None
        chosen = torch.randint(len(self.paths), (len(wavs),)).tolist()
        rirs = [_read_rir(self.paths[number])[: wavs.shape[1]] for number in chosen]
        return nn.utils.rnn.pad_sequence(rirs, batch_first=True).to(wavs.device)  # (n, L)

    def _synthetic(self, wavs: Tensor) -> Tensor:
        rt60, gap, level = torch.rand(3, len(wavs), 1, device=wavs.device)
        rt60 = 0.15 + (LONGEST_ROOM - 0.15) * rt60  # seconds
        times = torch.arange(round(LONGEST_ROOM * SAMPLE_RATE), device=wavs.device) / SAMPLE_RATE
        tail = torch.randn(len(wavs), len(times), device=wavs.device) * 10 ** (-3 * times / rt60)
        tail = tail * (times >= 0.002 + 0.02 * gap)  # until the first reflection
        tail = tail * 10 ** (-0.6 * level) / tail.norm(dim=1, keepdim=True)
        tail[:, 0] = 1.0
        return tail


@lru_cache(KEPT_RIRS)
def _read_rir(path: str) -> Tensor:
    """A room impulse response from its strongest sample on, so that nothing is delayed."""
    rir = read_audio(path)
    return rir[int(rir.abs().argmax()) :]


class Speed(nn.Module):
    """Plays each utterance faster or slower, with its pitch: another voice, for ``teacher_augment``.

    ``speeds`` are percentages, of which each utterance draws one. A shortened utterance is repeated
    to its length.

    Example
    -------
    >>> Speed([80, 125])(torch.zeros(4, 16000)).shape
    torch.Size([4, 16000])
    """

    def __init__(self, speeds: Sequence[int] = (80, 90, 110, 125)) -> None:
        super().__init__()
        if not speeds or any(speed <= 0 or speed == 100 for speed in speeds):
            raise ValueError(f"speeds must be percentages above 0 and other than 100, got {speeds}")
        self.speeds = tuple(speeds)

    def forward(self, wavs: Tensor) -> Tensor:
        """Waveforms (n, T) to ones of the same length."""
        n, length = wavs.shape
        drawn, changed = torch.randint(len(self.speeds), (n,)), wavs.clone()
        for number, speed in enumerate(self.speeds):
            rows = (drawn == number).nonzero().squeeze(1).to(wavs.device)
            if len(rows):
                found = resample(wavs[rows], SAMPLE_RATE * speed // 100, SAMPLE_RATE)
                changed[rows] = found.repeat(1, -(-length // found.shape[1]))[:, :length]
        return changed


class LowPass(nn.Module):
    """Muffles each utterance: a Butterworth low-pass without delay, its cutoff (Hz) drawn."""

    def __init__(self, cutoff_low: float = 2000.0, cutoff_high: float = 7000.0) -> None:
        super().__init__()
        self.cutoff_low, self.cutoff_high = cutoff_low, cutoff_high

    def forward(self, wavs: Tensor) -> Tensor:
        """Waveforms (n, T) to filtered ones."""
        spread = self.cutoff_high - self.cutoff_low
        cutoffs = self.cutoff_low + spread * torch.rand(len(wavs), 1, device=wavs.device)
        return _filtered(wavs, _low_pass(_frequencies(wavs), cutoffs))


class Telephone(nn.Module):
    """A telephone's band, 300 to 3400 Hz at a sampling rate of 8 kHz, in 8 bits by the µ-law."""

    def forward(self, wavs: Tensor) -> Tensor:
        """Waveforms (n, T) to what the other end receives."""
        frequencies = _frequencies(wavs)
        band = _low_pass(frequencies, 3400.0) * _low_pass(1 / frequencies, 1 / 300.0)
        narrow = resample(_filtered(wavs, band), SAMPLE_RATE, SAMPLE_RATE // 2)
        peaks = narrow.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
        decoded = mu_law_decoding(mu_law_encoding(narrow / peaks, 256), 256) * peaks
        return resample(decoded, SAMPLE_RATE // 2, SAMPLE_RATE)[:, : wavs.shape[1]]


class DropBands(nn.Module):
    """Takes one to ``max_bands`` frequency bands of ``width`` Hz out of each utterance."""

    def __init__(self, max_bands: int = 3, width: float = 400.0) -> None:
        super().__init__()
        self.max_bands, self.width = max_bands, width

    def forward(self, wavs: Tensor) -> Tensor:
        """Waveforms (n, T) to filtered ones."""
        centres = torch.rand(len(wavs), self.max_bands, 1, device=wavs.device) * SAMPLE_RATE / 2
        inside = (_frequencies(wavs) - centres).abs() < self.width / 2  # (n, bands, frequencies)
        return _filtered(wavs, ~(inside & _some(inside)).any(dim=1))


class DropChunks(nn.Module):
    """Silences one to ``max_chunks`` pieces of each utterance, of ``length_low`` to ``length_high``
    samples.
    """

    def __init__(self, max_chunks: int = 3, length_low: int = 800, length_high: int = 3200) -> None:
        super().__init__()
        self.max_chunks, self.length_low, self.length_high = max_chunks, length_low, length_high

    def forward(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Waveforms (n, T) and their relative lengths (n,) to ones with gaps."""
        starts, widths = torch.rand(2, len(wavs), self.max_chunks, 1, device=wavs.device)
        widths = self.length_low + (self.length_high - self.length_low) * widths
        starts = starts * (lengths[:, None, None] * wavs.shape[1] - widths).clamp_min(0)
        positions = torch.arange(wavs.shape[1], device=wavs.device)
        inside = (positions >= starts) & (positions < starts + widths)  # (n, chunks, T)
        return wavs.masked_fill((inside & _some(inside)).any(dim=1), 0.0)


def _some(pieces: Tensor) -> Tensor:
    """The first one to all of the pieces (n, pieces, …) of each utterance, bool (n, pieces, 1)."""
    n_utterances, n_pieces = pieces.shape[:2]
    kept = 1 + torch.rand(n_utterances, 1, 1, device=pieces.device).mul(n_pieces).floor()
    return torch.arange(n_pieces, device=pieces.device)[:, None] < kept


def _rms(wavs: Tensor) -> Tensor:
    """Of each waveform, (n, 1), not zero."""
    return wavs.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-8)


def _frequencies(wavs: Tensor) -> Tensor:
    """Hz, of what ``rfft`` gives of waveforms (n, T)."""
    return torch.fft.rfftfreq(wavs.shape[1], 1 / SAMPLE_RATE, device=wavs.device)


def _low_pass(frequencies: Tensor, cutoff: Any) -> Tensor:
    return (1 + (frequencies / cutoff) ** (2 * BUTTERWORTH_ORDER)).rsqrt()


def _filtered(wavs: Tensor, gain: Tensor) -> Tensor:
    """Waveforms (n, T) whose spectra are multiplied by a gain of each frequency."""
    return torch.fft.irfft(torch.fft.rfft(wavs) * gain, wavs.shape[1])
