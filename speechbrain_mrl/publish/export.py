"""Writes a model as a folder that loads with SpeechBrain alone."""

import copy
import hashlib
import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from speechbrain.dataio.encoder import CategoricalEncoder
from torch import Tensor

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.evaluation.calibration import check_calibration
from speechbrain_mrl.models import kaldi, matryoshka, redimnet, redimnet2
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
from speechbrain_mrl.publish.architecture import build_parts, plain_architecture, travelling
from speechbrain_mrl.publish.card import Provenance, corpus_name, write_card
from speechbrain_mrl.utils import exchange, writing

# All that a published folder may hold; examples is a folder of recordings.
FILES = (
    "README.md calibration.json check.json classifier.ckpt config.json custom.py eer_by_dim.png "
    "embedding_model.ckpt examples hyperparams.yaml label_encoder.ckpt report.json"
).split()


@torch.no_grad()
def export_model(
    model: ReDimNet | MatryoshkaEncoder,
    folder: str | os.PathLike[str],
    provenance: Provenance | None = None,
    *,
    report: Mapping[str, Any] | None = None,
    plot: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    speakers: Mapping[str, Tensor] | None = None,
    scale: float = 30.0,
    examples: Mapping[str, str | os.PathLike[str]] | None = None,
    target_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    architecture: str | None = None,
) -> Path:
    """Write a folder that SpeechBrain loads without this package, and that can be published.

    The folder appears complete or not at all; one that an earlier export wrote is replaced.

    Arguments
    ---------
    model : ReDimNet or MatryoshkaEncoder
        A student, a rotated pretrained model, or a plain ReDimNet of one size. Stays as it is.
    folder : path
        To be written.
    provenance : Provenance, optional
        For the card. None states no licence and cannot be uploaded.
    report : dict, optional
        A verification's report.json. The card's numbers all come from it; without one the folder
        loads but cannot be published.
    plot : path, optional
        The report's ``eer_by_dim.png``.
    calibration : path, optional
        A verification's ``calibration.json``, of cosines at every published size.
    speakers : mapping of str to torch.Tensor, optional
        Label -> the speaker's vector (D,), such as a trained classifier's row, or the embeddings
        (n, D) of some recordings to enrol the speaker with. None: the model recognises no speakers
        by name and has no classification tag.
    scale : float
        What the classifier multiplies cosines by; that of the training loss.
    examples : mapping of str to path, optional
        Title -> recording, for the model's page. Copied; needs ``speakers``.
    target_dim : int, optional
        Largest of the sizes to publish; the dimensions past it are dropped. None: all.
    dtype : torch.dtype
        Of the stored parameters, torch.float32 or torch.float16. They are loaded as float32.
    architecture : str, optional
        Of a MatryoshkaEncoder that has none: HyperPyYAML with the keys ``compute_features``,
        ``mean_var_norm`` and ``embedding_model``, which names layers only.

    Returns
    -------
    pathlib.Path
        ``folder``.

    Raises
    ------
    ValueError
        If the arguments do not belong together, ``architecture`` makes another model, or ``folder``
        holds something else.

    Example
    -------
    >>> model = MatryoshkaReDimNet(embed_dim=64, mrl_dims=(32, 64), backbone="b0")
    >>> provenance = Provenance("Random weights", "cc0-1.0", "Nothing.")
    >>> folder = export_model(model, getfixture("tmp_path") / "model", provenance)
    >>> from speechbrain.inference.classifiers import EncoderClassifier
    >>> loaded = EncoderClassifier.from_hparams(source=folder, overrides={"target_dim": 32})
    >>> loaded.encode_batch(torch.zeros(1, 16000)).shape
    torch.Size([1, 1, 32])
    """
    folder, provenance = check_replaceable(folder), provenance or Provenance()
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    if not isinstance(model, (ReDimNet, MatryoshkaEncoder)):
        raise TypeError(
            "model must be a ReDimNet, ReDimNetMRL or MatryoshkaEncoder, got "
            f"{type(model).__name__}; MatryoshkaEncoder takes any SpeechBrain encoder"
        )
    if architecture is not None and isinstance(model, ReDimNet):
        raise ValueError("architecture is for a MatryoshkaEncoder; a ReDimNet brings its own")
    if examples and not speakers:
        raise ValueError("examples show which speaker is recognised; give speakers too")
    model = copy.deepcopy(model).cpu().float().eval()
    network = _published_network(model, target_dim, architecture)
    expected = model(probe_wavs()).flatten()[: network.embed_dim]
    _check_embedding(network, expected)
    padding_cosine = _padding_cosine(network)
    if calibration is not None:
        check_calibration(calibration, network.mrl_dims)
    classifier = _classifier(speakers or {}, model.embed_dim, network.embed_dim, scale)
    labels = CategoricalEncoder()
    labels.update_from_iterable(speakers or {})

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent,
    ):
        new = Path(parent, "new")
        new.mkdir()
        for name, module in (("embedding_model", network), ("classifier", classifier)):
            stored = module.state_dict()
            stored |= {key: stored[key].to(dtype) for key, _ in module.named_parameters()}
            torch.save(stored, new / f"{name}.ckpt")
            module.load_published(new / f"{name}.ckpt")
        labels.save(new / "label_encoder.ckpt")
        if plot is not None:
            shutil.copyfile(plot, new / "eer_by_dim.png")
        if calibration is not None:
            shutil.copyfile(calibration, new / "calibration.json")
        if report is not None:
            _write_json(new / "report.json", {**report, "corpus": corpus_name(report)})
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        _write_json(new / "check.json", {"embedding": expected.tolist(), "tolerance": tolerance})
        config = {"speechbrain_interface": "EncoderClassifier", "padding_cosine": padding_cosine}
        _write_json(new / "config.json", {**config, "provenance": asdict(provenance)})
        widget = _widget(examples or {}, new / "examples", network, classifier, labels.ind2lab)
        texts = {
            "README.md": write_card(
                network.mrl_dims,
                provenance,
                report,
                plot is not None,
                len(labels),
                widget,
                encoder=_encoder_name(network),
                padding_cosine=padding_cosine,
            ),
            "hyperparams.yaml": _hyperparams(network, classifier, provenance.title, report),
            "custom.py": CUSTOM,
        }
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        if folder.exists():
            exchange(new, folder)
        else:
            os.replace(new, folder)
    return folder


