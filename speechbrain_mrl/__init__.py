"""Multi-resolution (Matryoshka) speaker encoders for SpeechBrain."""

from importlib import import_module
from typing import Any

from speechbrain_mrl.classification import MatryoshkaLoss
from speechbrain_mrl.evaluation.verification import evaluate, read_trials
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.inference.store import TeacherStore, embed_folder, read_embeddings
from speechbrain_mrl.losses import MatryoshkaDistillationLoss
from speechbrain_mrl.models.ensemble import MultiModelEnsemble
from speechbrain_mrl.models.kaldi import KaldiFbank
from speechbrain_mrl.models.matryoshka import MatryoshkaEncoder
from speechbrain_mrl.models.pretrained import (
    ReDimNetMRL,
    load_pretrained_redimnet,
    load_pretrained_redimnet2,
)
from speechbrain_mrl.models.redimnet import ReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2
from speechbrain_mrl.models.resize import expand_model
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.hub import push_to_hub
from speechbrain_mrl.rotation import matryoshka_rotation
from speechbrain_mrl.training.checkpoints import AtomicCheckpointer
from speechbrain_mrl.training.distill import train_distilled_mrl
from speechbrain_mrl.training.logger import TrainingLog

_ON_FIRST_USE = {  # what needs an extra, or nothing but a recipe or a published model
    "DropBands": "training.augment",
    "DropChunks": "training.augment",
    "LowPass": "training.augment",
    "MatryoshkaIndex": "inference.search",
    "MilvusIndex": "inference.milvus",
    "Noise": "training.augment",
    "Reverb": "training.augment",
    "Telephone": "training.augment",
    "UtteranceAugmenter": "training.augment",
    "babble": "training.augment",
    "export_onnx": "inference.onnx",
    "load_published": "publish.load",
}

__all__ = [
    "AtomicCheckpointer",
    "KaldiFbank",
    "MatryoshkaDistillationLoss",
    "MatryoshkaEncoder",
    "MatryoshkaLoss",
    "MultiModelEnsemble",
    "Provenance",
    "ReDimNet",
    "ReDimNet2",
    "ReDimNetMRL",
    "TeacherStore",
    "TrainingLog",
    "embed_folder",
    "evaluate",
    "expand_model",
    "export_model",
    "load_pretrained_redimnet",
    "load_pretrained_redimnet2",
    "matryoshka_rotation",
    "optimize_for_inference",
    "push_to_hub",
    "read_embeddings",
    "read_trials",
    "train_distilled_mrl",
    *_ON_FIRST_USE,
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
