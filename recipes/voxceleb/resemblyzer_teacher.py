"""Resemblyzer as a teacher: an example of plugging any encoder into the YAML with ``!new:``."""

import numpy as np
import torch
from resemblyzer import VoiceEncoder
from torch import Tensor, nn


class ResemblyzerTeacher(nn.Module):
    """The GE2E encoder of PyPI's ``resemblyzer`` (256 dimensions, Apache-2.0, weights included).

    Reference
    ---------
    Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018, arXiv:1710.10467.
    """

    def __init__(self):
        super().__init__()
        self.encoder = VoiceEncoder(device="cpu", verbose=False)

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Waveforms (B, T) at 16 kHz, and their relative lengths (B,), to embeddings (B, 256)."""
        embeddings = []
        for wav, length in zip(wavs, wav_lens, strict=True):
            samples = wav[: round(length.item() * wavs.shape[1])].cpu().numpy()
            embeddings.append(self.encoder.embed_utterance(samples.astype(np.float32)))
        return torch.from_numpy(np.stack(embeddings)).to(wavs)
