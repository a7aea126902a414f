"""What the keys of the recipes' YAMLs may hold, checked before anything is built or written."""

import inspect
import os
import pydoc
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from read_hparams import RUN_OPTIONS, Code, is_demo, nearest, unknown_key
from torch.utils.data import DataLoader

from speechbrain_mrl.inference.encoders import HUB_ID, choose_teachers
from speechbrain_mrl.models.redimnet import check_mrl_dims
from speechbrain_mrl.models.releases import check_released, names_release, released_names

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
is_released = released_names().__contains__
PLAIN = (inspect.Parameter.empty, bool, int, float, str, "bool", "int", "float", "str")
KINDS = {bool: bool, str: str, int: float, float: float}  # of an argument, by its default's type


def check_value(name, kind, value):
    """Raise ValueError, in a sentence, unless pydantic takes the value of this name for the type."""
    try:
        TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        inside = "".join(f"[{part!r}]" for part in wrong["loc"] if part != "[key]")
        rule = re.sub(r"^\w+ should", "must", wrong["msg"].removeprefix("Value error, "))
        if not rule.startswith("."):  # of an object's argument
            rule = f" {rule}, got {wrong['input']!r}"
        raise ValueError(f"{name}{inside}{rule}") from None


def check_arguments(function, given):
    """Raise ValueError for an argument that a function lacks, or of another type than its default."""
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name, value in given.items():
        if name not in parameters and not takes_any:
            raise ValueError(f".{unknown_key(name, parameters, function.__name__)}")
        if name in parameters and parameters[name].annotation in PLAIN:  # which allow no other type
            check_value(f".{name}", KINDS.get(type(parameters[name].default), Any), value)
    return given


def check_object(value):
    """Raise ValueError unless a tag names what can be called with these arguments."""
    if not isinstance(value, Code) or not isinstance(value.arguments, dict):
        raise ValueError("must be an object with its arguments by name, as in !new:any.Module")
    if not callable(called(value)):
        raise ValueError("must name a class or function that exists")
    return check_arguments(called(value), value.arguments)


def called(value):
    """The class or function that a tag names, None if there is none."""
    return pydoc.locate(value.tag.partition(":")[2])


def must_be(rule, *tests, also=(), many=()):
    """The type of a text that passes one of the tests, or of an object of the types ``also``.

    Collections of such values are taken if they are of the types ``many``.
    """

    def check(value):
        values = [value]
        if isinstance(value, many):
            values = list(value.values() if isinstance(value, dict) else value)
        for one in values or [None]:
            passes = isinstance(one, str) and any(test(one) for test in tests)
            if not passes and not isinstance(one, also):
                raise ValueError(f"must be {rule}")
        return value

    return Annotated[Any, AfterValidator(check)]


Count, Whole = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
Several, Seed = Annotated[int, Field(ge=2)], Annotated[int, Field(ge=0, lt=2**32)]
Share, Rate = Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(gt=0, le=10)]
Above0, NotNegative = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
Text = must_be("text", str.strip)
Name = must_be("letters, digits and '_-+.', or empty", re.compile(r"([\w+-][\w.+-]*)?").fullmatch)
File = must_be("an existing file", os.path.isfile)
Files = must_be("existing files", os.path.isfile, many=(list, dict))
Place = must_be("an existing file or folder", os.path.exists)
Places = must_be("existing files or folders", os.path.exists, many=list)
IS_MODEL = names_release, os.path.exists, HUB_ID.fullmatch
Model = must_be("a released name, file, folder, Hub id or object", *IS_MODEL, also=Code)
Models = must_be(
    "released names, files, folders, Hub ids or objects", *IS_MODEL, also=Code, many=(list, dict)
)
Backbone = must_be("a released name, file or model_config", is_released, os.path.isfile, also=dict)
Published = must_be("an existing folder or a Hub id", os.path.isdir, HUB_ID.fullmatch)
Object = Annotated[Any, AfterValidator(check_object)]
Loader = Annotated[dict, AfterValidator(lambda given: check_arguments(DataLoader, given))]
TRAINING = [  # of one stage of hparams/mrl_*.yaml
    (Seed, "seed split_seed"),
    (Text, "output_folder model_title license training_data"),
    (Name, "stage"),
    (Any, "data_folder"),  # which the demo makes
    (bool, "speaker_folders skip_bad_files prepare_only labels"),
    (File | None, "trials"),
    (Text | None, "shards"),
    (Above0, "chunk_seconds max_seconds batch_seconds"),
    (Count, "chunks_per_clip embed_dim number_of_epochs"),
    (Whole, "num_workers nonfinite_patience card_examples"),
    (Several, "batch_size"),
    (list[int], "mrl_dims"),
    (list[str] | None, "freeze"),
    (dict[str, Rate] | None, "unfreeze"),
    (Rate, "lr"),
    (Share, "weight_decay warmup cooldown"),
    (NotNegative, "ckpt_interval_minutes"),
    (Object, "student objective opt_class lr_schedule epoch_counter checkpointer train_logger"),
    (Object | None, "wav_augment"),
    (Loader, "train_loader valid_loader"),
    (must_be("a Hub id, org/name", HUB_ID.fullmatch) | None, "push_to_hub"),
]
OPTIONAL = [  # left out where nothing needs it
    (File | None, "train_speakers"),
    (Several, "valid_speakers test_speakers"),
    (Place | None, "test_folder"),
    (Models | None, "teachers"),
    (Annotated[list[int], Field(min_length=1)] | None, "taught_by"),
    (Object | None, "teacher_augment"),
    (Text, "teacher_store teacher_train_type teacher_dataset student_train_type student_dataset"),
    (Backbone, "backbone"),
    (bool, "pretrained gradient_checkpointing"),
    (Published | None, "pretrained_encoder"),
    (NotNegative, "margin_epochs"),
    (Literal["fp32", "fp16", "bf16"], "precision eval_precision"),
    (Count, "grad_accumulation_factor"),
    (Whole, "ckpt_interval_steps"),
    (Literal["random"], "sorting"),  # chunks are equally long
]
NEEDED = [  # keys that go with a value of another, None: with any
    ("speaker_folders", True, "train_speakers valid_speakers test_speakers"),
    ("speaker_folders", False, "test_folder"),
    ("pretrained", True, "backbone student_train_type student_dataset"),
    ("teachers", None, "taught_by teacher_train_type teacher_dataset teacher_store"),
    ("teachers", None, "teacher_augment"),
]
VERIFICATION = [  # hparams/verify.yaml
    (Text, "output_folder"),
    (Model, "source"),
    (Model | None, "compare_to"),
    (Places, "data_folder"),
    (Files, "trials"),
    (Above0, "batch_seconds"),
    (Whole, "num_workers n_bootstrap"),
    (File | None, "domain cohort calibration plda"),
    (Count | None, "cohort_top"),
    (Annotated[float, Field(gt=0, lt=1)], "calibration_p_target"),
]


