"""Multi-resolution (Matryoshka) speaker encoders for SpeechBrain."""

from speechbrain_mrl.bulk import embed_folder, read_embeddings
from speechbrain_mrl.checkpoints import AtomicCheckpointer
from speechbrain_mrl.ensemble import MultiModelEnsemble
from speechbrain_mrl.expansion import expand_model
from speechbrain_mrl.export import export_model
from speechbrain_mrl.hub import push_to_hub
from speechbrain_mrl.losses import MatryoshkaDistillationLoss, MatryoshkaLoss
from speechbrain_mrl.pretrained import ReDimNetMRL, load_pretrained_redimnet
from speechbrain_mrl.redimnet import ReDimNet
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.training import train_distilled_mrl

__all__ = [
    "AtomicCheckpointer",
    "MatryoshkaDistillationLoss",
    "MatryoshkaLoss",
    "MultiModelEnsemble",
    "ReDimNet",
    "ReDimNetMRL",
    "embed_folder",
    "expand_model",
    "export_model",
    "load_pretrained_redimnet",
    "matryoshka_rotation",
    "push_to_hub",
    "read_embeddings",
    "train_distilled_mrl",
]
