"""Embedding a folder with ``embed_folder``, against a loop over SpeechBrain's ``encode_batch``.

python benchmarks/bulk.py --models b0 b2 --files=48
python benchmarks/bulk.py --models --memory_files=100000

Recordings are noise of 2 to 12 s (``--lengths``), others in each round, since engines prepare
themselves for lengths that they meet first. Engines: PyTorch as ``for_inference`` arranges a model,
and the others with an utterance on each thread. With ``--memory_files`` the folder is a list of
that many short segments, the encoder costs nothing, and this process' memory is printed on the way.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from inference import exported_file, make_model
from speechbrain.inference.classifiers import EncoderClassifier
from timing import arguments, interleaved, resident, start, write

from speechbrain_mrl import embed_folder, export_model, read_embeddings
from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import Clip, find_clips, write_clips
from speechbrain_mrl.inference.onnx import ExportedEncoder
from speechbrain_mrl.inference.optimize import batch_seconds_for, for_inference
from speechbrain_mrl.models.redimnet import PRESETS

ENGINES = ["fast", "fast bfloat16", "onnxruntime float32", "openvino float32", "openvino bfloat16"]


def make_recordings(folder, count, seed=0, lengths=(2.0, 12.0)):
    """Noise of so many seconds, 16-bit FLAC at 16 kHz."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        wav = 0.1 * rng.standard_normal(int(16_000 * rng.uniform(*lengths)))
        soundfile.write(folder / f"{number:04d}.flac", wav, 16000)


class Memory:
    """An encoder that costs nothing and prints the memory after each tenth of the utterances."""

    fingerprint = "memory"

    def __init__(self, n_clips):
        self.step, self.clips, self.megabytes = n_clips // 10, 0, []

    def __call__(self, wavs, wav_lens):
        before, self.clips = self.clips, self.clips + len(wavs)
        if before // self.step < self.clips // self.step:
            self.megabytes.append(resident())
            print(f"{self.clips:9} utterances{self.megabytes[-1]:9.0f} MB", flush=True)
        return wavs[:, :192]


def compare(name, folders, work, args):
    """Seconds of the loop and of each engine, and the lowest cosine between their embeddings."""
    model = make_model(name)
    classifier = EncoderClassifier.from_hparams(str(export_model(model, work / name)))

    def make(engine):
        kind, _, precision = engine.partition(" ")
        if kind == "fast":
            return for_inference(model, precision or "float32")
        path = exported_file(name, args.exported)
        return ExportedEncoder(path, kind, precision, args.threads, streams=args.threads)

    encoders = {engine: make(engine) for engine in args.engines}
    one_by_one = {}
    rounds = {way: iter(folders) for way in ["loop", *args.engines]}  # each meets them in order
    batch_seconds = {
        engine: args.batch_seconds
        or (batch_seconds_for(encoder) if "fast" in engine else 30.0 * args.threads)
        for engine, encoder in encoders.items()
    }

    def loop():
        for clip in find_clips(next(rounds["loop"])):
            wav = read_audio(clip.wav)
            one_by_one[clip.id] = classifier.encode_batch(wav.unsqueeze(0))[0, 0]

    def bulk(engine):
        shutil.rmtree(work / engine, ignore_errors=True)
        embed_folder(
            encoders[engine],
            next(rounds[engine]),
            work / engine,
            batch_seconds=batch_seconds[engine],
            num_workers=args.num_workers,
        )

    ways = {"loop": loop} | {engine: partial(bulk, engine) for engine in args.engines}
    seconds = interleaved(ways, args.repeats)
    cosines = {
        engine: min(
            torch.cosine_similarity(found, one_by_one[clip_id], dim=0).item()
            for ids, embeddings in read_embeddings(work / engine)
            for clip_id, found in zip(ids, embeddings)
        )
        for engine in args.engines
    }
    return {"batch_seconds": batch_seconds, "seconds": seconds, "lowest_cosine": cosines}


def memory(count, folder, work):
    """MB after each tenth of a list of ``count`` segments of the folder's recordings."""
    paths = [clip.wav for clip in find_clips(folder)]
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 8000, count), rng.integers(4000, 8000, count)
    clips = (
        Clip(f"speaker/session/{i:07d}.flac", paths[i % len(paths)], int(a), int(a + n))
        for i, (a, n) in enumerate(zip(starts, lengths))
    )
    write_clips(clips, work / "list.csv")
    encoder = Memory(count)
    embed_folder(encoder, work / "list.csv", work / "memory")
    return encoder.megabytes


def main():
    parser = arguments(__doc__, "bulk")
    parser.add_argument("--models", nargs="*", default=["b0", "b2"], choices=list(PRESETS))
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--lengths", type=float, nargs=2, default=[2.0, 12.0], help="seconds")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--batch_seconds", type=float, help="default: batch_seconds_for(model)")
    parser.add_argument(
        "--exported", type=Path, default=Path("results/inference"), help="keeps ONNX files"
    )
    parser.add_argument("--memory_files", type=int, default=0)
    args = start(parser)
    args.exported.mkdir(parents=True, exist_ok=True)
    results = {"files": args.files, "threads": args.threads, "rows": {}}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folders = [work / f"recordings{number}" for number in range(args.repeats + 1)]
        for seed, folder in enumerate(folders):
            make_recordings(folder, args.files, seed, args.lengths)
        for name in args.models:
            row = results["rows"][name] = compare(name, folders, work, args)
            spent, cosines = row["seconds"], row["lowest_cosine"]
            print(f"{name}: loop {spent['loop']:.2f} s")
            for engine, cosine in cosines.items():
                print(
                    f"    {engine:20}{spent[engine]:8.2f} s{spent['loop'] / spent[engine]:8.2f} x"
                    f"   lowest cosine {cosine:.6f}   batches of {row['batch_seconds'][engine]:.0f} s",
                    flush=True,
                )
        if args.memory_files:
            results["memory_mb"] = memory(args.memory_files, folders[0], work)
    write(args.output, results)


if __name__ == "__main__":
    main()
