"""Loads any speaker encoder by name, file, folder, Hub id or module."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speechbrain_mrl.inference.extract import embed_long
from speechbrain_mrl.inference.optimize import for_inference
from speechbrain_mrl.models.pretrained import load_checkpoint, load_released
from speechbrain_mrl.models.releases import names_release, parse_release, released_names

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class EncoderClassifierTeacher(nn.Module):
    """A published SpeechBrain speaker encoder, a folder or Hub id, as a teacher on ``device``."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        super().__init__()
        from speechbrain.inference.classifiers import EncoderClassifier  # slow to import

        self.encoder = EncoderClassifier.from_hparams(source=source, run_opts={"device": device})

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Waveforms (B, T) to embeddings (B, D)."""
        return self.encoder.encode_batch(wavs, wav_lens).squeeze(1)

    def embed_long(self, wav: Tensor) -> Tensor:
        """One recording (1, T) to its embedding (1, D), window by window if it has a ReDimNet."""
        network = self.encoder.mods.embedding_model
        if not hasattr(network, "model_config"):
            return self(wav)
        return embed_long(network, wav)[:, : network.target_dim]

    def for_inference(self, precision: str = "float32") -> "EncoderClassifierTeacher":
        """The same with its ReDimNet as ``optimize_for_inference`` arranges it; itself without one."""
        network = self.encoder.mods.embedding_model
        fast = for_inference(network, precision)
        if fast is network:
            return self
        arranged, encoder = copy.copy(self), copy.copy(self.encoder)
        arranged._modules = {"encoder": encoder}
        mods = nn.ModuleDict({**self.encoder.mods, "embedding_model": fast})
        encoder._modules = {**self.encoder._modules, "mods": mods}
        return arranged


def load_teacher(
    teacher: str | os.PathLike[str] | nn.Module,
    train_type: str = "ft_lm",
    dataset: str = "vox2",
    device: str = "cpu",
) -> nn.Module:
    """A teacher in eval mode without gradients, called as ``teacher(wavs, wav_lens)`` -> (B, D).

    Arguments
    ---------
    teacher : str, path or torch.nn.Module
        "b0" … "b6", "S" or "M" for a released ReDimNet, "redimnet2_b0" … "redimnet2_b6" for a
        ReDimNet2, or a release's whole name, "b2-vox2-ptn"; a checkpoint file of either; the folder
        or Hub id of any SpeechBrain ``EncoderClassifier``; or a module.
    train_type, dataset : str
        Which release, for a model's name; see ``load_released``.
    device : str
        Where it runs.
    """
    released = released_names()
    if isinstance(teacher, nn.Module):
        module = teacher
    elif teacher in released or (names_release(teacher) and not os.path.exists(teacher)):
        name, dataset, train_type = parse_release(str(teacher), train_type, dataset)
        module = load_released(name, train_type, dataset)
    elif os.path.isfile(teacher):
        module = load_checkpoint(teacher)
    elif os.path.isdir(teacher) or HUB_ID.fullmatch(str(teacher)):
        module = EncoderClassifierTeacher(str(teacher), device)
    else:
        raise FileNotFoundError(
            f"{str(teacher)!r} is neither a file or folder, nor a released name {released}, "
            "nor a Hub id such as speechbrain/spkrec-ecapa-voxceleb"
        )
    return module.to(device).eval().requires_grad_(False)


def sizes_and_thresholds(encoder: nn.Module, embed_dim: int) -> tuple[list[int], dict[int, float]]:
    """The sizes at which an encoder's embedding is one, and the cosines to decide by.

    ``encoder`` is from ``load_teacher`` and gives ``embed_dim`` dimensions.

    Returns
    -------
    sizes : list of int
        Its ``mrl_dims`` up to ``embed_dim``; ``[embed_dim]`` of a model that names none.
    thresholds : dict of int to float
        Size -> threshold at the equal error rate, of a published model that has a report.
    """
    sizes = [
        size for size in getattr(_named(encoder), "mrl_dims", [embed_dim]) if size <= embed_dim
    ]
    return sizes, {size: found["eer"] for size, found in thresholds_of(encoder).items()}


def chosen_size(encoder: nn.Module, embed_dim: int, target_dim: int | None = None) -> int:
    """``target_dim``, if it is one of the encoder's sizes; None: the largest."""
    sizes, _ = sizes_and_thresholds(encoder, embed_dim)
    if target_dim is not None and target_dim not in sizes:
        raise ValueError(f"target_dim must be one of {sizes}, the model's sizes, got {target_dim}")
    return target_dim or sizes[-1]


def thresholds_of(encoder: nn.Module) -> dict[int, dict[str, float]]:
    """Of a published model that has a report: size -> {"eer": cosine, "far_0.01": cosine, …}.

    The cosines are those at the equal error rate, and at false-accept rates.
    """
    found = getattr(_named(encoder), "thresholds", {})
    return {int(size): dict(cosines) for size, cosines in found.items()}


def _named(encoder: nn.Module) -> Any:
    """What has the attributes ``mrl_dims`` and ``thresholds``, if there are any."""
    return encoder.encoder.hparams if isinstance(encoder, EncoderClassifierTeacher) else encoder


def choose_teachers(
    teachers: Mapping[str, Any] | Sequence[Any], taught_by: Sequence[int] | None = None
) -> dict[str, Any]:
    """Teachers by name; a list names each after its release or file.

    Arguments
    ---------
    teachers : mapping or sequence
        What ``load_teacher`` takes; modules only in a mapping.
    taught_by : sequence of int, optional
        Positions of those to choose, the first is 0, the last -1. None: all.

    Raises
    ------
    ValueError
        If there is none, two have one name, or a position is past the last.

    Example
    -------
    >>> choose_teachers(["b0", "/models/mine.pt"], taught_by=[-1])
    {'mine': '/models/mine.pt'}
    """
    if not isinstance(teachers, Mapping):
        named = {Path(str(teacher)).stem: teacher for teacher in teachers}
        if len(named) < len(teachers):
            raise ValueError(f"teachers {list(teachers)} share a name; give a mapping of names")
        teachers = named
    if not teachers:
        raise ValueError("teachers is empty; name at least one, as in teachers: [b2]")
    if taught_by is None:
        return dict(teachers)
    if not all(-len(teachers) <= position < len(teachers) for position in taught_by):
        raise ValueError(
            f"taught_by {taught_by} must be positions in the {len(teachers)} teachers "
            f"{list(teachers)}, the first is 0"
        )
    chosen = [list(teachers)[position] for position in taught_by]
    return {name: teachers[name] for name in chosen}


def load_teachers(
    teachers: Mapping[str, Any] | Sequence[Any],
    train_type: str = "ft_lm",
    dataset: str = "vox2",
    device: str = "cpu",
) -> dict[str, nn.Module]:
    """Teachers by name, as ``choose_teachers`` names them, each as from ``load_teacher``."""
    return {
        name: load_teacher(teacher, train_type, dataset, device)
        for name, teacher in choose_teachers(teachers).items()
    }
