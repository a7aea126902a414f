"""Reads, changes and checks the recipes' YAMLs, before anything is built or written.

A YAML is parsed here without running any of it.
"""

import difflib
import inspect
import io
import os
import pydoc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
import yaml
from hyperpyyaml import resolve_references
from rules import RELEASED, SUPERVISED, TRAIN, VERIFY, Code, Rule

from speechbrain_mrl.models.pretrained import RELEASES
from speechbrain_mrl.models.redimnet import complete_config
from speechbrain_mrl.prefixes import check_mrl_dims


def changed(document: Mapping, changes: Mapping):
    """A copy of a document with other values, by ``merge``; it must have their keys already."""
    round_trip = ruamel.yaml.YAML()
    # deepcopy would drop the tag of "!new:Name []"
    document = round_trip.load(dumped(document))
    if unknown := [key for key in changes if key not in document]:
        raise ValueError(unknown_key(unknown[0], unknown[0], document))
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


def dumped(document: Mapping) -> str:
    """A document's text."""
    text = io.StringIO()
    ruamel.yaml.YAML().dump(document, text)
    return text.getvalue()


class _Loader(ruamel.yaml.SafeLoader):
    """Reads what HyperPyYAML would build, and builds nothing."""


def _read_code(loader, tag, node):
    if isinstance(node, ruamel.yaml.MappingNode):
        return Code(f"!{tag}", loader.construct_mapping(node, deep=True))
    if isinstance(node, ruamel.yaml.SequenceNode):
        return Code(f"!{tag}", loader.construct_sequence(node, deep=True))
    return Code(f"!{tag}", {})


_Loader.add_multi_constructor("!", _read_code)


def parse(text: str) -> dict[str, Any]:
    """A YAML's keys and values, its references resolved, an object as what it would be made of."""
    return yaml.load(resolve_references(text), Loader=_Loader)


def check_train(text: str):
    """Raise ValueError, in a sentence that names the key, unless a training's YAML can be run.

    Arguments
    ---------
    text : str
        Of one stage, all of its changes applied.
    """
    check_values(tree := parse(text), TRAIN, SUPERVISED)
    check_relations(tree)


def check_verify(text: str):
    """Raise ValueError, in a sentence that names the key, unless a verification's YAML can be run."""
    check_values(parse(text), VERIFY)


def check_values(tree: Mapping, rules: Mapping, more_rules: Mapping | None = None):
    """Raise ValueError unless all keys that ``rules`` names are there, and none that nobody names.

    Keys that start with ``__`` are HyperPyYAML's own and left alone.
    """
    if missing := sorted(set(rules) - set(tree)):
        raise ValueError(f"the YAML lacks {missing}; give them, null where a part is not wanted")
    public = {key: value for key, value in tree.items() if not str(key).startswith("__")}
    _check_keys("", public, {**rules, **(more_rules or {})})


def _check_keys(path, given, rules, also=()):
    for key, value in given.items():
        if key in rules:
            _check(f"{path}{key}", value, rules[key])
        elif key not in also and None not in also:
            raise ValueError(unknown_key(f"{path}{key}", key, {*rules, *also}))


def unknown_key(path: str, key: Any, names: Iterable[str]) -> str:
    """A sentence on a key that is not there, with the name that was meant if there is one."""
    near = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(names)}"
    return f"{path} is not a key of the YAML; {hint}"


def _check(path, value, rule):
    if isinstance(rule, Rule):
        if not rule.holds(value):
            raise ValueError(f"{path} must be {rule.text}, got {_shown(value)}")
        return
    if value is None and rule.optional:
        return
    given, also = value, ()
    if rule.code and isinstance(value, Code):
        given, also = value.arguments, _parameters(path, value.tag)
    if rule.code != isinstance(value, Code) or not isinstance(given, dict):
        what = "an object with its arguments by name" if rule.code else "a mapping"
        raise ValueError(f"{path} must be {what}, got {_shown(value)}")
    _check_keys(f"{path}.", given, rule.rules, also)


def _shown(value):
    return value.tag if isinstance(value, Code) else repr(value)


