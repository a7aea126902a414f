"""Memory and time of the training list at VoxCeleb's scale: 1.2 million utterances.

python benchmarks/lists.py --clips=1200000

A synthetic CSV, read as a dataset here and by SpeechBrain, and as utterances for the teacher store.
Each in a fresh process: seconds to read, MB by which memory grows, and microseconds per random row.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from speechbrain.dataio.dataset import DynamicItemDataset
from timing import arguments, resident, write

from speechbrain_mrl.dataio.clips import read_clips
from speechbrain_mrl.dataio.dataset import ClipDataset

KEYS = ["id", "wav", "start", "stop", "spk_id"]
READERS = {
    "ClipDataset": lambda path: ClipDataset(path, [], KEYS),
    "SpeechBrain's from_csv": lambda path: DynamicItemDataset.from_csv(path, {}, [], KEYS),
    "read_clips": read_clips,
}


def make_list(path, count):
    """As the recipe writes it, in VoxCeleb2's naming."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        file.write("ID,duration,wav,start,stop,spk_id\n")
        for number, frames in enumerate(rng.integers(64_000, 200_000, count)):
            speaker = f"id{number // 200:05d}"
            clip = f"{speaker}/abcdefghijk/{number:07d}.wav"
            row = f"{clip},{frames / 16000},/data/VoxCeleb2/dev/wav/{clip},0,{frames},{speaker}\n"
            file.write(row)


def measure(send, name, path):
    """In a process of its own: seconds, MB, and microseconds per row."""
    before, started = resident(), time.perf_counter()
    rows = READERS[name](path)
    seconds, megabytes = time.perf_counter() - started, resident() - before
    numbers = np.random.default_rng(0).integers(0, len(rows), 20_000).tolist()
    started = time.perf_counter()
    for number in numbers:
        rows[number]
    send.send((seconds, megabytes, 1e6 * (time.perf_counter() - started) / len(numbers)))


def main():
    parser = arguments(__doc__, "lists")
    parser.add_argument("--clips", type=int, default=1_200_000)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = {}
    print(f"{args.clips} utterances{'read':>24}{'memory':>12}{'a row':>12}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.csv")
        make_list(path, args.clips)
        for name in READERS:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(send, name, path))
            process.start()
            seconds, megabytes, microseconds = receive.recv()
            process.join()
            rows[name] = {"seconds": seconds, "mb": megabytes, "row_us": microseconds}
            print(f"{name:24}{seconds:9.2f} s{megabytes:9.0f} MB{microseconds:9.1f} us", flush=True)
    write(args.output, {"clips": args.clips, "rows": rows})


if __name__ == "__main__":
    main()
