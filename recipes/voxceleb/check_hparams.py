"""What the keys of the recipes' YAMLs may hold, checked before anything is built or written."""

import os
import re
from typing import Annotated, Any, Literal

from check_relations import RELEASED, check_arguments, check_object, contradictions, shown
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model
from read_hparams import RUN_OPTIONS, Code, nearest, unknown_key
from torch.utils.data import DataLoader

from speechbrain_mrl.inference.encoders import HUB_ID


def must_be(rule, holds, many=False):
    """The type of a value that holds to a rule; ``many``: or a list or mapping of such values."""

    def check(value):
        values = value.values() if isinstance(value, dict) else value
        values = list(values) if many and isinstance(value, (list, dict)) else [value]
        if not values or not all(map(holds, values)):
            raise ValueError(f"must be {rule}")
        return value

    return Annotated[Any, AfterValidator(check)]


def text_like(pattern):
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


def is_place(value):
    return isinstance(value, str) and os.path.exists(value)


def is_file(value):
    return is_place(value) and os.path.isfile(value)


def is_backbone(value):
    return isinstance(value, dict) or value in RELEASED or is_file(value)


def is_model(value):
    known = isinstance(value, Code) or value in RELEASED or is_place(value)
    return known or text_like(HUB_ID)(value)


def is_published(value):
    return is_place(value) and os.path.isdir(value) or text_like(HUB_ID)(value)


Count, Whole = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
Several, Seed = Annotated[int, Field(ge=2)], Annotated[int, Field(ge=0, lt=2**32)]
Above0, Share = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0, le=1)]
Rate, NotNegative = Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(ge=0)]
Text = must_be("text", text_like(r"(?s).*\S.*"))
Name = must_be("empty or letters, digits, '_', '-', '+', '.'", text_like(r"([\w+-][\w.+-]*)?"))
File, Files = must_be("an existing file", is_file), must_be("existing files", is_file, many=True)
Place = must_be("an existing file or folder", is_place)
Places = must_be("existing files or folders", is_place, many=True)
Model = must_be("a released name, file, folder, Hub id or object", is_model)
Models = must_be("released names, files, folders, Hub ids or objects", is_model, many=True)
Published = must_be("an existing folder or a Hub id", is_published)
Object = Annotated[Any, AfterValidator(check_object)]
Loader = Annotated[dict, AfterValidator(lambda given: check_arguments(DataLoader, given))]
TRAINING = [  # of one stage of hparams/mrl_*.yaml
    (Seed, "seed split_seed"),
    (Text, "output_folder model_title license training_data"),
    (Name, "stage"),
    (Any, "data_folder"),
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
    (must_be("a Hub id, org/name", text_like(HUB_ID)) | None, "push_to_hub"),
]
OPTIONAL = [  # left out where nothing needs it
    (File | None, "train_speakers"),
    (Several, "valid_speakers test_speakers"),
    (Place | None, "test_folder"),
    (Models | None, "teachers"),
    (Annotated[list[int], Field(min_length=1)] | None, "taught_by"),
    (Object | None, "teacher_augment"),
    (Text, "teacher_store teacher_train_type teacher_dataset student_train_type student_dataset"),
    (must_be("a released name, a file or a model_config", is_backbone), "backbone"),
    (bool, "pretrained gradient_checkpointing"),
    (Published | None, "pretrained_encoder"),
    (NotNegative, "margin_epochs"),
    (Literal["fp32", "fp16", "bf16"], "precision eval_precision"),
    (Count, "grad_accumulation_factor"),
    (Whole, "ckpt_interval_steps"),
    (Literal["random"], "sorting"),  # chunks are equally long
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


def check_training(tree):
    """Raise ValueError, in a sentence that names the key, unless a stage of a training can run."""
    check(tree, TRAINING, OPTIONAL)
    for found in contradictions(tree):
        raise ValueError(found)


def check(tree, needed, optional=()):
    """Raise ValueError, in a sentence, for what may not be there; unknown keys others may refer to."""
    fields = {name: (kind, ...) for kind, names in needed for name in names.split()}
    fields |= {name: (kind, None) for kind, names in optional for name in names.split()}
    absent = {**fields, **RUN_OPTIONS}.keys() - tree.keys()
    others = tree.keys() - fields.keys() - RUN_OPTIONS.keys()
    for name in sorted(absent):
        if misspelt := nearest(name, others):
            raise ValueError(unknown_key(misspelt, absent))
    fields |= {key: (Object, ...) for key in others if isinstance(tree[key], Code)}
    options = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        create_model("Keys", __config__=options, **fields)(**tree)
    except ValidationError as error:
        raise ValueError(sentence(error.errors())) from None


def sentence(errors):
    """The first of pydantic's errors, or all keys that are missing, for whoever wrote the YAML."""
    if missing := [error["loc"][0] for error in errors if error["type"] == "missing"]:
        return f"the YAML lacks {missing}; give them, null where a part is not wanted"
    key, *inside = (part for part in errors[0]["loc"] if part != "[key]")
    key += "".join(f"[{part!r}]" for part in inside)
    rule = errors[0]["msg"].removeprefix("Value error, ")
    rule = re.sub(r"^\w+ should", "must", rule)
    if rule.startswith("must"):
        rule += f", got {shown(errors[0]['input'])}"
    return f"{key}{rule}" if rule.startswith(".") else f"{key} {rule}"
