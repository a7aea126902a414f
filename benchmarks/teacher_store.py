"""Filling the teacher store: an utterance at a time, a store per teacher, all teachers at once.

python benchmarks/teacher_store.py --teachers b0 b1 b2 --files=48

Also the seconds of reading and decoding, and the share of the log-mel front end in each teacher's
time. Teachers of equal settings could save that share by computing it once.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from bulk import make_recordings
from timing import arguments, interleaved, start, write

from speechbrain_mrl import ReDimNet
from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import find_clips
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.models.redimnet import PRESETS


def main():
    parser = arguments(__doc__, "teacher_store")
    parser.add_argument("--teachers", nargs="+", default=["b0", "b1", "b2"], choices=list(PRESETS))
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--num_workers", type=int, default=0)
    args = start(parser)
    teachers = {name: ReDimNet.from_config(PRESETS[name]).eval() for name in args.teachers}
    with tempfile.TemporaryDirectory() as scratch:
        folder, store = Path(scratch, "recordings"), Path(scratch, "store")
        make_recordings(folder, args.files)
        clips = find_clips(folder)

        @torch.inference_mode()
        def one_at_a_time():
            for clip in clips:
                wav = read_audio(clip.wav).unsqueeze(0)
                for teacher in teachers.values():
                    teacher(wav)

        def fill(*groups):
            shutil.rmtree(store, ignore_errors=True)
            for group in groups:
                TeacherStore(store).fill(group, clips, num_workers=args.num_workers)

        seconds = interleaved(
            {
                "one utterance at a time": one_at_a_time,
                "store, teacher after teacher": lambda: fill(
                    *({name: teacher} for name, teacher in teachers.items())
                ),
                "store, all teachers": lambda: fill(teachers),
                "reading and decoding": lambda: [read_audio(clip.wav) for clip in clips],
            },
            args.repeats,
        )
    wavs = torch.randn(4, 96_000) / 10
    with torch.inference_mode():
        parts = interleaved(
            {
                (name, part): lambda run=run: run(wavs)
                for name, teacher in teachers.items()
                for part, run in (("whole", teacher), ("mel", teacher.spec))
            },
            args.repeats,
        )
    shares = {name: parts[name, "mel"] / parts[name, "whole"] for name in teachers}
    print(f"{args.files} utterances, teachers {args.teachers}, {args.threads} threads")
    for way, found in seconds.items():
        print(f"{way:32}{found:8.2f} s{seconds['one clip at a time'] / found:8.2f} x")
    for name, share in shares.items():
        print(f"log-mel front end in {name:12}{100 * share:8.1f} %")
    settings = {"teachers": args.teachers, "files": args.files, "threads": args.threads}
    write(args.output, settings | {"seconds": seconds, "mel_share": shares})


if __name__ == "__main__":
    main()
