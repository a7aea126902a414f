"""Train the demo's teachers, which ship in ``demo_teachers/``, on voices that the demo never uses.

    python recipes/voxceleb/train_demo_teachers.py --device=cuda

They are four networks of one size that complement each other, for each is trained on other voices.
The files that ship have the same networks, voices and settings, but were stopped by time after 570
steps. So a new run does not give the same numbers.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from demo_voices import make_demo_corpus
from torch import nn
from tqdm import trange

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNetMRL
from speechbrain_mrl.dataio.clips import find_clips

RECIPE = Path(__file__).resolve().parent
BATCH_SIZE, CHUNK, LR = 64, 32000, 0.002  # CHUNK in samples at 16 kHz
EMBED_DIM = 128
BACKBONE = {
    "F": 36,
    "C": 6,
    "block_1d_type": "conv+att",
    "block_2d_type": "convnext_like",
    "stages_setup": [[3, 1, 1, [[3, 3]], 18], [2, 1, 1, [[3, 3]], 18]],
    "group_divisor": None,
    "hop_length": 256,
    "global_context_att": True,
}


class Voices(NamedTuple):
    """Arguments of ``make_demo_corpus``."""

    group: int
    n_speakers: int
    clips_per_speaker: int
    seed: int


TEACHERS = {
    "demo_1": Voices(group=1, n_speakers=400, clips_per_speaker=8, seed=2),
    "demo_2": Voices(group=2, n_speakers=400, clips_per_speaker=8, seed=2),
    "demo_3": Voices(group=3, n_speakers=400, clips_per_speaker=8, seed=2),
    "demo_4": Voices(group=1, n_speakers=120, clips_per_speaker=16, seed=1),
}


def train_teacher(folder: Path, n_steps: int, device: str) -> dict:
    """A network that tells the speakers of a folder apart, in the release's format."""
    clips = find_clips(folder / "wav")
    wavs = [torch.from_numpy(soundfile.read(clip.wav, dtype="float32")[0]) for clip in clips]
    _, speakers = np.unique([clip.id.split("/")[0] for clip in clips], return_inverse=True)
    network = ReDimNetMRL(EMBED_DIM, [EMBED_DIM], BACKBONE).to(device)
    objective = MatryoshkaDistillationLoss(
        [EMBED_DIM], "all", terms={"aam": 1.0}, n_classes=int(speakers.max()) + 1
    ).to(device)
    parameters = [*network.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / n_steps / 0.05, (n_steps - step) / n_steps / 0.5),
    )
    order: list[int] = []
    for step in trange(n_steps, desc=folder.name):
        if len(order) < BATCH_SIZE:
            order += torch.randperm(len(clips)).tolist()
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        starts = [int(torch.randint(len(wavs[i]) - CHUNK + 1, ())) for i in batch]
        chunks = torch.stack([wavs[i][start : start + CHUNK] for i, start in zip(batch, starts)])
        objective.scale_margins(min(1.0, 5 * step / n_steps))
        labels = torch.from_numpy(speakers[batch]).to(device)
        loss, _ = objective(network(chunks.to(device)), {}, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
    return {
        "model_config": {**BACKBONE, "embed_dim": EMBED_DIM},
        "state_dict": network.cpu().state_dict(),
    }


def main(argv: list[str] | None = None) -> None:
    """Make each teacher's voices, train it, write its checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=RECIPE / "demo_teachers")
    parser.add_argument("--voices_folder", type=Path, default=Path("results/demo_teachers"))
    parser.add_argument("--n_steps", type=int, default=575)
    parser.add_argument("--only", choices=TEACHERS, help="train just this one")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.output_folder.mkdir(parents=True, exist_ok=True)
    for number, (name, voices) in enumerate(TEACHERS.items()):
        if args.only not in (None, name):
            continue
        torch.manual_seed(number)
        folder = make_demo_corpus(args.voices_folder / name, **voices._asdict())
        checkpoint = train_teacher(folder, args.n_steps, args.device)
        path = args.output_folder / f"{name}-demo-ptn.pt"
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)  # smaller


if __name__ == "__main__":
    main()
