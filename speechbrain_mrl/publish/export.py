"""Writes a model as a folder that loads with SpeechBrain alone."""

import copy
import json
import os
import shutil
import tempfile
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
from speechbrain_mrl.models.matryoshka import EncoderModel, MatryoshkaEncoder
from speechbrain_mrl.models.redimnet import EmbeddingModel, PrefixSpeakerClassifier, ReDimNet
from speechbrain_mrl.publish.card import Provenance, corpus_name, write_card
from speechbrain_mrl.publish.definition import (
    check_embedding,
    encoder_name,
    hyperparams,
    padding_cosine,
    probe_wavs,
    published_network,
)
from speechbrain_mrl.publish.folder import CHECKPOINTS, FILES
from speechbrain_mrl.utils import exchange, sha256, writing


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

    Raises
    ------
    ValueError
        If the arguments do not belong together, ``architecture`` makes another model, or ``folder``
        holds something else.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> model = ReDimNetMRL(embed_dim=64, mrl_dims=(32, 64), backbone="b0")
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
    network = published_network(model, target_dim, architecture)
    wavs = probe_wavs()
    expected, again = (model(wavs).flatten()[: network.embed_dim] for _ in range(2))
    # Some encoders (x-vectors) draw numbers in eval mode too.
    tolerance = max(1e-4, 10 * ((again - expected).norm() / expected.norm()).item())
    check_embedding(network, expected, tolerance)
    cosine = padding_cosine(network)
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
        tolerance = tolerance if dtype == torch.float32 else max(1e-2, tolerance)
        _write_json(new / "check.json", {"embedding": expected.tolist(), "tolerance": tolerance})
        config = {
            "speechbrain_interface": "EncoderClassifier",
            "padding_cosine": cosine,
            "params": sum(p.numel() for p in network.parameters()),
            "speakers": len(labels),
            "sha256": {name: sha256(new / name) for name in CHECKPOINTS},
            "provenance": asdict(provenance),
        }
        _write_json(new / "config.json", config)
        widget = _widget(examples or {}, new / "examples", network, classifier, labels.ind2lab)
        texts = {
            "README.md": write_card(
                network.mrl_dims,
                provenance,
                report,
                plot is not None,
                len(labels),
                widget,
                encoder=encoder_name(network),
                padding_cosine=cosine,
            ),
            "hyperparams.yaml": hyperparams(network, classifier, provenance.title, report),
            "custom.py": CUSTOM,
            "custom_st.py": Path(__file__).with_name("custom_st.py").read_text(encoding="utf-8"),
            "modules.json": json.dumps([MODULE], indent=2) + "\n",
        }
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        if folder.exists():
            exchange(new, folder)
        else:
            os.replace(new, folder)
    return folder


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
# For SentenceTransformer.
MODULE = {"idx": 0, "name": "0", "path": "", "type": "custom_st.SpeakerEncoder"}


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
