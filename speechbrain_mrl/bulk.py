"""Embeds a folder of any number of recordings: streamed to disk, resumed where it was killed."""

import os
from collections.abc import Iterator
from pathlib import Path

from speechbrain.utils.distributed import if_main_process
from torch import Tensor

from speechbrain_mrl.embedding import Encoder, find_clips, read_clips, write_clips
from speechbrain_mrl.teachers import SHARD_SIZE, TeacherStore

NAME = "embeddings"  # of the subfolder


def embed_folder(
    encoder: Encoder,
    source: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    device: str = "cpu",
    batch_seconds: float = 60.0,
    max_seconds: float = 30.0,
    num_workers: int = 0,
) -> Path:
    """Embeddings of all recordings of a folder, in shards on disk that ``read_embeddings`` reads.

    Clips of like length travel together; no more than one shard is in memory. A killed call goes on
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

    Returns
    -------
    Path
        ``output_folder``.

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
    """Ids and embeddings (n, D) of a folder that ``embed_folder`` wrote, shard after shard."""
    ids = [clip.id for clip in read_clips(Path(folder) / "clips.csv")]
    store = TeacherStore(folder)
    for number, first in enumerate(range(0, len(ids), SHARD_SIZE)):
        yield ids[first : first + SHARD_SIZE], store.shard(NAME, number)
