"""What a published model says of recordings: the same voice, the nearest of some, a map of many.

Of a Space this is the file beside the page, so it never imports this package.
"""

from __future__ import annotations

import html
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import av
import gradio as gr
import numpy as np
import pandas as pd
import torch
from huggingface_hub import snapshot_download
from sklearn.cluster import AgglomerativeClustering
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from speechbrain.inference.classifiers import EncoderClassifier

SAMPLE_RATE = 16000  # Hz
MIN_SECONDS, MAX_SECONDS = 1, 60  # of a recording; the rest is not read
SILENCE = 1e-4  # a recording whose largest sample is below holds no speech
SEARCHED, RUNS = 100_000, 7  # voices of the search that is timed, and how often it is
FULL_SCALE = 2.0**31  # no format's samples are larger
READ_SECONDS = 20  # that decoding one recording may take
KEPT_SECONDS = 600  # that an embedding stays in memory after its last use
MIN_TSNE = 12  # recordings; fewer are drawn by PCA
# FFmpeg's formats that hold audio themselves; playlists, which name other files, are not read
FORMATS = "aac,aiff,amr,caf,flac,matroska,mov,mp3,ogg,w64,wav"

Voice = tuple[np.ndarray, float]  # embedding (D,) and seconds of a recording


class Refusal(gr.Error):
    """What is wrong with what the visitor gave, in one sentence for the page."""

    def __init__(self, sentence: str) -> None:
        super().__init__(html.escape(sentence), None, title="Not possible", print_exception=False)


def read_voice(path: str | os.PathLike[str]) -> torch.Tensor:
    """The first minute of a recording of any usual format, mono at 16 kHz, (T,).

    Raises
    ------
    Refusal
        If it is not audio, shorter than a second, or silent.

    Example
    -------
    >>> path = getfixture("tmp_path") / "notes.txt"
    >>> _ = path.write_text("not a voice")
    >>> read_voice(path)
    Traceback (most recent call last):
    ...
    speechbrain_mrl.publish.verdicts.Refusal: '“notes.txt” cannot be read as audio; ...
    """
    name = f"“{Path(path).name}”"
    blocks, seconds, started = [], 0.0, time.monotonic()
    # An open file, and no protocol: neither a path nor anything in the file is taken for an address
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        with open(path, "rb") as file, av.open(file, "r", options=options) as container:
            to_mono = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            for packet in container.demux(audio=0):
                if time.monotonic() - started > READ_SECONDS:
                    raise Refusal(f"{name} takes too long to read; give a shorter one.")
                for frame in packet.decode():
                    blocks += [part.to_ndarray()[0] for part in to_mono.resample(frame)]
                    seconds += frame.samples / frame.sample_rate
                if seconds > MAX_SECONDS:
                    break
            blocks += [part.to_ndarray()[0] for part in to_mono.resample(None)]
    except Refusal:
        raise
    except (av.FFmpegError, IndexError, OSError, ValueError):  # IndexError: no audio stream
        what = "cannot be read as audio; give a WAV, FLAC, Ogg, MP3 or M4A file."
        raise Refusal(f"{name} {what}") from None
    wav = torch.from_numpy(np.concatenate(blocks or [np.zeros(0, np.float32)]))
    wav, seconds = wav[: MAX_SECONDS * SAMPLE_RATE], len(wav) / SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise Refusal(f"{name} lasts {seconds:.1f} s; at least {MIN_SECONDS} s is needed.")
    if not (wav.abs() <= FULL_SCALE).all():
        raise Refusal(f"{name} holds samples that are no audio; record it again.")
    if not wav.abs().max() > SILENCE:
        raise Refusal(f"{name} is silent; check the microphone.")
    return wav


