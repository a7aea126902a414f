"""Time and memory against the length of a recording, whole and window by window.

python benchmarks/length.py --output=results/length --source=b2

Each length and way runs in a process of its own, whose peak memory is reported. `--audio` names a
recording that is repeated to each length; without it the sound is noise.
Weights are random unless `--source` is a published folder.
"""

import argparse
import json
import multiprocessing
import resource
import time
from functools import partial
from pathlib import Path

import torch
from inference import make_model
from speechbrain.inference.speaker import EncoderClassifier

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.inference.extract import embed_long
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models.redimnet import PRESETS

WHOLE_SECONDS = 180  # the whole recording at once takes too much memory beyond this


def embed(source, audio, seconds, windows, queue):
    """Seconds spent, peak memory in GB and the embedding of one recording, into ``queue``."""
    if source in PRESETS:
        model = make_model(source)
    else:
        model = EncoderClassifier.from_hparams(source, savedir=source).mods.embedding_model
    model = optimize_for_inference(model)
    n = int(seconds * 16000)
    wav = 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    if audio is not None:
        speech = read_audio(audio)
        wav = speech.repeat(1 + n // len(speech))[:n]
    run = partial(embed_long, model) if windows else model
    run(0.1 * torch.randn(16000))  # kernels are chosen at the first call
    started = time.perf_counter()
    embedding = run(wav)
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put((spent, peak, embedding.flatten().tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/length"))
    parser.add_argument("--source", default="b2", help="b0 … b6, or a published folder")
    parser.add_argument("--audio", help="a recording, repeated to each length; default: noise")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[0.5, 2, 10, 30, 60, 180, 600, 900]
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    context, rows = multiprocessing.get_context("spawn"), []
    print(f"{'audio s':>8}{'way':>9}{'time s':>9}{'peak GB':>9}{'cosine':>10}")
    for seconds in args.seconds:
        embeddings = []
        for windows in (False, True):
            if not windows and seconds > WHOLE_SECONDS:
                continue
            queue = context.Queue()
            job = (args.source, args.audio, seconds, windows, queue)
            process = context.Process(target=embed, args=job)
            process.start()
            spent, peak, embedding = queue.get()
            process.join()
            embeddings.append(torch.tensor(embedding))
            cosine = None
            if windows and len(embeddings) == 2:
                cosine = torch.cosine_similarity(*embeddings, dim=0).item()
            way = "windows" if windows else "whole"
            rows.append(
                {"audio_seconds": seconds, "way": way, "seconds": spent, "peak_gb": peak}
                | {"cosine_to_whole": cosine}
            )
            shown = "" if cosine is None else f"{cosine:.6f}"
            print(f"{seconds:8.1f}{way:>9}{spent:9.2f}{peak:9.2f}{shown:>10}", flush=True)
    report = {"source": args.source, "threads": torch.get_num_threads(), "rows": rows}
    (args.output / "length.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, args.output / "length.png")
    print(f"written to {args.output}")


def plot(rows, path):
    """Time and memory against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, key, label in zip(axes, ("seconds", "peak_gb"), ("time (s)", "peak memory (GB)")):
        for way in ("whole", "windows"):
            of_way = [row for row in rows if row["way"] == way]
            axis.loglog(
                [row["audio_seconds"] for row in of_way],
                [row[key] for row in of_way],
                "o-",
                label=way,
            )
        axis.set(xlabel="audio (s)", ylabel=label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
