"""The notebook runs from top to bottom, and shows what it says."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "matryoshka.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_both_maps():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("espeakng_loader")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    for expected in (
        "student: {64:",
        "teacher, PCA: {64:",
        "student, LDA: {64:",
        "at 64 dimensions",
    ):
        assert expected in text