class Model:
    """A published model: embeddings of recordings, and what their cosines mean at every size.

    Arguments
    ---------
    source : str
        Exported folder, or id on the Hub. Loading it runs the code in it.
    revision : str, optional
        Commit hash of the Hub's version to load. None: the newest.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        folder = source if os.path.isdir(source) else snapshot_download(source, revision=revision)
        self.name = Path(source).name if os.path.isdir(source) else source
        self.encoder = EncoderClassifier.from_hparams(source=str(folder))
        self.sizes = list(self.encoder.hparams.mrl_dims)
        self.thresholds = {
            int(size): found["eer"] for size, found in self.encoder.hparams.thresholds.items()
        }
        self.calibration = read_json(Path(folder, "calibration.json")).get("dims")
        self.report = read_json(Path(folder, "report.json"))
        self.known: dict[str, tuple[float, Voice]] = {}  # by path: last use, and what

    def embed(self, path: str) -> Voice:
        """Embedding (D,) and seconds of a recording, which is deleted.

        A path is the same in the next comparison, and for a file that is uploaded again, so the
        embedding is kept for a while.
        """
        now = time.monotonic()
        recent = list(self.known.items())
        self.known = {one: kept for one, kept in recent if now - kept[0] < KEPT_SECONDS}
        if path in self.known and not os.path.exists(path):
            voice = self.known[path][1]
        else:
            try:
                wav = read_voice(path)
            finally:
                Path(path).unlink(missing_ok=True)
            with torch.no_grad():
                embedding = self.encoder.encode_batch(wav.unsqueeze(0))[0, 0]
            voice = embedding.cpu().numpy(), len(wav) / SAMPLE_RATE
        self.known[path] = now, voice
        return voice

    def log_ratio(self, size: int, cosine: float, seconds: tuple[float, float]) -> float:
        """Calibrated score: log-likelihood ratio of the same person against different people."""
        found = self.calibration[str(size)]
        logs = np.log(sorted(seconds))  # the shorter recording first
        if bounds := found.get("bounds"):  # no further than it was fitted
            logs = logs.clip(*np.transpose(bounds))
        quality = sum(factor * log for factor, log in zip(found["quality"], logs))
        return float(found["offset"] + found["scale"] * cosine + quality)

    def is_same(self, size: int, cosine: float, seconds: tuple[float, float]) -> bool | None:
        """Same person or not; None for a model without calibration and threshold."""
        if self.calibration:
            return self.log_ratio(size, cosine, seconds) > 0
        return cosine >= self.thresholds[size] if size in self.thresholds else None

    def basis(self) -> str:
        """What verdicts rest on, in words."""
        if self.calibration:
            return (
                "Calibrated: the probability assumes that both answers are equally likely "
                "beforehand, and above 50 % the verdict is “same”. The calibration was fitted on "
                "other speakers (calibration.json). It can be wrong where rooms, microphones or "
                "durations differ from theirs."
            )
        if self.thresholds:
            corpus = Path(self.report.get("corpus", "")).name
            return (
                "Not calibrated: the model has no calibration.json, so a cosine is not a "
                "probability. The threshold is that of the equal error rate on the model's own "
                f"trials{f' ({corpus})' if corpus else ''}."
            )
        return "The model has neither thresholds nor calibration.json: cosines only, no verdict."


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def prefix_cosine(size: int, one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the first ``size`` dimensions of two embeddings (D,).

    Example
    -------
    >>> round(prefix_cosine(2, np.array([3.0, 4.0, 9.0]), np.array([4.0, 3.0, -9.0])), 6)
    0.96
    """
    one, other = one[:size], other[:size]
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def time_searches(sizes: list[int], n: int = SEARCHED, runs: int = RUNS) -> dict[int, float]:
    """Seconds of an exact search among ``n`` embeddings, by size: the shortest of ``runs``.

    One matrix product and the place of its maximum; the time does not depend on the numbers.
    """
    numbers, seconds = np.ones(n * max(sizes), np.float32), {}
    for size in sizes:
        voices, times = numbers[: n * size].reshape(n, size), []
        for _ in range(runs):
            start = time.perf_counter()
            (voices @ voices[0]).argmax()
            times.append(time.perf_counter() - start)
        seconds[size] = min(times)
    return seconds


