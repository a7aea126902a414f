"""Reads a recipe's YAML: the command line's changes, those of the demo, and those of each stage."""

import difflib
import io
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ruamel.yaml
import yaml
from hyperpyyaml import resolve_references
from speechbrain.utils.run_opts import RunOptions

RUN_OPTIONS = RunOptions().as_dict()
RECIPE = Path(__file__).resolve().parent
HPARAMS = RECIPE.parents[1] / "hparams"


def help_text(about, argv, default):
    """What a script does, the keys of the YAML in ``argv`` with their comments, and run options.

    Arguments
    ---------
    about : str
        The script's docstring.
    argv : list of str
        The command line.
    default : str
        The YAML in ``hparams/`` that is shown if the command line has none.
    """
    hparams_file = next((one for one in argv if not one.startswith("-")), HPARAMS / default)
    lines = []
    for line in Path(hparams_file).read_text(encoding="utf-8").splitlines():
        if key := re.match(r"([a-z]\w*):(.*?)(?: *# (.*))?$", line):
            name, value, comment = key.groups()
            option = f"--{name}={value.strip() or '{...}'}"
            lines.append(f"  {option:33}  {comment or ''}".rstrip())
        elif not line or line.startswith("# "):
            lines.append(line.removeprefix("# "))
    options = sorted(f"--{name}" for name in RUN_OPTIONS.keys() - {"param_file", "overridden_args"})
    return (
        f"{about.strip()}\n\n"
        f"{os.path.relpath(hparams_file)}; each key may be given as --key=value\n\n"
        + "\n".join(lines)
        + "\n\nRun options, see speechbrain.utils.run_opts\n"
        + textwrap.fill(" ".join(options), 96, initial_indent="  ", subsequent_indent="  ")
    )


def read_yaml(hparams_file, overrides: str = ""):
    """A YAML with the command line's changes; a training's without ``data_folder`` is the demo.

    Arguments
    ---------
    hparams_file : path
    overrides : str
        As from ``speechbrain.parse_arguments``.

    Returns
    -------
    ruamel.yaml.CommentedMap
        References are not resolved: what refers to another key follows it when that is changed.

    Raises
    ------
    ValueError
        For a key that the YAML does not have, or that each of its stages sets anew.
    """
    document = round_trip(Path(hparams_file).read_text(encoding="utf-8"))
    given = round_trip(overrides) or {}
    stages = given.get("stages", document.get("stages"))
    for key in given if isinstance(stages, list) else ():
        if stages and all(isinstance(stage, dict) and key in stage for stage in stages):
            raise ValueError(f"{key} is set by every stage; change it there, with --stages=[...]")
    if {"data_folder": "", **document, **given}["data_folder"] is None:
        text = (RECIPE / "demo.yaml").read_text(encoding="utf-8")
        demo = round_trip(text.replace("{recipe}", str(RECIPE)))
        demo.update(demo.pop("only_in").get(Path(hparams_file).stem, {}))
        given.pop("data_folder", None)
        given = {key: value for key, value in demo.items() if key in document} | given
    return changed(document, given)


def split_stages(document) -> list:
    """The document of each stage of a training; without ``stages`` it is one, without a name.

    Raises
    ------
    ValueError
        If ``stages`` is not a list of changes, or two stages have one name.
    """
    stages = document.get("stages")
    if stages is None:
        return [document]
    if not isinstance(stages, list) or not stages or not all(isinstance(x, dict) for x in stages):
        raise ValueError(f"stages must be null or a list of mappings of changes, got {stages!r}")
    found = {}
    for number, stage in enumerate(stages, start=1):
        name = stage.get("stage", str(number))
        if name in found:
            raise ValueError(f"two stages are called {name!r}; give each its own name")
        found[name] = changed(document, {**stage, "stage": name, "stages": None})
    return list(found.values())


def changed(document: Mapping, changes: Mapping):
    """A copy of a document with other values, by ``merge``; it must have their keys already."""
    document = round_trip(dumped(document))  # deepcopy would drop the tag of "!new:Name []"
    for key in changes:
        if key not in document and key not in RUN_OPTIONS:
            raise ValueError(unknown_key(key, document))
    merge(document, changes)
    return document


def merge(document, changes):
    """Give a document other values in place; mappings without a tag are merged into mappings."""
    for key, value in changes.items():
        tag = getattr(value, "tag", None)
        untagged = tag is None or tag.value is None
        if isinstance(value, dict) and isinstance(document.get(key), dict) and untagged:
            merge(document[key], value)
        else:
            document[key] = value


def unknown_key(key: object, names: Iterable[str], whose: str = "the YAML") -> str:
    """A sentence on a key that is not there, with the name that was meant if there is one."""
    near = nearest(key, names)
    return f"{key} is not a key of {whose}" + (f"; did you mean {near!r}?" if near else "")


def nearest(key: object, names: Iterable[str]) -> str | None:
    """The name that a misspelt key was meant to be, if there is one."""
    return next(iter(difflib.get_close_matches(str(key), names, n=1, cutoff=0.7)), None)


def round_trip(text: str):
    """A YAML's document, comments, tags and references as they are."""
    return ruamel.yaml.YAML().load(text)


def dumped(document: Mapping) -> str:
    """A document's text."""
    text = io.StringIO()
    ruamel.yaml.YAML().dump(document, text)
    return text.getvalue()


def resolved(document: Mapping) -> str:
    """A document's text without references, for ``load_hyperpyyaml``."""
    return resolve_references(dumped(document)).getvalue()


class Code(NamedTuple):
    """A value with a tag, ``!new:torch.nn.Linear``, and what it would be called with."""

    tag: str
    arguments: Any

    def __repr__(self):
        return self.tag


class _Loader(ruamel.yaml.SafeLoader):
    """Reads what HyperPyYAML would build, and builds nothing."""


def _read_code(loader, tag, node):
    if isinstance(node, ruamel.yaml.MappingNode):
        return Code(f"!{tag}", loader.construct_mapping(node, deep=True))
    if isinstance(node, ruamel.yaml.SequenceNode):
        return Code(f"!{tag}", loader.construct_sequence(node, deep=True))
    return Code(f"!{tag}", {})


_Loader.add_multi_constructor("!", _read_code)


def parse(document: Mapping) -> dict[str, Any]:
    """Keys and values, references resolved, an object as what it would be made of; builds none."""
    tree = yaml.load(resolved(document), Loader=_Loader)
    return {key: value for key, value in tree.items() if not key.startswith("__")}


def run_options(given, hparams: Mapping) -> dict[str, Any]:
    """SpeechBrain's run options, as a mapping: the command line's, else those of the YAML."""
    in_yaml = {name: hparams[name] for name in RUN_OPTIONS if name in hparams}
    of_command = {name: given[name] for name in given.overridden_args}
    return {"distributed_backend": "nccl"} | in_yaml | of_command


def is_demo(hparams: Mapping) -> bool:
    """Whether a training's data are the demo's voices, which are made in its output folder."""
    return hparams["data_folder"] == str(Path(hparams["output_folder"]) / "voices")
