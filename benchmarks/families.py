"""ReDimNet and ReDimNet2 size by size: parameters, multiply-adds, and seconds in turns on one machine.

python benchmarks/families.py --sizes b0 b1 b2

Weights are random. Every model of a size embeds the same utterance in turns, as it is and as
``optimize_for_inference`` arranges it; medians over the rounds.
"""

from functools import partial

import timing
import torch
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_mrl import ReDimNetMRL
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models.redimnet import PRESETS


def multiply_adds(model, wavs):
    """1e9 multiply-adds of the plain forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(wavs)
    return counter.get_total_flops() / 2e9


def main():
    parser = timing.arguments(__doc__, "families")
    parser.add_argument("--sizes", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seconds", type=float, default=2.0)
    args = timing.start(parser)
    wavs, rows = 0.1 * torch.randn(1, int(16000 * args.seconds)), {}
    print(f"{'model':15}{'parameters':>11}{'GMACs':>8}{'plain ms':>10}{'optimised ms':>14}")
    for size in args.sizes:
        models = {
            name: ReDimNetMRL(192, (192,), backbone=name).eval()
            for name in (size, f"redimnet2_{size}")
        }
        fast = {name: optimize_for_inference(model) for name, model in models.items()}
        functions = {(name, "plain"): partial(model, wavs) for name, model in models.items()}
        functions |= {(name, "optimised"): partial(model, wavs) for name, model in fast.items()}
        with torch.no_grad():
            spent = timing.interleaved(functions, args.repeats)
        for name, model in models.items():
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            row = {"parameters_millions": millions, "gmacs": multiply_adds(model, wavs)}
            row |= {how: 1e3 * spent[name, how] for how in ("plain", "optimised")}
            rows[name] = row
            numbers = (
                f"{millions:10.1f}M{row['gmacs']:8.2f}{row['plain']:10.1f}{row['optimised']:14.1f}"
            )
            print(f"{name:15}{numbers}", flush=True)
    timing.write(args.output, {"threads": args.threads, "seconds": args.seconds, "models": rows})


if __name__ == "__main__":
    main()
