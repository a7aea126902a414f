"""Seconds and modules of ``import speechbrain_mrl``, against SpeechBrain's own import.

python benchmarks/start.py --repeats=7

Each import is a fresh interpreter, in turns; SpeechBrain's is ``import speechbrain``, which is less
than what its pretrained models need (``speechbrain.inference``, also shown).
"""

import subprocess
import sys
from functools import partial

from timing import arguments, interleaved, write

SUBJECTS = ("speechbrain", "speechbrain.inference", "speechbrain_mrl")


def run(code):
    """A fresh interpreter's output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def main():
    args = arguments(__doc__, "start").parse_args()
    imports = {name: partial(run, f"import {name}") for name in ("sys", *SUBJECTS)}
    seconds = interleaved(imports, args.repeats)
    rows = {}
    print(f"{'import':24}{'seconds':>9}{'modules':>9}{'ratio':>8}")
    for name in SUBJECTS:
        modules = int(run(f"import sys, {name}; print(len(sys.modules))").split()[-1])
        ratio = seconds[name] / seconds["speechbrain"]
        rows[name] = {"seconds": seconds[name], "modules": modules, "ratio": ratio}
        print(f"{name:24}{seconds[name]:9.2f}{modules:9}{ratio:8.3f}")
    write(args.output, {"interpreter": seconds["sys"], "rows": rows})


if __name__ == "__main__":
    main()
