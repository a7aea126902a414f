"""Time and memory against the length of a recording, whole and window by window.

python benchmarks/length.py --seconds 10 60 180

Each length and way runs in a process of its own, whose peak memory is reported. Random weights, noise.
"""

import multiprocessing
import resource
import time
from functools import partial

import torch
from inference import make_model
from timing import arguments, start, write

from speechbrain_mrl.inference.extract import embed_long
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models.redimnet import PRESETS

WHOLE_SECONDS = 180  # the whole recording at once takes too much memory beyond this


def embed(send, backbone, seconds, way):
    """Seconds spent, peak memory in GB and the embedding of one recording, in a process of its own."""
    model = optimize_for_inference(make_model(backbone))
    run = partial(embed_long, model) if way == "windows" else model
    wav = 0.1 * torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(0))
    run(0.1 * torch.randn(16000))  # kernels are chosen at the first call
    started = time.perf_counter()
    embedding = run(wav)
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    send.send((spent, peak, embedding.flatten().tolist()))


def main():
    parser = arguments(__doc__, "length")
    parser.add_argument("--model", choices=sorted(PRESETS), default="b2")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2, 10, 60, 180, 600])
    args = start(parser)
    context, rows = multiprocessing.get_context("spawn"), []
    print(f"{'audio s':>8}{'way':>9}{'time s':>9}{'peak GB':>9}{'cosine':>10}")
    for seconds in args.seconds:
        embeddings = {}
        for way in ["whole"] * (seconds <= WHOLE_SECONDS) + ["windows"]:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=embed, args=(send, args.model, seconds, way))
            process.start()
            spent, peak, embedding = receive.recv()
            process.join()
            embeddings[way] = torch.tensor(embedding)
            row = {"audio_seconds": seconds, "way": way, "seconds": spent, "peak_gb": peak}
            print(f"{seconds:8.1f}{way:>9}{spent:9.2f}{peak:9.2f}", end="")
            if len(embeddings) == 2:
                row["cosine"] = torch.cosine_similarity(*embeddings.values(), dim=0).item()
                print(f"{row['cosine']:10.6f}", end="")
            rows.append(row)
            print(flush=True)
    write(args.output, {"model": args.model, "rows": rows})


if __name__ == "__main__":
    main()
