"""Brings into the site what lies outside docs/: the notebook as a page, and the examples."""

from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """Add the notebook, with the results that are stored in it, and the scripts."""
    text, resources = MarkdownExporter().from_filename(ROOT / "notebooks" / "matryoshka.ipynb")
    text = text.replace("](../docs/", "](")
    files.append(File.generated(config, "notebook.md", content=text))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "examples").glob("*.py")):
        address = f"examples/{path.name}"
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """A page's links to examples lead to the site's copies."""
    return markdown.replace("](../examples/", "](examples/")
