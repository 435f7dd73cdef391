"""An index of embedded models: saved and loaded as a folder, searched by inner products.

Indexes too large for exact search use FAISS (the extra ``search``) and not a vector database such as LanceDB: the
vectors fit into memory, one wheel that needs only numpy is enough, and an index on disk stays a table and a safetensors
file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import constants
from jaxtyping import Float, Int

from weightspace.encoder import Encoder, embed_zoo
from weightspace.errors import CheckpointError, SettingsError, ZooError, install_command
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import load_json_object
from weightspace.io.hub import LIBRARY
from weightspace.io.writing import save_checkpoint
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.storage import read_table, replacing, unwritable, write_text

EXACT_UP_TO = 1_000_000
"""Models up to which every model is compared.

A query in a million embeddings of 64 to 256 numbers takes 11 to 71 ms on two cores, and misses nothing; FAISS takes .3
to 2 ms, after 5 to 14 s of building, and misses one model in twenty (``benchmarks/search.py``).
"""

_VERSION = 1
_RECORD, _MODELS, _VECTORS = _FILES = ("index.json", "models.parquet", "vectors.safetensors")
_RECORDED = {"encoder": str, "encoder_digest": str, "zoo_digest": str | None, "left_out": int}
_REBUILD = "build the index again"
_BLOCK = 2**16
_LENGTH_TOLERANCE = 1e-3
_LISTS_VERSION = 1
_PROBED = 64  # lists of about sqrt(n) vectors that a query looks into
_TRAINED_ON = 64  # vectors a list


@dataclass(frozen=True, eq=False)
class EmbeddingIndex:
    """Models as vectors of length 1, with their metadata.

    Attributes:
        models: one row a model: ``model_id``, ``location``, and the zoo's metadata where there is any.
        vectors: their embeddings.
        encoder: name of their encoder.
        encoder_digest: see `Encoder.digest`.
        zoo_digest: digest of the zoo that the models come from, if they come from one.
        left_out: models whose embedding has no direction: it is zero, or holds NaN or Inf.
    """

    models: pd.DataFrame
    vectors: Float[np.ndarray, "models size"]
    encoder: str
    encoder_digest: str
    zoo_digest: str | None = None
    left_out: int = 0

    def __len__(self) -> int:
        """Number of models."""
        return len(self.vectors)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, encoder: Encoder, zoo_digest: str | None = None) -> EmbeddingIndex:
        """Builds an index from a table as `embed` returns it.

        Args:
            frame: one row a model, with ``model_id`` and ``embedding``.
            encoder: the encoder that the embeddings come from.
            zoo_digest: of the zoo that the models come from.

        Raises:
            ZooError: there is no model, or none that can be found.
            SettingsError: the embeddings are not of this encoder's size.
        """
        if not len(frame):
            raise ZooError("no models to search; give at least one")
        sizes = {len(embedding) for embedding in frame["embedding"]}
        if sizes != {encoder.embedding_size}:
            raise SettingsError(
                f"embeddings of {', '.join(map(str, sorted(sizes)))} numbers: the encoder {encoder.name} makes "
                f"{encoder.embedding_size}; embed all models with it"
            )
        embeddings = np.stack(frame["embedding"].to_list()).astype(np.float64)
        lengths = np.linalg.norm(embeddings, axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        if not usable.any():
            raise ZooError(f"none of {len(frame)} embeddings is finite and not zero; embed the models again")
        return cls(
            models=frame.drop(columns="embedding")[usable].reset_index(drop=True),
            vectors=(embeddings[usable] / lengths[usable, None]).astype(np.float32),
            encoder=encoder.name,
            encoder_digest=encoder.digest,
            zoo_digest=zoo_digest,
            left_out=int((~usable).sum()),
        )

    @classmethod
    def from_zoo(cls, zoo: Zoo, encoder: Encoder) -> EmbeddingIndex:
        """Embeds the models of a zoo and builds their index."""
        embedding = list(embed_zoo(encoder, zoo))
        return cls.from_frame(zoo.index.assign(location=zoo.location, embedding=embedding), encoder, zoo.digest)

    def save(self, folder: str | Path) -> Path:
        """Writes the index as a folder; replaces an index that is already there.

        Raises:
            ZooError: the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        others = [path.name for path in folder.iterdir() if path.name not in _FILES] if folder.is_dir() else []
        if others:
            raise ZooError(f"{folder}: holds {others[0]!a}, which is no part of an index; choose a folder of its own")
        try:
            (folder / _RECORD).unlink(missing_ok=True)  # a half replaced index must not open
        except OSError as error:
            raise unwritable(folder, error) from error
        with replacing(folder / _MODELS) as partial:
            self.models.to_parquet(partial)
        save_checkpoint({"vectors": torch.from_numpy(self.vectors)}, folder / _VECTORS)
        record = {name: getattr(self, name) for name in _RECORDED}
        write_text(folder / _RECORD, json.dumps({"version": _VERSION, "models": len(self), **record}, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None) -> EmbeddingIndex:
        """Reads what `save` wrote.

        Args:
            folder: the index.
            encoder: the encoder that queries will be embedded with.

        Raises:
            ZooError: there is no index, or it is damaged.
            SettingsError: the index was built with another encoder.
        """
        folder = Path(folder)
        record = _read_record(folder)
        try:
            vectors = open_checkpoint(folder / _VECTORS).tensor("vectors")
        except CheckpointError as error:
            raise ZooError(f"{error}; {_REBUILD}") from error
        models = read_table(folder / _MODELS).to_pandas()
        count = record["models"]
        if vectors.dtype != torch.float32 or vectors.ndim != 2 or {len(vectors), len(models)} != {count}:
            raise ZooError(
                f"{folder}: damaged: {count} models in {_RECORD}, {len(models)} in {_MODELS} and vectors of shape "
                f"{tuple(vectors.shape)}; {_REBUILD}"
            )
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        if not count or "model_id" not in models or not bool(((lengths - 1).abs() < _LENGTH_TOLERANCE).all()):
            raise ZooError(f"{folder}: damaged: not one vector of length 1 for each named model; {_REBUILD}")
        index = cls(models, vectors.numpy(), **{name: record[name] for name in _RECORDED})
        if encoder is not None:
            index.ensure_encoder(encoder)
        return index

    def ensure_encoder(self, encoder: Encoder) -> None:
        """Refuses an encoder whose embeddings do not compare with those of the index.

        Raises:
            SettingsError: the index was built with another one.
        """
        if encoder.digest != self.encoder_digest:
            raise SettingsError(
                f"encoder {encoder.name} ({encoder.digest[:12]}): the index was built with {self.encoder} "
                f"({self.encoder_digest[:12]}); search with that one, or build the index again"
            )

    def search(
        self, queries: Float[np.ndarray, "queries size"], k: int, *, exact: bool | None = None
    ) -> tuple[Float[np.ndarray, "queries found"], Int[np.ndarray, "queries found"]]:
        """Finds the models with the largest inner products.

        Args:
            queries: vectors of any length.
            k: models to find; all of them where there are fewer.
            exact: compare all models; by default unless there are more than ``EXACT_UP_TO`` and FAISS is installed.

        Returns:
            Scores and rows for each query, best first; equal scores in the order of their rows.
        """
        k = min(k, len(self))
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not (exact if exact is not None else len(self) <= EXACT_UP_TO or not is_faiss_available()):
            scores, rows = self._approximate.search(queries, k)
            if (rows >= 0).all():
                return scores, rows
        parts = [
            (torch.from_numpy(queries) @ block.T).topk(min(k, len(block)))
            for block in torch.from_numpy(self.vectors).split(_BLOCK)
        ]
        starts = range(0, len(self), _BLOCK)
        rows = torch.cat([part.indices + start for part, start in zip(parts, starts, strict=True)], dim=1).numpy()
        scores = torch.cat([part.values for part in parts], dim=1).numpy()
        best = np.lexsort((rows, -scores))[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def rank(
        self, query: Float[np.ndarray, "size"], k: int, *, excluded: Collection[int] = (), exact: bool | None = None
    ) -> tuple[Float[np.ndarray, "found"], Int[np.ndarray, "found"]]:
        """Ranks the models for one query.

        Args:
            query: a vector of any length.
            k: models to find; fewer where there are not as many.
            excluded: rows to leave out.
            exact: as in `search`.

        Returns:
            Scores and rows, best first.
        """
        scores, rows = self.search(query[None], k + len(excluded), exact=exact)
        kept = np.flatnonzero(~np.isin(rows[0], list(excluded)))[:k]
        return scores[0, kept], rows[0, kept]

    @cached_property
    def _approximate(self) -> Any:
        return faiss_index(self.vectors)


def is_index(folder: str | Path) -> bool:
    """Whether a folder holds an index."""
    return (Path(folder) / _RECORD).is_file()


def _read_record(folder: Path) -> dict[str, Any]:
    if not is_index(folder):
        raise ZooError(f"{folder}: no index (there is no {_RECORD}); save one or check the path")
    try:
        record = load_json_object((folder / _RECORD).read_bytes(), where=str(folder / _RECORD))
    except CheckpointError as error:
        raise ZooError(f"{error}; {_REBUILD}") from error
    if record.get("version") != _VERSION:
        raise ZooError(f"{folder}: version {record.get('version')!r} of an index, expected {_VERSION}; {_REBUILD}")
    for name, kind in {"models": int, **_RECORDED}.items():
        if not isinstance(record.get(name), kind):
            raise ZooError(f"{folder}: damaged: {name} is {record.get(name)!a}; {_REBUILD}")
    return record


def is_faiss_available() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def faiss_index(vectors: Float[np.ndarray, "models size"]) -> Any:
    """Builds a FAISS index of vectors in about sqrt(n) lists around centres; a query looks into the nearest lists only.

    A graph of neighbours (HNSW) answers faster still, but takes several times as long to build and more memory.

    The index is kept in huggingface_hub's assets cache by the content of the vectors, and only ever read from there:
    FAISS trusts the files that it reads.

    Raises:
        SettingsError: FAISS is not installed.
    """
    if not is_faiss_available():
        raise SettingsError(f"approximate search needs FAISS; {install_command('search')}, or search exactly")
    import faiss

    index: Any
    count, size = vectors.shape
    digest = hashlib.sha256(f"{_LISTS_VERSION} {vectors.shape} ".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    path = Path(constants.HF_ASSETS_CACHE) / LIBRARY / "faiss" / f"{digest.hexdigest()}.faiss"
    if path.is_file():
        index = faiss.read_index(str(path))
    else:
        lists = max(1, round(math.sqrt(count)))
        index = faiss.index_factory(size, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).permutation(count)[: _TRAINED_ON * lists]
        index.train(vectors[np.sort(sample)])
        index.add(vectors)
        with replacing(path) as partial:
            faiss.write_index(index, str(partial))
    index.nprobe = _PROBED
    return index
