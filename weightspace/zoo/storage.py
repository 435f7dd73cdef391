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
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from weightspace.dtypes import DTYPES
from weightspace.errors import CheckpointError, ZooError
from weightspace.files import atomic_file
from weightspace.io.checkpoint import Checkpoint
from weightspace.io.header import Header, load_json_object, shown
from weightspace.schema import ModelRef, ReportedMetric, ZooEntry

T = TypeVar("T")

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
"""Default result columns: fractions, mean nats per example, and counts."""

MAX_BLOB_BYTES = 2**31 - 2**16
"""Largest model: a parquet value is shorter than 2 GiB."""

GROUP_ROWS, GROUP_BYTES = 256, 64 * 2**20
"""Limits of a row group, the smallest unit that is read; a larger model gets its own."""

COPY_OF = "published_from"
"""Settings key of a partial copy of a zoo: the digest of the original."""

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_LEADING = ("model_id", "run_id", "dataset")
_TRAILING = ("hyperparameters", "config", "licence", "base_model", "lineage", "ref", "revision", "subfolder", "header")
LATER = ("task", "datasets", "metrics", "content")
"""Columns that zoos of the first versions do not have."""

_PLAIN = ("model_id", "run_id", "dataset", "licence", "base_model", "task", "content")
_JSON = ("hyperparameters", "config", "lineage", "datasets")
_REQUIRED = ("model_id", "run_id", "hyperparameters", "lineage", "ref", "header", "size")
# The 4- and 6-bit floats have neither NaN nor infinity.
_FLOATS = ("F8", "F16", "BF16", "F32", "F64", "C64")


def packed(items: Iterable[T], size: Callable[[T], int], most_items: int, most_bytes: int) -> Iterator[list[T]]:
    """Cuts items, in order, into lists of bounded length and bytes; an item above the limit is alone in its list."""
    part: list[T] = []
    held = 0
    for item in items:
        if part and (len(part) == most_items or held + size(item) > most_bytes):
            yield part
            part, held = [], 0
        part.append(item)
        held += size(item)
    if part:
        yield part


def index_schema(results: Sequence[str]) -> pa.Schema:
    """Returns the columns of the index."""
    fields = [(name, pa.string()) for name in _LEADING] + [(name, pa.float64()) for name in results]
    fields += [(name, pa.string()) for name in _TRAILING]
    return pa.schema([*fields, ("size", pa.int64()), *((name, pa.string()) for name in LATER)])


def weights_schema(results: Sequence[str]) -> pa.Schema:
    """Returns the columns of the weights shards."""
    return index_schema(results).append(pa.field("weights", pa.large_binary()))


def check_index(table: pa.Table, where: Path) -> None:
    """Raises `ZooError` unless every required column exists and has values."""
    for field in index_schema(()):
        if field.name in LATER and field.name not in table.schema.names:
            continue
        if field.name not in table.schema.names or not table.schema.field(field.name).type.equals(field.type):
            raise ZooError(f"{where}: the index has no column {field.name!r} of type {field.type}; write the zoo again")
    for name in _REQUIRED:
        if table[name].null_count:
            raise ZooError(f"{where}: {table[name].null_count} models have no {name}; write the zoo again")


def row_of(entry: ZooEntry) -> dict[str, Any]:
    """Returns the columns that follow from an entry.

    Raises:
        ZooError: a value cannot be written as JSON.
    """
    try:
        texts = {name: json.dumps(getattr(entry, name)) for name in _JSON}
        texts["metrics"] = json.dumps([asdict(metric) for metric in entry.metrics])
    except (TypeError, ValueError) as error:
        raise ZooError(f"{entry.model_id}: not ready for JSON: {error}; use plain numbers and texts") from error
    return {
        **{name: getattr(entry, name) for name in _PLAIN},
        **{name: float(value) for name, value in entry.results.items()},
        **texts,
        "config": None if entry.config is None else texts["config"],
        "ref": str(entry.ref),
        "revision": entry.ref.revision,
        "subfolder": entry.ref.subfolder,
    }


def entry_of(row: Mapping[str, Any], results: Sequence[str]) -> ZooEntry:
    """Inverts `row_of`; ``results`` names the result columns.

    Raises:
        ZooError: a column does not hold the JSON that belongs there.
    """
    plain: dict[str, Any] = {name: row.get(name) for name in _PLAIN}
    where, revision, subfolder = row["model_id"], row["revision"], row["subfolder"]
    location = row["ref"].removesuffix(f":{subfolder}" if subfolder else "")
    location = location.removesuffix(f"@{revision}" if revision else "")
    metrics = []
    for values in parse_json(row.get("metrics"), list, where) or ():
        try:
            metrics.append(ReportedMetric(**values))
        except TypeError as error:
            message = f"{where}: the index holds {shown(values)} where a metric belongs; write the zoo again"
            raise ZooError(message) from error
    return ZooEntry(
        **plain,
        ref=ModelRef(location, revision, subfolder),
        results={name: row[name] for name in results if row[name] is not None},
        hyperparameters=parse_json(row["hyperparameters"], dict, where),
        config=parse_json(row["config"], dict, where),
        lineage=tuple(parse_json(row["lineage"], list, where)),
        datasets=tuple(parse_json(row.get("datasets"), list, where) or ()),
        metrics=tuple(metrics),
    )


