"""Lets mkdocstrings read SpeechBrain's docstrings: its section names are not numpydoc's."""

import re

import griffe

NAMES = {"Arguments": "Parameters", "Example": "Examples"}


class Dialect(griffe.Extension):
    """Renames sections before they are parsed."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        for ours, numpydoc in NAMES.items():
            pattern = rf"^{ours}\n-+$"
            heading = f"{numpydoc}\n{'-' * len(numpydoc)}"
            obj.docstring.value = re.sub(pattern, heading, obj.docstring.value, flags=re.M)
        # what numpydoc has no section for stays text: its heading in bold, not a heading of the page
        obj.docstring.value = re.sub(
            r"^Reference\n-+$", "**Reference**\n", obj.docstring.value, flags=re.M
        )
