"""Embed every recording of a folder with a model, to shards on disk; a killed run resumes.

python recipes/voxceleb/embed.py results/mrl_distill/1986/model /data/recordings results/embeddings
"""

import argparse
import tempfile
from pathlib import Path

import torch
from command import run_command

from speechbrain_mrl import embed_folder
from speechbrain_mrl.inference.encoders import EncoderClassifierTeacher, load_teacher
from speechbrain_mrl.inference.engines import ENGINES, check_engine
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.inference.onnx import ExportedEncoder, export_onnx
from speechbrain_mrl.inference.optimize import (
    PRECISIONS,
    batch_seconds_for,
    for_inference,
)
from speechbrain_mrl.utils import check_device

BATCH_SECONDS = 60.0  # of an encoder that is no ReDimNet, or on a GPU
SECONDS_PER_STREAM = 30.0  # utterances of a batch run side by side


def check_options(engine, precision, device):
    """Raise a ValueError for an engine that cannot run so, before anything is loaded."""
    if engine != "torch":
        check_engine(engine, precision)
        if device != "cpu":
            raise ValueError(f"--engine={engine} runs on the CPU, got --device={device}")


def choose_engine(encoder, engine, precision, device):
    """What embeds with the encoder's weights, and the seconds of audio that pay in a batch."""
    published = isinstance(encoder, EncoderClassifierTeacher)
    network = encoder.encoder.mods.embedding_model if published else encoder
    if engine != "torch":
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(network, path := Path(folder, "model.onnx"))
            embed = ExportedEncoder(path, engine, precision, threads, streams=threads)
        embed.fingerprint = f"{fingerprint(encoder)} {engine} {precision}"
        return embed, SECONDS_PER_STREAM * threads
    fast = (
        encoder if device != "cpu" and precision == "float32" else for_inference(encoder, precision)
    )
    if fast is encoder:
        if precision != "float32":
            raise TypeError(
                f"--precision={precision} needs a ReDimNet, got {type(network).__name__}"
            )
        return encoder, BATCH_SECONDS

    def embed(wavs, wav_lens):
        return fast(wavs, wav_lens)

    embed.fingerprint = fingerprint(encoder)
    if precision != "float32":
        embed.fingerprint += f" {precision}"
    return embed, batch_seconds_for(fast.encoder.mods.embedding_model if published else fast)


def main(argv=None):
    """Everything from the command line to the shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="released name, checkpoint file, model folder or Hub id")
    parser.add_argument("source", help="folder of recordings, or a CSV (ID, wav, start, stop)")
    parser.add_argument("output_folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--batch_seconds",
        type=float,
        help="of audio, padding too; default 60, and for a ReDimNet on a CPU what its maps allow",
    )
    parser.add_argument(
        "--max_seconds", type=float, default=30.0, help="of an utterance's beginning"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode")
    parser.add_argument(
        "--engine",
        choices=["torch", *ENGINES],
        default="torch",
        help="of a ReDimNet on a CPU; the others need the extra onnx, and openvino for that one",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of a ReDimNet; bfloat16 is faster where the processor has such instructions",
    )
    options = vars(parser.parse_args(argv))
    engine, precision = options.pop("engine"), options.pop("precision")
    check_options(engine, precision, options["device"])
    options["device"] = check_device(options["device"])
    encoder = load_teacher(options.pop("model"), device=options["device"])
    encoder, batch_seconds = choose_engine(encoder, engine, precision, options["device"])
    options["batch_seconds"] = options["batch_seconds"] or batch_seconds
    print(f"written to {embed_folder(encoder, **options)}")


if __name__ == "__main__":
    run_command(main)
