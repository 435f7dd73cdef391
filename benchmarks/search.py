"""Exact search against FAISS: what an index costs to build, what a query costs, and what it misses.

    python benchmarks/search.py [--models 10000 100000 1000000] [--size 64 128 256] [--hnsw] [--json FILE]

The models are points of length 1 around one centre for every hundred of them, and queries are new points of these
clusters. The lists are those of `EmbeddingIndex`; --hnsw builds a graph of 32 neighbours, too. Needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from huggingface_hub import constants

from weightspace.search.index import EmbeddingIndex, faiss_index

QUERIES, K = 100, 10
Search = Callable[[np.ndarray, int], Any]


def points(models: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns models and queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, models // 100), size)).astype(np.float32)
    members = np.concatenate([np.arange(models) % len(centres), rng.integers(len(centres), size=QUERIES)])
    found = centres[members] + 0.7 * rng.standard_normal((len(members), size), dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found[:models], found[models:]


def hnsw(vectors: np.ndarray) -> Search:
    """Builds a graph with FAISS's defaults for a search of 64 candidates."""
    import faiss

    index = faiss.index_factory(vectors.shape[1], "HNSW32,Flat", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = 64
    index.add(vectors)
    return index.search


def measure(models: int, size: int, ways: dict[str, Callable[[np.ndarray], Search]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each way to search."""
    vectors, queries = points(models, size)
    exact: np.ndarray | None = None
    for name, build in ways.items():
        begun = time.perf_counter()
        search = build(vectors)
        built = time.perf_counter() - begun
        rows = search(queries, K)[1]
        exact = rows if exact is None else exact
        yield {
            "models": models,
            "size": size,
            "search": name,
            "build (s)": built,
            "one query (ms)": 1e3 * least_seconds(search, queries[:1], repeats=10),
            "of 100 (ms)": 1e3 * least_seconds(search, queries, repeats=3) / QUERIES,
            "recall@10": float(np.mean([len(set(a) & set(b)) / K for a, b in zip(rows, exact, strict=True)])),
        }


def least_seconds(search: Search, queries: np.ndarray, repeats: int) -> float:
    """Returns the shortest of several runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        search(queries, K)
        times.append(time.perf_counter() - begun)
    return min(times)


def exact_search(vectors: np.ndarray) -> Search:
    index = EmbeddingIndex(pd.DataFrame({"model_id": np.arange(len(vectors))}), vectors, "", "")
    return lambda queries, k: index.search(queries, k, exact=True)


def list_search(vectors: np.ndarray) -> Search:
    search: Search = faiss_index(vectors).search
    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--hnsw", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways: dict[str, Callable[[np.ndarray], Search]] = {
        "exact": exact_search,
        "lists": lambda vectors: faiss_index(vectors).search,
    }
    if options.hnsw:
        ways["graph"] = hnsw
    table = []
    for models in options.models:
        for size in options.size:
            with tempfile.TemporaryDirectory() as cache:
                constants.HF_ASSETS_CACHE = cache  # so that every building is measured
                for row in measure(models, size, ways):
                    if not table:
                        print("".join(f"{name:>16}" for name in row))
                    table.append(row)
                    cells = (f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values())
                    print("".join(f"{cell:>16}" for cell in cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
