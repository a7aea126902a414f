"""A CSV of millions of clips as a SpeechBrain dataset, in sixteen bytes a row."""

import csv
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import DataPipeline


class ClipDataset(DynamicItemDataset):
    """As ``DynamicItemDataset.from_csv``, but a row is parsed when it is asked for.

    In memory are only where each line begins and ``data_ids``, here the numbers of the rows, as
    arrays that worker processes share; items have their ``id`` from the column ID as always.

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
        with open(path, "rb") as file:
            self.columns = next(csv.reader([file.readline().decode()]), [])
        if "ID" not in self.columns:
            raise ValueError(f"{path} must have a column ID, its columns are {self.columns}")
        self.text = np.memmap(path, dtype=np.uint8, mode="r")
        ends = np.concatenate(
            [
                first + np.flatnonzero(self.text[first : first + 2**24] == ord("\n")) + 1
                for first in range(0, len(self.text), 2**24)
            ]
        )
        if ends[-1] < len(self.text):  # the last line does not end in a line break
            ends = np.append(ends, len(self.text))
        self.begins = ends  # and the end of the last line
        if len(self) == 0:
            raise ValueError(f"{path} has no row below its header")

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        line = self.text[self.begins[number] : self.begins[number + 1]].tobytes().decode()
        row: dict[str, Any] = dict(
            zip(self.columns, next(csv.reader([line], skipinitialspace=True)))
        )
        row = {"id": row.pop("ID"), **row}
        if "duration" in row:
            row["duration"] = float(row["duration"])
        return row

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _Rows, (self.path,)
