"""Reads lists, CSV or an entry a line; what is wrong with one is a sentence with file and line."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines of a text file, without a byte order mark and without empty lines at the end.

    Example
    -------
    >>> path = getfixture("tmp_path") / "cohort.txt"
    >>> _ = path.write_bytes("\\ufeffa/1.wav\\r\\nb/1.wav\\r\\n\\r\\n".encode())
    >>> read_lines(path)
    ['a/1.wav', 'b/1.wav']
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: is not UTF-8; save the list as UTF-8") from None


def read_clip_list(path: str | os.PathLike[str]) -> list[str]:
    """Clip ids out of a list with one a line, such as a cohort.

    A line of anything but one id, an utterance that comes twice and an empty list are a ValueError.

    Example
    -------
    >>> path = getfixture("tmp_path") / "cohort.txt"
    >>> _ = path.write_text("a/1.wav\\nb/1.wav\\n")
    >>> read_clip_list(path)
    ['a/1.wav', 'b/1.wav']
    """
    clip_ids: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if len(fields) != 1:
            raise ValueError(f"{path}, line {number}: expected one utterance id, got {line!r}")
        first = clip_ids.setdefault(fields[0], number)
        if first < number:
            raise ValueError(
                f"{path}, line {number}: utterance {fields[0]!r} is on line {first} too"
            )
    return list(clip_ids)


def read_rows(
    path: str | os.PathLike[str], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One by one, (line, row) of a CSV with a header; ``columns`` must be there and filled.

    A byte order mark and spaces after commas are no part of a name or a value.

    Raises
    ------
    ValueError
        If a column is missing or comes twice, a cell is missing, empty or surplus, or the text is
        not UTF-8.

    Example
    -------
    >>> path = getfixture("tmp_path") / "clips.csv"
    >>> _ = path.write_text("ID, wav\\na/0/1.wav, /x/1.wav\\n")
    >>> list(read_rows(path, ["ID", "wav"]))
    [(2, {'ID': 'a/0/1.wav', 'wav': '/x/1.wav'})]
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        try:
            names = check_columns(path, next(reader, []), columns)
            for cells in reader:
                if cells:
                    number = reader.line_num
                    yield number, check_row(f"{path}, line {number}", names, cells, columns)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def check_columns(
    path: str | os.PathLike[str], names: list[str], wanted: Sequence[str]
) -> list[str]:
    """A CSV's header, if it has these columns and none twice."""
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(
            f"{path}, line 1: must have a column {missing[0]}, its columns are {names}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, line 1: a column comes twice in {names}")
    return names


def check_row(
    where: str, names: list[str], cells: list[str], filled: Sequence[str]
) -> dict[str, str]:
    """A row by its columns, if it has a cell for each and none of ``filled`` is empty."""
    if len(cells) != len(names):
        raise ValueError(f"{where}: has {len(cells)} cells for the {len(names)} columns {names}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: is not UTF-8; save the list as UTF-8") from None
    row = dict(zip(names, cells))
    if empty := [name for name in filled if not row[name]]:
        raise ValueError(f"{where}: {empty[0]} is empty")
    try:
        float(row.get("duration", 0.0))
    except ValueError:
        raise ValueError(f"{where}: duration must be seconds, got {row['duration']!r}") from None
    return row
