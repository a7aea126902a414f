"""Memory of ``embed_folder`` while it embeds a long list of short segments.

python benchmarks/bulk.py --clips=100000

The encoder costs nothing; this process' memory is printed after each tenth of the list.
"""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
from timing import arguments, resident, start, write

from speechbrain_mrl import embed_folder
from speechbrain_mrl.dataio.clips import Clip, write_clips

N_FILES = 16  # recordings that the segments are of


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


def main():
    parser = arguments(__doc__, "bulk")
    parser.add_argument("--clips", type=int, default=100_000)
    args = start(parser)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{number}.flac")) for number in range(N_FILES)]
        for path in paths:
            soundfile.write(path, 0.1 * rng.standard_normal(16_000), 16000)
        starts = rng.integers(0, 8000, args.clips)
        stops = starts + rng.integers(4000, 8000, args.clips)
        clips = (
            Clip(f"speaker/session/{i:07d}.flac", paths[i % N_FILES], int(first), int(stop))
            for i, (first, stop) in enumerate(zip(starts, stops))
        )
        write_clips(clips, Path(folder, "list.csv"))
        encoder = Memory(args.clips)
        embed_folder(encoder, Path(folder, "list.csv"), Path(folder, "embeddings"))
    write(args.output, {"clips": args.clips, "memory_mb": encoder.megabytes})


if __name__ == "__main__":
    main()