def _parameters(path, tag):
    """Names of the arguments that a tag's object takes; None in place of any name."""
    name = tag.partition(":")[2]
    found = pydoc.locate(name)
    if not callable(found):
        raise ValueError(f"{path} names {tag}, but there is no {name or 'such tag'} to be called")
    parameters = inspect.signature(found).parameters.values()
    return [None if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


def check_relations(tree: Mapping):
    """Raise ValueError where keys of a training's YAML contradict each other."""
    for sentence in _contradictions(tree):
        raise ValueError(sentence)


def _contradictions(tree):
    mrl_dims, objective = tree["mrl_dims"], tree["objective"].arguments
    terms = objective.get("terms", {"cosine": 1.0, "gram": 1.0})
    terms = {term for term, weight in terms.items() if weight}
    check_mrl_dims(mrl_dims)
    if mrl_dims[-1] != tree["embed_dim"]:
        yield f"mrl_dims {mrl_dims} must end at embed_dim, which is {tree['embed_dim']}"
    if objective.get("mrl_dims", mrl_dims) != mrl_dims:
        yield f"objective.mrl_dims {objective['mrl_dims']} must be mrl_dims {mrl_dims}"
    if "n_classes" in objective:
        yield "objective.n_classes is the number of speakers that training has; leave it out"
    if tree["labels"] and not tree["speaker_folders"]:
        yield "labels need speaker_folders; set labels to False or speaker_folders to True"
    if tree["labels"] != ("aam" in terms):
        yield (
            f"labels is {tree['labels']} and objective.terms are {sorted(terms)}; the term aam "
            "needs labels, and no other term reads them"
        )
    if tree["margin_epochs"] and "aam" not in terms:
        yield f"margin_epochs is {tree['margin_epochs']}, but only the term aam has margins"
    if tree["warmup"] + tree["cooldown"] > 1:
        yield f"warmup {tree['warmup']} and cooldown {tree['cooldown']} must be 1 at most, together"
    for key in ("mrl_weights", "margins"):
        given = objective.get(key)
        of_sizes = {str(size) for size in given} if isinstance(given, dict) else None
        if of_sizes is not None and of_sizes != {str(dim) for dim in mrl_dims}:
            yield f"objective.{key} must have the sizes {mrl_dims}, got {sorted(given)}"
        if isinstance(given, list) and len(given) != len(mrl_dims):
            yield f"objective.{key} must have one entry for each of {mrl_dims}, got {given}"
    yield from _contradictions_of_teachers(tree, terms)
    if isinstance(tree["backbone"], dict):
        complete_config(tree["backbone"])
        if tree["pretrained"]:
            yield "backbone is a model_config, which has no weights; set pretrained to False"
    if not tree["pretrained"] and isinstance(tree["backbone"], str):
        if tree["backbone"] not in RELEASED:
            yield (
                f"backbone is the file {tree['backbone']}, from which training starts; set "
                "pretrained to True"
            )
    if tree["pretrained"]:
        yield from _never_released(tree, "backbone", [tree["backbone"]], "student")


def _contradictions_of_teachers(tree, terms):
    teachers, objective = tree["teachers"], tree["objective"].arguments
    if teachers is None:
        if terms != {"aam"}:
            yield f"objective.terms {sorted(terms - {'aam'})} need teachers, which is null"
        return
    listed = list(teachers.values() if isinstance(teachers, dict) else teachers)
    yield from _never_released(tree, "teachers", listed, "teacher")
    names = list(teachers) if isinstance(teachers, dict) else [Path(name).stem for name in listed]
    if len(set(names)) < len(names):
        yield f"teachers {listed} share a name; give a mapping of names to teachers"
    if tree["taught_by"] is not None:
        if not all(-len(names) <= i < len(names) for i in tree["taught_by"]):
            yield (
                f"taught_by {tree['taught_by']} must be positions in the {len(names)} teachers "
                f"{names}, the first is 0"
            )
            return
        names = [names[i] for i in tree["taught_by"]]
    teacher_map = objective.get("teacher_map")
    if isinstance(teacher_map, dict):
        if {str(size) for size in teacher_map} != {str(dim) for dim in tree["mrl_dims"]}:
            yield (
                f"objective.teacher_map must have the sizes {tree['mrl_dims']}, "
                f"got {sorted(teacher_map)}"
            )
        groups = [[one] if isinstance(one, str) else one for one in teacher_map.values()]
        if absent := sorted({name for group in groups for name in group} - set(names)):
            yield f"objective.teacher_map names {absent}, but the teachers are {names}"
    if absent := sorted(set(objective.get("teacher_weights") or ()) - set(names)):
        yield f"objective.teacher_weights names {absent}, but the teachers are {names}"


def _never_released(tree, key, models, whose):
    """Sentences on released names that the release of a train type and data set lacks."""
    dataset, train_type = tree[f"{whose}_dataset"], tree[f"{whose}_train_type"]
    release = RELEASES[dataset]
    for name in models:
        if isinstance(name, str) and name in RELEASED and not os.path.exists(name):
            if name not in release["model_names"] or train_type not in release["train_types"]:
                yield (
                    f"{key} names {name}, which was not released for {whose}_dataset {dataset} "
                    f"and {whose}_train_type {train_type}; see docs/releases.md"
                )