def compare(model: Model, *paths: str | None) -> pd.DataFrame:
    """Two recordings, a row for each size."""
    voices = []
    for which, path in zip(("first", "second"), paths):
        if path is None:
            raise Refusal(f"Record or upload the {which} voice too.")
        voices.append(model.embed(path))
    (one, length), (two, other) = voices
    seconds, searches, rows = (length, other), time_searches(model.sizes), []
    for size in model.sizes:
        cosine = prefix_cosine(size, one, two)
        verdict = {True: "same person", False: "different people", None: "no verdict"}
        row = {"dimensions": size, "verdict": verdict[model.is_same(size, cosine, seconds)]}
        if model.calibration:
            log_ratio = min(max(model.log_ratio(size, cosine, seconds), -50.0), 50.0)
            row["probability"] = f"{100 / (1 + math.exp(-log_ratio)):.1f} %"
        row["cosine"] = f"{cosine:.2f}"
        if size in model.thresholds and not model.calibration:
            row["threshold"] = f"{model.thresholds[size]:.2f}"
        row[f"search of {SEARCHED:,}"] = f"{1000 * searches[size]:.1f} ms"
        rows.append({**row, "memory": f"{SEARCHED * size * 4 / 1e6:.0f} MB"})
    return pd.DataFrame(rows)


def enrol(model: Model, path: str | None, name: str, people: dict[str, list[Voice]]) -> None:
    """Adds a recording to ``people``: name -> list of embeddings and seconds."""
    name = name.strip()
    if path is None:
        raise Refusal("Record or upload a voice to enrol.")
    if not name:
        raise Refusal("Type a name for this voice.")
    voice = model.embed(path)  # first: a refused recording enrols nobody
    people.setdefault(name, []).append(voice)


def find(
    model: Model, path: str | None, people: dict[str, list[Voice]]
) -> tuple[str, pd.DataFrame]:
    """A verdict, and the enrolled voices nearest to a recording, a column for each size."""
    if not people:
        raise Refusal("Enrol a voice or two first.")
    if path is None:
        raise Refusal("Record or upload the voice to find.")
    embedding, seconds = model.embed(path)
    columns = {}
    for size in model.sizes:
        found = []
        for name, voices in people.items():
            units = [v[:size] / np.linalg.norm(v[:size]) for v, _ in voices]
            cosine = prefix_cosine(size, embedding, np.mean(units, axis=0))
            lengths = seconds, max(length for _, length in voices)
            found.append((cosine, name, model.is_same(size, cosine, lengths)))
        found.sort(key=lambda one: one[0], reverse=True)
        columns[f"{size} dimensions"] = [
            f"{name} {cosine:.2f}{' ✓' if same else ''}" for cosine, name, same in found[:5]
        ]
    _, best, same = found[0]  # of the largest size
    verdict = {
        True: ", probably the same person",
        False: ", but probably nobody enrolled",
        None: "",
    }
    return f"Most like {best}{verdict[same]}.", pd.DataFrame(columns)


def draw_map(
    model: Model, size: int, voices: list[tuple[str, np.ndarray]]
) -> tuple[pd.DataFrame | None, str]:
    """Places of the recordings in two dimensions, and a sentence about them.

    ``voices`` are pairs of a name and an embedding (D,).
    """
    if len(voices) < 3:
        return None, f"A map needs at least 3 recordings; there are {len(voices)}."
    points = np.stack([embedding[:size] for _, embedding in voices])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    if len(voices) < MIN_TSNE:
        how, places = "PCA", PCA(2).fit_transform(points)
    else:
        perplexity = min(30, (len(voices) - 1) / 3)
        how = "t-SNE"
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    about = (
        f"{len(voices)} recordings by {how} of {size} dimensions: near points are similar voices."
    )
    groups = np.zeros(len(voices), int)
    if size in model.thresholds:
        limit = model.thresholds[size]
        options: dict[str, Any] = {"n_clusters": None, "metric": "cosine", "linkage": "average"}
        clustering = AgglomerativeClustering(**options, distance_threshold=1 - limit)
        groups = clustering.fit_predict(points)
        about += f" Colour: {groups.max() + 1} voices by clustering (average linkage, {limit:.2f})."
    x, y = places.T
    names, labels = [name for name, _ in voices], [f"voice {group + 1}" for group in groups]
    return pd.DataFrame({"x": x, "y": y, "voice": labels, "recording": names}), about
