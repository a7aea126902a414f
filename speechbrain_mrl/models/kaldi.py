"""Filter-bank features as Kaldi's runtimes compute them.

A model that is published with these features carries this file, so that it imports only torch,
torchaudio and the standard library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks

SAMPLE_RATE = 16000  # Hz
WINDOW, SHIFT, N_FFT = 400, 160, 512  # samples: 25 ms, 10 ms, the next power of two
INT16 = 32768.0  # Kaldi reads samples as integers
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps  # of a band's energy


class KaldiFbank(nn.Module):
    """``compute_features``: log mel energies with Kaldi's windows, minus each utterance's mean.

    25 ms every 10 ms in Povey's window, mirrored at the ends (``snip_edges`` off), samples as
    16-bit integers, no dither. sherpa-onnx feeds these to a model (its metadata:
    ``normalize_samples`` 0, ``feature_normalize_type`` "global-mean").

    An utterance is mirrored at its own end, and its mean is of its own frames. With ``wav_lens`` its
    frames are the same alone and in a padded batch, and padding frames are zero. Without, every
    sample counts: give utterances of one length. No ``mean_var_norm`` is needed after it.

    Arguments
    ---------
    n_mels : int
        F, mel bands.
    f_min, f_max : float
        Range of the bands, Hz.

    Example
    -------
    >>> KaldiFbank(n_mels=80)(torch.randn(2, 16000)).shape
    torch.Size([2, 100, 80])
    """

    min_samples = WINDOW
    window: Tensor
    bands: Tensor

    def __init__(self, n_mels: int = 80, f_min: float = 20.0, f_max: float = 7600.0) -> None:
        super().__init__()
        if not 0 <= f_min < f_max <= SAMPLE_RATE / 2:
            raise ValueError(
                f"f_min and f_max must be in 0 ... {SAMPLE_RATE // 2} Hz, ascending, "
                f"got {f_min} and {f_max}"
            )
        self.n_mels = n_mels
        window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85)
        bands, _ = get_mel_banks(n_mels, N_FFT, SAMPLE_RATE, f_min, f_max, 100.0, -500.0, 1.0)
        self.register_buffer("window", window.float(), persistent=False)
        # Kaldi's banks leave out the highest frequency.
        self.register_buffer("bands", F.pad(bands, (0, 1)).T.contiguous(), persistent=False)

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Features of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            16 kHz, in [-1, 1], (B, T), T at least 400 samples.
        wav_lens : torch.Tensor, optional
            Lengths relative to T, in (0, 1], (B,).

        Returns
        -------
        torch.Tensor
            (B, frames, n_mels), a frame for every 160 samples.
        """
        with torch.autocast(wavs.device.type, enabled=False):
            total = wavs.shape[1]
            frames = (total + SHIFT // 2) // SHIFT
            ends = valid = None
            if wav_lens is not None:
                ends = (wav_lens.double() * total).round().long().unsqueeze(1)  # (B, 1)
                valid = torch.arange(frames, device=wavs.device) < (ends + SHIFT // 2) // SHIFT
            feats = self._log_mel(_mirrored(INT16 * wavs.float(), frames, ends))
            if valid is None:
                return feats - feats.mean(dim=1, keepdim=True)
            mask = valid.unsqueeze(2)  # (B, frames, 1)
            mean = (feats * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
            return (feats - mean) * mask

    def _log_mel(self, signals: Tensor) -> Tensor:
        """Of signals that begin with the first window."""
        windows = signals.unfold(1, WINDOW, SHIFT)  # (B, frames, WINDOW)
        windows = windows - windows.mean(dim=2, keepdim=True)
        before = torch.cat([windows[..., :1], windows[..., :-1]], dim=2)
        windows = (windows - PREEMPHASIS * before) * self.window
        spectrum = torch.view_as_real(torch.fft.rfft(windows, N_FFT))  # (B, frames, bins, 2)
        energies = spectrum.square().sum(dim=3) @ self.bands
        return energies.clamp_min(FLOOR).log()


def _mirrored(wavs: Tensor, frames: int, ends: Tensor | None) -> Tensor:
    """Utterances with what the first and the last windows reach beyond their ends."""
    length = (frames - 1) * SHIFT + WINDOW
    places = torch.arange(length, device=wavs.device) - (WINDOW - SHIFT) // 2
    places = torch.where(places < 0, -1 - places, places)
    if ends is None:
        total = wavs.shape[1]
        return wavs[:, torch.where(places < total, places, 2 * total - 1 - places)]
    places = torch.where(places < ends, places, 2 * ends - 1 - places)  # (B, length)
    return wavs.gather(1, places.clamp_min(0))
