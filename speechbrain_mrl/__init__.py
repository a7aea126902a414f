"""Multi-resolution (Matryoshka) speaker encoders for SpeechBrain."""

from importlib import import_module
from typing import Any

_ON_FIRST_USE = {  # importing the package alone imports neither torch nor SpeechBrain
    "AtomicCheckpointer": "training.checkpoints",
    "DropBands": "training.augment",
    "DropChunks": "training.augment",
    "KaldiFbank": "models.kaldi",
    "LowPass": "training.augment",
    "MatryoshkaDistillationLoss": "losses",
    "MatryoshkaEncoder": "models.matryoshka",
    "MatryoshkaIndex": "inference.search",
    "MatryoshkaLoss": "classification",
    "MilvusIndex": "inference.milvus",
    "MultiModelEnsemble": "models.ensemble",
    "Noise": "training.augment",
    "Provenance": "publish.card",
    "PyannoteEmbedding": "publish.pyannote",
    "ReDimNet": "models.redimnet",
    "ReDimNet2": "models.redimnet2",
    "ReDimNetMRL": "models.pretrained",
    "Reverb": "training.augment",
    "TeacherStore": "inference.store",
    "Telephone": "training.augment",
    "TrainingLog": "training.logger",
    "UtteranceAugmenter": "training.augment",
    "VoiceRegistry": "inference.registry",
    "babble": "training.augment",
    "embed_folder": "inference.store",
    "evaluate": "evaluation.verification",
    "expand_model": "models.resize",
    "export_model": "publish.export",
    "export_onnx": "inference.onnx",
    "load_pretrained_redimnet": "models.pretrained",
    "load_pretrained_redimnet2": "models.pretrained",
    "load_published": "publish.load",
    "matryoshka_rotation": "rotation",
    "optimize_for_inference": "inference.optimize",
    "push_to_hub": "publish.hub",
    "read_embeddings": "inference.store",
    "read_trials": "evaluation.verification",
    "train_distilled_mrl": "training.distill",
}

__all__ = [*_ON_FIRST_USE]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
