"""What each key of the recipes' YAMLs may hold. A key without a rule is refused.

Only keys with a ``Part`` or ``CODE`` in their rule may name code.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from speechbrain_mrl.losses import TERMS
from speechbrain_mrl.models.pretrained import RELEASES
from speechbrain_mrl.models.redimnet import CONFIG_DEFAULTS

PARTS_OF_A_STUDENT = ("backbone", "spec", "pool", "bn", "linear")
RELEASED = {name for release in RELEASES.values() for name in release["model_names"]}
_TRAIN_TYPES = {name for release in RELEASES.values() for name in release["train_types"]}


class Code(NamedTuple):
    """A value with a tag, ``!new:torch.nn.Linear``, and what it would be called with."""

    tag: str
    arguments: Any


class Rule(NamedTuple):
    """What a value must be, as it is said after "must be", and the test of it."""

    text: str
    holds: Callable[[Any], bool]


class Part(NamedTuple):
    """An object's arguments, or without ``code`` a plain mapping; rules of the keys we give.

    An object may be given any other of its arguments; null may take an optional part's place.
    """

    rules: Mapping[str, Any]
    optional: bool = False
    code: bool = True


def whole(low: int = 0, high: float = math.inf) -> Rule:
    upto = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
    return Rule(f"a whole number {upto}", lambda x: type(x) is int and low <= x <= high)


def number(low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Rule:
    """``low`` and ``high`` are allowed, ``above`` is not."""
    least = f"above {above:g}" if above > -math.inf else f"of {low:g} or more"
    text = least if high == math.inf else f"{least} and at most {high:g}"

    def holds(x):
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        return is_number and math.isfinite(x) and low <= x <= high and x > above

    return Rule(f"a number {text}", holds)


def choice(values: Iterable[Any]) -> Rule:
    values = sorted(values)
    return Rule(
        f"one of {', '.join(values)}", lambda x: type(x) in map(type, values) and x in values
    )


def matching(pattern: str, text: str) -> Rule:
    return Rule(text, lambda x: isinstance(x, str) and re.fullmatch(pattern, x) is not None)


def maybe(rule: Rule) -> Rule:
    return either(rule, Rule("null", lambda x: x is None))


def either(*rules: Rule) -> Rule:
    text = " or ".join(rule.text for rule in rules)
    return Rule(text, lambda x: any(rule.holds(x) for rule in rules))


def list_of(rule: Rule, least: int = 1) -> Rule:
    return Rule(
        f"a list of which each is {rule.text}",
        lambda x: isinstance(x, list) and len(x) >= least and all(map(rule.holds, x)),
    )


def mapping(keys: Rule, values: Rule) -> Rule:
    return Rule(
        f"a mapping from {keys.text} to {values.text}",
        lambda x: (
            isinstance(x, dict)
            and len(x) > 0
            and all(keys.holds(key) and values.holds(value) for key, value in x.items())
        ),
    )


FLAG = Rule("True or False", lambda x: isinstance(x, bool))
TEXT = Rule("text", lambda x: isinstance(x, str) and x.strip() != "")
NAME = matching(r"[\w+-][\w.+-]*", "a name of letters, digits, '_', '-', '+' and '.'")
FILE = Rule("an existing file", lambda x: isinstance(x, str) and os.path.isfile(x))
PLACE = Rule("an existing file or folder", lambda x: isinstance(x, str) and os.path.exists(x))
CODE = Rule("an object, as in !new:any.Module", lambda x: isinstance(x, Code))
SIZE = Rule("a size", lambda x: whole(1).holds(x) or isinstance(x, str) and x.isdecimal())
MARGIN = number(0, 1.5)
SECONDS = number(above=0)
# WebDataset would run what comes after "pipe:"
SHARDS = matching(r"(?!.*pipe:)\S+", "paths or URLs of tar shards, without spaces or 'pipe:'")
HUB_ID = matching(r"[\w-][\w.-]*/[\w-][\w.-]*", "a Hub id, org/name")
MODEL = Rule(
    "a released name, an existing file or folder or a Hub id",
    lambda x: isinstance(x, str) and x in RELEASED or PLACE.holds(x) or HUB_ID.holds(x),
)

COUNTER = Part({"limit": whole(1)})
LOADER = {
    "batch_size": whole(1),
    "shuffle": FLAG,
    "drop_last": FLAG,
    "num_workers": whole(0),
    "pin_memory": FLAG,
    "prefetch_factor": maybe(whole(1)),
    "persistent_workers": FLAG,
}
SNRS = {"snr_low": number(-100, 200), "snr_high": number(-100, 200)}
TRAIN: dict[str, Any] = {
    "seed": whole(0, 2**32 - 1),
    "output_folder": TEXT,
    "stages": maybe(list_of(Rule("a mapping of changes", lambda x: isinstance(x, dict)))),
    "stage": either(NAME, Rule("empty", lambda x: x == "")),
    "data_folder": maybe(either(PLACE, list_of(PLACE))),
    "speaker_folders": FLAG,
    "trials": maybe(FILE),
    "train_speakers": maybe(FILE),
    "valid_speakers": whole(2),
    "test_speakers": whole(2),
    "test_folder": maybe(PLACE),
    "split_seed": whole(0, 2**32 - 1),
    "shards": maybe(SHARDS),
    "skip_bad_files": FLAG,
    "nonfinite_patience": whole(0),
    "ckpt_interval_minutes": number(0),
    "tensorboard": FLAG,
    "chunk_seconds": SECONDS,
    "chunks_per_clip": whole(1),
    "max_seconds": SECONDS,
    "num_workers": whole(0),
    "teachers": maybe(either(list_of(MODEL), mapping(NAME, either(MODEL, CODE)))),
    "taught_by": maybe(list_of(whole(-1000))),
    "teacher_train_type": choice(_TRAIN_TYPES),
    "teacher_dataset": choice(RELEASES),
    "teacher_store": TEXT,
    "teacher_batch_seconds": SECONDS,
    "backbone": either(
        choice(RELEASED),
        FILE,
        Rule(
            "a model_config", lambda x: isinstance(x, dict) and x.keys() <= CONFIG_DEFAULTS.keys()
        ),
    ),
    "pretrained": FLAG,
    "student_train_type": choice(_TRAIN_TYPES),
    "student_dataset": choice(RELEASES),
    "embed_dim": whole(1),
    "mrl_dims": list_of(whole(1)),
    "freeze": maybe(list_of(choice(PARTS_OF_A_STUDENT))),
    "unfreeze": maybe(mapping(choice(PARTS_OF_A_STUDENT), number(above=0, high=10))),
    "labels": FLAG,
    "margin_epochs": number(0),
    "objective": Part(
        {
            "mrl_dims": list_of(whole(1)),
            "teacher_map": maybe(
                either(choice(["all"]), mapping(SIZE, either(NAME, list_of(NAME))))
            ),
            "terms": mapping(choice(TERMS), maybe(number(0))),
            "mrl_weights": maybe(list_of(number(0))),
            "teacher_weights": maybe(mapping(NAME, number(0))),
            "margins": either(MARGIN, mapping(SIZE, MARGIN)),
            "contrastive_scale": number(above=0),
        }
    ),
    "number_of_epochs": whole(1),
    "batch_size": whole(2),
    "lr": number(above=0, high=10),
    "weight_decay": number(0, 1),
    "warmup": number(0, 1),
    "cooldown": number(0, 1),
    "opt_class": Part({"lr": number(above=0, high=10), "weight_decay": number(0, 1)}),
    "lr_schedule": Part({"lr": number(above=0, high=10), "decay_factor": number(0, 1)}),
    "epoch_counter": COUNTER,
    "train_loader": Part(LOADER, code=False),
    "valid_loader": Part(LOADER, code=False),
    "augment_prob": number(0, 1),
    "noise_csv": maybe(PLACE),
    "rir_csv": maybe(PLACE),
    "add_reverb": Part({"csv_file": maybe(PLACE)}),
    "add_noise": Part({"noise_funct": Part({"csv_file": maybe(PLACE)}), **SNRS}),
    "add_babble": Part({"noise_funct": Part({"n_voices": whole(1)}), **SNRS}),
    "low_pass": Part({"cutoff_low": number(above=0), "cutoff_high": number(above=0)}),
    "telephone": Part({}),
    "drop_bands": Part({"max_bands": whole(1), "width": number(above=0)}),
    "drop_chunks": Part({"max_chunks": whole(1), "length_low": whole(), "length_high": whole()}),
    "wav_augment": Part(
        {
            "augment_prob": number(0, 1),
            "min_augmentations": whole(1),
            "max_augmentations": whole(1),
            "augmentations": list_of(CODE),
        },
        optional=True,
    ),
    "checkpointer": Part(
        {"checkpoints_dir": TEXT, "recoverables": Part({"epoch_counter": COUNTER}, code=False)}
    ),
    "train_logger": Part({"save_file": TEXT, "tensorboard": FLAG}),
    "model_title": TEXT,
    "license": TEXT,
    "training_data": TEXT,
    "card_examples": whole(0),
    "push_to_hub": maybe(HUB_ID),
}
# Keys that only some of the training YAMLs have.
SUPERVISED: dict[str, Any] = {
    "margins": either(MARGIN, mapping(SIZE, MARGIN)),
    "large_margins": either(MARGIN, mapping(SIZE, MARGIN)),
    "large_margin_epochs": whole(1),
    "large_margin_lr": number(above=0, high=10),
    "large_margin_seconds": SECONDS,
}
VERIFY: dict[str, Any] = {
    "output_folder": TEXT,
    "source": either(MODEL, CODE),
    "compare_to": maybe(either(MODEL, CODE)),
    "data_folder": either(PLACE, list_of(PLACE)),
    "trials": either(FILE, list_of(FILE), mapping(NAME, FILE)),
    "batch_seconds": SECONDS,
    "num_workers": whole(0),
    "domain": maybe(FILE),
    "cohort": maybe(FILE),
    "cohort_top": maybe(whole(1)),
    "calibration": maybe(FILE),
    "calibration_p_target": Rule(
        "a number between 0 and 1",
        lambda x: number(above=0, high=1).holds(x) and x < 1,
    ),
    "plda": maybe(FILE),
    "n_bootstrap": whole(0),
}
