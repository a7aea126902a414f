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
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from speechbrain.dataio.encoder import CategoricalEncoder
from torch import Tensor

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.evaluation.calibration import check_calibration
from speechbrain_mrl.models import redimnet, redimnet2
from speechbrain_mrl.models.redimnet import (
    EmbeddingModel,
    MatryoshkaReDimNet,
    PrefixSpeakerClassifier,
    ReDimNet,
)
from speechbrain_mrl.models.redimnet2 import EmbeddingModel2, MatryoshkaReDimNet2, ReDimNet2
from speechbrain_mrl.publish.card import Provenance, corpus_name, write_card
from speechbrain_mrl.utils import exchange, writing

# All that a published folder may hold; examples is a folder of recordings.
FILES = (
    "README.md calibration.json check.json classifier.ckpt config.json custom.py eer_by_dim.png "
    "embedding_model.ckpt examples hyperparams.yaml label_encoder.ckpt report.json"
).split()


@torch.no_grad()
def export_model(
    model: ReDimNet,
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
) -> Path:
    """Write a folder that SpeechBrain loads without this package, and that can be published.

    The folder appears complete or not at all; one that an earlier export wrote is replaced.

    Arguments
    ---------
    model : ReDimNet
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
        (n, D) of some recordings to enrol the speaker with. None: the model tells no speakers
        apart by name and has no classification tag.
    scale : float
        What the classifier multiplies cosines by; that of the training loss.
    examples : mapping of str to path, optional
        Title -> recording, for the model's page. Copied; needs ``speakers``.
    target_dim : int, optional
        Largest of the sizes to publish; the coordinates past it are dropped. None: all.
    dtype : torch.dtype
        Of the stored parameters, torch.float32 or torch.float16. They are loaded as float32.

    Returns
    -------
    pathlib.Path
        ``folder``.

    Raises
    ------
    ValueError
        If the arguments do not belong together, or ``folder`` holds something else.

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
    if not isinstance(model, ReDimNet):
        raise TypeError(f"model must be a ReDimNet or ReDimNetMRL, got {type(model).__name__}")
    if examples and not speakers:
        raise ValueError("examples show which speaker is recognised; give speakers too")
    model = copy.deepcopy(model).cpu().float().eval()
    network = _published_network(model, target_dim)
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
        expected = model(probe_wavs()).flatten()[: network.embed_dim].tolist()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        _write_json(new / "check.json", {"embedding": expected, "tolerance": tolerance})
        config = {"speechbrain_interface": "EncoderClassifier", "provenance": asdict(provenance)}
        _write_json(new / "config.json", config)
        widget = _widget(examples or {}, new / "examples", network, classifier, labels.ind2lab)
        texts = {
            "README.md": write_card(
                network.mrl_dims, provenance, report, plot is not None, len(labels), widget
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


def _published_network(model: ReDimNet, target_dim: int | None) -> EmbeddingModel:
    """``model`` as the class that travels, cut after ``target_dim``."""
    of_two = isinstance(model, ReDimNet2)
    if not isinstance(model, MatryoshkaReDimNet):
        size = model.embed_dim
        student = MatryoshkaReDimNet2 if of_two else MatryoshkaReDimNet
        model = student.from_redimnet(model, size, (size,))
    size = model.embed_dim if target_dim is None else target_dim
    if size not in model.mrl_dims:
        raise ValueError(f"target_dim must be one of {list(model.mrl_dims)}, got {target_dim!r}")
    sizes = tuple(d for d in model.mrl_dims if d <= size)
    travels = EmbeddingModel2 if of_two else EmbeddingModel
    network = travels({**model.model_config, "embed_dim": size}, sizes)
    state_dict = model.state_dict()
    state_dict |= {key: state_dict[key][:size] for key in ("linear.weight", "linear.bias")}
    network.load_state_dict(state_dict)
    return network.eval()


def _classifier(
    speakers: Mapping[str, Tensor], embed_dim: int, size: int, scale: float
) -> PrefixSpeakerClassifier:
    """The speakers' vectors, or centroids of their embeddings, cut to ``size`` coordinates."""
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
    network: EmbeddingModel,
    classifier: PrefixSpeakerClassifier,
    title: str,
    report: Mapping[str, Any] | None,
) -> str:
    two = isinstance(network, EmbeddingModel2)
    paths = [Path(redimnet.__file__), Path(redimnet2.__file__)][: 1 + two]
    files = {path.name: path.read_text(encoding="utf-8") for path in paths}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    config = (f"{key}: {json.dumps(value)}" for key, value in network.model_config.items())
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
        package=f"redimnet_{digest[:16]}",
        network="redimnet2.EmbeddingModel2" if two else "redimnet.EmbeddingModel",
        files="".join(f"        {n}: |\n{textwrap.indent(t, ' ' * 10)}" for n, t in files.items()),
        model_config=textwrap.indent("\n".join(config), " " * 8),
        n_classes=len(classifier.weight),
        scale=float(classifier.scale),
    )


def _widget(
    examples: Mapping[str, str | os.PathLike[str]],
    folder: Path,
    network: EmbeddingModel,
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