def parse_json(text: str | None, kind: type, where: str) -> Any:
    """Parses a JSON column; None stays None. Raises `ZooError` if it is not valid JSON of this ``kind``."""
    if text is None:
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, kind):
            return value
    raise ZooError(f"{where}: the index holds {shown(text)} where a JSON {kind.__name__} belongs; write the zoo again")


def header_digest(blob: bytes | memoryview, header: Header) -> str:
    """Returns the first 16 hex digits of the sha256 of the header bytes of ``blob``."""
    return hashlib.sha256(memoryview(blob)[: header.size]).hexdigest()[:16]


def content_digest(blob: bytes | bytearray, header: Header) -> str:
    """Returns 64 hex digits that are equal for the same names, dtypes, shapes and bytes of tensors.

    The order of the tensors in the file and the free text of its header make no difference.
    """
    view = memoryview(blob)
    digest = hashlib.sha256()
    for name in sorted(header.tensors):
        stored = header.tensors[name]
        digest.update(f"{name}\n{stored.spec.dtype} {stored.spec.shape}\n".encode())
        digest.update(view[stored.start : stored.end])
    return digest.hexdigest()


def check_finite(blob: bytes | bytearray, header: Header) -> None:
    """Raises `ZooError` if a complete safetensors file has NaN or infinite weights."""
    # Tensors of one dtype are contiguous, so that thousands of small ones are checked at once.
    for dtype, members in groupby(header.tensors.values(), key=lambda stored: stored.spec.dtype):
        run = list(members)
        known = dtype.startswith(_FLOATS) and dtype in DTYPES
        for stored in run if known and _nonfinite(blob, run[0].start, run[-1].end, dtype) else ():
            if count := _nonfinite(blob, stored.start, stored.end, dtype):
                spec = stored.spec
                raise ZooError(f"tensor {shown(spec.name)} has {count} NaN or infinite values of {spec.numel}")


def check_usable(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that no encoder could ever be given.

    Raises:
        WeightspaceError: its numbers are not the weights, none of them is a floating point number, or its config
            describes another network.
    """
    checkpoint.ensure_weights()
    if not checkpoint.architecture.numel:
        raise ZooError(f"{checkpoint.where}: none of its {len(checkpoint.specs)} tensors has floating point entries")


def check_entry(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that must not enter a zoo.

    Raises:
        WeightspaceError: see `check_usable`; or at least half of its tensors are empty.
    """
    check_usable(checkpoint)
    empty = [name for name, spec in checkpoint.specs.items() if not spec.numel]
    if 2 * len(empty) >= len(checkpoint.specs):
        raise ZooError(
            f"{checkpoint.where}: {len(empty)} of its {len(checkpoint.specs)} tensors are empty, e.g. "
            f"{shown(empty[0])}; save it again with all weights gathered (ZeRO-3 leaves such files)"
        )


def _nonfinite(blob: bytes | bytearray, start: int, stop: int, dtype: str) -> int:
    count, step = 0, 2**22
    for first in range(start, stop, step):
        # torch needs aligned, writable memory
        piece = bytearray(memoryview(blob)[first : min(first + step, stop)])
        values = torch.frombuffer(piece, dtype=DTYPES[dtype])
        finite = torch.isfinite(values.float() if values.dtype.itemsize == 1 else values)
        count += len(finite) - int(finite.sum())
    return count


def read_state(folder: Path) -> dict[str, Any] | None:
    """Reads ``zoo.json``; None if it does not exist.

    Raises:
        ZooError: it is damaged, or written by a newer version.
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
    """Reads ``(file, reason)`` of what was left out of a zoo; empty if unknown. Raises `ZooError` if damaged."""
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
    """Turns errors while reading the parquet file ``path`` into a ``ZooError``."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ZooError(f"{path}: cannot be read ({' '.join(str(error).split())}); write the zoo again") from error


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a small parquet file. Raises `ZooError` if it is missing or damaged."""
    with reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: yields a temporary path whose file is synced and renamed to ``path`` if the block succeeds.

    Raises:
        ZooError: the disk is full or the folder cannot be written; nothing is left at the temporary path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            yield partial
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def is_partial(path: Path) -> bool:
    """Whether this is the temporary file of a killed `replacing`."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def check_empty(folder: Path, advice: str, *, allowed: Collection[str] = ()) -> None:
    """Raises `ZooError` with ``advice`` if a folder holds files other than ``allowed`` and temporary ones."""
    paths = folder.iterdir() if folder.is_dir() else ()
    if names := [path.name for path in paths if path.name not in allowed and not is_partial(path)]:
        raise ZooError(f"{folder}: holds {min(names)!r}{advice}")


def unwritable(path: Path, error: OSError) -> ZooError:
    """Returns the error to raise if ``path`` cannot be written."""
    return ZooError(f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder")
