"""Time of one embedding: every model with every engine, against the plain eager forward.

python benchmarks/inference.py --output=results/inference

Weights are random. In each round every engine embeds the same utterance, so that all meet the same
machine; a ratio is the median over rounds of the plain forward's time in a round by the engine's.
Two calls that are not counted go before, for threads of the engine before spin a while. Exported
files are kept in the output folder; ``--export_only`` writes them and stops. "fixed" engines are
prepared for the utterance's shape; "not recorded" is the copy whose layers Python calls one by one.
The column ``new`` is the first call at a length that the engine never met.
"""

import argparse
import json
import resource
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from speechbrain_mrl import ReDimNetMRL
from speechbrain_mrl.inference.onnx import ExportedEncoder, export_onnx
from speechbrain_mrl.inference.optimize import (
    PRECISIONS,
    batch_seconds_for,
    for_inference,
    optimize_for_inference,
    prepare_cpu,
)
from speechbrain_mrl.models.redimnet import PRESETS

EXPORTED = (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))


def make_model(backbone):
    """Random weights with BatchNorm statistics and stage weights as after training."""
    torch.manual_seed(0)
    model = ReDimNetMRL(backbone=backbone).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith(".w") and tensor.requires_grad:
            tensor.data.normal_()
    return model


def exported_file(backbone, folder):
    """The model's ONNX file, written if it is not there."""
    path = folder / f"{backbone}.onnx"
    if not path.exists():
        export_onnx(make_model(backbone), path)
    return path


def best(function):
    """Seconds of the fastest of five calls, after one more."""
    function()
    return min(_timed(function)[0] for _ in range(5))


def peaks():
    """Measured GFLOP/s of a matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rough_a, rough_b = a.bfloat16(), b.bfloat16()
    return {
        "gflops_float32": 2 * 2048**3 / best(lambda: a @ b) / 1e9,
        "gflops_bfloat16": 2 * 2048**3 / best(lambda: rough_a @ rough_b) / 1e9,
    }


def copy_rate():
    """Measured GB/s of a copy of 256 MB."""
    big, to = torch.ones(2**26), torch.empty(2**26)
    return 2 * big.nbytes / best(lambda: to.copy_(big)) / 1e9


def count_gflops(model, wavs):
    """2 · multiply-adds of the plain forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(wavs)
    return counter.get_total_flops() / 1e9


def _timed(function):
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def truncation_seconds(model, rounds=500):
    """Seconds that all sizes take more than one, from the shortest signal, where noise is least."""
    wavs, spent = 0.1 * torch.randn(1, 257), {False: [], True: []}
    with torch.no_grad():
        for _ in range(rounds):
            for all_sizes, times in spent.items():
                times.append(_timed(lambda all_=all_sizes: model(wavs, return_all_dims=all_))[0])
    return statistics.median(spent[True]) - statistics.median(spent[False])


def compare(backbone, folder, seconds, rounds, exported):
    """One row per engine for one model."""
    model = make_model(backbone)
    fast, rough = (optimize_for_inference(model, precision) for precision in PRECISIONS)
    wavs = 0.1 * torch.randn(1, int(seconds * 16000))
    eight = wavs.expand(8, -1).contiguous()
    encoders = {
        "plain": model,
        "optimize_for_inference": fast,
        "optimize_for_inference bfloat16": rough,
    }
    if exported:
        path = exported_file(backbone, folder)
        for engine, precision in EXPORTED:
            for fixed, shape in (("", None), (" fixed", tuple(wavs.shape))):
                encoders[f"{engine} {precision}{fixed}"] = ExportedEncoder(
                    path, engine, precision, torch.get_num_threads(), shape=shape
                )
    engines = {name: partial(encoder, wavs) for name, encoder in encoders.items()} | {
        "for_inference (not recorded)": partial(for_inference(model), wavs),
        "plain, batch of 8": lambda: model(eight)[:1],
        "optimize_for_inference, batch of 8": lambda: fast(eight)[:1],
        "... bfloat16, batch of 8": lambda: rough(eight)[:1],
    }
    times, outputs, faults = {name: [] for name in engines}, {}, {}
    copies = [copy_rate()]
    with torch.no_grad():
        for round_ in range(rounds + 1):
            for name, function in engines.items():
                if "batch" in name and round_ > 3:  # as long as all the others
                    continue
                for _ in range(0 if "batch" in name else 2):
                    function()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                spent, value = _timed(function)
                faults[name] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
                if round_:  # the first is to warm up
                    times[name].append(spent / (8 if "batch" in name else 1))
                outputs[name] = torch.as_tensor(value)
        new = {
            name: statistics.median(
                _timed(partial(encoder, wavs[:, : -240 * step]))[0]  # fewer frames by one each
                for step in range(1, 6)
            )
            for name, encoder in encoders.items()
        }
    plain, gflops = outputs["plain"], count_gflops(model, wavs)
    base = statistics.median(times["plain"])
    truncation = truncation_seconds(model)
    copies.append(copy_rate())
    print(
        f"{backbone:6}truncating to four sizes: {1e6 * truncation:.0f} µs, "
        f"{100 * truncation / base:.3f} %; "
        f"copies at {copies[0]:.0f} GB/s before, {copies[1]:.0f} after"
    )
    return [
        {
            "model": backbone,
            "engine": name,
            "ms_per_clip": 1e3 * (spent := statistics.median(times[name])),
            "ratio": statistics.median(
                plain_ / own for plain_, own in zip(times["plain"], times[name])
            ),
            "max_difference": (outputs[name] - plain).abs().max().item(),
            "cosine": torch.cosine_similarity(outputs[name], plain).item(),
            "ms_new_length": 1e3 * new[name] if name in new else None,
            "page_faults": faults[name],  # of one call, the last
            "gflops_per_second": gflops / spent,
            "truncation_share": truncation / base,
            "copies_gb_per_second": copies,
        }
        for name in engines
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/inference"))
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS))
    parser.add_argument("--exported", nargs="*", default=["b0", "b2", "b5"], help="also exported")
    parser.add_argument("--export_only", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    prepare_cpu()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.export_only:
        for backbone in args.exported:
            print(exported_file(backbone, args.output), flush=True)
        return
    report = {"threads": torch.get_num_threads(), "seconds": args.seconds, **peaks(), "rows": []}
    print({key: value for key, value in report.items() if key != "rows"})
    print(
        f"{'model':6}{'engine':38}{'ms':>8}{'new':>8}{'ratio':>7}{'difference':>12}{'cosine':>10}"
        f"{'faults':>9}{'GFLOP/s':>9}"
    )
    for backbone in args.models:
        exported = backbone in args.exported
        for row in compare(backbone, args.output, args.seconds, args.rounds, exported):
            report["rows"].append(row)
            new = "" if row["ms_new_length"] is None else f"{row['ms_new_length']:.1f}"
            print(
                f"{backbone:6}{row['engine']:38}{row['ms_per_clip']:8.1f}{new:>8}{row['ratio']:7.2f}"
                f"{row['max_difference']:12.1e}{row['cosine']:10.6f}{row['page_faults']:9}"
                f"{row['gflops_per_second']:9.0f}",
                flush=True,
            )
    report["batch_seconds"] = {b: batch_seconds_for(make_model(b)) for b in args.models}
    (args.output / "inference.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output / 'inference.json'}")


if __name__ == "__main__":
    main()
