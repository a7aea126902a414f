"""A store of embeddings on disk, computed once: of teachers for training, or of a folder in bulk."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor, nn
from tqdm import tqdm

from speechbrain_mrl.dataio.clips import Clip, find_clips, read_clips, write_clips
from speechbrain_mrl.inference.extract import Encoder, embed_clips
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.utils import only_run, read_json, replacing

SHARD_SIZE = 1024  # utterances; what a killed run computes again at most


class TeacherStore:
    """Embeddings of a set of utterances by several teachers, on disk, each computed once.

    A teacher has a folder of shards (safetensors) and a manifest that says of which weights and
    which utterances they are. Shards are written whole or not at all, so a killed run resumes where
    it was; with several processes (``torchrun``) each fills its part. Another run that wants the
    same store waits, and finds it filled.

    Arguments
    ---------
    folder : path
        Where the store is or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.rows: dict[str, int] = {}
        self.parts: dict[str, Sequence[Tensor]] = {}  # teacher -> shards, mapped from disk

    def fill(
        self,
        teachers: Mapping[str, nn.Module],
        clips: Sequence[Clip],
        device: str = "cpu",
        batch_seconds: float = 60.0,
        max_seconds: float | None = 30.0,
        num_workers: int = 0,
    ) -> None:
        """Compute what is missing, then map all embeddings from disk, once for all processes.

        Arguments and errors are those of ``compute``.
        """
        clips = self.compute(teachers, clips, device, batch_seconds, max_seconds, num_workers)
        ids = [clip.id for clip in clips]
        self.rows = {clip_id: row for row, clip_id in enumerate(ids)}
        self.parts = {name: [found for _, found in self.shards(name, ids)] for name in teachers}

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """All embeddings in the order of ``rows``, {teacher: (N, D)}, as a copy in memory."""
        return {name: torch.cat(list(parts)) for name, parts in self.parts.items()}

    def sample(self, n_clips: int) -> tuple[list[str], dict[str, Tensor]]:
        """Ids and embeddings of at most ``n_clips`` utterances, evenly over the rows."""
        ids = list(self.rows)[:: -(-len(self.rows) // n_clips)]
        return ids, self.lookup(ids)

    def compute(
        self,
        teachers: Mapping[str, Encoder],
        clips: Sequence[Clip],
        device: str = "cpu",
        batch_seconds: float = 60.0,
        max_seconds: float | None = 30.0,
        num_workers: int = 0,
    ) -> list[Clip]:
        """Write the shards that are missing, and hold no more than one in memory.

        Returns the utterances in the order of the rows in the shards.

        Arguments
        ---------
        teachers : dict of str to torch.nn.Module or callable
            As from ``load_teachers``, or as ``fingerprint`` takes them.
        clips : sequence of Clip
            With distinct ids.
        device, batch_seconds, max_seconds, num_workers
            As for ``embed_clips``.

        Raises
        ------
        ValueError
            If two utterances have one id, or the folder holds embeddings of other teachers,
            utterances or ``max_seconds``.
        """
        for first, second in pairwise(sorted(clip.id for clip in clips)):
            if first == second:
                raise ValueError(f"two utterances have the id {first!r}; give each its own")
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
                claim(self.folder / name / "manifest.json", manifest)
            ddp_barrier()

            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            todo = []
            for i, shard in list(enumerate(shards))[rank::world_size]:
                missing = {n: t for n, t in teachers.items() if not self._path(n, i).exists()}
                if missing:
                    todo.append((i, shard, missing))
            total = sum(len(shard) for _, shard, _ in todo)
            with tqdm(total=total, unit=" utterances", desc="Embedding", disable=not todo) as bar:
                for i, shard, missing in todo:
                    found = embed_clips(
                        missing, shard, device, batch_seconds, max_seconds, num_workers, bar
                    )
                    for name, embeddings in found.items():
                        made_of = {"ids": _fingerprint_ids([clip.id for clip in shard])}
                        with replacing(self._path(name, i)) as part:
                            save_file({"embeddings": embeddings}, part, made_of)
            ddp_barrier()

        return clips

    def shards(self, name: str, ids: list[str]) -> Iterator[tuple[list[str], Tensor]]:
        """The embeddings by the teacher ``name`` shard by shard, with the utterances' ids, n and (n, D).

        ``ids`` are of all utterances, in the order of ``compute``. A shard that is damaged or of other
        utterances is a ValueError that names it.
        """
        for number, first in enumerate(range(0, len(ids), SHARD_SIZE)):
            some = ids[first : first + SHARD_SIZE]
            yield some, self._read(self._path(name, number), some)

    def _read(self, path: Path, ids: Sequence[str]) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                made_of, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
        except SafetensorError as error:
            reason = str(error)
        else:
            if made_of.get("ids") != _fingerprint_ids(ids):
                reason = "it is of other utterances"
            elif embeddings.ndim != 2 or len(embeddings) != len(ids):
                reason = f"it holds {tuple(embeddings.shape)} for {len(ids)} utterances"
            elif not embeddings.isfinite().all():
                reason = "it holds NaN or infinity"
            else:
                return embeddings
        raise ValueError(f"{path} cannot be used ({reason}); delete it, and compute it again")

    def lookup(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of the utterances of these ids, {teacher: (B, D)}."""
        places = [divmod(self.rows[clip_id], SHARD_SIZE) for clip_id in ids]
        return {
            name: torch.stack([parts[shard][row] for shard, row in places])
            for name, parts in self.parts.items()
        }

    def targets(self, batch: Any) -> dict[str, Tensor]:
        """Embeddings of a SpeechBrain batch's utterances, by its ``id``."""
        return self.lookup(batch.id)

    def _path(self, name: str, shard: int) -> Path:
        return self.folder / name / f"{shard:05d}.safetensors"


def claim(path: Path, manifest: dict[str, Any]) -> None:
    """Write what a folder is filled with, or raise ValueError if it was filled with something else."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(manifest, indent=1))
    found = read_json(path)
    same = isinstance(found, dict)
    changed = [key for key in manifest if not same or found.get(key) != manifest[key]]
    if changed:
        raise ValueError(
            f"{path.parent} was filled with other {' and '.join(changed)}; delete that folder or "
            "name another one"
        )


def _fingerprint_clips(clips: Sequence[Clip]) -> str:
    """SHA-256 over the utterances' ids, segments and file sizes."""
    digest = hashlib.sha256()
    for clip in clips:
        size = os.path.getsize(clip.wav)
        digest.update(f"{clip.id} {clip.start} {clip.stop} {size}\n".encode())
    return digest.hexdigest()


def _fingerprint_ids(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


NAME = "embeddings"  # of the subfolder


def embed_folder(
    encoder: Encoder,
    source: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    device: str = "cpu",
    batch_seconds: float = 60.0,
    max_seconds: float | None = 30.0,
    num_workers: int = 0,
) -> Path:
    """Embeddings of all recordings of a folder, in shards on disk that ``read_embeddings`` reads.

    Utterances of similar length share a batch; at most one shard is in memory. A killed call resumes
    at the shard where it was, and with several processes (``torchrun``) each computes its part.

    Arguments
    ---------
    encoder : torch.nn.Module or callable
        Called as ``encoder(wavs (B, T), wav_lens (B,))``, to give (B, D); a callable that is no
        module needs a string ``fingerprint`` that names its weights.
    source : path
        Folder of recordings of any structure, or a CSV with columns ID, wav, start and stop
        (samples at 16 kHz).
    output_folder : path
        Holds afterwards ``clips.csv``, in the order of the rows, and the shards (safetensors).
    device, batch_seconds, max_seconds, num_workers
        As for ``embed_clips``.

    Raises
    ------
    ValueError
        If a recording cannot be read, or the folder holds embeddings of another encoder, other
        recordings or another ``max_seconds``.

    Example
    -------
    >>> import soundfile, torch
    >>> folder = getfixture("tmp_path")
    >>> for n in (3, 5):
    ...     soundfile.write(folder / f"{n}.wav", torch.full((1000 * n,), 0.5), 16000)
    >>> def mean(wavs, wav_lens): return wavs.mean(dim=1, keepdim=True) / wav_lens[:, None]
    >>> mean.fingerprint = "mean"
    >>> embedded = embed_folder(mean, folder, folder / "out")
    >>> [(ids, found.shape) for ids, found in read_embeddings(embedded)]
    [(['5.wav', '3.wav'], torch.Size([2, 1]))]
    """
    folder = Path(output_folder)
    clips = read_clips(source) if Path(source).is_file() else find_clips(source)
    clips = TeacherStore(folder).compute(
        {NAME: encoder}, clips, device, batch_seconds, max_seconds, num_workers
    )
    if if_main_process():
        write_clips(clips, folder / "clips.csv")
    return folder


def read_embeddings(folder: str | os.PathLike[str]) -> Iterator[tuple[list[str], Tensor]]:
    """Ids and embeddings (n, D) of a folder that ``embed_folder`` wrote, shard after shard.

    Raises
    ------
    ValueError
        If a shard is damaged or of other utterances, naming it.
    """
    ids = [clip.id for clip in read_clips(Path(folder) / "clips.csv")]
    yield from TeacherStore(folder).shards(NAME, ids)
