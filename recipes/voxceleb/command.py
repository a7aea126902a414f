"""What the recipes' scripts share as programs: errors in one sentence, a short log, fitting workers."""

import os
import sys
from pathlib import Path

import ruamel.yaml
import torch
import yaml

from speechbrain_mrl.inference.optimize import prepare_cpu

LOG_CONFIG = str(Path(__file__).with_name("log.yaml"))  # of create_experiment_directory
TRACEBACK = "MRL_TRACEBACK"  # environment variable that shows where an error comes from
MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    yaml.YAMLError,
    ruamel.yaml.error.YAMLError,
)


def run_command(main, argv=None):
    """Run a script's ``main``; a mistake of its user is one sentence on stderr and exit code 2.

    Arguments
    ---------
    main : callable
        Takes the list of arguments.
    argv : list of str, optional
        Default: the process' own.
    """
    prepare_cpu()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except MISTAKES as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error):
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename}: {error.strerror}"
    if getattr(error, "problem_mark", None) is not None:  # of a YAML
        return f"the YAML cannot be read, line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def check_device(device):
    """Raise ValueError, in a sentence, unless this machine has such a device; None is any."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={device} cannot be used here: {reason}") from error


def limit_workers(hparams):
    """Lower ``num_workers``, also of loaders, to the processors that this process may use."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        available = os.cpu_count() or 1
    for part in (hparams, hparams.get("train_loader"), hparams.get("valid_loader")):
        if part is not None:
            part["num_workers"] = min(part["num_workers"], available)
