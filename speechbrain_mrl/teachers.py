"""Frozen teachers, and a store of their embeddings so that training runs no teacher."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speechbrain.utils.distributed import ddp_barrier
from torch import Tensor, nn
from tqdm import tqdm

from speechbrain_mrl.embedding import Clip, Encoder, embed_clips
from speechbrain_mrl.fast import arrange, for_inference
from speechbrain_mrl.files import only_run, replacing
from speechbrain_mrl.pretrained import RELEASES, load_pretrained_redimnet

SHARD_SIZE = 1024  # clips; what a killed run computes again at most
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class EncoderClassifierTeacher(nn.Module):
    """A published SpeechBrain speaker encoder as a teacher.

    Arguments
    ---------
    source : str
        What ``EncoderClassifier.from_hparams`` takes: a folder or a Hub id.
    device : str
        Where it runs.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        super().__init__()
        from speechbrain.inference.classifiers import EncoderClassifier  # slow to import

        self.encoder = EncoderClassifier.from_hparams(source=source, run_opts={"device": device})

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Waveforms (B, T) to embeddings (B, D)."""
        return self.encoder.encode_batch(wavs, wav_lens).squeeze(1)

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
        "b0" … "b6", "S" or "M" for a released ReDimNet; a ReDimNet checkpoint file; the folder or
        Hub id of any SpeechBrain ``EncoderClassifier``; or a module.
    train_type, dataset : str
        Which release, for a released name.
    device : str
        Where it runs.
    """
    released = {name for release in RELEASES.values() for name in release["model_names"]}
    if isinstance(teacher, nn.Module):
        module = teacher
    elif teacher in released:
        module = load_pretrained_redimnet(teacher, train_type, dataset)
    elif os.path.isfile(teacher):
        module = load_pretrained_redimnet(source=teacher)
    elif os.path.isdir(teacher) or HUB_ID.fullmatch(str(teacher)):
        module = EncoderClassifierTeacher(str(teacher), device)
    else:
        raise FileNotFoundError(
            f"{str(teacher)!r} is neither a file or folder, nor a released name {sorted(released)}, "
            "nor a Hub id such as speechbrain/spkrec-ecapa-voxceleb"
        )
    return module.to(device).eval().requires_grad_(False)


def sizes_and_thresholds(encoder: nn.Module, embed_dim: int) -> tuple[list[int], dict[int, float]]:
    """The sizes at which an encoder's embedding is one, and the cosines to decide by.

    Arguments
    ---------
    encoder : torch.nn.Module
        As from ``load_teacher``.
    embed_dim : int
        Coordinates that it gives.

    Returns
    -------
    sizes : list of int
        Its ``mrl_dims`` up to ``embed_dim``; ``[embed_dim]`` of a model that names none.
    thresholds : dict of int to float
        Size -> threshold at the equal error rate, of a published model that has a report.
    """
    named = encoder.encoder.hparams if isinstance(encoder, EncoderClassifierTeacher) else encoder
    sizes = [size for size in getattr(named, "mrl_dims", [embed_dim]) if size <= embed_dim]
    thresholds = getattr(named, "thresholds", {})
    return sizes, {int(size): found["eer"] for size, found in thresholds.items()}


def load_teachers(
    teachers: Mapping[str, Any] | Sequence[Any],
    train_type: str = "ft_lm",
    dataset: str = "vox2",
    device: str = "cpu",
) -> dict[str, nn.Module]:
    """Teachers by name; a list names each after its release or file.

    Raises
    ------
    ValueError
        If there is none, or two have one name.
    """
    if not isinstance(teachers, Mapping):
        named = {Path(str(teacher)).stem: teacher for teacher in teachers}
        if len(named) < len(teachers):
            raise ValueError(f"teachers {list(teachers)} share a name; give a mapping of names")
        teachers = named
    if not teachers:
        raise ValueError("teachers is empty; name at least one, as in teachers: [b2]")
    return {
        name: load_teacher(teacher, train_type, dataset, device)
        for name, teacher in teachers.items()
    }


