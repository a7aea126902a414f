"""What the benchmarks share: interleaved repeats, medians, peak memory, a table, JSON."""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from speechbrain_mrl.inference.optimize import prepare_cpu


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(f"results/{name}.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--unprepared", action="store_true", help="leave the process as it is, without prepare_cpu"
    )
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed arguments, with torch set up by them: threads, memory, subnormal numbers, seed."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.unprepared:
        prepare_cpu()
    torch.manual_seed(0)
    return args


def interleaved(
    functions: Mapping[str, Callable], repeats: int, calls: int = 1
) -> dict[str, float]:
    """Median seconds of each function; one round of all warms up, then all take turns.

    The last of ``calls`` in a turn is timed: threads of another engine may spin during the first.
    """
    seconds = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            for _ in range(calls - 1):
                function()
            started = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak_memory(function: Callable, *given) -> float:
    """MB by which a fresh process' peak grows while it runs ``function(*given)()``.

    ``function`` prepares what is not counted and returns what is.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, function, *given))
    process.start()
    send.close()
    megabytes = receive.recv()
    process.join()
    return megabytes


def resident(field: str = "VmRSS") -> float:
    """MB of this process' memory now, or with ``VmHWM`` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _measure(send, function, *given):
    run = function(*given)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run()
    send.send(resident("VmHWM") - before)


def write(path: Path, results: dict):
    """The results as JSON, with what they were measured on."""
    results = {"torch": torch.__version__, "machine": platform.machine()} | results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")
