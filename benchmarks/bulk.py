"""Embedding a folder with ``embed_folder``, against a loop over SpeechBrain's ``encode_batch``.

python benchmarks/bulk.py --models b0 b2 --files=48
python benchmarks/bulk.py --models --memory_files=100000

Recordings are noise of 2 to 12 s. ``--engine package.module:function`` names a function that takes a
ReDimNet in eval mode and gives a callable (wavs, wav_lens) -> (B, D) with a string ``fingerprint``;
without it the model itself is the engine. With ``--memory_files`` the folder is a list of that many
short segments, the encoder costs nothing, and this process' memory is printed on the way.
"""

import importlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.inference.classifiers import EncoderClassifier
from timing import arguments, interleaved, resident, write

from speechbrain_mrl import ReDimNet, embed_folder, export_model, read_embeddings
from speechbrain_mrl.audio import read_audio
from speechbrain_mrl.embedding import Clip, find_clips, write_clips
from speechbrain_mrl.redimnet import PRESETS


def make_recordings(folder, count):
    """Noise of 2 to 12 s, 16-bit FLAC at 16 kHz."""
    rng = np.random.default_rng(0)
    for number in range(count):
        wav = 0.1 * rng.standard_normal(rng.integers(32_000, 192_000))
        soundfile.write(folder / f"{number:04d}.flac", wav, 16000)


class Memory:
    """An encoder that costs nothing and prints the memory after each tenth of the clips."""

    fingerprint = "memory"

    def __init__(self, n_clips):
        self.step, self.clips, self.megabytes = n_clips // 10, 0, []

    def __call__(self, wavs, wav_lens):
        before, self.clips = self.clips, self.clips + len(wavs)
        if before // self.step < self.clips // self.step:
            self.megabytes.append(resident())
            print(f"{self.clips:9} clips{self.megabytes[-1]:9.0f} MB", flush=True)
        return wavs[:, :192]


def compare(name, folder, work, engine, num_workers, repeats):
    """Seconds of both ways with one model, and the lowest cosine between their embeddings."""
    torch.manual_seed(0)
    model = ReDimNet.from_config(PRESETS[name]).eval()
    classifier = EncoderClassifier.from_hparams(str(export_model(model, work / name)))
    encoder = model if engine is None else engine(model)
    one_by_one, clips = {}, find_clips(folder)
    output = work / "out"

    def loop():
        for clip in clips:
            wav = read_audio(clip.wav)
            one_by_one[clip.id] = classifier.encode_batch(wav.unsqueeze(0))[0, 0]

    def bulk():
        shutil.rmtree(output, ignore_errors=True)
        embed_folder(encoder, folder, output, num_workers=num_workers)

    seconds = interleaved({"loop": loop, "bulk": bulk}, repeats)
    cosines = [
        torch.cosine_similarity(found, one_by_one[clip_id], dim=0).item()
        for ids, embeddings in read_embeddings(output)
        for clip_id, found in zip(ids, embeddings)
    ]
    return seconds | {"ratio": seconds["loop"] / seconds["bulk"], "lowest_cosine": min(cosines)}


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
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--engine", help="package.module:function")
    parser.add_argument("--memory_files", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    engine = None
    if args.engine is not None:
        module, _, function = args.engine.partition(":")
        engine = getattr(importlib.import_module(module), function)
    results = {"files": args.files, "threads": args.threads, "engine": args.engine, "rows": {}}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folder = work / "recordings"
        folder.mkdir()
        make_recordings(folder, args.files)
        for name in args.models:
            row = compare(name, folder, work, engine, args.num_workers, args.repeats)
            results["rows"][name] = row
            print(
                f"{name}: loop {row['loop']:.2f} s, bulk {row['bulk']:.2f} s, ratio "
                f"{row['ratio']:.2f}, lowest cosine {row['lowest_cosine']:.6f}",
                flush=True,
            )
        if args.memory_files:
            results["memory_mb"] = memory(args.memory_files, folder, work)
    write(args.output, results)


if __name__ == "__main__":
    main()
