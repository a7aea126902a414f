"""Speed, recall and memory of prefix search against exact and HNSW search, side by side.

Speakers are drawn from a Gaussian whose variance falls with the dimension, as PCA finds it in real
embeddings. Each method is timed right after exact search over the full embeddings, so that a busy
machine slows both. The ratio is that of the two.

    python benchmarks/search.py --n_speakers 1000000 --output search.json
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from speechbrain_mrl.inference.search import MatryoshkaIndex

CHUNK = 50_000
METHODS = ("flat", "ivf", "4bit", "float32", "int8", "hnsw")
SHORTLISTS = {"ivf": 1000, "4bit": 600, "float32": 100, "int8": 100}
K = 10


class Speakers:
    """A Gaussian of speakers; the variance of dimension i is (i + 10) ** -decay."""

    def __init__(self, dim, decay, seed):
        self.rng = np.random.default_rng(seed)
        variances = (np.arange(1, dim + 1) + 10.0) ** -decay
        self.deviations = np.sqrt(variances / variances.sum()).astype(np.float32)
        self.effective_rank = float(variances.sum() ** 2 / (variances**2).sum())

    def noise(self, n):
        shape = n, len(self.deviations)
        return self.rng.standard_normal(shape, dtype=np.float32) * self.deviations

    def draw(self, n):
        return unit(self.noise(n))

    def queries(self, speakers, cosine):
        """At exactly this cosine from their speakers, in directions drawn like the speakers'."""
        noise = self.noise(len(speakers))
        noise = unit(noise - (noise * speakers).sum(axis=1, keepdims=True) * speakers)
        return np.float32(cosine) * speakers + np.float32((1 - cosine**2) ** 0.5) * noise


def unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def anonymous_bytes():
    """Memory of this process that is not a file's."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon; this benchmark needs Linux")


def disk_bytes(path):
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def queries_per_second(search, queries, batch):
    start = time.perf_counter()
    found = [search(queries[i : i + batch]) for i in range(0, len(queries), batch)]
    return len(queries) / (time.perf_counter() - start), np.concatenate(found)


def as_numbers(ids):
    return np.array([[int(name) for name in row] for row in ids])


def build(method, speakers, path, args):
    n, dim = speakers.shape
    chunks = [(i, speakers[i : i + CHUNK]) for i in range(0, n, CHUNK)]
    if method in ("flat", "hnsw"):
        index = faiss.IndexFlatIP(dim)
        if method == "hnsw":
            index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        for _, chunk in chunks:
            index.add(chunk)
        faiss.write_index(index, str(path))
        return
    index = MatryoshkaIndex(dim, args.prefix_dim, codes=method)
    for i, chunk in chunks:
        index.add([str(j) for j in range(i, i + len(chunk))], torch.from_numpy(chunk))
    index.save(path)


def open_index(method, path, args):
    """The saved index as a function from queries to the positions of their speakers."""
    if method in ("flat", "hnsw"):
        index = faiss.read_index(str(path))
        if method == "hnsw":
            index.hnsw.efSearch = args.ef_search
        return lambda queries: index.search(queries, K)[1]
    index = MatryoshkaIndex.load(path)
    return lambda queries: as_numbers(index.search(queries, K, args.shortlists[method])[0])


def ram_bytes(method, path, args, query):
    """What the opened index adds to a fresh process; mapped files are not counted."""
    before = anonymous_bytes()
    search = open_index(method, path, args)
    search(query)
    return anonymous_bytes() - before


def measure(method, flat, speakers, queries, exact, args, folder):
    path = folder / method
    start = time.perf_counter()
    build(method, speakers, path, args)
    result = {"shortlist": args.shortlists.get(method, 0)}
    result["build_seconds"] = time.perf_counter() - start
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ram = pool.apply(ram_bytes, (method, path, args, queries[:1]))
    result["ram_bytes_per_speaker"] = ram / len(speakers)
    result["disk_bytes_per_speaker"] = disk_bytes(path) / len(speakers)
    search = open_index(method, path, args)
    n_all = len(queries)
    for label, n, batch in (("single", args.single_queries, 1), ("batch", n_all, n_all)):
        search(queries[:2])
        exact_qps, _ = queries_per_second(flat, queries[:n], batch)
        qps, found = queries_per_second(search, queries[:n], batch)
        result |= {f"{label}_qps": qps, f"{label}_exact_qps": exact_qps}
        result[f"{label}_ratio"] = qps / exact_qps
    pairs = list(zip(exact, found))
    result["recall_at_1"] = float(np.mean([e[0] == f[0] for e, f in pairs]))
    result["recall_at_10"] = float(np.mean([len(np.intersect1d(e, f)) / K for e, f in pairs]))
    del search
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result


def print_row(method, r):
    print(
        f"{method:8s}{r['shortlist']:10d}{r['recall_at_1']:8.3f}{r['recall_at_10']:8.3f}"
        f"{r['single_qps']:10.1f}{r['single_ratio']:8.1f}"
        f"{r['batch_qps']:10.1f}{r['batch_ratio']:8.1f}"
        f"{r['ram_bytes_per_speaker']:9.0f}{r['disk_bytes_per_speaker']:9.0f}"
        f"{r['build_seconds']:9.0f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n_speakers", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--prefix_dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=2048, help="of the batch")
    parser.add_argument("--single_queries", type=int, default=50, help="one at a time")
    parser.add_argument("--query_cosine", type=float, default=0.7, help="of a query, its speaker")
    parser.add_argument(
        "--shortlists", type=json.loads, default={}, help=f"JSON by method, default {SHORTLISTS}"
    )
    parser.add_argument("--ef_search", type=int, default=256, help="of HNSW")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--decay", type=float, default=2.0, help="synthetic variance of dimension i: (i + 10)^-x"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1986)
    parser.add_argument("--output", type=Path, default=Path("search.json"))
    args = parser.parse_args()
    args.shortlists = SHORTLISTS | args.shortlists
    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    source = Speakers(args.dim, args.decay, args.seed)
    flat = faiss.IndexFlatIP(args.dim)
    for start in range(0, args.n_speakers, CHUNK):
        flat.add(source.draw(min(CHUNK, args.n_speakers - start)))
    size = args.n_speakers * args.dim
    speakers = faiss.rev_swig_ptr(flat.get_xb(), size).reshape(-1, args.dim)  # a view
    own = source.rng.integers(0, args.n_speakers, args.queries)
    queries = source.queries(speakers[own], args.query_cosine)
    print(f"{args.n_speakers} speakers of size {args.dim}")
    print(
        f"effective rank {source.effective_rank:.0f}; {args.queries} queries at cosine "
        f"{args.query_cosine:g} from their speakers; prefix {args.prefix_dim}; "
        f"{args.threads} threads; FAISS {faiss.__version__}"
    )
    _, exact = queries_per_second(lambda q: flat.search(q, K)[1], queries, len(queries))
    first = float((exact[:, 0] == own).mean())
    print(f"exact search puts {100 * first:.1f} % of the speakers first")
    groups = (34, "recall of exact"), (18, "one query a call"), (18, "all in one call")
    heads = (18, "shortlist"), (8, "@1"), (8, "@10"), (10, "q/s"), (8, "x flat")
    heads += (10, "q/s"), (8, "x flat"), (9, "RAM"), (9, "disk"), (9, "build s")
    for row in (groups + ((18, "bytes per speaker"),), heads):
        print("".join(head.rjust(width) for width, head in row))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            results[method] = measure(
                method,
                lambda q: flat.search(q, K)[1],
                speakers,
                queries,
                exact,
                args,
                Path(folder),
            )
            print_row(method, results[method])
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    report = {
        "settings": settings,
        "effective_rank": source.effective_rank,
        "own_speaker_first": first,
        "results": results,
        "versions": {"faiss": faiss.__version__, "numpy": np.__version__, "python": sys.version},
        "machine": platform.machine(),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