class TeacherStore:
    """Embeddings of a set of clips by several teachers, on disk, each computed once.

    A teacher has a folder of shards (safetensors) and a manifest that says of which weights and
    which clips they are. Shards are written whole or not at all, so a killed run goes on where it
    was; with several processes (``torchrun``) each fills its part. Another run that wants the same
    store waits, and finds it filled.

    Arguments
    ---------
    folder : path
        Where the store is or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.rows: dict[str, int] = {}
        self.embeddings: dict[str, Tensor] = {}

    def fill(
        self,
        teachers: Mapping[str, nn.Module],
        clips: Sequence[Clip],
        device: str = "cpu",
        batch_seconds: float = 60.0,
        max_seconds: float = 30.0,
        num_workers: int = 0,
    ) -> None:
        """Compute what is missing, then hold all embeddings in memory (4 bytes a coordinate).

        Arguments and errors are those of ``compute``.
        """
        clips = self.compute(teachers, clips, device, batch_seconds, max_seconds, num_workers)
        self.rows = {clip.id: row for row, clip in enumerate(clips)}
        n_shards = -(-len(clips) // SHARD_SIZE)
        self.embeddings = {
            name: torch.cat([self.shard(name, number) for number in range(n_shards)])
            for name in teachers
        }

    def compute(
        self,
        teachers: Mapping[str, Encoder],
        clips: Sequence[Clip],
        device: str = "cpu",
        batch_seconds: float = 60.0,
        max_seconds: float = 30.0,
        num_workers: int = 0,
    ) -> list[Clip]:
        """Write the shards that are missing, and hold no more than one in memory.

        Arguments
        ---------
        teachers : dict of str to torch.nn.Module or callable
            As from ``load_teachers``, or as ``fingerprint`` takes them.
        clips : sequence of Clip
            With distinct ids.
        device, batch_seconds, max_seconds, num_workers
            As for ``embed_clips``.

        Returns
        -------
        list of Clip
            The clips in the order of the rows in the shards.

        Raises
        ------
        ValueError
            If the folder holds embeddings of other weights, clips or ``max_seconds``.
        """
        # Neighbours in length share a shard, so that its batches are little padded.
        clips = sorted(clips, key=lambda clip: (-clip.num_frames, clip.id))
        shards = [clips[i : i + SHARD_SIZE] for i in range(0, len(clips), SHARD_SIZE)]
        data = _fingerprint_clips(clips)
        with only_run(self.folder, patience=-1):
            for name, teacher in teachers.items():
                manifest = {
                    "teacher": fingerprint(teacher),
                    "clips": data,
                    "max_seconds": max_seconds,
                    "shard_size": SHARD_SIZE,
                }
                self._claim(name, manifest)
            ddp_barrier()

            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            todo = []
            for i, shard in list(enumerate(shards))[rank::world_size]:
                missing = {n: t for n, t in teachers.items() if not self._path(n, i).exists()}
                if missing:
                    todo.append((i, shard, missing))
            total = sum(len(shard) for _, shard, _ in todo)
            with tqdm(total=total, unit="clip", desc="Embedding", disable=not todo) as bar:
                for i, shard, missing in todo:
                    found = embed_clips(
                        missing, shard, device, batch_seconds, max_seconds, num_workers, bar
                    )
                    for name, embeddings in found.items():
                        with replacing(self._path(name, i)) as part:
                            save_file({"embeddings": embeddings}, part)
            ddp_barrier()

        return clips

    def shard(self, name: str, number: int) -> Tensor:
        """One teacher's embeddings of the clips of one shard, (at most SHARD_SIZE, D)."""
        return load_file(self._path(name, number))["embeddings"]

    def lookup(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of the clips of these ids, {teacher: (B, D)}."""
        rows = torch.tensor([self.rows[clip_id] for clip_id in ids])
        return {name: embeddings[rows] for name, embeddings in self.embeddings.items()}

    def targets(self, batch: Any) -> dict[str, Tensor]:
        """Embeddings of a SpeechBrain batch's clips, by its ``id``."""
        return self.lookup(batch.id)

    def _path(self, name: str, shard: int) -> Path:
        return self.folder / name / f"{shard:05d}.safetensors"

    def _claim(self, name: str, manifest: dict[str, Any]) -> None:
        """Write a teacher's manifest, or compare with the one that is there."""
        path = self.folder / name / "manifest.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(json.dumps(manifest, indent=1))
        found = json.loads(path.read_text())
        changed = [key for key in manifest if found.get(key) != manifest[key]]
        if changed:
            raise ValueError(
                f"{path.parent} was filled with other {' and '.join(changed)}; delete that folder "
                "or name another one"
            )


class LiveTeachers:
    """Teachers that hear every batch, for data whose clips have no lasting identity.

    Arguments
    ---------
    teachers : dict of str to torch.nn.Module
        As from ``load_teachers``, on ``device``.
    loader : iterable
        Of batches with ``sig`` (waveforms and relative lengths); the first ``fit_batches`` of it
        give ``embeddings``, on which rotations are fitted.
    device : str
        Where the teachers are.
    fit_batches : int
        How many.
    """

    def __init__(
        self,
        teachers: Mapping[str, nn.Module],
        loader: Iterable[Any],
        device: str = "cpu",
        fit_batches: int = 200,
    ) -> None:
        self.teachers = arrange(teachers, device)
        found = [self.targets(batch.to(device)) for batch in islice(loader, fit_batches)]
        self.embeddings = {name: torch.cat([one[name].cpu() for one in found]) for name in teachers}

    @torch.no_grad()
    def targets(self, batch: Any) -> dict[str, Tensor]:
        """Embeddings of a SpeechBrain batch's signals, ``sig``."""
        return {name: teacher(*batch.sig) for name, teacher in self.teachers.items()}


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over a module's class and all its tensors: changes when a single weight does.

    A callable that is no module must have an attribute ``fingerprint``, a string that does the same.
    """
    if not isinstance(encoder, nn.Module):
        given = getattr(encoder, "fingerprint", None)
        if not isinstance(given, str):
            raise ValueError(
                f"{encoder} is neither a torch.nn.Module nor has it an attribute fingerprint; set it "
                "to a string that names its weights, so that embeddings of others are not mixed in"
            )
        return given
    digest = hashlib.sha256(type(encoder).__qualname__.encode())
    # not encoder.state_dict(): a copy made for inference refuses that, lest it be saved
    for key, value in sorted(nn.Module.state_dict(encoder).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        value = value.detach().cpu().contiguous()
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fingerprint_clips(clips: Sequence[Clip]) -> str:
    """SHA-256 over the clips' ids, segments and file sizes."""
    digest = hashlib.sha256()
    for clip in clips:
        size = os.path.getsize(clip.wav)
        digest.update(f"{clip.id} {clip.start} {clip.stop} {size}\n".encode())
    return digest.hexdigest()
