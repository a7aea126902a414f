"""Finds a voice among many: shortlist by the prefix, rerank by the full embedding.

``enrol`` and ``score_speakers`` serve lists that need no index. All scores are cosines.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections import Counter
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_mrl.utils import require

# FAISS' names of how prefixes can be kept
CODES = {
    "float32": "Flat",
    "int8": "SQ8",
    "4bit": "PQ{size}x4fs",
    "binary": "LSH{bits}r",
    "ivf": "IVF{lists},PQ{size}x4fs",
}
STORAGE = {"int16": 32767, "float32": 1}  # unit length; int16 is three times as fast as float16
SETTINGS = ("dim", "prefix_dim", "codes", "storage")
FILES = ("full.npy", "ids.json", "codes.faiss", "index.json")  # of a saved index, after a token
MIN_CODED = 1000  # speakers; below, every speaker is reranked, and codes have nothing to learn from
MAX_TRAINING = 65536  # prefixes that codes are fitted to
MAX_LISTS, MIN_LIST = 1024, 64  # of "ivf": lists, and speakers that each is fitted to
CHUNK = 8192  # speakers or queries handled at once


def enrol(
    speakers: Sequence[str], embeddings: Tensor, target_dim: int | None = None
) -> tuple[list[str], Tensor]:
    """One voice per speaker: the mean of its clips, each at unit length, brought to unit length.

    ``speakers`` and ``embeddings``, N and (N, D), belong to the clips; ``target_dim`` is the prefix
    to keep, default D, which an index wants. Returns the C speakers in order of first appearance,
    and their voices, (C, target_dim).

    Example
    -------
    >>> enrol(["ann", "bob", "ann"], torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]))
    (['ann', 'bob'], tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]]))
    """
    ids, owners, clips = _clips(speakers, embeddings, target_dim)
    sums = clips.new_zeros(len(ids), clips.shape[1]).index_add_(0, owners, clips)
    return ids, F.normalize(sums, dim=1)


def score_speakers(
    embeddings: Tensor,
    speakers: Sequence[str],
    enrolled: Tensor,
    target_dim: int | None = None,
    clips: str = "average",
) -> tuple[list[str], Tensor]:
    """Cosine of every query with every enrolled speaker at one size, in one product.

    Arguments
    ---------
    embeddings : torch.Tensor
        Queries, (Q, D).
    speakers, enrolled
        Speaker and embedding of each enrolled clip, N and (N, D); or what ``enrol`` made of them.
    target_dim : int, optional
        Prefix that is compared, 1..D. Default: D.
    clips : str
        What several clips of a speaker give: ``"average"`` is the score of their mean embedding,
        ``"mean"`` the mean and ``"max"`` the best of the clips' own scores.

    Returns
    -------
    tuple of list of str and torch.Tensor
        The C speakers in order of first appearance, and the scores, (Q, C).

    Example
    -------
    >>> clips = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> score_speakers(torch.tensor([[3.0, 4.0]]), ["ann", "ann", "bob"], clips, clips="max")
    (['ann', 'bob'], tensor([[ 0.8000, -0.8000]]))
    """
    if clips not in ("average", "mean", "max"):
        raise ValueError(f"clips must be 'average', 'mean' or 'max', got {clips!r}")
    ids, owners, voices = _clips(speakers, enrolled, target_dim)
    queries = unit_prefixes(check_embeddings(embeddings, enrolled.shape[1]), target_dim)
    if clips == "average":
        voices = enrol(speakers, voices)[1]
    scores = torch.from_numpy(queries) @ voices.T
    if clips != "average":
        how, empty = {"max": "amax"}.get(clips, clips), scores.new_zeros(len(scores), len(ids))
        scores = empty.scatter_reduce(1, owners.expand_as(scores), scores, how, include_self=False)
    return ids, scores


class MatryoshkaIndex:
    """A searchable set of speakers: short codes of the prefix in memory, the rest on disk.

    A search ranks all speakers by the codes of their prefixes, then the shortlist by the full
    embeddings; with no more than 1000 speakers, or than the shortlist, it is exact. Codes are
    fitted to the speakers themselves, at the first search and again as the index grows.

    Arguments
    ---------
    dim : int
        Full size D.
    prefix_dim : int
        Coordinates that make the shortlist, 1..D.
    codes : str
        How prefixes are kept; bytes per speaker at 64: ``"float32"`` 256, ``"int8"`` 64, ``"4bit"``
        32, ``"binary"`` 32, the sides of four random hyperplanes per coordinate. ``"ivf"``, 40:
        4bit codes in 1024 lists of like voices, of which a query looks into the nearest 256; the
        fastest, and it may miss a speaker in the others.
    storage : str
        Type of the full embeddings, ``"int16"`` (cosines to 1e-4) or ``"float32"``. They are in
        memory until ``save``; ``load`` maps them from the disk.

    Example
    -------
    >>> index = MatryoshkaIndex(dim=3, prefix_dim=2)
    >>> index.add(["ann", "bob"], torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]]))
    >>> ids, scores = index.search(torch.tensor([[0.0, 1.0, 0.0]]), k=2)
    >>> ids, scores.round(3).tolist()
    ([['bob', 'ann']], [[0.6000000238418579, 0.0]])
    """

    def __init__(
        self, dim: int = 256, prefix_dim: int = 64, codes: str = "4bit", storage: str = "int16"
    ) -> None:
        check_range("prefix_dim", prefix_dim, 1, dim)
        if codes not in CODES or storage not in STORAGE:
            raise ValueError(f"codes {[*CODES]}, storage {[*STORAGE]}; got {codes!r}, {storage!r}")
        self._faiss = require("faiss", "search", "a search index")
        self.dim, self.prefix_dim, self.codes, self.storage = dim, prefix_dim, codes, storage
        self._full = _Rows(np.empty((0, dim), storage))
        self._names: list[str] = []  # by row of _full, the removed ones too
        self._row_of: dict[str, int] = {}
        self._rows = np.empty(0, np.int64)  # rows in use, ascending: one for each code
        self._coded: Any = None  # faiss.Index
        self._trained_on = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, ids: Sequence[str], embeddings: Tensor) -> None:
        """Add N speakers by their embeddings (N, D); an id that is there gets the new embedding."""
        ids = check_ids(ids)
        unit = unit_prefixes(check_embeddings(embeddings, self.dim, len(ids)))
        self._drop([self._row_of[name] for name in ids if name in self._row_of])
        rows = np.arange(len(self._full), len(self._full) + len(ids))
        self._full.append(np.rint(unit * 32767) if self.storage == "int16" else unit)
        self._rows = np.append(self._rows, rows)
        self._names += ids
        self._row_of.update(zip(ids, rows.tolist(), strict=True))
        if self._coded is not None:
            self._add_codes(self._coded, rows, unit)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove speakers; ValueError, and nothing is removed, if one of them is not there."""
        self._drop([self._row_of.pop(name) for name in check_ids(ids, known=self._row_of)])

    def search(
        self, embeddings: Tensor, k: int = 10, shortlist: int = 600
    ) -> tuple[list[list[str]], np.ndarray]:
        """The k speakers most like each query, best first.

        ``embeddings`` are the queries, (Q, D); ``shortlist`` is how many are compared by the full
        embedding, k if that is more. Returns Q lists of k ids (of all, if there are fewer), and
        the cosines of the full embeddings, float32, (Q, k).
        """
        check_range("k", k, 1)
        check_range("shortlist", shortlist, 1)
        queries = unit_prefixes(check_embeddings(embeddings, self.dim))
        n, k = len(self), min(k, len(self))
        shortlist = max(shortlist, k)
        use_codes = n > max(shortlist, MIN_CODED)
        if use_codes:
            self._update_codes()
        ids, scores = [], np.empty((len(queries), k), np.float32)
        n_threads = self._faiss.omp_get_max_threads()
        with ThreadPoolExecutor(n_threads) as pool:
            for start in range(0, len(queries), CHUNK):
                chunk = queries[start : start + CHUNK]
                if use_codes:
                    prefixes = unit_prefixes(chunk, self.prefix_dim)
                    nearest = self._rows_of(self._coded.search(prefixes, shortlist)[1])
                else:
                    nearest = np.broadcast_to(self._rows, (len(chunk), n))
                rerank = partial(self._rerank, chunk, nearest, k)
                blocks = np.array_split(np.arange(len(chunk)), min(n_threads, len(chunk)))
                best = itertools.chain(*(pool.map if len(blocks) > 1 else map)(rerank, blocks))
                for i, (rows, cosines) in enumerate(best, start):
                    ids.append([self._names[row] for row in rows])
                    scores[i] = cosines
        return ids, scores

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index; the folder holds the old or the new one at any time, never a mixture."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if len(self) > MIN_CODED:
            self._update_codes()
        full, ids, codes, new = (f"{uuid.uuid4().hex[:12]}.{kind}" for kind in FILES)
        mapped = np.lib.format.open_memmap(folder / full, "w+", self.storage, (len(self), self.dim))
        for start in range(0, len(self), CHUNK):
            rows = self._rows[start : start + CHUNK]
            mapped[start : start + len(rows)] = self._full.take(rows)
        mapped.flush()
        (folder / ids).write_text(json.dumps([self._names[row] for row in self._rows]))
        manifest = {key: getattr(self, key) for key in SETTINGS}
        manifest |= {"speakers": len(self), "trained_on": self._trained_on, "files": [full, ids]}
        if self._coded is not None:
            self._faiss.write_index(self._renumbered(), str(folder / codes))
            manifest["files"].append(codes)
        (folder / new).write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(folder / new, folder / "index.json")
        for path in folder.iterdir():
            if path.name[13:] in FILES and path.name not in manifest["files"]:
                with suppress(OSError):  # Windows keeps a file that is still mapped
                    path.unlink()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MatryoshkaIndex:
        """The index that ``save`` wrote; its full embeddings stay on the disk, memory-mapped."""
        folder = Path(folder)
        manifest = json.loads((folder / "index.json").read_text())
        index = cls(**{key: manifest[key] for key in SETTINGS})
        if elsewhere := [name for name in manifest["files"] if Path(name).name != name]:
            raise ValueError(f"{folder}/index.json names {elsewhere}, which are not in that folder")
        full, ids, *codes = (folder / name for name in manifest["files"])
        mapped = np.asarray(np.load(full, mmap_mode="r"))  # without memmap's cost per slice
        index._names = json.loads(ids.read_text())
        index._coded = index._faiss.read_index(str(codes[0])) if codes else None
        n, n_codes = manifest["speakers"], index._coded.ntotal if codes else manifest["speakers"]
        if mapped.shape != (n, index.dim) or len(index._names) != n or n_codes != n:
            found = f"{len(index._names)} ids, {n_codes} codes, embeddings {mapped.shape}"
            raise ValueError(f"{folder} must hold {n} speakers of size {index.dim}, has {found}")
        index._full, index._rows = _Rows(mapped), np.arange(n)
        index._row_of = dict(zip(index._names, range(n), strict=True))
        index._trained_on = manifest["trained_on"]
        return index

    def _drop(self, rows: list[int]) -> None:
        positions = np.searchsorted(self._rows, rows)
        self._rows = np.delete(self._rows, positions)
        if rows and self._coded is not None:
            numbers = rows if self.codes == "ivf" else positions
            self._coded.remove_ids(np.asarray(numbers, np.int64))

    def _rows_of(self, found: Any) -> Any:
        """Rows of the numbers that the codes give: lists keep row numbers, others positions."""
        return found if self.codes == "ivf" else self._rows[found]

    def _renumbered(self) -> Any:
        """The codes as of an index without gaps between its rows."""
        if self.codes != "ivf" or len(self._rows) == len(self._full):
            return self._coded
        codes = self._faiss.clone_index(self._coded)
        for number in range(codes.nlist):
            size = codes.invlists.list_size(number)
            ids = self._faiss.rev_swig_ptr(codes.invlists.get_ids(number), size)
            ids[:] = np.searchsorted(self._rows, ids)
        return codes

    def _rerank(
        self, queries: np.ndarray, nearest: Any, k: int, block: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and cosines of the k best of ``nearest``, for each query of a block."""
        found = []
        for query, rows in zip(queries[block], nearest[block]):
            rows = rows[rows >= 0]  # FAISS fills up with -1 where the lists hold fewer speakers
            if len(rows) < k:
                rows = self._rows
            full = self._full.take(rows).astype(np.float32, copy=False)
            scores = full @ query / STORAGE[self.storage]
            best = np.argpartition(-scores, k - 1)[:k] if k else np.arange(0)
            best = best[np.argsort(-scores[best], kind="stable")]
            found.append((rows[best], scores[best]))
        return found

    def _update_codes(self) -> None:
        """Build the codes if there are none, or if they were fitted to a fraction of the index."""
        n = len(self)
        outgrown = self._trained_on < MAX_TRAINING and n > 4 * self._trained_on
        if self._coded is not None and not (outgrown and self.codes in ("int8", "4bit", "ivf")):
            return
        self._trained_on = min(n, MAX_TRAINING)
        sample = self._rows[np.linspace(0, n - 1, self._trained_on).astype(np.int64)]
        metric = "METRIC_L2" if self.codes == "binary" else "METRIC_INNER_PRODUCT"
        lists = min(MAX_LISTS, self._trained_on // MIN_LIST)
        sizes = {"size": self.prefix_dim, "bits": 4 * self.prefix_dim, "lists": lists}
        recipe = CODES[self.codes].format(**sizes)
        coded = self._faiss.index_factory(self.prefix_dim, recipe, getattr(self._faiss, metric))
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # of many tiny steps, threads would only wait
        coded.train(unit_prefixes(self._full.take(sample), self.prefix_dim))
        self._faiss.omp_set_num_threads(threads)
        for start in range(0, n, CHUNK):
            rows = self._rows[start : start + CHUNK]
            self._add_codes(coded, rows, self._full.take(rows))
        self._coded = coded

    def _add_codes(self, coded: Any, rows: np.ndarray, embeddings: np.ndarray) -> None:
        prefixes = unit_prefixes(embeddings, self.prefix_dim)
        if self.codes == "ivf":
            coded.nprobe = round(2 * coded.nlist**0.7)  # for about the same recall
            coded.add_with_ids(prefixes, rows)
        else:
            coded.add(prefixes)


class _Rows:
    """Append-only rows: those of a saved index stay memory-mapped, new ones are in memory."""

    def __init__(self, mapped: np.ndarray) -> None:
        self.mapped, self.new, self.n_new = mapped, np.empty((0, mapped.shape[1]), mapped.dtype), 0

    def __len__(self) -> int:
        return len(self.mapped) + self.n_new

    def append(self, rows: np.ndarray) -> None:
        needed = self.n_new + len(rows)
        if needed > len(self.new):
            larger = np.empty((max(needed, 2 * self.n_new), rows.shape[1]), self.new.dtype)
            larger[: self.n_new] = self.new[: self.n_new]
            self.new = larger
        self.new[self.n_new : needed] = rows
        self.n_new = needed

    def take(self, rows: np.ndarray) -> np.ndarray:
        old = rows < len(self.mapped)
        if old.all():
            return self.mapped[rows]
        taken = np.empty((len(rows), self.new.shape[1]), self.new.dtype)
        taken[old], taken[~old] = self.mapped[rows[old]], self.new[rows[~old] - len(self.mapped)]
        return taken


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """ValueError unless the named value lies in low..high."""
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must lie in {low}..{'' if high is None else high}, got {value}")


def check_ids(ids: Sequence[str], known: Container[str] | None = None) -> list[str]:
    """The ids as a list, once they are different strings and all ``known``."""
    if not isinstance(ids, (list, tuple)) or not all(isinstance(name, str) for name in ids):
        raise TypeError(f"ids must be a list of str, got {ids!r}")
    ids = list(ids)
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise ValueError(f"ids must differ within a call, got {name!r} {times} times")
    for name in ids:
        if known is not None and name not in known:
            raise ValueError(f"ids must be in the index, {name!r} is not")
    return ids


def check_embeddings(embeddings: Tensor, dim: int, n: int | None = None) -> np.ndarray:
    """The embeddings as float32, once they are finite and (n, dim)."""
    matrix = torch.as_tensor(embeddings).detach().cpu().float().numpy()
    if matrix.ndim != 2 or matrix.shape[1] != dim or n not in (None, len(matrix)):
        raise ValueError(f"embeddings must be ({n or 'N'}, {dim}), got {matrix.shape}")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise ValueError(f"embeddings must be finite, row {finite.argmin()} is not")
    return matrix


def unit_prefixes(embeddings: np.ndarray, target_dim: int | None = None) -> np.ndarray:
    """Prefixes, cut first and normalised after, float32; all zero stays all zero."""
    prefixes = embeddings[:, :target_dim].astype(np.float32)
    return F.normalize(torch.from_numpy(prefixes), dim=1).numpy()


def _clips(
    speakers: Sequence[str], embeddings: Tensor, target_dim: int | None
) -> tuple[list[str], Tensor, Tensor]:
    size = embeddings.shape[-1]
    check_range("target_dim", size if target_dim is None else target_dim, 1, size)
    clips = unit_prefixes(check_embeddings(embeddings, size, len(speakers)), target_dim)
    index: dict[str, int] = {}
    owners = [index.setdefault(speaker, len(index)) for speaker in speakers]
    return list(index), torch.tensor(owners, dtype=torch.long), torch.from_numpy(clips)
