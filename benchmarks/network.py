"""ReDimNet against its plain layout in PyTorch: one embedding, and a training step, on a CPU.

python benchmarks/network.py --models b0 b2 b5 b6 --steps b0 b2

The plain layout is that of ``tests/plain.py``, which the tests compare the network with: maps of
(B, C, F, T) in memory, stacked mixtures, attention as two products. All ways take turns; a ratio is
the median over rounds of the plain layout's time in a round by the other's. Weights are random.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import timing
import torch

from speechbrain_mrl import ReDimNetMRL, optimize_for_inference
from speechbrain_mrl.models.redimnet import PRESETS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain import PlainReDimNet  # noqa: E402


def ratios(functions, repeats):
    """Median seconds of the first function, and how many times faster the others are in a round."""
    first, *others = functions
    rounds = [timing.interleaved(functions, 1) for _ in range(repeats)]
    faster = {n: statistics.median(one[first] / one[n] for one in rounds) for n in others}
    return statistics.median(one[first] for one in rounds), faster


def forwards(backbone, wavs):
    """One embedding each way, features included."""
    model = ReDimNetMRL(192, (192,), backbone).eval()
    plain = PlainReDimNet(model)
    return {
        "plain layout": lambda: plain(model.spec(wavs)[0]),
        "ours": partial(model, wavs),
        "optimised": partial(optimize_for_inference(model), wavs),
    }


def steps(backbone, wavs):
    """Forward in train mode and backward each way."""
    model = ReDimNetMRL(192, (192,), backbone).train()
    plain = PlainReDimNet(model, training=True)

    def step(embed):
        embed().square().mean().backward()
        model.zero_grad()

    return {
        "plain layout": lambda: step(lambda: plain(model.spec(wavs)[0])),
        "ours": lambda: step(lambda: model(wavs)),
    }


def main():
    parser = timing.arguments(__doc__, "network")
    parser.add_argument("--models", nargs="*", choices=list(PRESETS), default=["b0", "b2"])
    parser.add_argument("--steps", nargs="*", choices=list(PRESETS), default=["b0", "b2"])
    parser.add_argument("--batch_size", type=int, default=32, help="of a step")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = timing.start(parser)
    n_samples, results = int(16000 * args.seconds), {"forward": {}, "step": {}}
    with torch.no_grad():
        for name in args.models:
            functions = forwards(name, 0.1 * torch.randn(1, n_samples))
            results["forward"][name] = ratios(functions, args.repeats)
            print("forward", name, *results["forward"][name], flush=True)
    for name in args.steps:
        functions = steps(name, 0.1 * torch.randn(args.batch_size, n_samples))
        results["step"][name] = ratios(functions, args.repeats)
        print("step   ", name, *results["step"][name], flush=True)
    setting = {"threads": args.threads, "seconds": args.seconds, "batch_size": args.batch_size}
    timing.write(args.output, setting | results)


if __name__ == "__main__":
    main()
