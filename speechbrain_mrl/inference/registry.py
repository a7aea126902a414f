"""Names the speaker of a recording, or nobody: enrolled voices, decided by the model's threshold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, clips_at
from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds, thresholds_of
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.utils import check_device, replacing, writing

FILE = "registry.safetensors"
FRAME = 400  # samples, 25 ms
SILENCE = 1e-4  # RMS, -80 dB of full scale; and 40 dB below a recording's loud frames
MIN_SECONDS = 1.0  # of sound
FALSE_ALARMS = 0.05  # of recordings of speakers who are not enrolled, how many may be named
MIN_MARGIN = 0.05  # between the two best speakers

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Identified(NamedTuple):
    """Who speaks: ``name``, or None with the ``reason``.

    ``score`` is the cosine with the most similar speaker, ``margin`` that minus the next one's,
    ``threshold`` the score from which on that speaker is named, ``seconds`` the sound in the
    recording. What cannot be told is None.
    """

    name: str | None
    score: float | None
    margin: float | None
    threshold: float | None
    seconds: float
    reason: str | None


class Verified(NamedTuple):
    """Whether a recording is of the speaker it is said to be of; if not ``accepted``, the ``reason``."""

    accepted: bool
    score: float | None
    threshold: float
    seconds: float
    reason: str | None


class VoiceRegistry:
    """Speakers enrolled by name, of whom a recording is one, or nobody (open-set identification).

    A speaker is the mean of L2-normalised embeddings; of each only the sum, the number of
    recordings and their seconds are kept. Among N speakers, each comparison may name a speaker who
    is not enrolled in one of 20 N cases: the threshold is the model's own for that rate, scaled as
    quantiles of a normal distribution are. It is never below that of the equal error rate, and
    higher for a mean of several recordings, which scores higher with everybody.

    Arguments
    ---------
    source : str, path or torch.nn.Module
        The model, whatever ``load_teacher`` takes.
    target_dim : int, optional
        One of the model's sizes. Default: the largest.
    threshold : float, optional
        Lowest cosine of one speaker, used as it is. Default: as above, of a published model with a
        report.
    device : str
        Where the model runs.

    Raises
    ------
    ValueError
        If the model lacks the size, or brings no threshold and none is given.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> noise = torch.rand(2, 32000, generator=torch.Generator().manual_seed(0)) - 0.5
    >>> for name, wav in zip(("low", "high"), (noise[0].cumsum(0) / 500, noise[1])):
    ...     soundfile.write(folder / f"{name}.wav", wav.numpy(), 16000)
    >>> class Roughness(torch.nn.Module):
    ...     def forward(self, wavs, wav_lens):
    ...         return torch.stack([wavs.std(1), wavs.diff(dim=1).std(1)], dim=1)
    >>> registry = VoiceRegistry(Roughness(), threshold=0.9)
    >>> registry.enroll("ann", folder / "high.wav")
    >>> registry.identify(folder / "high.wav").name
    'ann'
    >>> registry.identify(folder / "low.wav").name is None
    True
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | nn.Module,
        target_dim: int | None = None,
        threshold: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = check_device(device)
        self.encoder = load_teacher(source, device=self.device)
        here = isinstance(source, (str, os.PathLike)) and os.path.exists(source)
        self.source = os.path.abspath(source) if here else source  # type: ignore[arg-type]
        self.fingerprint = fingerprint(self.encoder)
        second = torch.zeros(1, SAMPLE_RATE, device=self.device)
        with torch.inference_mode():
            full_size = self.encoder(second, torch.ones(1, device=self.device)).shape[-1]
        sizes, _ = sizes_and_thresholds(self.encoder, full_size)
        self.target_dim = sizes[-1] if target_dim is None else target_dim
        if self.target_dim not in sizes:
            raise ValueError(
                f"target_dim must be one of {sizes}, the model's sizes, got {target_dim}"
            )
        self._cosines = thresholds_of(self.encoder).get(self.target_dim, {})
        if threshold is None and not self._cosines:
            raise ValueError(
                f"the model brings no threshold for {self.target_dim} dimensions; give threshold, the "
                "lowest cosine of one speaker, fitted to recordings like yours"
            )
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine, it must lie in -1..1, got {threshold}")
        self.threshold = threshold
        self._sums = torch.zeros(0, self.target_dim)
        self.speakers: dict[str, tuple[int, float]] = {}  # recordings and seconds, by name

    def __len__(self) -> int:
        return len(self.speakers)

    def enroll(self, name: str, recordings: Paths) -> None:
        """Add a speaker, or recordings to one: a file, a folder, or several of them.

        Raises
        ------
        ValueError
            If there is no recording, or one is silent, too short or damaged; nothing is added then.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name must be a text that is not empty, got {name!r}")
        if isinstance(recordings, (str, os.PathLike)):
            recordings = [recordings]
        clips = clips_at([os.fspath(path) for path in recordings])
        if not clips:
            raise ValueError(f"recordings of {name!r} are none; give at least one")
        seconds = [sound_seconds(clip.wav) for clip in clips]
        for clip, found in zip(clips, seconds, strict=True):
            if reason := _unfit(found):
                raise ValueError(f"{clip.wav} cannot be enrolled: {reason}")
        new = self._embed(clips).sum(0)
        if name in self.speakers:
            self._sums[list(self.speakers).index(name)] += new
        else:
            self._sums = torch.cat([self._sums, new[None]])
        count, before = self.speakers.get(name, (0, 0.0))
        self.speakers[name] = count + len(clips), before + sum(seconds)

    def identify(self, recording: str | os.PathLike[str]) -> Identified:
        """The enrolled speaker of a recording, or nobody and why; ValueError if it is damaged."""
        seconds, unit = self._query(recording)
        reason = _unfit(seconds) if self.speakers else "nobody is enrolled"
        if reason:
            return Identified(None, None, None, None, seconds, reason)
        scores = F.normalize(self._sums, dim=1) @ unit
        best, *others = scores.topk(min(2, len(self))).indices.tolist()
        names, score = list(self.speakers), scores[best].item()
        margin = score - scores[others[0]].item() if others else None
        threshold = self._threshold(names[best], len(self))
        if score < threshold:
            reason = f"the score with {names[best]}, {score:.3f}, is below {threshold:.3f}"
        elif margin is not None and margin < MIN_MARGIN:
            near = names[others[0]]
            reason = f"{names[best]} and {near} are too near, {margin:.3f} apart"
        name = None if reason else names[best]
        return Identified(name, score, margin, threshold, seconds, reason)

    def verify(self, name: str, recording: str | os.PathLike[str]) -> Verified:
        """Whether the enrolled speaker speaks in a recording: one comparison, others do not matter."""
        row = self._row(name)
        threshold = self._threshold(name, 1)
        seconds, unit = self._query(recording)
        if reason := _unfit(seconds):
            return Verified(False, None, threshold, seconds, reason)
        score = (F.normalize(self._sums[row], dim=0) @ unit).item()
        if score < threshold:
            reason = f"the score, {score:.3f}, is below {threshold:.3f}"
        return Verified(score >= threshold, score, threshold, seconds, reason)

    def remove(self, name: str) -> None:
        """Forget a speaker; ``save`` then removes the voice from the folder too."""
        row = self._row(name)
        self._sums = torch.cat([self._sums[:row], self._sums[row + 1 :]])
        del self.speakers[name]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the registry as one file of a folder, which holds the old or the new one at any time."""
        source = None if isinstance(self.source, nn.Module) else str(self.source)
        about: dict[str, Any] = {
            "source": source,
            "fingerprint": self.fingerprint,
            "target_dim": self.target_dim,
        }
        about |= {"threshold": self.threshold, "speakers": self.speakers}
        text = json.dumps(about)
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        metadata = {"registry": text, "sha256": _digest(text, self._sums)}
        with replacing(Path(folder, FILE)) as part:
            save_file({"sums": self._sums.contiguous()}, part, metadata)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        source: str | os.PathLike[str] | nn.Module | None = None,
        device: str = "cpu",
    ) -> VoiceRegistry:
        """The registry that ``save`` wrote; ``source`` is the model, if it is elsewhere now.

        Raises
        ------
        ValueError
            If the file is damaged, or the model is not the one that enrolled the speakers.
        """
        path = Path(folder, FILE)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {FILE}, so it is no registry that save wrote"
            )
        try:
            with safe_open(path, "pt") as file:
                metadata, sums = file.metadata(), file.get_tensor("sums")
            about, digest = metadata["registry"], metadata["sha256"]
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore or enrol it again") from None
        if digest != _digest(about, sums):
            raise ValueError(f"{path} is damaged (wrong checksum); restore or enrol it again")
        about = json.loads(about)
        source = about["source"] if source is None else source
        if source is None:
            raise ValueError(f"{path} was saved with a module; give it as source")
        registry = cls(source, about["target_dim"], about["threshold"], device)
        if registry.fingerprint != about["fingerprint"]:
            raise ValueError(
                f"{folder} was enrolled with another model than {source}, whose embeddings cannot be "
                "compared; give that model as source, or enrol again"
            )
        registry._sums = sums
        registry.speakers = {name: (n, seconds) for name, (n, seconds) in about["speakers"].items()}
        return registry

    def _row(self, name: str) -> int:
        if name not in self.speakers:
            raise ValueError(f"name must be of an enrolled speaker, {name!r} is not")
        return list(self.speakers).index(name)

    def _embed(self, clips: Any) -> Tensor:
        """L2-normalised prefixes, (N, target_dim)."""
        options: Any = {"device": self.device, "max_seconds": None}
        found = embed_clips({"the model": self.encoder}, clips, **options)["the model"]
        return F.normalize(found[:, : self.target_dim], dim=1)

    def _query(self, recording: str | os.PathLike[str]) -> tuple[float, Tensor]:
        """Seconds of sound, and the embedding if they are enough."""
        clips = clips_at([os.fspath(recording)], folders=False)
        seconds = sound_seconds(clips[0].wav)
        return seconds, torch.empty(0) if _unfit(seconds) else self._embed(clips)[0]

    def _threshold(self, name: str, n_speakers: int) -> float:
        """Lowest cosine by which one of so many speakers is named."""
        if self.threshold is not None:
            return self.threshold
        # The equal error rate is not known here; a model without other rates counts as one of 5 %.
        rates = {float(key[4:]): cosine for key, cosine in self._cosines.items() if key != "eer"}
        rates = rates or {FALSE_ALARMS: self._cosines["eer"]}
        quantile = NormalDist().inv_cdf
        wanted = quantile(1 - FALSE_ALARMS / n_speakers)
        rate = min(rates, key=lambda rate: abs(quantile(1 - rate) - wanted))
        cosine = max(rates[rate] * wanted / quantile(1 - rate), self._cosines["eer"])
        # The mean of several recordings has a length l <= 1. Its cosines with impostors spread wider
        # than those of one recording, by 1 to 1 / l; this is the mean of the two bounds.
        length = self._sums[self._row(name)].norm().item() / self.speakers[name][0]
        return float(min(1.0, cosine / max(length, 1e-6) ** 0.5))


def sound_seconds(path: str | os.PathLike[str]) -> float:
    """Seconds of a recording that are not silent, by the level of frames; 0 if it is all silence.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "half.wav"
    >>> soundfile.write(path, [0.0] * 16000 + [0.5, -0.5] * 8000, 16000)
    >>> sound_seconds(path)
    1.0
    """
    wav = read_audio(path)
    frames = F.pad(wav, (0, -len(wav) % FRAME)).reshape(-1, FRAME)
    levels = frames.square().mean(1).sqrt()
    loud = levels.sort().values[int(0.95 * (len(levels) - 1))].item()
    return round((levels > max(SILENCE, 0.01 * loud)).sum().item() * FRAME / SAMPLE_RATE, 3)


def _unfit(seconds: float) -> str | None:
    """Why a recording with so many seconds of sound says nothing of a voice."""
    if seconds == 0:
        return "it holds only silence"
    if seconds < MIN_SECONDS:
        return f"too short, it holds {seconds:.1f} s of sound and {MIN_SECONDS:.0f} s is needed"
    return None


def _digest(text: str, sums: Tensor) -> str:
    return hashlib.sha256(text.encode() + sums.numpy().tobytes()).hexdigest()
