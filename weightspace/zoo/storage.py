"""The zoo format: many models as one ``datasets`` repository of parquet shards, one row a model.

A zoo is a folder::

    zoo.json            settings, shard names and whether the zoo is complete
    ledger.jsonl        one line a finished shard
    skips.jsonl         (file, reason) of what was left out
    index/*.parquet     what is known of each model
    weights/*.parquet   the same columns and ``weights``: the complete safetensors bytes of the model
    README.md           names ``index`` and ``weights`` as configurations for ``datasets.load_dataset``

A reference zoo has no ``weights``: they stay where ``ref`` says, on the Hub at one commit, and are read when needed.

Result columns are the float64 columns; ``hyperparameters``, ``config``, ``lineage``, ``datasets`` and ``metrics`` are
JSON texts; ``header`` is a digest of the safetensors header, equal for models whose tensors lie at the same bytes;
``size`` is the model's bytes; ``content`` is equal for equal weights. Zoos of earlier versions lack `LATER` columns.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from weightspace.errors import CheckpointError, ZooError
from weightspace.files import whole_file, write_whole
from weightspace.io.header import Header, load_json_object

FORMAT_VERSION = 1

RESULTS = (
    "test_accuracy",
    "train_accuracy",
    "generalization_gap",
    "test_loss",
    "train_loss",
    "epoch",
    "step",
    "train_size",
)
"""Result columns that every zoo has unless it is told otherwise: fractions, mean nats an example, and counts."""

MAX_BLOB_BYTES = 2**31 - 2**16
"""Largest model: a parquet value is shorter than 2 GiB."""

GROUP_ROWS, GROUP_BYTES = 256, 64 * 2**20
"""Most models and most bytes of a row group, the smallest piece that is read; a larger model has its own."""

COPY_OF = "published_from"
"""Setting of a zoo that holds a part of another: the digest of that one."""

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_LEADING = ("model_id", "run_id", "dataset")
_TRAILING = ("hyperparameters", "config", "licence", "base_model", "lineage", "ref", "revision", "subfolder", "header")
LATER = ("task", "datasets", "metrics", "content")
"""Columns that zoos of the first versions do not have."""

_REQUIRED = ("model_id", "run_id", "hyperparameters", "lineage", "ref", "header", "size")


def index_schema(results: Sequence[str]) -> pa.Schema:
    """Returns the columns of the index."""
    fields = [(name, pa.string()) for name in _LEADING] + [(name, pa.float64()) for name in results]
    fields += [(name, pa.string()) for name in _TRAILING]
    return pa.schema([*fields, ("size", pa.int64()), *((name, pa.string()) for name in LATER)])


def weights_schema(results: Sequence[str]) -> pa.Schema:
    """Returns the columns of the weights shards."""
    return index_schema(results).append(pa.field("weights", pa.large_binary()))


def check_index(table: pa.Table, where: Path) -> None:
    """Checks that every column of the format is there, and filled where it must be.

    Raises:
        ZooError: it is not.
    """
    for field in index_schema(()):
        if field.name in LATER and field.name not in table.schema.names:
            continue
        if field.name not in table.schema.names or not table.schema.field(field.name).type.equals(field.type):
            raise ZooError(f"{where}: the index has no column {field.name!r} of type {field.type}; write the zoo again")
    for name in _REQUIRED:
        if table[name].null_count:
            raise ZooError(f"{where}: {table[name].null_count} models have no {name}; write the zoo again")


def header_digest(blob: bytes | memoryview, header: Header) -> str:
    """Returns the first 16 hex digits of the sha256 of the header bytes of ``blob``."""
    return hashlib.sha256(memoryview(blob)[: header.size]).hexdigest()[:16]


def read_state(folder: Path) -> dict[str, Any] | None:
    """Reads ``zoo.json``, or returns None where there is none.

    Raises:
        ZooError: it is damaged, or of a newer version.
    """
    file = folder / "zoo.json"
    if not file.is_file():
        return None
    try:
        state = load_json_object(file.read_bytes(), where=str(file))
    except CheckpointError as error:
        raise ZooError(f"{error}; write the zoo again") from error
    if state.get("version") != FORMAT_VERSION:
        raise ZooError(
            f"{file}: version {state.get('version')!r} of the zoo format, expected {FORMAT_VERSION}; update weightspace"
        )
    state.setdefault("reference", False)
    kinds = {"complete": bool, "digest": str, "reference": bool, "settings": dict, "shards": list}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise ZooError(f"{file}: damaged: {key} is {state.get(key)!r}; write the zoo again")
    for name in state["shards"]:
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ZooError(f"{file}: damaged: {name!r} is no shard name; write the zoo again")
    return state


def read_skips(folder: Path) -> list[tuple[str, str]]:
    """Reads ``(file, reason)`` of what was left out of a zoo; empty if that is not known.

    Raises:
        ZooError: the list is damaged.
    """
    file = folder / "skips.jsonl"
    if not file.is_file():
        return []
    try:
        rows = [load_json_object(line, where=str(file)) for line in file.read_bytes().splitlines()]
        return [(str(row["file"]), str(row["reason"])) for row in rows]
    except (CheckpointError, KeyError) as error:
        raise ZooError(f"{file}: damaged ({error}); write the zoo again") from error


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns whatever goes wrong with the parquet file ``path`` within the block into a ``ZooError``."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ZooError(f"{path}: cannot be read ({' '.join(str(error).split())}); write the zoo again") from error


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a small parquet file whole.

    Raises:
        ZooError: it is missing or damaged.
    """
    with reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a partial path whose file is synced to disk and becomes ``path`` when the block ends without an error.

    Raises:
        ZooError: the disk is full or the folder cannot be written; nothing is left at the partial path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
        _sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def is_partial(path: Path) -> bool:
    """Whether a killed ``replacing`` left this file behind."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        ZooError: the disk is full or the folder cannot be written.
    """
    try:
        write_whole(path, text)
        _sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ZooError:
    """Returns the error to raise where ``path`` cannot be written."""
    return ZooError(f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
