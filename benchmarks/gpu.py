"""One GPU in one script: tests, training, synchronisations, the teachers' pass, inference.

python benchmarks/gpu.py                 # at most eight minutes on one GPU
python benchmarks/gpu.py --device=cpu    # the same steps on a CPU, at toy size

Weights and audio are random, chunks have 3 s. The card's peaks are measured, not read from a table:
a product of two bfloat16 matrices and a copy. A part that would end past ``--minutes`` is left out.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNet, ReDimNetMRL
from speechbrain_mrl.dataio.clips import find_clips
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.redimnet import PRESETS
from speechbrain_mrl.training.gradient_checkpointing import checkpoint_gradients

SECONDS = 3.0
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = {"b0": 256, "b2": 256, "b6": 64}  # chunks in a training step


class Bench:
    """What is measured: the device, the clock, and the results so far."""

    def __init__(self, args):
        self.device, self.output = args.device, args.output
        self.cuda = args.device.startswith("cuda")
        self.toy = not self.cuda
        self.ends = time.monotonic() + 60 * args.minutes
        self.results = {"torch": torch.__version__, "device": self.name()}

    def name(self):
        return torch.cuda.get_device_name() if self.cuda else "CPU"

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function, repeats=10, least=0.5):
        """Seconds of a call: the mean of as many as fill ``least`` seconds, after three more."""
        for _ in range(1 if self.toy else 3):
            function()
        self.wait()
        started, calls = time.perf_counter(), 0
        while calls < repeats or time.perf_counter() - started < least:
            function()
            calls += 1
            if self.toy and calls == 2:
                break
        self.wait()
        return (time.perf_counter() - started) / calls

    def audio(self, n):
        seconds = 0.5 if self.toy else SECONDS
        return 0.1 * torch.randn(n, round(16000 * seconds), device=self.device)

    def autocast(self, precision):
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16")

    def add(self, part, row):
        self.results.setdefault(part, []).append(row)
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{part:10} | " + " | ".join(cells), flush=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.results, indent=2) + "\n")

    def late(self, seconds, what):
        """Whether there are fewer than ``seconds`` left; says what is left out."""
        left = self.ends - time.monotonic()
        if left < seconds:
            print(f"left out: {what}, {left:.0f} s are left", flush=True)
        return left < seconds


def peaks(bench):
    """TFLOP/s of a bfloat16 product and TB/s of a copy."""
    size = 256 if bench.toy else 8192
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    product = 2 * size**3 / bench.seconds(lambda: a @ a) / 1e12
    x = torch.randn(2**20 if bench.toy else 2**28, device=bench.device)
    y = torch.empty_like(x)
    copied = 2 * x.numel() * 4 / bench.seconds(lambda: y.copy_(x)) / 1e12
    bench.add("peak", {"bfloat16 TFLOP/s": product, "copy TB/s": copied})
    return product


def tests(bench):
    """The tests that need a GPU, in a process of their own."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["tests/training/test_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    for line in lines[-40:] if done.returncode else lines[-1:]:
        print(line)
    seconds = time.perf_counter() - started
    bench.add("tests", {"result": lines[-1] if lines else "none", "seconds": seconds})


def make_step(bench, backbone, precision, way=""):
    """A function that makes one training step, and the student."""
    torch.manual_seed(0)
    student = ReDimNetMRL(backbone=backbone).to(bench.device).train()
    if way == "checkpointing":
        checkpoint_gradients(student)
    forward = torch.compile(student) if way == "compiled" else student
    terms = {"cosine": 1.0, "contrastive": 0.1}
    objective = MatryoshkaDistillationLoss(student.mrl_dims, "all", terms).to(bench.device)
    fitted_on = {"b0": torch.randn(2000, 192), "b6": torch.randn(2000, 192)}
    objective.fit(fitted_on)
    n = 2 if bench.toy else BATCHES[backbone]
    wavs = bench.audio(n)
    targets = {name: x[:n].to(bench.device) for name, x in fitted_on.items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=bench.cuda)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with bench.autocast(precision):
            embeddings = forward(wavs)
        loss, _ = objective(embeddings, targets)
        loss.backward()
        optimizer.step()

    return step, student, n


