"""A page for trying a published model: compare two voices, find one among several, draw a map.

python -m speechbrain_mrl.publish.space --model results/mrl_distill/1986/model

The model's Space runs this file and ``verdicts.py``: they need SpeechBrain, Gradio, scikit-learn and
PyAV (the extra ``space``), and nothing else of this package.
A recording is deleted once it has been read. Its embedding stays in memory for some minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from speechbrain_mrl.publish.verdicts import (
    KEPT_SECONDS,
    MAX_SECONDS,
    MIN_SECONDS,
    RUNS,
    SEARCHED,
    Model,
    Refusal,
    Voice,
    compare,
    draw_map,
    enrol,
    find,
    read_json,
)

WAITING = 20  # visitors who may wait for their turn; the next is told to come back


def check_uploaded(*paths: str | None) -> None:
    """Raise Refusal if a path is none that Gradio gave to an upload: a request may name any file."""
    folder = os.path.realpath(get_upload_folder())
    for path in paths:
        if path is not None and not os.path.realpath(path).startswith(folder + os.sep):
            raise Refusal("Only recordings that you upload here are read.")


def build(model: Model) -> gr.Blocks:
    """The page."""

    def on_compare(one: str | None, two: str | None) -> Any:
        check_uploaded(one, two)
        return compare(model, one, two)

    def on_enrol(path: str | None, name: str, people: dict[str, list[Voice]]) -> Any:
        check_uploaded(path)
        enrol(model, path, name, people)
        listing = ", ".join(f"{name} ({len(voices)})" for name, voices in people.items())
        return listing, people, None, ""

    def on_find(path: str | None, people: dict[str, list[Voice]]) -> Any:
        check_uploaded(path)
        return *find(model, path, people), None

    def on_files(paths: list[str], size: int, voices: list[tuple[str, np.ndarray]]) -> Any:
        for path in paths:
            try:
                check_uploaded(path)
                voices = [*voices, (Path(path).stem, model.embed(path)[0])]
            except Refusal as refusal:
                gr.Warning(refusal.message, duration=None)
        return *draw_map(model, size, voices), None, voices

    def voice(label: str, elem_id: str) -> gr.Audio:
        options: dict[str, Any] = {"type": "filepath", "editable": False, "buttons": []}
        return gr.Audio(label=label, elem_id=elem_id, sources=["upload", "microphone"], **options)

    def memory(value: Any) -> gr.State:
        return gr.State(value, time_to_live=KEPT_SECONDS)

    options: dict[str, Any] = {"delete_cache": (60, KEPT_SECONDS), "analytics_enabled": False}
    with gr.Blocks(title=TITLE, **options) as page:
        sizes = " / ".join(map(str, model.sizes))
        gr.Markdown(INTRODUCTION.format(title=TITLE, sizes=sizes, model=model.name))
        with gr.Tab("Compare"):
            with gr.Row():
                one, two = voice("First voice", "first"), voice("Second voice", "second")
            button = gr.Button("Same or different?", variant="primary")
            comparison = gr.Dataframe(label="By size", elem_id="comparison")
            button.click(on_compare, [one, two], comparison, api_name="compare")
            gr.Markdown(f"{model.basis()} {ABOUT_SEARCH}")
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
            listing = gr.Textbox("nobody yet", label="Enrolled (recordings)", elem_id="enrolled")
            forget = gr.Button("Forget all", size="sm")
            verdict = gr.Textbox(label="Verdict", elem_id="nearest")
            ranks = gr.Dataframe(label="The nearest first, with their cosines; ✓: same person")
            gr.Markdown(model.basis())
            # One event each: a second one could take away what the visitor gives next.
            enrolled = [listing, people, new, name]
            add.click(on_enrol, [new, name, people], enrolled, show_progress_on=listing)
            found = [verdict, ranks, asked]
            search.click(on_find, [asked, people], found, show_progress_on=verdict)
            cleared = [listing, verdict, ranks, people]
            forget.click(lambda: ("nobody yet", "", None, {}), None, cleared)
        with gr.Tab("Map"):
            voices = memory([])
            files = gr.File(file_count="multiple", label="Recordings, 3 or more", elem_id="files")
            with gr.Row():
                folder = gr.UploadButton("Add a folder", file_count="directory", size="sm")
                clear = gr.Button("Forget all", size="sm")
            size = gr.Radio(model.sizes, value=model.sizes[0], label="Dimensions")
            note = gr.Markdown(elem_id="map")
            look: dict[str, Any] = {"x": "x", "y": "y", "color": "voice", "tooltip": ["recording"]}
            plot = gr.ScatterPlot(**look, x_title=" ", y_title=" ", elem_id="plot")
            for source in (files, folder):
                source.upload(on_files, [source, size, voices], [plot, note, source, voices])
            size.input(lambda *given: draw_map(model, *given), [size, voices], [plot, note])
            clear.click(lambda: (None, "", []), None, [plot, note, voices])
        gr.Markdown(PRIVACY)
    return page


TITLE = "Voices at several sizes"

INTRODUCTION = """
# {title}
The model **{model}** turns a recording into an *embedding* of its voice, a list of numbers. It is
usable at {sizes} dimensions, the first numbers of the list. A small size searches faster, a large
one is often more accurate. The cosine of two embeddings is 1 for the same direction and near 0 for
unrelated voices.
"""

ABOUT_SEARCH = f"""
Search times among {SEARCHED:,} voices are measured on this server: the best of {RUNS} exact
searches, without an index, 4 bytes per dimension. Time grows linearly with the voices.
"""

PRIVACY = f"""
**Recordings are not kept.** A recording is deleted as soon as it is read, or
{KEPT_SECONDS // 60 + 1} minutes after an upload without a click. Its embedding stays in memory and is
forgotten an hour after your last click at the latest. A recording needs {MIN_SECONDS} second of
audio; the first {MAX_SECONDS} seconds are used. Use voices only with consent. A verdict is no proof:
voices can be imitated, and error rates differ between languages, accents, ages and microphones.
"""


def main(arguments: list[str] | None = None) -> None:
    """Serve the page; in a Space, of the model and version that model.json beside this file names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pin = Path(__file__).with_name("model.json")
    about = "exported folder, or id on the Hub"
    parser.add_argument("--model", required=not pin.is_file(), help=about)
    parser.add_argument("--revision", help="commit hash of the Hub's version; default: the newest")
    given = parser.parse_args(arguments)
    pinned = read_json(pin) if given.model is None else vars(given)
    launch(Model(pinned["model"], pinned["revision"]))


def launch(model: Model, **options: Any) -> Any:
    """Serve ``model``'s page; ``options`` are those of ``gradio.Blocks.launch``."""
    # Fonts of the visitor's own system: the page makes no request to a font server.
    theme = gr.themes.Default(font="system-ui", font_mono="ui-monospace")
    options = {"theme": theme, "max_file_size": "50mb", "footer_links": [], **options}
    return build(model).queue(max_size=WAITING).launch(**options)


if __name__ == "__main__":
    main()
