"""Trials and embeddings of speakers that are clouds of points."""

import numpy as np
import torch

from speechbrain_mrl.evaluation.verification import Trials


def toy_trials(n_speakers=12, n_clips=5, embed_dim=16, prefix="s", seed=3):
    """Every trial among the speakers' clips, and their float64 embeddings, (N, embed_dim)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_speakers, 1, embed_dim))
    clouds = centres + rng.normal(size=(n_speakers, n_clips, embed_dim))
    names = [
        f"{prefix}{speaker}/{clip}" for speaker in range(n_speakers) for clip in range(n_clips)
    ]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    trials = Trials.parse(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}" for a, b in pairs)
    embeddings = dict(zip(names, torch.from_numpy(clouds.reshape(-1, embed_dim))))
    return trials, trials.stack(embeddings)
