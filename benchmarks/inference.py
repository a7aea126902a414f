"""Time of one embedding: every model with every engine, against the plain eager forward.

python benchmarks/inference.py --output=results/inference

Weights are random. All ways embed the same utterance in turns; a ratio is the plain forward's median
time by the other's. "fixed" engines are prepared for the utterance's shape; "not recorded" is the
copy whose layers Python calls one by one. Exported files are kept in the output folder.
"""

from functools import partial
from pathlib import Path

import torch
from timing import arguments, interleaved, start, write

from speechbrain_mrl import ReDimNetMRL
from speechbrain_mrl.inference.onnx import ExportedEncoder, export_onnx
from speechbrain_mrl.inference.optimize import (
    PRECISIONS,
    batch_seconds_for,
    for_inference,
    optimize_for_inference,
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


def make_ways(model, wavs, path, threads):
    """{name: function that embeds the utterance}, the plain forward first; ``path`` to export to."""
    fast = {f"optimize_for_inference {p}": optimize_for_inference(model, p) for p in PRECISIONS}
    ways = {"plain": model, **fast, "for_inference, not recorded": for_inference(model)}
    if path is not None:
        if not path.exists():
            export_onnx(model, path)
        for engine, precision in EXPORTED:
            for fixed, shape in (("", None), (" fixed", tuple(wavs.shape))):
                encoder = ExportedEncoder(path, engine, precision, threads, shape=shape)
                ways[f"{engine} {precision}{fixed}"] = encoder
    return {name: partial(way, wavs) for name, way in ways.items()}


def main():
    parser = arguments(__doc__, "inference")
    parser.set_defaults(output=Path("results/inference"))
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS))
    parser.add_argument("--exported", nargs="*", default=["b0", "b2", "b5"], help="also exported")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = start(parser)
    args.output.mkdir(parents=True, exist_ok=True)
    wavs, rows = 0.1 * torch.randn(1, int(args.seconds * 16000)), []
    print(f"{'model':6}{'way':36}{'ms':>8}{'ratio':>7}{'difference':>12}{'cosine':>10}")
    for backbone in args.models:
        model = make_model(backbone)
        path = args.output / f"{backbone}.onnx" if backbone in args.exported else None
        ways = make_ways(model, wavs, path, args.threads)
        with torch.no_grad():
            spent = interleaved(ways, args.repeats, calls=4)
            found = {name: torch.as_tensor(embed()) for name, embed in ways.items()}
        for name, embedding in found.items():
            row = {"model": backbone, "way": name, "ms": 1e3 * spent[name]}
            row["ratio"] = spent["plain"] / spent[name]
            row["max_difference"] = (embedding - found["plain"]).abs().max().item()
            row["cosine"] = torch.cosine_similarity(embedding, found["plain"]).item()
            rows.append({**row, "batch_seconds": batch_seconds_for(model)})
            print(f"{backbone:6}{name:36}{row['ms']:8.1f}{row['ratio']:7.2f}", end="")
            print(f"{row['max_difference']:12.1e}{row['cosine']:10.6f}", flush=True)
    settings = {"threads": args.threads, "seconds": args.seconds}
    write(args.output / "inference.json", settings | {"rows": rows})


if __name__ == "__main__":
    main()
