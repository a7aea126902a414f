"""``MatryoshkaIndex`` on Milvus, for those who outgrow one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from speechbrain_mrl.inference.enrolment import (
    check_embeddings,
    check_ids,
    check_range,
    unit_prefixes,
)
from speechbrain_mrl.utils import require

ROWS_PER_CALL = 1000
HITS_PER_CALL = 16384  # with 1 KB embeddings well below gRPC's 64 MB


class MilvusIndex:
    """``MatryoshkaIndex`` on Milvus: a file on one machine, a cluster by another address.

    Speakers may carry metadata, and a search may be restricted by it. What is added is on disk
    when the call returns; the same ``uri`` and ``collection`` open it again.

    Arguments
    ---------
    uri : str
        A file that ends in ``.db`` (milvus-lite), or ``http://host:19530``.
    dim, prefix_dim : int
        Full size and the size of the shortlist; must be those of a collection that exists.
    collection : str
        Name of the collection; made if missing.
    token : str
        ``user:password`` or API key of a cluster.
    prefix_index : mapping, optional
        Milvus' index of the prefixes, ``index_type`` and ``params``; for a new collection only.
        Default: FLAT, exact.

    Example
    -------
    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     index = MilvusIndex(f"{folder}/speakers.db", dim=3, prefix_dim=2)
    ...     embeddings = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    ...     index.add(["ann", "bob"], embeddings, [{"language": "en"}, {"language": "de"}])
    ...     ids, scores = index.search(embeddings[:1], k=2, filter="language == 'de'")
    ...     index.close()
    >>> ids, scores.tolist()
    ([['bob']], [[0.0]])
    """

    def __init__(
        self,
        uri: str,
        dim: int = 256,
        prefix_dim: int = 64,
        collection: str = "speakers",
        token: str = "",
        prefix_index: Mapping[str, Any] | None = None,
    ) -> None:
        check_range("prefix_dim", prefix_dim, 1, dim)
        pymilvus = require("pymilvus", "an index in Milvus")
        if "://" not in uri:
            require("milvus_lite", "an index in a Milvus file")
        self.dim, self.prefix_dim, self.collection = dim, prefix_dim, collection
        self._client = pymilvus.MilvusClient(uri, token=token)
        sizes = {"prefix": prefix_dim, "embedding": dim}
        if self._client.has_collection(collection):
            fields = self._client.describe_collection(collection)["fields"]
            found = {f["name"]: f["params"]["dim"] for f in fields if f["name"] in sizes}
            if {name: int(size) for name, size in found.items()} != sizes:
                self.close()
                raise ValueError(f"collection {collection!r} has sizes {found}, not {sizes}")
            self._client.load_collection(collection)
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=1024)
        indices = self._client.prepare_index_params()
        for field, size in sizes.items():
            schema.add_field(field, pymilvus.DataType.FLOAT_VECTOR, dim=size)
            kind = prefix_index if field == "prefix" and prefix_index else {"index_type": "FLAT"}
            indices.add_index(field, metric_type="IP", **kind)
        self._client.create_collection(
            collection, schema=schema, index_params=indices, consistency_level="Strong"
        )

    def __len__(self) -> int:
        (count,) = self._client.query(self.collection, filter="", output_fields=["count(*)"])
        return count["count(*)"]

    def add(
        self,
        ids: Sequence[str],
        embeddings: Tensor,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Add N speakers (N, D); an id that is there gets the new embedding and metadata."""
        ids = check_ids(ids)
        full = unit_prefixes(check_embeddings(embeddings, self.dim, len(ids)))
        metadata = [{}] * len(ids) if metadata is None else metadata
        reserved = {"id", "prefix", "embedding"}
        if len(metadata) != len(ids) or any(reserved & set(fields) for fields in metadata):
            raise ValueError(
                f"metadata must be {len(ids)} mappings, one per id, without the keys "
                f"{sorted(reserved)}; got {len(metadata)}"
            )
        columns = zip(ids, unit_prefixes(full, self.prefix_dim), full, metadata, strict=True)
        rows = [{**m, "id": name, "prefix": p, "embedding": e} for name, p, e, m in columns]
        for start in range(0, len(rows), ROWS_PER_CALL):
            self._client.upsert(self.collection, rows[start : start + ROWS_PER_CALL])

    def remove(self, ids: Sequence[str]) -> None:
        """Remove speakers; ValueError, and nothing is removed, if one of them is not there."""
        ids, known = check_ids(ids), set()
        chunks = [ids[i : i + ROWS_PER_CALL] for i in range(0, len(ids), ROWS_PER_CALL)]
        # The client's own `ids=` writes them into an expression without escaping quotes
        filters = [f"id in {json.dumps(chunk, ensure_ascii=False)}" for chunk in chunks]
        for these in filters:
            known |= {row["id"] for row in self._client.query(self.collection, these, ["id"])}
        check_ids(ids, known)
        for these in filters:
            self._client.delete(self.collection, filter=these)

    def search(
        self, embeddings: Tensor, k: int = 10, shortlist: int = 100, filter: str = ""
    ) -> tuple[list[list[str]], np.ndarray]:
        """As ``MatryoshkaIndex.search``, among the speakers that pass Milvus' ``filter``.

        Where fewer than k pass, ``ids`` are fewer, and ``scores`` end in minus infinity if other
        queries have more. ``shortlist`` is at most 16384, Milvus' limit.
        """
        check_range("k", k, 1)
        check_range("shortlist", shortlist, 1)
        shortlist = max(k, shortlist)
        queries = unit_prefixes(check_embeddings(embeddings, self.dim))
        per_call = max(1, HITS_PER_CALL // shortlist)
        ids, scores = [], np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), per_call):
            chunk = queries[start : start + per_call]
            hits_per_query = self._client.search(
                self.collection,
                data=list(unit_prefixes(chunk, self.prefix_dim)),
                anns_field="prefix",
                limit=shortlist,
                filter=filter,
                output_fields=["embedding"],
            )
            for i, hits in enumerate(hits_per_query, start):
                full = [hit["entity"]["embedding"] for hit in hits]
                cosines = np.array(full, np.float32).reshape(-1, self.dim) @ queries[i]
                best = np.argsort(-cosines, kind="stable")[:k]
                ids.append([hits[j]["id"] for j in best])
                scores[i, : len(best)] = cosines[best]
        return ids, scores[:, : max(map(len, ids), default=0)]

    def close(self) -> None:
        """Close the connection. milvus-lite keeps its file locked until the process ends."""
        self._client.close()
