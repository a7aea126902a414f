"""Brings into the site what lies outside docs/ (notebook, READMEs, examples), and marks options."""

import re
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {  # of the repository, by their place in the site
    "benchmarks/README.md": "benchmarks.md",
    "recipes/voxceleb/README.md": "recipe.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
CODE = re.compile(r"<code.*?</code>", re.DOTALL)
TO_DOCS = re.compile(r"\]\((?:\.\./)*docs/")


def on_files(files, config):
    """Add the notebook as a page, the READMEs, the scripts, and what the benchmarks measured."""
    text, resources = MarkdownExporter().from_filename(ROOT / "notebooks" / "matryoshka.ipynb")
    pages = {place: (ROOT / path).read_text(encoding="utf-8") for path, place in PAGES.items()}
    for place, content in {"notebook.md": text, **pages}.items():
        files.append(File.generated(config, place, content=TO_DOCS.sub("](", content)))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    scripts = (ROOT / "examples").glob("*.py")
    measured = (ROOT / "benchmarks/measured").glob("*.json")
    for path in sorted([*scripts, *measured]):
        address = f"{path.parent.name}/{path.name}"
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """A page's links to what lies outside lead to the site's copies."""
    for path, place in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(path)}", f"]({place}", markdown)
    markdown = markdown.replace("](../benchmarks/measured/", "](measured/")
    return markdown.replace("](../examples/", "](examples/")


def on_page_content(html, **_):
    """Command-line options in code are marked, for the stylesheet keeps them on one line."""
    option = re.compile(r"(?<![\w-])--[a-z]\w*")
    return CODE.sub(lambda code: option.sub(r'<span class="option">\g<0></span>', code[0]), html)
