"""Train the demo's teachers, which ship in ``demo_teachers/``, on voices that the demo never uses.

python recipes/voxceleb/train_demo_teachers.py
"""

import argparse
from pathlib import Path

import torch
import train
from demo_voices import make_demo_corpus

RECIPE = Path(__file__).resolve().parent
N_SPEAKERS = 250
FIRST_SPEAKER = 100  # the demo's 88 speakers and 6 voices of babble come before
COMMON = {
    "F": 48,
    "block_1d_type": "conv+att",
    "block_2d_type": "convnext_like",
    "group_divisor": None,
    "hop_length": 240,
    "global_context_att": True,
}
BACKBONES = {
    "demo_small": {
        **COMMON,
        "C": 6,
        "stages_setup": [[2, 1, 1, [[3, 3]], 12], [2, 1, 1, [[3, 3]], 12], [2, 1, 1, [[3, 3]], 12]],
    },
    "demo_large": {
        **COMMON,
        "C": 8,
        "stages_setup": [[2, 1, 1, [[3, 3]], 12], [2, 2, 1, [[3, 3]], 12], [2, 1, 1, [[3, 3]], 8]],
    },
}


def main():
    """Make the voices, train each teacher by its labels, write it in the release's format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_folder", default="results/demo_teachers")
    parser.add_argument("--number_of_epochs", type=int, default=6)
    parser.add_argument("--only", choices=sorted(BACKBONES), help="train just this one")
    args = parser.parse_args()
    folder = Path(args.output_folder)
    voices = make_demo_corpus(folder / "voices", n_speakers=N_SPEAKERS)
    speakers = folder / "speakers.txt"
    speakers.write_text("".join(f"demo{i:04d}\n" for i in range(FIRST_SPEAKER, N_SPEAKERS)))
    for name, backbone in BACKBONES.items():
        if args.only not in (None, name):
            continue
        overrides = {
            "data_folder": voices,
            "output_folder": folder / name,
            "train_speakers": speakers,
            "valid_speakers": 8,
            "pretrained": False,
            "backbone": backbone,
            "embed_dim": 192,
            "mrl_dims": [192],
            "chunk_seconds": 2.0,
            "batch_size": 32,
            "num_workers": 0,
            "number_of_epochs": args.number_of_epochs,
            "margin_epochs": 0,
            "stages": None,
            "lr": 0.002,
        }
        options = [f"--{key}={value}".replace("None", "null") for key, value in overrides.items()]
        student = train.main(["hparams/mrl_supervised.yaml", *options])
        config = {key: value for key, value in student.model_config.items() if key in backbone}
        config.update(embed_dim=192, out_channels=None)
        checkpoint = {"model_config": config, "state_dict": student.state_dict()}
        path = RECIPE / "demo_teachers" / f"{name}-demo-ptn.pt"
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)  # smaller


if __name__ == "__main__":
    main()
