"""Tells encoders apart by their weights and configuration."""

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechbrain_mrl.inference.extract import Encoder

NOT_CONFIGURATION = {"training", "device", "device_type"}


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over a module's tensors and configuration: changes when its embeddings may.

    Configuration is each inner module's plain attributes: numbers, text, lists and mappings of
    them, tensors. The device and names that start with ``_`` do not count. Of a published
    ``EncoderClassifier`` it is the numbers of its ``hparams``: the rest is paths and run options. A
    callable that is no module must have an attribute ``fingerprint``, a string that does the same.
    """
    if not isinstance(encoder, nn.Module):
        given = getattr(encoder, "fingerprint", None)
        if not isinstance(given, str):
            raise ValueError(
                f"{encoder} is neither a torch.nn.Module nor has it an attribute fingerprint; set it "
                "to a string that names its weights, so that embeddings of others are not mixed in"
            )
        return given
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        digest.update(f"{name} {type(module).__qualname__}{_configuration(module)}".encode())
    # not encoder.state_dict(): a copy made for inference refuses that, lest it be saved
    for key, value in sorted(nn.Module.state_dict(encoder).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _configuration(module: nn.Module) -> Any:
    """What a module was configured with, as a text of it tells apart."""
    hparams = getattr(module, "hparams", None)
    if isinstance(hparams, SimpleNamespace):
        return _plain({k: v for k, v in vars(hparams).items() if not isinstance(v, str)})
    own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    return _plain({k: v for k, v in own.items() if k not in NOT_CONFIGURATION})


def _plain(value: Any) -> Any:
    """Numbers, text, and lists and mappings of them; of anything else its type, or its name."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return value
    if isinstance(value, Mapping):
        return sorted((str(k), _plain(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(one)) for one in value)
    if isinstance(value, Tensor):
        return tuple(value.shape), hashlib.sha256(_bytes(value)).hexdigest()
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if callable(getattr(value, "to_dict", None)):  # a configuration of transformers
        return _plain(value.to_dict())
    return getattr(value, "__qualname__", type(value).__qualname__)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
