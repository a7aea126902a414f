"""Names the speaker of a recording among enrolled ones, or nobody."""

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

from speechbrain_mrl.dataio.audio import FRAME, read_audio, sound_frames
from speechbrain_mrl.dataio.clips import SAMPLE_RATE, clips_at
from speechbrain_mrl.inference.encoders import chosen_size, load_teacher, thresholds_of
from speechbrain_mrl.inference.extract import embed_recording
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.inference.optimize import arrange
from speechbrain_mrl.utils import check_device, replacing, writing

FILE = "registry.safetensors"
MIN_SECONDS = 1.0  # of sound in a recording
FALSE_ALARMS = 0.07  # of recordings of speakers who are not enrolled, the fraction that is named
MIN_MARGIN = 0.05  # between the cosines of the two best speakers

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Decision(NamedTuple):
    """Who speaks in a recording; it is true if somebody is named."""

    name: str | None  # None: nobody, and ``reason`` says why
    score: float | None  # cosine with the most similar speaker; None if it was not computed
    margin: float | None  # ``score`` minus that of the next speaker; None without one
    threshold: float | None  # lowest score that names this speaker
    seconds: float  # of sound in the recording
    reason: str | None

    def __bool__(self) -> bool:
        return self.name is not None


class VoiceRegistry:
    """Enrolled speakers, of whom one speaks in a recording, or nobody (open-set identification).

    A speaker is the mean of L2-normalised embeddings. Only the sum, the number of recordings and
    their seconds are kept. Each of N comparisons may accept an impostor in one of 14 N cases, so
    that 7 % of the impostors' recordings are named. The threshold for that rate follows from those
    in the model's report, as quantiles of a normal distribution. It is at least that of the equal
    error rate.

    Arguments
    ---------
    source : str, path or torch.nn.Module
        The model, as for ``load_teacher``.
    target_dim : int, optional
        One of the model's sizes. Default: the largest.
    threshold : float, optional
        Lowest cosine that names a speaker. Default: as above; a model without a report needs it.
    device : str
        Where the model runs.

    Raises
    ------
    ValueError
        If the model lacks the size, or there is no threshold.

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
    >>> bool(registry.identify(folder / "low.wav"))
    False
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | nn.Module,
        target_dim: int | None = None,
        threshold: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = check_device(device)
        encoder = load_teacher(source, device=self.device)
        self.fingerprint = fingerprint(encoder)
        self.source: Any = source
        if isinstance(source, (str, os.PathLike)) and os.path.exists(source):
            self.source = os.path.abspath(source)
        self.encoder = arrange({"": encoder}, self.device)[""]
        probe = torch.zeros(1, SAMPLE_RATE, device=self.device)
        with torch.inference_mode():
            full_size = embed_recording(self.encoder, probe).shape[1]
        self.target_dim = chosen_size(encoder, full_size, target_dim)
        self.thresholds = thresholds_of(encoder).get(self.target_dim, {})
        if threshold is None and not self.thresholds:
            raise ValueError(
                f"the model brings no threshold for {self.target_dim} dimensions; give threshold, "
                "the lowest cosine that names a speaker, fitted to recordings like yours"
            )
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold must be a cosine, in -1..1, got {threshold}")
        self.threshold = threshold
        self.sums = torch.zeros(0, self.target_dim)
        self.speakers: dict[str, tuple[int, float]] = {}  # recordings and seconds, by name

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
        paths = [clip.wav for clip in clips_at([os.fspath(path) for path in recordings])]
        if not paths:
            raise ValueError(f"recordings of {name!r} are none; give at least one")
        total, new = 0.0, torch.zeros(self.target_dim)
        for path in paths:
            seconds, embedding = self._embed(path)
            if embedding is None:
                raise ValueError(f"{path} cannot be enrolled: {_unfit(seconds)}")
            total, new = total + seconds, new + embedding
        if name in self.speakers:
            self.sums[self._row(name)] += new
        else:
            self.sums = torch.cat([self.sums, new[None]])
        count, before = self.speakers.get(name, (0, 0.0))
        self.speakers[name] = count + len(paths), before + total

    def identify(self, recording: str | os.PathLike[str]) -> Decision:
        """The enrolled speaker of a recording, or nobody; ValueError if the file is damaged."""
        return self._decide(recording, list(self.speakers))

    def verify(self, name: str, recording: str | os.PathLike[str]) -> Decision:
        """Whether this speaker speaks in a recording: one comparison, the others do not matter."""
        self._row(name)
        return self._decide(recording, [name])

    def remove(self, name: str) -> None:
        """Forget a speaker; the next ``save`` removes the voice from the folder."""
        row = self._row(name)
        self.sums = torch.cat([self.sums[:row], self.sums[row + 1 :]])
        del self.speakers[name]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the registry as one file of a folder, which is the old or the new one at any time."""
        about = {
            "source": None if isinstance(self.source, nn.Module) else str(self.source),
            "fingerprint": self.fingerprint,
            "target_dim": self.target_dim,
            "threshold": self.threshold,
            "speakers": self.speakers,
        }
        text = json.dumps(about)
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with replacing(Path(folder, FILE)) as part:
            save_file(
                {"sums": self.sums}, part, {"about": text, "sha256": _digest(text, self.sums)}
            )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        source: str | os.PathLike[str] | nn.Module | None = None,
        device: str = "cpu",
    ) -> VoiceRegistry:
        """The registry that ``save`` wrote; ``source`` is its model, if that is elsewhere now.

        Raises
        ------
        FileNotFoundError
            If the folder holds no registry.
        ValueError
            If the file is damaged, or the model is not the one that enrolled the speakers.
        """
        path = Path(folder, FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {FILE}, so it is no saved registry")
        try:
            with safe_open(path, "pt") as file:
                metadata, sums = file.metadata() or {}, file.get_tensor("sums")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); enrol its speakers again") from None
        text = metadata.get("about", "")
        if metadata.get("sha256") != _digest(text, sums):
            raise ValueError(f"{path} is damaged (another checksum); enrol its speakers again")
        about = json.loads(text)
        source = source or about["source"]
        if source is None:
            raise ValueError(f"{path} was saved with a module as its model; give it as source")
        registry = cls(source, about["target_dim"], about["threshold"], device)
        if registry.fingerprint != about["fingerprint"]:
            raise ValueError(
                f"{folder} was enrolled with another model than {source}, and embeddings of two "
                "models cannot be compared; give that model as source, or enrol again"
            )
        registry.sums = sums
        registry.speakers = {name: tuple(found) for name, found in about["speakers"].items()}
        return registry

    def _row(self, name: str) -> int:
        if name not in self.speakers:
            raise ValueError(f"name must be that of an enrolled speaker, {name!r} is not")
        return list(self.speakers).index(name)

    def _embed(self, path: str | os.PathLike[str]) -> tuple[float, Tensor | None]:
        """Seconds of sound, and the L2-normalised prefix (target_dim,) if they are enough."""
        wav = read_audio(path)
        seconds = sound_frames(wav).sum().item() * FRAME / SAMPLE_RATE
        if _unfit(seconds):
            return seconds, None
        with torch.inference_mode():
            embedding = embed_recording(self.encoder, wav[None].to(self.device))[0]
        if not embedding.isfinite().all():
            raise ValueError(f"the model gives an embedding that is not finite for {path}")
        return seconds, F.normalize(embedding.float().cpu()[: self.target_dim], dim=0)

    def _decide(self, recording: str | os.PathLike[str], names: list[str]) -> Decision:
        """Which of these speakers speaks in a recording, if one does."""
        seconds, embedding = self._embed(recording)
        reason = _unfit(seconds) or (None if names else "nobody is enrolled")
        if embedding is None or reason:
            return Decision(None, None, None, None, seconds, reason)
        rows = [self._row(name) for name in names]
        scores = (F.normalize(self.sums[rows], dim=1) @ embedding).tolist()
        order = sorted(range(len(names)), key=scores.__getitem__, reverse=True)
        name, score = names[order[0]], scores[order[0]]
        margin = score - scores[order[1]] if len(order) > 1 else None
        threshold = self._threshold(name, len(names))
        if score < threshold:
            reason = f"the score with {name}, {score:.3f}, is below {threshold:.3f}"
        elif margin is not None and margin < MIN_MARGIN:
            reason = f"{name} and {names[order[1]]} are too near, {margin:.3f} apart"
        return Decision(None if reason else name, score, margin, threshold, seconds, reason)

    def _threshold(self, name: str, n_speakers: int) -> float:
        """Lowest cosine that names a speaker in so many comparisons."""
        if self.threshold is not None:
            return self.threshold
        found = {float(key[4:]): cosine for key, cosine in self.thresholds.items() if key != "eer"}
        found = found or {FALSE_ALARMS: self.thresholds["eer"]}  # the rate there is not reported
        quantile = NormalDist().inv_cdf
        wanted = quantile(1 - FALSE_ALARMS / n_speakers)
        rate = min(found, key=lambda rate: abs(quantile(1 - rate) - wanted))
        cosine = max(found[rate] * wanted / quantile(1 - rate), self.thresholds["eer"])
        # A mean of several recordings has a length below 1. Its cosines with impostors spread wider
        # than those of one recording, by a factor between 1 and 1 / length.
        length = self.sums[self._row(name)].norm().item() / self.speakers[name][0]
        return min(1.0, cosine / max(length, 1e-6) ** 0.5)


def _unfit(seconds: float) -> str | None:
    """Why a recording with so many seconds of sound tells nothing of a voice, if it does not."""
    if seconds == 0:
        return "it holds only silence"
    if seconds < MIN_SECONDS:
        return f"it holds {seconds:.1f} s of sound, and {MIN_SECONDS:.0f} s is needed"
    return None


def _digest(text: str, sums: Tensor) -> str:
    return hashlib.sha256(text.encode() + sums.numpy().tobytes()).hexdigest()
