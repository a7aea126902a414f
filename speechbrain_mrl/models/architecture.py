"""Reads an encoder's architecture out of HyperPyYAML, and builds it from layers alone."""

import io
import pydoc
import re
from collections.abc import Iterator
from typing import Any

from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import nn

from speechbrain_mrl.models.kaldi import KaldiFbank
from speechbrain_mrl.models.matryoshka import PARTS

# Where layers come from, as prefixes of the modules that define them; and the class that travels.
PACKAGES = (
    "speechbrain.lobes.",
    "speechbrain.nnet.",
    "speechbrain.processing.",
    "torch.nn.",
    "torchaudio.",
)
OWN = "speechbrain_mrl.KaldiFbank"
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in "map seq str int float bool null".split()}
PLAIN.add("!tuple")


def architecture_of(text: str, key: str | None = None) -> str:
    r"""HyperPyYAML of an encoder's parts alone, from the whole text or the object ``key`` in it.

    Example
    -------
    >>> text = "n: 8\nmodules:\n  embedding_model: !new:torch.nn.Linear [!ref <n>, 4]\n"
    >>> print(architecture_of(text, "modules").strip())
    embedding_model: !new:torch.nn.Linear [8, 4]
    """
    found = YAML().load(resolve_references(text).getvalue())
    return parts_of(found if key is None else found[key])


def parts_of(mapping: Any) -> str:
    """The HyperPyYAML of an encoder's parts, from a mapping that ruamel.yaml has read."""
    yaml, text = YAML(), io.StringIO()
    yaml.dump({name: mapping[name] for name in PARTS if mapping.get(name) is not None}, text)
    return text.getvalue()


def plain_architecture(text: str) -> str:
    r"""The parts of an architecture alone, its references resolved.

    Example
    -------
    >>> text = "n: 8\nembedding_model: !new:torch.nn.Linear [!ref <n>, 4]"
    >>> print(plain_architecture(text).strip())
    embedding_model: !new:torch.nn.Linear [8, 4]
    """
    try:
        return architecture_of(text)
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"architecture must be HyperPyYAML with the keys {', '.join(PARTS)}: {reason}"
        ) from error


def build_parts(text: str) -> dict[str, Any]:
    """The modules of a plain architecture, new, by the names of ``MatryoshkaEncoder``'s arguments.

    Nothing but layers is made: each tag must name a ``torch.nn.Module`` of SpeechBrain, torch.nn,
    torchaudio or this package, wherever its name leads to.

    Raises
    ------
    ValueError
        If it names anything else, or the layers cannot be made.
    """
    for tag in set(_tags(YAML().compose(text))):
        kind, _, name = tag.partition(":")
        if tag not in PLAIN and (kind not in ("!new", "!name") or not _is_layer(name)):
            raise ValueError(
                f"architecture has {tag}; it may name layers only, by !new: or !name:, of "
                f"{', '.join(prefix + '*' for prefix in PACKAGES)} or {OWN}"
            )
    try:
        parts = dict(load_hyperpyyaml(text))
    except Exception as error:  # many types: each layer refuses in its own way
        reason = " ".join(str(error).split())
        raise ValueError(f"architecture cannot be built: {reason}") from error
    if PARTS[-1] not in parts:
        raise ValueError(f"architecture lacks {PARTS[-1]}")
    return parts


def _tags(node: Any) -> Iterator[str]:
    yield str(node.tag)
    if isinstance(node.value, list):
        for child in node.value:
            for one in child if isinstance(child, tuple) else (child,):
                yield from _tags(one)


def _is_layer(name: str) -> bool:
    """Whether a dotted name is a layer's, which a package may also have imported from elsewhere."""
    if not name.startswith((*PACKAGES, "speechbrain_mrl.")):
        return False
    try:
        found = pydoc.locate(name)
    except (pydoc.ErrorDuringImport, ImportError):
        return False
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return False
    return found is KaldiFbank or found.__module__.startswith(PACKAGES)


def travelling(text: str, package: str) -> str:
    """The same with this package's layer under the name that it has in a published folder."""
    return re.sub(
        r"speechbrain_mrl(\.models\.kaldi)?\.KaldiFbank", f"{package}.kaldi.KaldiFbank", text
    )


def of_package(text: str, package: str) -> str:
    """``travelling`` undone."""
    return text.replace(f"{package}.kaldi.KaldiFbank", OWN)
