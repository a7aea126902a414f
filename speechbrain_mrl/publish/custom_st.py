"""Lets ``SentenceTransformer(folder, trust_remote_code=True)`` load the model of this folder.

Embeddings are SpeechBrain's, ``EncoderClassifier.encode_batch``; ``truncate_dim`` gives a prefix.
Inputs are ``{"array": waveform, "sampling_rate": hertz}``, waveforms at 16 kHz, or paths.
"""

import os
import shutil
from typing import Any

import torch
import torchaudio
from huggingface_hub import snapshot_download
from speechbrain.dataio.dataio import read_audio, read_audio_info
from speechbrain.inference.classifiers import EncoderClassifier

SAMPLE_RATE = 16000  # Hz


class SpeakerEncoder(torch.nn.Module):
    """The only module of a ``SentenceTransformer``."""

    modalities = ["audio"]
    save_in_root = True

    def __init__(self, folder: str) -> None:
        super().__init__()
        model = EncoderClassifier.from_hparams(source=folder)
        self.folder, self.mods = folder, model.mods
        self.embed_dim = model.hparams.target_dim

    @classmethod
    def load(cls, source: str, revision: Any = None, token: Any = None, **options: Any) -> Any:
        """A folder, or a model of the Hub."""
        if not os.path.isdir(source):
            source = snapshot_download(
                source,
                revision=revision,
                token=token,
                cache_dir=options.get("cache_folder"),
                local_files_only=options.get("local_files_only", False),
            )
        return cls(source)

    def save(self, output_path: str, **options: Any) -> None:
        shutil.copytree(self.folder, output_path, dirs_exist_ok=True)

    def get_embedding_dimension(self) -> int:
        return int(self.embed_dim)

    def preprocess(
        self, inputs: Any, prompt: Any = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        """Utterances of any lengths, padded, and their relative lengths."""
        # Each is made long enough for the network on its own, not only as part of a longer batch.
        wavs = [self.mods.compute_features(_waveform(one))[0] for one in inputs]
        lengths = torch.tensor([float(len(wav)) for wav in wavs])
        padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        return {"wavs": padded, "wav_lens": lengths / padded.shape[1]}

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mods: Any = self.mods
        lens = features["wav_lens"]
        wavs = mods.mean_var_norm(features["wavs"], lens)
        features["sentence_embedding"] = mods.embedding_model(wavs, lens).squeeze(1)
        return features


def _waveform(one: Any) -> torch.Tensor:
    """An input at 16 kHz, (T,); channels are averaged."""
    if isinstance(one, dict) and set(one) == {"audio"}:
        one = one["audio"]
    rate: Any = SAMPLE_RATE
    if isinstance(one, str):
        one, rate = read_audio(one), read_audio_info(one).sample_rate
    elif isinstance(one, dict):
        if not {"array", "sampling_rate"} <= set(one):
            raise ValueError(
                f"an input of the keys {sorted(one)} needs 'array', a waveform, and 'sampling_rate', "
                "hertz"
            )
        one, rate = one["array"], one["sampling_rate"]
    wav = torch.as_tensor(one)
    if not wav.is_floating_point() or wav.ndim not in (1, 2) or not wav.numel():
        raise ValueError(
            "array must be float in [-1, 1], (T,) or (channels, T), and not empty, got "
            f"{wav.dtype} {tuple(wav.shape)}; divide integers first"
        )
    if not wav.isfinite().all():
        raise ValueError("array has samples that are not finite; leave the recording out")
    if not rate > 0:
        raise ValueError(f"sampling_rate must be positive, in hertz, got {rate}")
    if wav.ndim == 2:
        wav = wav.mean(dim=0 if wav.shape[0] < wav.shape[1] else 1)
    return torchaudio.functional.resample(wav.float(), rate, SAMPLE_RATE)
