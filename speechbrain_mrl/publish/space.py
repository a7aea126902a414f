"""A page for trying a published model: compare two voices, find one among several, draw a map.

python -m speechbrain_mrl.publish.space --model results/mrl_distill/1986/model

This one file is everything that the model's Space runs: it is copied there unchanged, so it imports
SpeechBrain, Gradio, scikit-learn, matplotlib and PyAV (the extra ``space``), never this package.
A recording is deleted once it has been read. Its embedding stays in memory for some minutes.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

SAMPLE_RATE = 16000  # Hz
MIN_SECONDS, MAX_SECONDS = 1, 60  # of a recording; the rest is not read
SILENCE = 1e-4  # a recording whose largest sample is below holds no speech
SEARCHED, RUNS = 100_000, 7  # voices of the search that is timed, and how often it is
FULL_SCALE = 2.0**31  # no format's samples are larger
READ_SECONDS = 20  # that decoding one recording may take
WAITING = 20  # visitors who may wait for their turn; the next is told to come back
KEPT_SECONDS = 600  # that an embedding stays in memory after its last use
MIN_TSNE = 12  # recordings; fewer are drawn by PCA
# FFmpeg's formats that hold audio themselves; playlists, which name other files, are not read
FORMATS = "aac,aiff,amr,caf,flac,matroska,mov,mp3,ogg,w64,wav"

Voice = tuple[np.ndarray, float]  # embedding (D,) and seconds of a recording


class Refusal(Exception):
    """What is wrong with what the visitor gave, in one sentence for the page."""


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
    speechbrain_mrl.publish.space.Refusal: “notes.txt” cannot be read as audio; ...
    """
    import av

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
        from huggingface_hub import snapshot_download
        from speechbrain.inference.classifiers import EncoderClassifier

        folder = source if os.path.isdir(source) else snapshot_download(source, revision=revision)
        self.name = Path(source).name if os.path.isdir(source) else source
        self.encoder = EncoderClassifier.from_hparams(source=str(folder))
        self.sizes = list(self.encoder.hparams.mrl_dims)
        self.thresholds = {
            int(size): found["eer"] for size, found in self.encoder.hparams.thresholds.items()
        }
        self.calibration = _read_json(Path(folder, "calibration.json")).get("dims")
        self.report = _read_json(Path(folder, "report.json"))
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def prefix_cosines(size: int, one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines of the first ``size`` dimensions of ``one`` (D,) with ``others`` (N, D).

    Example
    -------
    >>> prefix_cosines(2, np.array([3.0, 4.0, 9.0]), np.array([[4.0, 3.0, -9.0]])).tolist()
    [0.96]
    """
    one, others = one[:size], others[:, :size]
    return others @ one / (np.linalg.norm(others, axis=1) * np.linalg.norm(one))


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


def compare(model: Model, *paths: str | None) -> str:
    """Two recordings, at every size side by side."""
    voices = []
    for which, path in zip(("first", "second"), paths):
        if path is None:
            raise Refusal(f"Record or upload the {which} voice too.")
        voices.append(model.embed(path))
    (one, length), (two, other) = voices
    seconds, searches = (length, other), time_searches(model.sizes)
    cards = []
    for size in model.sizes:
        cosine = float(prefix_cosines(size, one, two[None])[0])
        same = model.is_same(size, cosine, seconds)
        verdict = {True: "Same person", False: "Different people", None: "No verdict"}[same]
        about = f"cosine <b>{cosine:.2f}</b>"
        if model.calibration:
            certainty = _percent(model.log_ratio(size, cosine, seconds))
            about = f"Probability of one person: <b>{certainty}</b><br>cosine {cosine:.2f}"
        elif size in model.thresholds:
            about += f"<br>threshold {model.thresholds[size]:.2f}"
        cards.append(
            f'<div class="card {str(same).lower()}"><h3>{size} dimensions</h3>'
            f"<p class=verdict>{verdict}</p><p>{about}</p>"
            f"<p>Search of {SEARCHED:,} voices:<br><b>{1000 * searches[size]:.1f} ms</b>, "
            f"{SEARCHED * size * 4 / 1e6:.0f} MB</p></div>"
        )
    return (
        f"<div class=cards>{''.join(cards)}</div><p>{model.basis()}</p>"
        f"<p>Search times: measured just now on this server, the best of {RUNS} exact searches, "
        "without an index, 4 bytes per dimension. Time grows linearly with the voices.</p>"
    )


def _percent(log_ratio: float) -> str:
    percent = 100 / (1 + math.exp(-max(-50.0, log_ratio)))
    if percent > 99.9:
        return "over 99.9 %"
    return "under 0.1 %" if percent < 0.1 else f"{percent:.1f} %"


def enrol(model: Model, path: str | None, name: str, people: dict[str, list[Voice]]) -> str:
    """Adds a recording to ``people``: name -> list of embeddings and seconds."""
    name = name.strip()
    if path is None:
        raise Refusal("Record or upload a voice to enrol.")
    if not name:
        raise Refusal("Type a name for this voice.")
    people.setdefault(name, []).append(model.embed(path))
    return enrolled(people)


def enrolled(people: dict[str, list[Voice]]) -> str:
    """Who is enrolled, for the page."""
    names = [f"{html.escape(name)} ({len(voices)})" for name, voices in people.items()]
    return f"<p>Enrolled (recordings): {', '.join(names) or 'nobody yet'}.</p>"


def find(model: Model, path: str | None, people: dict[str, list[Voice]]) -> str:
    """The enrolled voices nearest to a recording, at every size side by side."""
    if not people:
        raise Refusal("Enrol a voice or two first.")
    if path is None:
        raise Refusal("Record or upload the voice to find.")
    embedding, seconds = model.embed(path)
    columns = []
    for size in model.sizes:
        found = []
        for name, voices in people.items():
            units = [v[:size] / np.linalg.norm(v[:size]) for v, _ in voices]
            cosine = float(prefix_cosines(size, embedding, np.mean(units, axis=0)[None])[0])
            lengths = seconds, max(length for _, length in voices)
            found.append((cosine, name, model.is_same(size, cosine, lengths)))
        columns.append(sorted(found, key=lambda one: one[0], reverse=True)[:5])
    heads = "".join(f"<th>{size}</th>" for size in model.sizes)
    rows = "".join(
        f"<tr><th>{rank}</th>"
        + "".join(
            f'<td class="{str(same).lower()}">{html.escape(name)} {cosine:.2f}</td>'
            for cosine, name, same in row
        )
        + "</tr>"
        for rank, row in enumerate(zip(*columns), 1)
    )
    cosine, best, same = columns[-1][0]
    verdict = {
        True: f"Most like {html.escape(best)}, probably the same person.",
        False: f"Most like {html.escape(best)}, but probably none of the enrolled.",
        None: f"Most like {html.escape(best)}.",
    }[same]
    return (
        f"<p class=verdict>{verdict}</p><div class=scroll><table><caption>Names by cosine, for "
        f"each number of dimensions</caption><tr><th></th>{heads}</tr>{rows}</table></div>"
        f"<p>Bold: same person by this model. {model.basis()}</p>"
    )


def draw_map(
    model: Model, size: int, voices: Sequence[tuple[str, np.ndarray]]
) -> tuple[object, str]:
    """A figure of the recordings in two dimensions, and a sentence about it.

    ``voices`` are pairs of a name and an embedding (D,).
    """
    from matplotlib.figure import Figure
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(voices) < 3:
        raise Refusal(f"A map needs at least 3 recordings; there are {len(voices)}.")
    points = np.stack([embedding[:size] for _, embedding in voices])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    if len(voices) < MIN_TSNE:
        how, places = "PCA", PCA(2).fit_transform(points)
    else:
        perplexity = min(30, (len(voices) - 1) / 3)
        how = "t-SNE"
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    groups = np.zeros(len(voices), int)
    about = (
        f"{len(voices)} recordings by {how} of {size} dimensions: near points are similar voices."
    )
    if size in model.thresholds:
        options: dict[str, Any] = {"n_clusters": None, "metric": "cosine", "linkage": "average"}
        limit = model.thresholds[size]
        groups = AgglomerativeClustering(**options, distance_threshold=1 - limit).fit_predict(
            points
        )
        about += (
            f" Colour and shape: {groups.max() + 1} voices by clustering (average linkage, cosine "
            f"{limit:.2f})."
        )
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[], title=f"Voices at {size} dimensions ({how})")
    for group in range(groups.max() + 1):
        x, y = places[groups == group].T
        look: dict[str, Any] = {
            "color": f"C{group % 10}",
            "marker": "osD^vP*X"[group % 8],
            "edgecolors": "black",
        }
        axes.scatter(x, y, s=60, linewidths=0.5, **look)
    text: dict[str, Any] = {
        "xytext": (6, 4),
        "textcoords": "offset points",
        "fontsize": 8,
        "parse_math": False,
    }
    for (name, _), place in zip(voices, places) if len(voices) <= 40 else ():
        axes.annotate(name if len(name) <= 16 else f"{name[:15]}…", place, **text)
    axes.margins(0.15)
    return figure, about


def check_uploaded(*paths: str | None) -> None:
    """Raise Refusal if a path is none that Gradio gave to an upload: a request may name any file."""
    from gradio.utils import get_upload_folder

    folder = os.path.realpath(get_upload_folder())
    for path in paths:
        if path is not None and not os.path.realpath(path).startswith(folder + os.sep):
            raise Refusal("Only recordings that you upload here are read.")


def build(model: Model) -> Any:
    """The page, a ``gradio.Blocks``."""
    import gradio as gr

    def guarded(function: Callable[..., list[Any]], *unchanged: Any) -> Callable[..., list[Any]]:
        """A refusal becomes its sentence on the page; other outputs stay as they are."""

        def call(*arguments: Any) -> list[Any]:
            try:
                return function(*arguments)
            except Refusal as refusal:
                return [_refused(str(refusal)), *unchanged]

        return call

    def on_compare(one: str | None, two: str | None) -> list[Any]:
        check_uploaded(one, two)
        return [compare(model, one, two)]

    def on_enrol(path: str | None, name: str, people: dict[str, list[Voice]]) -> list[Any]:
        check_uploaded(path)
        return [enrol(model, path, name, people), None, "", people]

    def on_find(path: str | None, people: dict[str, list[Voice]]) -> list[Any]:
        check_uploaded(path)
        return [find(model, path, people), None]

    def on_files(paths: list[str], size: int, voices: list[tuple[str, np.ndarray]]) -> list[Any]:
        bad = []
        for path in paths:
            try:
                check_uploaded(path)
                voices = [*voices, (Path(path).stem, model.embed(path)[0])]
            except Refusal as refusal:
                bad.append(str(refusal))
        return [*on_size(size, voices, bad), None, voices]

    def on_size(
        size: int, voices: list[tuple[str, np.ndarray]], bad: Sequence[str] = ()
    ) -> list[Any]:
        figure = None
        try:
            figure, about = draw_map(model, int(size), voices)
        except Refusal as refusal:
            about, bad = "", [str(refusal), *bad]
        return [figure, f"{''.join(map(_refused, bad))}<p>{html.escape(about)}</p>"]

    def voice(label: str, elem_id: str) -> Any:
        sources: list[Literal["upload", "microphone"]] = ["upload", "microphone"]
        options: dict[str, Any] = {"type": "filepath", "editable": False, "buttons": []}
        return gr.Audio(sources=sources, label=label, elem_id=elem_id, **options)

    def memory(value: Any) -> Any:
        return gr.State(value, time_to_live=KEPT_SECONDS)

    options: dict[str, Any] = {"delete_cache": (60, KEPT_SECONDS), "analytics_enabled": False}
    with gr.Blocks(title=TITLE, **options) as page:
        sizes = " / ".join(map(str, model.sizes))
        gr.HTML(INTRODUCTION.format(title=TITLE, sizes=sizes, model=html.escape(model.name)))
        with gr.Tab("Compare"):
            with gr.Row():
                one, two = voice("First voice", "first"), voice("Second voice", "second")
            button = gr.Button("Same or different?", variant="primary")
            button.click(guarded(on_compare), [one, two], [gr.HTML(elem_id="comparison")])
        with gr.Tab("Find"):
            people = memory({})
            with gr.Row():
                with gr.Column():
                    new = voice("A voice to enrol", "new")
                    name = gr.Textbox(label="Name", max_length=40, elem_id="name")
                    add = gr.Button("Enrol")
                with gr.Column():
                    asked = voice("Whose voice is this?", "asked")
                    search = gr.Button("Find the nearest", variant="primary")
            with gr.Row():
                listing = gr.HTML(enrolled({}), elem_id="enrolled", scale=4)
                forget = gr.Button("Forget all", size="sm", scale=1)
            nearest = gr.HTML(elem_id="nearest")
            kept = [gr.skip(), gr.skip(), gr.skip()]
            add.click(guarded(on_enrol, *kept), [new, name, people], [listing, new, name, people])
            search.click(guarded(on_find, gr.skip()), [asked, people], [nearest, asked])
            forget.click(lambda: [enrolled({}), "", {}], None, [listing, nearest, people])
        with gr.Tab("Map"):
            voices = memory([])
            files = gr.File(file_count="multiple", label="Recordings, 3 or more", elem_id="files")
            with gr.Row():
                folder = gr.UploadButton("Add a folder", file_count="directory", size="sm")
                clear = gr.Button("Forget all", size="sm")
            size = gr.Radio(model.sizes, value=model.sizes[0], label="Dimensions")
            note, plot = gr.HTML(elem_id="map"), gr.Plot(show_label=False)
            for source in (files, folder):
                source.upload(on_files, [source, size, voices], [plot, note, source, voices])
            size.input(on_size, [size, voices], [plot, note])
            clear.click(lambda: [None, "", []], None, [plot, note, voices])
        gr.HTML(PRIVACY)
    return page


def _refused(sentence: str) -> str:
    return f"<p class=refusal role=alert>{html.escape(sentence)}</p>"


TITLE = "Voices at several sizes"

INTRODUCTION = """
<h1>{title}</h1>
<p>The model <b>{model}</b> turns a recording into an <i>embedding</i> of its voice, a list of
numbers. It is usable at {sizes} dimensions, the first numbers of the list: a small size searches
faster, a large one is more accurate. The cosine of two embeddings is 1 for the same direction and
near 0 for unrelated voices.</p>
"""

PRIVACY = f"""
<p class=small><b>Recordings are not kept.</b> A recording is deleted as soon as it is read, or
{KEPT_SECONDS // 60 + 1} minutes after an upload without a click. Its embedding stays in memory and is
forgotten an hour after your last click at the latest. A recording needs {MIN_SECONDS} second of
audio; the first {MAX_SECONDS} seconds are used. Use voices only with consent. A verdict is no proof:
voices can be imitated, and error rates differ between languages, accents, ages and microphones.</p>
"""

CSS = """
.cards, .scroll {margin-bottom: 12px}
.cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px}
.card {border: 1px solid #8888; border-top: 6px solid #888; border-radius: 8px; padding: 6px 10px}
.card.true {border-top-color: #1a7f37} .card.false {border-top-color: #b35900}
.card h3 {margin: 0; font-size: 1em} .card p {margin: 6px 0}
.verdict {font-size: 1.2em; font-weight: bold}
.scroll {overflow-x: auto} caption {text-align: left} td, th {padding: 4px 10px; text-align: left} td.true {font-weight: bold}
.refusal {border-left: 6px solid #b35900; padding: 6px 10px; font-weight: bold}
.small {font-size: .9em}
"""


def main(arguments: list[str] | None = None) -> None:
    """Serve the page; in a Space, of the model and version that model.json beside this file names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pin = Path(__file__).with_name("model.json")
    about = "exported folder, or id on the Hub"
    parser.add_argument("--model", required=not pin.is_file(), help=about)
    parser.add_argument("--revision", help="commit hash of the Hub's version; default: the newest")
    given = parser.parse_args(arguments)
    pinned = _read_json(pin) if given.model is None else vars(given)
    launch(Model(pinned["model"], pinned["revision"]))


def launch(model: Model, **options: Any) -> Any:
    """Serve ``model``'s page; ``options`` are those of ``gradio.Blocks.launch``."""
    import gradio as gr

    # Fonts of the visitor's own system: the page makes no request to a font server.
    theme = gr.themes.Default(font="system-ui", font_mono="ui-monospace")
    options = {"theme": theme, "css": CSS, "max_file_size": "50mb", "footer_links": [], **options}
    return build(model).queue(max_size=WAITING).launch(**options)


if __name__ == "__main__":
    main()
