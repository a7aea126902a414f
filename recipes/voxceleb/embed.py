"""Embed every recording of a folder with a model, to shards on disk; a killed run goes on.

python recipes/voxceleb/embed.py results/mrl_distill/1986/model /data/recordings results/embeddings
"""

import argparse

import torch

from speechbrain_mrl import embed_folder
from speechbrain_mrl.fast import PRECISIONS, batch_seconds_for, optimize_for_inference
from speechbrain_mrl.teachers import EncoderClassifierTeacher, fingerprint, load_teacher


def fast_form(encoder, precision):
    """A ReDimNet arranged for inference and its seconds of audio in a batch; others unchanged."""
    published = isinstance(encoder, EncoderClassifierTeacher)
    model = encoder.encoder.mods.embedding_model if published else encoder
    try:
        fast = optimize_for_inference(model, precision)
    except TypeError:  # no ReDimNet
        if precision != "float32":
            raise
        return encoder, 60.0

    weights = fingerprint(encoder)
    if published:
        encoder.encoder.mods.embedding_model = fast
    else:
        encoder = fast

    def embed(wavs, wav_lens):
        return encoder(wavs, wav_lens)

    embed.fingerprint = weights if precision == "float32" else f"{weights} {precision}"
    return embed, batch_seconds_for(model)


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
    parser.add_argument("--max_seconds", type=float, default=30.0, help="of a clip's beginning")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of a ReDimNet; bfloat16 is faster where the processor has such instructions",
    )
    options = vars(parser.parse_args(argv))
    encoder = load_teacher(options.pop("model"), device=options["device"])
    batch_seconds, precision = 60.0, options.pop("precision")
    if options["device"] == "cpu" or precision != "float32":
        encoder, batch_seconds = fast_form(encoder, precision)
    options["batch_seconds"] = options["batch_seconds"] or batch_seconds
    print(f"written to {embed_folder(encoder, **options)}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