def training(bench, peak):
    """Chunks a second, memory and FLOP of a step for each student and precision."""
    variants = [("float32", ""), ("bfloat16", "")]
    further = {"b2": [("bfloat16", "compiled")], "b6": [("bfloat16", "checkpointing")]}
    for backbone in ("b0",) if bench.toy else BATCHES:
        for precision, way in variants + further.get(backbone, []):
            what = f"{backbone} {precision} {way}".rstrip()
            if bench.late(100 if way == "compiled" else 20, what):
                continue
            step, student, n = make_step(bench, backbone, precision, way)
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                took = bench.seconds(step, repeats=5, least=2.0)
            except torch.OutOfMemoryError:
                bench.add("training", {"student": what, "batch": n, "chunks/s": "out of memory"})
                continue
            row = {"student": what, "batch": n, "chunks/s": n / took}
            if bench.cuda:
                row["MB/chunk"] = torch.cuda.max_memory_allocated() / n / 2**20
                row["GPU busy"] = busy(step)
            if not way:
                with FlopCounterMode(display=False) as counter:
                    step()
                row["TFLOP/s"] = counter.get_total_flops() / took / 1e12
                row["of peak"] = row["TFLOP/s"] / peak
            bench.add("training", row)
            del step, student
            gc.collect()
            if bench.cuda:
                torch.cuda.empty_cache()


def busy(step):
    """Share of the time in which a kernel runs, over three steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        took = time.perf_counter() - started
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    covered, end = 0.0, 0.0
    for first, last in spans:
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered / 1e6 / took


def synchronisations(bench):
    """How often a step waits for the GPU."""
    if not bench.cuda:
        return
    step, *_ = make_step(bench, "b0", "bfloat16")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(10):
            step()
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in found if "synchroniz" in str(w.message)]
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})
    bench.add("waits", {"a step": len(waits) / 10, "places": ", ".join(places) or "none"})


def teachers_pass(bench):
    """Hours of audio in an hour that the teacher b6 embeds, files included."""
    if bench.late(25, "the teachers' pass"):
        return
    n = 4 if bench.toy else 768
    teacher = ReDimNet.from_config(PRESETS["b0" if bench.toy else "b6"]).to(bench.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            wav = 0.1 * torch.randn(round(16000 * (4 + i % 9)))
            soundfile.write(Path(folder) / f"{i}.wav", wav.numpy(), 16000)
        clips = find_clips(folder)
        options = {
            "batch_seconds": 240.0,
            "max_seconds": 20.0,
            "num_workers": 0 if bench.toy else 8,
        }
        started = time.perf_counter()
        embed_clips({"teacher": teacher}, clips, bench.device, **options)
        bench.wait()
        took = time.perf_counter() - started
    audio = sum(clip.num_frames for clip in clips) / 16000
    bench.add("teacher b6", {"utterances/s": n / took, "times real time": audio / took})


def inference(bench):
    """Milliseconds of a forward at batch 1 and 64, in float32 and bfloat16."""
    for backbone in ("b0",) if bench.toy else PRESETS:
        if backbone not in {f"b{i}" for i in range(7)} or bench.late(12, f"inference {backbone}"):
            continue
        model = ReDimNetMRL(backbone=backbone).to(bench.device).eval()
        row = {"model": backbone}
        for n in (1, 2 if bench.toy else 64):
            wavs = bench.audio(n)
            for precision in PRECISIONS:
                with torch.inference_mode(), bench.autocast(precision):
                    took = bench.seconds(lambda model=model, wavs=wavs: model(wavs))
                row[f"{n} {precision} ms"] = 1000 * took
        bench.add("inference", row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="on cpu everything is of toy size")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("results/gpu.json"))
    parser.add_argument("--no_tests", action="store_true", help="measure only")
    bench = Bench(parser.parse_args())
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    print(f"{bench.name()}, torch {torch.__version__}")
    peak = peaks(bench)
    if bench.cuda and not parser.parse_args().no_tests:
        tests(bench)
    synchronisations(bench)
    training(bench, peak)
    inference(bench)
    teachers_pass(bench)
    print(f"written to {bench.output}")


if __name__ == "__main__":
    main()
