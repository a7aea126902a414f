"""What objects of a YAML may be called with, and what its keys may not say together."""

import inspect
import math
import os
import pydoc

from read_hparams import Code, is_demo, unknown_key

from speechbrain_mrl.inference.encoders import choose_teachers
from speechbrain_mrl.models.redimnet import check_mrl_dims
from speechbrain_mrl.models.releases import (
    check_released,
    released_names,
)

RELEASED = released_names()
PLAIN = (inspect.Parameter.empty, bool, int, float, str, "bool", "int", "float", "str")
NEEDED = {  # keys that go with a value of another
    ("speaker_folders", True): ("train_speakers", "valid_speakers", "test_speakers"),
    ("speaker_folders", False): ("test_folder",),
    ("pretrained", True): ("backbone", "student_train_type", "student_dataset"),
    ("embedding_model", "any"): ("pretrained_encoder",),
    ("teachers", "any"): (
        "taught_by",
        "teacher_train_type",
        "teacher_dataset",
        "teacher_store",
        "teacher_augment",
    ),
}


def check_object(value):
    """Raise ValueError unless a tag names what can be called with these arguments."""
    if not isinstance(value, Code) or not isinstance(value.arguments, dict):
        raise ValueError("must be an object with its arguments by name, as in !new:any.Module")
    function = pydoc.locate(value.tag.partition(":")[2])
    if not callable(function):
        raise ValueError(f"names {value.tag}, but there is nothing of that name to be called")
    check_arguments(function, value.arguments)
    return value


def is_finite(value):
    return type(value) is int or type(value) is float and math.isfinite(value)


def check_arguments(function, given):
    """Raise ValueError for an argument that a function lacks, or of another type than its default."""
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name, value in given.items():
        if name not in parameters and not takes_any:
            raise ValueError(f".{unknown_key(name, parameters, function.__name__)}")
        default = None
        if name in parameters and parameters[name].annotation in PLAIN:  # which allow no other type
            default = parameters[name].default
        if type(default) in (int, float) and not is_finite(value):
            raise ValueError(f".{name} must be a finite number, got {shown(value)}")
        if type(default) in (bool, str) and not isinstance(value, type(default)):
            wanted = {bool: "True or False", str: "text"}[type(default)]
            raise ValueError(f".{name} must be {wanted}, got {shown(value)}")
    return given


def shown(value):
    return value.tag if isinstance(value, Code) else repr(value)


def contradictions(given):
    """A sentence on each of the keys that do not go together.

    Arguments
    ---------
    given : mapping
        Keys and values of one stage, of which each may be there.
    """
    for (key, value), keys in NEEDED.items():
        missing = [name for name in keys if name not in given]
        if missing and given.get(key) is not None and value in (given[key], "any"):
            yield f"{key} is {shown(given[key])}, for which the YAML lacks {missing}"
    check_mrl_dims(given["mrl_dims"], given["embed_dim"])
    for part in ("student", "objective"):
        sizes = given[part].arguments.get("mrl_dims", given["mrl_dims"])
        if sizes != given["mrl_dims"]:
            yield f"{part}.mrl_dims {sizes} must be mrl_dims {given['mrl_dims']}"
    folders = given["data_folder"]
    folders = folders if isinstance(folders, list) else [folders]
    if not is_demo(given) and not all(os.path.exists(str(path)) for path in folders):
        yield f"data_folder must be existing files or folders, got {given['data_folder']!r}"
    if given["labels"] and not given["speaker_folders"]:
        yield "labels need speaker_folders; set labels to False or speaker_folders to True"
    if given["warmup"] + given["cooldown"] > 1:
        shares = f"warmup {given['warmup']} and cooldown {given['cooldown']}"
        yield f"{shares} must be 1 at most, together"
    if given["ckpt_interval_minutes"] and given.get("ckpt_interval_steps"):
        yield "ckpt_interval_minutes and ckpt_interval_steps exclude each other; set one to 0"
    if given.get("pretrained") and isinstance(given["backbone"], dict):
        yield "backbone is a model_config, which has no weights; set pretrained to False"
    elif given.get("pretrained"):
        yield from _unreleased("backbone", given["backbone"], "student", given)
    yield from _of_objective(given)


def _of_objective(given):
    """Sentences on labels, teachers and the objective that reads them."""
    arguments = given["objective"].arguments
    if "n_classes" in arguments:
        yield "objective.n_classes is the number of speakers that training has; leave it out"
    terms = {term for term, weight in arguments.get("terms", {}).items() if weight}
    if "aam" in terms and not given["labels"]:
        yield "labels is False, but objective.terms has aam, which needs them; set one of the two"
    if given.get("margin_epochs") and "aam" not in terms:
        yield f"margin_epochs is {given['margin_epochs']}, but only the term aam has margins"
    named, teachers = given.get("teachers"), {}
    if named is None and terms != {"aam"}:
        yield f"objective.terms {sorted(terms - {'aam'})} need teachers, which is null"
    if named is not None:
        teachers = choose_teachers(named, given["taught_by"])
        for name in teachers.values():
            yield from _unreleased("teachers", name, "teacher", given)
    try:
        objective = pydoc.locate(given["objective"].tag.partition(":")[2])
        made = objective(**arguments, n_classes=2 if given["labels"] else None)
    except (TypeError, ValueError) as error:
        yield f"objective: {error}"
        return
    teaching = {name for ensemble in made.ensembles for name in ensemble.names or ()}
    teaching |= set(arguments.get("teacher_weights") or ())
    if absent := sorted(teaching - teachers.keys()):
        yield f"objective names {absent}, but the teachers are {sorted(teachers)}"


def _unreleased(key, name, whose, given):
    if isinstance(name, str) and name in RELEASED and not os.path.exists(name):
        kinds = (f"{whose}_train_type", f"{whose}_dataset")
        try:
            check_released(name, *(given[kind] for kind in kinds))
        except ValueError as error:
            yield f"{key} names {name} for {' and '.join(kinds)}, but {error}"