def check(tree, needed, optional=()):
    """Raise ValueError, in a sentence, for what may not be there; unknown keys others may refer to."""
    kinds = {name: kind for kind, names in (*needed, *optional) for name in names.split()}
    absent = {**kinds, **RUN_OPTIONS}.keys() - tree.keys()
    others = tree.keys() - kinds.keys() - RUN_OPTIONS.keys()
    for name in sorted(absent):
        if misspelt := nearest(name, others):
            raise ValueError(unknown_key(misspelt, absent))
    if missing := [name for _, names in needed for name in names.split() if name in absent]:
        raise ValueError(f"the YAML lacks {missing}; give them, null where a part is not wanted")
    kinds |= {name: Object for name in others if isinstance(tree[name], Code)}
    for name, kind in kinds.items():
        if name in tree:
            check_value(name, kind, tree[name])


def check_training(tree):
    """Raise ValueError, in a sentence that names the key, unless a stage of a training can run."""
    check(tree, TRAINING, OPTIONAL)
    for found in contradictions(tree):
        raise ValueError(found)


def contradictions(tree):
    """A sentence on each of the keys that do not go together."""
    for key, value, names in NEEDED:
        missing = [name for name in names.split() if name not in tree]
        if missing and tree.get(key) is not None and value in (tree[key], None):
            yield f"{key} is {tree[key]!r}, for which the YAML lacks {missing}"
    if not is_demo(tree):
        check_value("data_folder", Places, tree["data_folder"])
    check_mrl_dims(tree["mrl_dims"], tree["embed_dim"])
    for part in ("student", "objective"):
        sizes = tree[part].arguments.get("mrl_dims", tree["mrl_dims"])
        if sizes != tree["mrl_dims"]:
            yield f"{part}.mrl_dims {sizes} must be mrl_dims {tree['mrl_dims']}"
    if tree["labels"] and not tree["speaker_folders"]:
        yield "labels need speaker_folders; set labels to False or speaker_folders to True"
    if tree["warmup"] + tree["cooldown"] > 1:
        yield f"warmup {tree['warmup']} and cooldown {tree['cooldown']} must be 1 at most, together"
    if tree["ckpt_interval_minutes"] and tree.get("ckpt_interval_steps"):
        yield "ckpt_interval_minutes and ckpt_interval_steps exclude each other; set one to 0"
    if tree.get("pretrained") and isinstance(tree["backbone"], dict):
        yield "backbone is a model_config, which has no weights; set pretrained to False"
    arguments, teachers = tree["objective"].arguments, {}
    if "n_classes" in arguments:
        yield "objective.n_classes is the number of speakers that training has; leave it out"
    try:
        made = called(tree["objective"])(**arguments, n_classes=2)
        terms, ensembles = made.terms.keys(), made.ensembles
    except (AttributeError, TypeError, ValueError) as error:
        yield f"objective: {error}"
        return
    if "aam" in terms and not tree["labels"]:
        yield "labels is False, but objective.terms has aam, which needs them; set one of the two"
    if tree.get("margin_epochs") and "aam" not in terms:
        yield f"margin_epochs is {tree['margin_epochs']}, but only the term aam has margins"
    if tree.get("teachers") is not None:
        teachers = choose_teachers(tree["teachers"], tree["taught_by"])
    elif taught := sorted(terms - {"aam"}):
        yield f"objective.terms {taught} need teachers, which is null"
    teaching = {name for ensemble in ensembles for name in ensemble.names or ()}
    teaching |= set(arguments.get("teacher_weights") or ())
    if absent := sorted(teaching - teachers.keys()):
        yield f"objective names {absent}, but the teachers are {sorted(teachers)}"
    models = [("teacher", name) for name in teachers.values()]
    models += [("student", tree["backbone"])] if tree.get("pretrained") else []
    for whose, name in models:
        if names_release(name) and not os.path.exists(name):
            try:
                check_released(name, tree[f"{whose}_train_type"], tree[f"{whose}_dataset"])
            except ValueError as error:
                yield f"{whose}_train_type and {whose}_dataset: {error}"
