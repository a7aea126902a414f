"""Finds a voice among many: shortlist by the prefix, rerank by the full embedding; by cosines."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from speechbrain_mrl.inference.enrolment import (
    check_embeddings,
    check_ids,
    check_range,
    unit_prefixes,
)
from speechbrain_mrl.utils import read_json, replacing, require, writing

# FAISS's names of how prefixes, and full embeddings, can be kept
CODES = {
    "float32": "Flat",
    "int8": "SQ8",
    "4bit": "PQ{size}x4fs",
    "ivf": "IVF{lists},PQ{size}x4fs",
}
STORAGE = {"float16": "SQfp16", "float32": "Flat"}
SETTINGS = ("dim", "prefix_dim", "codes", "storage")
MANIFEST = "index.json"  # of a saved index: settings, ids, and the name of FAISS's file
MIN_CODED = 1000  # speakers; below, every speaker is reranked, and codes have nothing to learn from
MAX_TRAINING = 65536  # prefixes that codes are fitted to
MAX_LISTS, MIN_LIST = 1024, 64  # of "ivf": lists, and speakers that each is fitted to


class MatryoshkaIndex:
    """A searchable set of speakers: short codes of the prefix, and the full embeddings, by FAISS.

    A search ranks all speakers by the codes of their prefixes, then the shortlist by the full
    embeddings. With no more than 1000 speakers, or than the shortlist, it is exact. Codes are
    fitted to the speakers themselves, at the first search and again as the index grows.

    Arguments
    ---------
    dim : int
        Full size D.
    prefix_dim : int
        Dimensions that make the shortlist, 1..D.
    codes : str
        How prefixes are kept; bytes per speaker at 64: ``"float32"`` 256, ``"int8"`` 64, ``"4bit"``
        32. ``"ivf"``, 40: 4bit codes in 1024 lists of like voices, of which a query looks into the
        nearest 256; the fastest, and it may miss a speaker in the others.
    storage : str
        Type of the full embeddings, ``"float16"`` (cosines to 5e-4) or ``"float32"``. ``load`` maps
        them from the disk; they are read into memory when speakers are added or removed.

    Example
    -------
    >>> import torch
    >>> index = MatryoshkaIndex(dim=3, prefix_dim=2)
    >>> index.add(["ann", "bob"], torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]]))
    >>> ids, scores = index.search(torch.tensor([[0.0, 1.0, 0.0]]), k=2)
    >>> ids, scores.round(3).tolist()
    ([['bob', 'ann']], [[0.6000000238418579, 0.0]])
    """

    def __init__(
        self, dim: int = 256, prefix_dim: int = 64, codes: str = "4bit", storage: str = "float16"
    ) -> None:
        check_range("prefix_dim", prefix_dim, 1, dim)
        if codes not in CODES or storage not in STORAGE:
            raise ValueError(f"codes {[*CODES]}, storage {[*STORAGE]}; got {codes!r}, {storage!r}")
        self._faiss = faiss = require("faiss", "a search index", package="faiss-cpu")
        self.dim, self.prefix_dim, self.codes, self.storage = dim, prefix_dim, codes, storage
        self._names: list[str] = []  # number n of both parts below is name n
        self._number_of: dict[str, int] = {}
        self._full = faiss.index_factory(dim, STORAGE[storage], faiss.METRIC_INNER_PRODUCT)
        self._coded: Any = None  # of the prefixes, faiss.IndexPreTransform
        self._trained_on = 0
        self._mapped = False

    def __len__(self) -> int:
        return len(self._names)

    def add(self, ids: Sequence[str], embeddings: Tensor) -> None:
        """Add N speakers by their embeddings (N, D); an id that is there gets the new embedding."""
        ids = check_ids(ids)
        unit = unit_prefixes(check_embeddings(embeddings, self.dim, len(ids)))
        self._drop([name for name in ids if name in self._number_of])
        self._own()
        self._full.add(unit)
        if self._coded is not None:
            self._coded.add(unit)
        self._number_of.update(zip(ids, range(len(self), len(self) + len(ids)), strict=True))
        self._names += ids

    def remove(self, ids: Sequence[str]) -> None:
        """Remove speakers; ValueError, and nothing is removed, if one of them is not there."""
        self._drop(check_ids(ids, known=self._number_of))

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
        k = min(k, len(self))
        if not k or not len(queries):
            return [[] for _ in queries], np.empty((len(queries), k), np.float32)
        shortlist = max(shortlist, k)
        if len(self) <= max(shortlist, MIN_CODED):
            scores, found = self._full.search(queries, k)
        else:
            self._update_codes()
            options = self._faiss.IndexRefineSearchParameters(k_factor=(shortlist + 0.5) / k)
            scores, found = self._both().search(queries, k, params=options)
            few = (found < 0).any(axis=1)  # the lists that "ivf" looked into hold fewer than k
            if few.any():
                scores[few], found[few] = self._full.search(queries[few], k)
        return [[self._names[i] for i in row] for row in found], scores.clip(-1, 1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index; the folder holds the old or the new one at any time, never a mixture.

        On a full disk OSError names the file, and the old index is as it was.
        """
        folder = Path(folder)
        if len(self) > MIN_CODED:
            self._update_codes()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex[:12]}.faiss"
        try:
            with replacing(path) as part:
                with open(part, "wb") as file:
                    # FAISS's own files lose their last bytes on a full disk without an error
                    writer = self._faiss.PyCallbackIOWriter(file.write)
                    self._faiss.write_index(self._both(), writer)
                checksums = _checksums(part, self._names)
            manifest = {key: getattr(self, key) for key in SETTINGS}
            manifest |= {"trained_on": self._trained_on, "ids": self._names}
            manifest |= {"file": path.name, "checksums": checksums}
            with replacing(folder / MANIFEST) as part:
                part.write_text(json.dumps(manifest))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        for old in set(folder.glob("*.faiss")) - {path}:
            with suppress(OSError):  # Windows keeps a file that is still mapped
                old.unlink()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MatryoshkaIndex:
        """The index that ``save`` wrote, mapped from the disk; ValueError if it is not whole."""
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
        try:
            index = cls(**{key: manifest[key] for key in SETTINGS})
            index._names, index._trained_on = manifest["ids"], manifest["trained_on"]
            index._number_of = dict(zip(index._names, range(len(index._names))))
            path, checksums = folder / manifest["file"], manifest["checksums"]
        except (LookupError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, LookupError) else error
            raise ValueError(
                f"{folder / MANIFEST} is damaged ({reason}); save the index again"
            ) from None
        if path.name != manifest["file"]:
            raise ValueError(f"{folder}/{MANIFEST} names {path}, which is not in that folder")
        found_checksums = _checksums(path, index._names)
        if found_checksums[0] != checksums[0]:
            raise ValueError(f"{path} is damaged; save the index again")
        try:
            index._take(index._faiss.read_index(str(path), index._faiss.IO_FLAG_MMAP_IFC))
            index._both()  # refuses parts of different lengths
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged ({error}); save the index again") from None
        index._mapped = True
        n, found = len(index._number_of), (len(index._names), index._full.ntotal, index._full.d)
        if found != (n, n, index.dim):
            rule = f"{folder} must hold one id of its own for each embedding of size {index.dim}"
            raise ValueError(rule + ", has {} ids, {} embeddings of size {}".format(*found))
        if found_checksums != checksums:
            raise ValueError(f"{folder / MANIFEST} has other ids than were saved; save it again")
        return index

    def _both(self) -> Any:
        """One FAISS index that ranks by the codes, if there are any, then by the embeddings."""
        coded, full = self._coded, self._full
        return full if coded is None else self._faiss.IndexRefine(coded, full)

    def _take(self, index: Any) -> None:
        """The parts of what FAISS read."""
        self._read = index  # owns its parts
        self._full, self._coded = index, None
        if isinstance(index, self._faiss.IndexRefine):
            parts = index.base_index, index.refine_index
            self._coded, self._full = map(self._faiss.downcast_index, parts)

    def _own(self) -> None:
        """Read what is mapped into memory, where it can change."""
        if self._mapped:
            self._take(self._faiss.deserialize_index(self._faiss.serialize_index(self._both())))
        self._mapped = False

    def _drop(self, names: list[str]) -> None:
        if not names:
            return
        self._own()
        gone = np.sort([self._number_of[name] for name in names])
        self._full.remove_ids(gone)  # the numbers after a gap move up
        if self._coded is not None:
            self._coded.remove_ids(gone)
            if self.codes == "ivf":  # its lists keep numbers
                lists = self._faiss.extract_index_ivf(self._coded).invlists
                for i in range(lists.nlist):
                    ids = self._faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i))
                    ids -= np.searchsorted(gone, ids)
        self._names = np.delete(np.array(self._names, object), gone).tolist()
        self._number_of = dict(zip(self._names, range(len(self._names))))

    def _update_codes(self) -> None:
        """Build the codes if there are none, or if they were fitted to a fraction of the index."""
        faiss, n = self._faiss, len(self)
        outgrown = self._trained_on < MAX_TRAINING and n > 4 * self._trained_on
        if self._coded is not None and not (outgrown and self.codes != "float32"):
            return
        self._trained_on = min(n, MAX_TRAINING)
        lists = min(MAX_LISTS, self._trained_on // MIN_LIST)
        recipe = CODES[self.codes].format(size=self.prefix_dim, lists=lists)
        codes = faiss.index_factory(self.prefix_dim, recipe, faiss.METRIC_INNER_PRODUCT)
        if self.codes == "ivf":
            codes.nprobe = round(2 * lists**0.7)  # for about the same recall
        coded = faiss.IndexPreTransform(codes)
        coded.prepend_transform(faiss.NormalizationTransform(self.prefix_dim))
        coded.prepend_transform(faiss.RemapDimensionsTransform(self.dim, self.prefix_dim, False))
        sample = np.linspace(0, n - 1, self._trained_on).astype(np.int64)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # of many tiny steps, threads would only wait
        coded.train(self._full.reconstruct_batch(sample))
        faiss.omp_set_num_threads(threads)
        for start in range(0, n, MAX_TRAINING):
            coded.add(self._full.reconstruct_n(start, min(MAX_TRAINING, n - start)))
        self._coded = coded


def _checksums(path: Path, names: Sequence[str]) -> list[int]:
    """CRC-32 of FAISS's file, and of the speakers' names."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return [found, zlib.crc32(json.dumps(names).encode())]
