"""Lets mkdocstrings read SpeechBrain's docstrings, and find the names that load on first use."""

import ast
import re

import griffe

from speechbrain_mrl.training.defaults import DEFAULTS

NAMES = {"Arguments": "Parameters", "Example": "Examples"}
SECTION = r"^[A-Z]\w+\n-+$"
DEFAULT = re.compile(r"""DEFAULTS\[["'](\w+)["']\]""")
GROUP = re.compile(r"^((?:\w+, )+\w+)( : .*)?\n((?: {4}.*(?:\n|\Z))+)", re.M)
REFERENCE = re.compile(rf"\n*^Reference\n-+\n(.*?)(?=\n+{SECTION}|\Z)", re.M | re.S)


class Dialect(griffe.Extension):
    """Renames sections before they are parsed, and puts references before the first of them."""

    def on_package(self, *, pkg, **kwargs):
        for name, module in ast.literal_eval(str(pkg["_ON_FIRST_USE"].value)).items():
            pkg.set_member(name, griffe.Alias(name, f"{pkg.name}.{module}.{name}"))

    def on_function(self, *, func, **kwargs):
        for parameter in func.parameters:  # a default is shown by its value
            if found := DEFAULT.fullmatch(str(parameter.default)):
                parameter.default = repr(DEFAULTS[found[1]])

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        text = f"{obj.docstring.value}\n"
        if reference := REFERENCE.search(text):
            text = REFERENCE.sub("", text)
            source = f"*Reference:* {reference[1].strip()}"
            first = re.search(SECTION, text, re.M)
            at = first.start() if first else len(text)
            text = f"{text[:at].rstrip()}\n\n{source}\n\n{text[at:]}".rstrip()
        # names that share a description get one each, with a default of their own
        text = GROUP.sub(
            lambda m: "".join(f"{name}{m[2] or ''}\n{m[3]}" for name in m[1].split(", ")), text
        )
        for ours, numpydoc in NAMES.items():
            heading = f"{numpydoc}\n{'-' * len(numpydoc)}"
            text = re.sub(rf"^{ours}\n-+$", heading, text, flags=re.M)
        obj.docstring.value = text.rstrip()
