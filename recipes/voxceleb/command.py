"""What the recipes' scripts share as programs: errors in one sentence, a short log, fitting workers."""

import os
import sys
from pathlib import Path

from speechbrain_mrl.inference.optimize import prepare_cpu
from speechbrain_mrl.utils import attempt

LOG_CONFIG = str(Path(__file__).with_name("log.yaml"))  # of create_experiment_directory


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
    code = attempt(lambda: main(sys.argv[1:] if argv is None else argv), exit_code=2)
    if code:
        sys.exit(code)


def limit_workers(hparams):
    """Lower ``num_workers``, also of loaders, to the processors that this process may use."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        available = os.cpu_count() or 1
    for part in (hparams, hparams.get("train_loader"), hparams.get("valid_loader")):
        if part is not None:
            part["num_workers"] = min(part["num_workers"], available)
