"""Approximate search in very many vectors, by FAISS (the extra ``search``) through ``datasets``.

FAISS and not a vector database such as LanceDB: the vectors fit into memory, one wheel that needs only numpy is enough,
``datasets`` speaks to it, and an index on disk stays what it is, a table and a safetensors file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from jaxtyping import Float, Int

from weightspace.errors import SettingsError, install_command
from weightspace.io.hub import LIBRARY
from weightspace.zoo.storage import replacing

_NAME = "vectors"
_PROBED = 64  # lists of about sqrt(n) vectors that a query looks into
_TRAINED_ON = 64  # vectors a list
_VERSION = 1


def is_available() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


class ApproximateSearch:
    """Vectors in about sqrt(n) lists around centres; a query looks into the nearest lists only.

    A graph of neighbours (HNSW) answers faster still, but takes several times as long to build and more memory.

    What FAISS builds is kept in huggingface_hub's assets cache by the content of the vectors, and only ever read from
    there: FAISS trusts the files that it reads.
    """

    def __init__(self, vectors: Float[np.ndarray, "models size"]) -> None:
        """Builds the lists, or takes them from the cache.

        Raises:
            SettingsError: FAISS is not installed.
        """
        if not is_available():
            raise SettingsError(f"approximate search needs FAISS; {install_command('search')}, or search exactly")
        from datasets import Dataset

        self._rows = Dataset.from_dict({"row": np.arange(len(vectors))})
        digest = hashlib.sha256(f"{_VERSION} {vectors.shape} ".encode())
        digest.update(np.ascontiguousarray(vectors).data)
        path = Path(constants.HF_ASSETS_CACHE) / LIBRARY / "faiss" / f"{digest.hexdigest()}.faiss"
        if path.is_file():
            self._rows.load_faiss_index(_NAME, path)
        else:
            trained = _trained(vectors)
            self._rows.add_faiss_index_from_external_arrays(vectors, _NAME, custom_index=trained, batch_size=2**16)
            with replacing(path) as partial:
                self._rows.save_faiss_index(_NAME, partial)
        self._rows.get_index(_NAME).faiss_index.nprobe = _PROBED

    def __call__(
        self, queries: Float[np.ndarray, "queries size"], k: int
    ) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Returns inner products and rows, best first; row -1 where the lists hold fewer than k."""
        found = self._rows.search_batch(_NAME, queries, k)
        return found.total_scores, found.total_indices


def _trained(vectors: Float[np.ndarray, "models size"]) -> Any:
    """Finds the centres of the lists from a sample."""
    import faiss

    count, size = vectors.shape
    lists = max(1, round(math.sqrt(count)))
    index = faiss.index_factory(size, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(count)[: _TRAINED_ON * lists]
    index.train(vectors[np.sort(sample)])
    return index
