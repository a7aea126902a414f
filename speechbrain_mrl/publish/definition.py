"""A model as the class that travels, and the YAML and Python files that make it anew."""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_mrl.models import kaldi, matryoshka, redimnet, redimnet2
from speechbrain_mrl.models.architecture import build_parts, plain_architecture, travelling
from speechbrain_mrl.models.kaldi import KaldiFbank
from speechbrain_mrl.models.matryoshka import EncoderModel, MatryoshkaEncoder
from speechbrain_mrl.models.redimnet import (
    EmbeddingModel,
    MatryoshkaHead,
    MatryoshkaReDimNet,
    PrefixSpeakerClassifier,
    ReDimNet,
    check_state_dict,
)
from speechbrain_mrl.models.redimnet2 import EmbeddingModel2, MatryoshkaReDimNet2, ReDimNet2
from speechbrain_mrl.models.resize import resize_model


def published_network(
    model: ReDimNet | MatryoshkaEncoder, target_dim: int | None, architecture: str | None
) -> EmbeddingModel | EncoderModel:
    """``model`` as the class that travels, truncated to ``target_dim``."""
    of_two = isinstance(model, ReDimNet2)
    if not isinstance(model, MatryoshkaHead):
        size = model.embed_dim
        student = MatryoshkaReDimNet2 if of_two else MatryoshkaReDimNet
        model = student.from_redimnet(model, size, (size,))
    size = model.embed_dim if target_dim is None else target_dim
    if size not in model.mrl_dims:
        raise ValueError(f"target_dim must be one of {list(model.mrl_dims)}, got {target_dim!r}")
    sizes = tuple(d for d in model.mrl_dims if d <= size)
    state_dict = (model if size == model.embed_dim else resize_model(model, sizes)).state_dict()
    network: EmbeddingModel | EncoderModel
    if isinstance(model, MatryoshkaEncoder):
        network = _published_encoder(sizes, architecture or model.architecture)
        if problems := check_state_dict(network, state_dict):
            raise ValueError(f"architecture makes another model than this one: {problems}")
    else:
        travels = EmbeddingModel2 if of_two else EmbeddingModel
        network = travels({**model.model_config, "embed_dim": size}, sizes)
    network.load_state_dict(state_dict)
    return network.eval()


def _published_encoder(sizes: tuple[int, ...], architecture: str | None) -> EncoderModel:
    if architecture is None:
        raise ValueError(
            "a MatryoshkaEncoder is published with the HyperPyYAML that makes its parts, and this "
            "one has none; give architecture=, a text with the keys compute_features, "
            "mean_var_norm and embedding_model as in a SpeechBrain recipe"
        )
    text = plain_architecture(architecture)
    parts = build_parts(text)
    try:
        network = EncoderModel(mrl_dims=sizes, **parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"architecture makes no model that can be published: {error}") from error
    network.architecture = text
    return network


def check_embedding(
    network: EmbeddingModel | EncoderModel, expected: Tensor, tolerance: float
) -> None:
    """ValueError where what state dicts do not hold (activations, features) changes the embedding."""
    difference = (network(probe_wavs()).flatten() - expected).norm() / expected.norm()
    if not difference <= tolerance:
        raise ValueError(
            "architecture makes another model than this one: its embedding differs by "
            f"{difference:.2g} of its length; give the YAML that the model was made from"
        )


def padding_cosine(network: EmbeddingModel | EncoderModel) -> float:
    """Of an utterance's embedding alone with that in a batch where it is padded."""
    wavs = probe_wavs()
    n = wavs.shape[1] * 3 // 5
    batch, lens = wavs.repeat(2, 1), torch.tensor([1.0, n / wavs.shape[1]])
    batch[1, n:] = 0
    alone, padded = network(wavs[:, :n]), network(batch, lens)[1:]
    return round(F.cosine_similarity(alone, padded, dim=-1).item(), 6)


def encoder_name(network: EmbeddingModel | EncoderModel) -> str:
    if isinstance(network, EncoderModel):
        return type(network.embedding_model).__name__
    return "ReDimNet2" if isinstance(network, EmbeddingModel2) else "ReDimNet"


def probe_wavs() -> torch.Tensor:
    """The signal whose embedding check.json holds: two seconds of tones, (1, 32000)."""
    times = torch.arange(32000, dtype=torch.float64) / 16000
    phases = [6.2831853 * hertz * times * (1 + 0.05 * times) for hertz in (140, 470, 1130, 2650)]
    wav: Any = sum(phase.sin() for phase in phases) / 10
    return wav.float().unsqueeze(0)


def hyperparams(
    network: EmbeddingModel | EncoderModel,
    classifier: PrefixSpeakerClassifier,
    title: str,
    report: Mapping[str, Any] | None,
) -> str:
    modules, name, arguments = _definition(network)
    paths = [Path(str(module.__file__)) for module in modules]
    files = {path.name: path.read_text(encoding="utf-8") for path in paths}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    package = f"{'encoder' if isinstance(network, EncoderModel) else 'redimnet'}_{digest[:16]}"
    thresholds = {}
    if report is not None:
        for d in map(str, network.mrl_dims):
            found = report["dims"][d]
            thresholds[d] = {"eer": found["threshold"], **found.get("thresholds", {})}
    template = Path(__file__).with_name("hyperparams.yaml").read_text(encoding="utf-8")
    return template.format(
        title=" ".join(title.split()),  # a line break of any kind would end the comment
        embed_dim=network.embed_dim,
        sizes=list(network.mrl_dims),
        min_samples=network.min_samples,
        thresholds=json.dumps(thresholds),
        package=package,
        network=name,
        files="".join(f"        {n}: |\n{textwrap.indent(t, ' ' * 10)}" for n, t in files.items()),
        arguments=textwrap.indent(travelling(arguments, package).rstrip(), " " * 4),
        n_classes=len(classifier.weight),
        scale=float(classifier.scale),
    )


def _definition(network: EmbeddingModel | EncoderModel) -> tuple[list[ModuleType], str, str]:
    """The Python files that define a network, its class in them, and its arguments as YAML."""
    if isinstance(network, EncoderModel):
        with_kaldi = any(isinstance(module, KaldiFbank) for module in network.modules())
        modules = [redimnet, matryoshka, *([kaldi] if with_kaldi else [])]
        return modules, "matryoshka.EncoderModel", str(network.architecture)
    config = [f"    {key}: {json.dumps(value)}" for key, value in network.model_config.items()]
    arguments = "\n".join(["model_config:", *config])
    if isinstance(network, EmbeddingModel2):
        return [redimnet, redimnet2], "redimnet2.EmbeddingModel2", arguments
    return [redimnet], "redimnet.EmbeddingModel", arguments
