"""Training and validation data: a memory-mapped CSV, random chunks, and the seed of each draw."""

import csv
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.data_pipeline import DataPipeline, DynamicItem
from torch import Tensor

from speechbrain_mrl.dataio.audio import read_audio, read_sound
from speechbrain_mrl.dataio.clips import SAMPLE_RATE
from speechbrain_mrl.dataio.lists import check_columns, check_row, read_rows


class ClipDataset(DynamicItemDataset):
    """As ``DynamicItemDataset.from_csv``, but a row is parsed when it is asked for.

    Memory holds only where each line begins, and ``data_ids``, which are the numbers of the rows.
    Both are arrays that worker processes share. Items have their ``id`` from the column ID.

    Arguments
    ---------
    path : path
        CSV with a column ID and any others; no field holds a line break.
    dynamic_items, output_keys : sequence
        As for ``DynamicItemDataset``.

    Raises
    ------
    ValueError
        If there is no column ID or no row.

    Example
    -------
    >>> path = getfixture("tmp_path") / "clips.csv"
    >>> _ = path.write_text("ID,duration,wav\\na/0/1.wav,1.5,/x/1.wav\\nb/0/1.wav,2.0,/x/2.wav\\n")
    >>> ClipDataset(path, [], ["id", "duration"])[1]
    {'id': 'b/0/1.wav', 'duration': 2.0}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dynamic_items: Sequence[Any] = (),
        output_keys: Sequence[Any] = (),
    ) -> None:
        self.data = _Rows(path)
        self.data_ids = np.arange(len(self.data))
        columns = ["id", *(column for column in self.data.columns if column != "ID")]
        self.pipeline = DataPipeline(columns, list(dynamic_items))
        self.set_output_keys(list(output_keys))


class _Rows:
    """Rows of a CSV by their number."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            names = _cells(file.readline(), f"{path}, line 1")
        self.columns = check_columns(path, names, ["ID"])
        self.text = np.memmap(path, dtype=np.uint8, mode="r")
        ends = np.concatenate(
            [
                first + np.flatnonzero(self.text[first : first + 2**24] == ord("\n")) + 1
                for first in range(0, len(self.text), 2**24)
            ]
        )
        if not len(ends) or ends[-1] < len(self.text):  # the last line does not end in a line break
            ends = np.append(ends, len(self.text))
        self.begins = ends  # and the end of the last line
        if len(self) == 0:
            raise ValueError(f"{path} has no row below its header")

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        line = self.text[self.begins[number] : self.begins[number + 1]].tobytes()
        text = line.decode(errors="surrogateescape")
        where = f"{self.path}, line {number + 2}"
        row: dict[str, Any] = dict(check_row(where, self.columns, _cells(text, where), ["ID"]))
        row = {"id": row.pop("ID"), **row}
        if "duration" in row:
            row["duration"] = float(row["duration"])
        return row

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _Rows, (self.path,)


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line], skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from None


def global_seed() -> int:
    """SpeechBrain's seed (``seed_everything``; its default without)."""
    return int(os.environ.get("SB_GLOBAL_SEED", 563375142))


def draw_seed(*numbers: int, seed: int | None = None) -> int:
    """32 bits of a seed, SpeechBrain's if none is given, and the numbers."""
    seed = global_seed() if seed is None else seed
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0])


def seed_draws(*numbers: int) -> None:
    """Seed Python, numpy and torch by SpeechBrain's seed, this process' rank and some numbers.

    Example
    -------
    >>> seed_draws(3, 250)  # an epoch and a step in it
    >>> first = torch.rand(2)
    >>> seed_draws(3, 250)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    seed = draw_seed(int(os.environ.get("RANK", 0)), *numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededClips(ClipDataset):
    """A dataset whose items draw by seed, epoch and position, in whichever process.

    ``epoch`` is a tensor that reading processes see change. The seed is SpeechBrain's where the
    dataset is made: reading processes need not have that environment.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.seed = global_seed()

    def __getitem__(self, index: Any) -> Any:
        return self.draw(index, self.data[self.data_ids[index]])

    def draw(self, index: int, row: dict[str, Any]) -> Any:
        """The item of a row, drawn as that position's."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.epoch.item(), index, seed=self.seed))
            return self.pipeline.compute_outputs(row)


AUDIO_KEYS = ["wav", "start", "stop"]  # of a row, for what reads its utterance


def train_dataset(
    csv_path: str | os.PathLike[str],
    chunk_seconds: float,
    chunks_per_clip: int = 1,
    label_encoder: CategoricalEncoder | None = None,
) -> SeededClips:
    """Random chunks of the utterances of a CSV, with their speaker's index if there is an encoder.

    Which chunk follows from the seed, the epoch and the position in ``data_ids``.

    Arguments
    ---------
    csv_path : path
        Columns ID, wav, start and stop (samples at 16 kHz), and spk_id for labels.
    chunk_seconds : float
        Length of a chunk; a shorter utterance is repeated to that length.
    chunks_per_clip : int
        How many random chunks of each utterance make an epoch.
    label_encoder : CategoricalEncoder, optional
        Of the speakers. None: no label is read.
    """
    length = round(chunk_seconds * SAMPLE_RATE)
    items, keys = [DynamicItem(AUDIO_KEYS, partial(_chunk, length), ["sig"])], ["id", "sig"]
    if label_encoder is not None:
        items.append(DynamicItem(["spk_id"], label_encoder.encode_label, ["label"]))
        keys.append("label")
    dataset = SeededClips(csv_path, items, keys)
    needed = AUDIO_KEYS if label_encoder is None else [*AUDIO_KEYS, "spk_id"]
    check_columns(csv_path, dataset.data.columns, needed)
    dataset.data_ids = np.tile(dataset.data_ids, chunks_per_clip)
    return dataset


def valid_dataset(csv_path: str | os.PathLike[str], max_seconds: float) -> DynamicItemDataset:
    """Whole utterances of a CSV, longest first; of each at most its first ``max_seconds``."""
    beginning = partial(_beginning, round(max_seconds * SAMPLE_RATE))
    items = [DynamicItem(AUDIO_KEYS, beginning, ["sig"])]
    columns = ["ID", "duration", *AUDIO_KEYS]
    rows = {
        row["ID"]: {**row, "duration": float(row["duration"])}
        for _, row in read_rows(csv_path, columns)
    }
    dataset = DynamicItemDataset(rows, items, ["id", "sig"])
    return dataset.filtered_sorted(sort_key="duration", reverse=True)


# Functions of the module, so that workers can be sent them where they are not forks (macOS).
def _chunk(length: int, wav: str, start: Any, stop: Any) -> Tensor:
    """Somewhere in an utterance, ``length`` samples."""
    first, stop = int(start), int(stop)
    start, spare = first, stop - first - length
    if spare > 0:
        start += torch.randint(spare + 1, (1,)).item()
    signal = read_audio(wav, start, min(length, stop - start))
    if not signal.any():
        signal = read_sound(wav, first, stop, length)
    return signal.repeat(-(-length // len(signal)))[:length]


def _beginning(length: int, wav: str, start: Any, stop: Any) -> Tensor:
    """At most ``length`` samples of an utterance, as ``read_sound`` finds them."""
    return read_sound(wav, int(start), int(stop), length)
