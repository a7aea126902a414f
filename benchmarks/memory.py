"""Memory that a chunk of 3 s takes in a training step on a CPU, with and without checkpointing.

python benchmarks/memory.py --models b2 b6

It is the growth of a fresh process' peak from one batch size to another, divided by the chunks.
"""

import os

import timing
import torch

from speechbrain_mrl import ReDimNetMRL
from speechbrain_mrl.models.redimnet import PRESETS
from speechbrain_mrl.training.gradient_checkpointing import checkpoint_gradients

BATCHES = 2, 6
WAYS = {"float32": (False, False), "bfloat16": (True, False), "checkpointing": (False, True)}


def step(backbone, bfloat16, checkpointed, n):
    """A function that makes one training step of ``n`` chunks."""
    torch.set_num_threads(1)
    student = ReDimNetMRL(backbone=backbone).train()
    if checkpointed:
        checkpoint_gradients(student)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            embeddings = student(0.1 * torch.randn(n, 48000))
        embeddings.square().mean().backward()

    return run


def main():
    parser = timing.arguments(__doc__, "memory")
    parser.add_argument("--models", nargs="*", choices=list(PRESETS), default=["b2", "b6"])
    args = timing.start(parser)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system at once
    results = {}
    for name in args.models:
        for way, options in WAYS.items():
            few, many = (timing.peak_memory(step, name, *options, n) for n in BATCHES)
            results[f"{name} {way}"] = megabytes = (many - few) / (BATCHES[1] - BATCHES[0])
            print(f"{name} {way}: {megabytes:.0f} MB a chunk", flush=True)
    timing.write(args.output, results)


if __name__ == "__main__":
    main()
