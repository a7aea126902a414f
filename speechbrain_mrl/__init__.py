"""Multi-resolution (Matryoshka) speaker encoders for SpeechBrain."""

from speechbrain_mrl.classification import MatryoshkaLoss
from speechbrain_mrl.inference.store import embed_folder, read_embeddings
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.models.ensemble import MultiModelEnsemble
from speechbrain_mrl.models.pretrained import (
    ReDimNetMRL,
    load_pretrained_redimnet,
    load_pretrained_redimnet2,
)
from speechbrain_mrl.models.redimnet import ReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2
from speechbrain_mrl.models.resize import expand_model
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.hub import push_to_hub
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.training.checkpoints import AtomicCheckpointer
from speechbrain_mrl.training.distill import train_distilled_mrl

__all__ = [
    "AtomicCheckpointer",
    "MatryoshkaDistillationLoss",
    "MatryoshkaLoss",
    "MultiModelEnsemble",
    "ReDimNet",
    "ReDimNet2",
    "ReDimNetMRL",
    "embed_folder",
    "expand_model",
    "export_model",
    "load_pretrained_redimnet",
    "load_pretrained_redimnet2",
    "matryoshka_rotation",
    "push_to_hub",
    "read_embeddings",
    "train_distilled_mrl",
]