def probe_wavs() -> torch.Tensor:
    """The signal whose embedding check.json holds: two seconds of tones, (1, 32000)."""
    times = torch.arange(32000, dtype=torch.float64) / 16000
    phases = [6.2831853 * hertz * times * (1 + 0.05 * times) for hertz in (140, 470, 1130, 2650)]
    wav: Any = sum(phase.sin() for phase in phases) / 10
    return wav.float().unsqueeze(0)


def check_replaceable(folder: str | os.PathLike[str]) -> Path:
    """The folder's path, unless it holds what no export wrote."""
    folder = Path(folder)
    if folder.exists() and (foreign := foreign_files(folder)):
        raise ValueError(f"{folder} holds {foreign}, which no export wrote; choose another folder")
    return folder


def foreign_files(folder: Path) -> list[str]:
    """What is in ``folder`` and no export wrote: other names, links, recordings not of the card."""
    card, own = folder / "README.md", set(FILES)
    if card.is_file():
        examples = huggingface_hub.ModelCard.load(card).data.get("widget") or []
        own |= {example["src"] for example in examples}
    return sorted(
        name
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix()) not in own or path.is_symlink()
    )


def _published_network(
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


def _check_embedding(network: EmbeddingModel | EncoderModel, expected: Tensor) -> None:
    """What state dicts do not hold (activations, features) may differ, and is heard."""
    difference = (network(probe_wavs()).flatten() - expected).norm() / expected.norm()
    if not difference < 1e-4:
        raise ValueError(
            "architecture makes another model than this one: its embedding differs by "
            f"{difference:.2g} of its length; give the YAML that the model was made from"
        )


def _padding_cosine(network: EmbeddingModel | EncoderModel) -> float:
    """Of an utterance's embedding alone with that in a batch where it is padded."""
    wavs = probe_wavs()
    n = wavs.shape[1] * 3 // 5
    batch, lens = wavs.repeat(2, 1), torch.tensor([1.0, n / wavs.shape[1]])
    batch[1, n:] = 0
    alone, padded = network(wavs[:, :n]), network(batch, lens)[1:]
    return round(F.cosine_similarity(alone, padded, dim=-1).item(), 6)


def _encoder_name(network: EmbeddingModel | EncoderModel) -> str:
    if isinstance(network, EncoderModel):
        return type(network.embedding_model).__name__
    return "ReDimNet2" if isinstance(network, EmbeddingModel2) else "ReDimNet"


def _classifier(
    speakers: Mapping[str, Tensor], embed_dim: int, size: int, scale: float
) -> PrefixSpeakerClassifier:
    """The speakers' vectors, or centroids of their embeddings, truncated to ``size`` dimensions."""
    weight = torch.zeros(len(speakers), size)
    for row, (label, vectors) in zip(weight, speakers.items()):
        if not isinstance(label, str) or not label or " => " in label:
            raise ValueError(
                f"speakers has the label {label!r}; a label must be text without ' => '"
            )
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != embed_dim or not vectors.numel():
            raise ValueError(
                f"speakers[{label!r}] must be ({embed_dim},) or (n, {embed_dim}), "
                f"got {tuple(vectors.shape)}"
            )
        centroid = F.normalize(vectors.float(), dim=-1).reshape(-1, embed_dim).mean(dim=0)
        row.copy_(centroid[:size])
    classifier = PrefixSpeakerClassifier(size, len(speakers), scale=scale)
    classifier.weight.copy_(weight)
    return classifier


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


CUSTOM = '''\
from speechbrain.inference.classifiers import EncoderClassifier


class CustomInterface(EncoderClassifier):
    """For ``foreign_class``; ``EncoderClassifier.from_hparams`` gives the same model."""
'''


def _hyperparams(
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


def _widget(
    examples: Mapping[str, str | os.PathLike[str]],
    folder: Path,
    network: EmbeddingModel | EncoderModel,
    classifier: PrefixSpeakerClassifier,
    labels: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Copies the examples; what the model says about each: its five likeliest speakers."""
    entries: list[dict[str, Any]] = []
    for title, path in examples.items():
        folder.mkdir(exist_ok=True)
        name = f"{len(entries) + 1}{Path(path).suffix}"
        shutil.copyfile(path, folder / name)
        posteriors = classifier(network(read_audio(path))).flatten().exp()
        scores, indices = posteriors.topk(min(5, len(labels)))
        output = [
            {"label": labels[i], "score": round(score, 4)}
            for i, score in zip(indices.tolist(), scores.tolist())
        ]
        entries.append({"example_title": title, "src": f"{folder.name}/{name}", "output": output})
    return entries
