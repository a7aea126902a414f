"""Resemblyzer as a teacher: an example of plugging any encoder into the YAML with ``!new:``."""

import numpy as np
import torch
import torch.nn.functional as F
from resemblyzer import VoiceEncoder
from resemblyzer.audio import wav_to_mel_spectrogram
from torch import Tensor, nn

RATE, MIN_COVERAGE = 1.3, 0.75  # windows a second, and part of the last one: embed_utterance's own


class ResemblyzerTeacher(nn.Module):
    """The GE2E encoder of PyPI's ``resemblyzer`` (256 dimensions, Apache-2.0, weights included).

    One pass for the windows of all utterances; their embeddings are those of ``embed_utterance``.

    Reference
    ---------
    Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018, arXiv:1710.10467.
    """

    def __init__(self):
        super().__init__()
        self.encoder = VoiceEncoder(device="cpu", verbose=False)

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Waveforms (B, T) at 16 kHz, and their relative lengths (B,), to embeddings (B, 256)."""
        counts = (wav_lens * wavs.shape[1]).round().long().tolist()
        windows = [self._windows(wav[:count]) for wav, count in zip(wavs, counts, strict=True)]
        found = self.encoder(torch.cat(windows).to(self.encoder.device)).to(wavs)
        of_each = found.split([len(one) for one in windows])
        return F.normalize(torch.stack([one.mean(dim=0) for one in of_each]), dim=1)

    def _windows(self, wav: Tensor) -> Tensor:
        """One waveform (T,) to the windows of its mel spectrogram, as ``embed_utterance`` cuts them."""
        of_wav, of_mel = self.encoder.compute_partial_slices(len(wav), RATE, MIN_COVERAGE)
        padded = F.pad(wav, (0, max(0, of_wav[-1].stop - len(wav))))
        mel = wav_to_mel_spectrogram(padded.float().cpu().numpy())
        return torch.from_numpy(np.stack([mel[frames] for frames in of_mel]))
