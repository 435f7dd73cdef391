"""Writing a zoo shard by shard, so that a writer killed at any moment can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from weightspace.errors import ZooError
from weightspace.io.header import parse_header, shown
from weightspace.schema import ZooEntry
from weightspace.zoo.storage import (
    FORMAT_VERSION,
    GROUP_BYTES,
    GROUP_ROWS,
    MAX_BLOB_BYTES,
    RESULTS,
    SHARD_NAME,
    check_empty,
    header_digest,
    index_schema,
    packed,
    read_state,
    read_table,
    replacing,
    row_of,
    unwritable,
    weights_schema,
    write_text,
)

T = TypeVar("T")

SHARD_MODELS, SHARD_BYTES = 1024, 256 * 2**20
"""Limits of a shard; a larger model gets its own."""

README = """\
---
configs:
- config_name: index
  data_files: index/*.parquet
  default: true
- config_name: weights
  data_files: weights/*.parquet
tags:
- weightspace
- model-zoo
---

# A zoo of trained models

One row a model: `index` holds what is known of each model, `weights` adds its complete safetensors bytes.

```python
from weightspace.zoo.dataset import load_zoo

zoo = load_zoo("path/to/this/folder")
zoo.index                      # a data frame
for batch in zoo.batches():    # flat weights of models that share one header
    ...
```
"""


@dataclass(frozen=True)
class RemoteWeights:
    """Weights that stay on the Hub, in place of their bytes.

    Attributes:
        header: digest of the header, see `header_digest`.
        size: bytes of the model.
    """

    header: str
    size: int


class Skip(NamedTuple):
    """A model that is left out of a zoo: its file or repository, and the reason."""

    file: str
    reason: str


Candidate: TypeAlias = tuple[ZooEntry, bytes | RemoteWeights] | Skip


@dataclass(frozen=True)
class ZooSummary:
    """What a command that writes a zoo did.

    Attributes:
        models: number of models in the zoo.
        skipped: ``(file, reason)`` of everything that was left out.
        fetched: bytes that were downloaded in this run.
    """

    models: int
    skipped: tuple[tuple[str, str], ...]
    fetched: int = 0


def cut_shards(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cuts items, in order, into shards of at most `SHARD_MODELS` items and `SHARD_BYTES` bytes."""
    return packed(items, size, SHARD_MODELS, SHARD_BYTES)


class ZooWriter:
    """Writes a zoo shard by shard; a writer that was killed continues after the last finished shard.

    A shard is finished once its line is in the ledger, which is appended after both of its files are complete under
    their final names. Other files in ``index`` and ``weights`` are remains of a kill: they are overwritten, or removed
    by ``finish``. Only one process at a time may write a zoo.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        settings: Mapping[str, Any],
        results: Sequence[str] = RESULTS,
        reference: bool = False,
        beside: Collection[str] = (),
    ) -> None:
        """Opens a new, an unfinished or a finished zoo.

        Args:
            path: folder of the zoo; created if need be.
            settings: JSON values that determine the content of the zoo; a folder holds the zoo of one settings.
            results: names of the result columns.
            reference: all weights stay on the Hub.
            beside: names of the caller's own files in the folder.

        Raises:
            ZooError: the folder holds something else or a zoo of other settings, or cannot be written.
        """
        self.path = Path(path)
        self.results = tuple(results)
        self._settings, self._reference = dict(settings), reference
        if taken := set(self.results) & set(weights_schema(()).names):
            raise ZooError(f"{path}: {min(taken)!r} cannot be a result column, the zoo format uses it; rename it")
        recorded = json.dumps([self._settings, self.results, *([reference] if reference else [])], sort_keys=True)
        self.digest = hashlib.sha256(recorded.encode()).hexdigest()[:16]
        self._complete = False
        self._ledger: dict[str, dict[str, Any]] = {}
        self._model_ids: set[str] = set()
        self._contents: dict[str, str] = {}
        state = read_state(self.path)
        if state is not None and state["digest"] != self.digest:
            old = state["settings"]
            keys = [key for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)] or ["results"]
            raise ZooError(
                f"{path}: holds a zoo of settings {state['digest']}, not {self.digest} (they differ in "
                f"{', '.join(keys)}); choose another folder or delete this one"
            )
        if state is None:
            check_empty(self.path, " and no zoo; choose an empty or a new folder", allowed=beside)
        for partial in [*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")]:
            partial.unlink(missing_ok=True)
        if state is None:
            self._save_state()
        else:
            self._resume()
            self._complete = state["complete"] and state["shards"] == self._shards()

    @property
    def models(self) -> int:
        """Number of models in finished shards."""
        return len(self._model_ids)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """``(file, reason)`` of everything that was left out, in the order of the shards."""
        return tuple((file, reason) for name in self.shards for file, reason in self._ledger[name]["skipped"])

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the finished shards, sorted."""
        return tuple(sorted(self._ledger))

    def has_shard(self, name: str) -> bool:
        """Whether the shard is finished."""
        return name in self._ledger

    def write_all(
        self,
        shards: Iterable[Sequence[T]],
        load: Callable[[int, Sequence[T]], Iterable[Candidate]],
        *,
        name: Callable[[int, Sequence[T]], str] = lambda number, _: f"{number:05d}",
        skipped: Sequence[tuple[str, str]] = (),
        distinct: bool = False,
        progress: tqdm | None = None,
    ) -> ZooSummary:
        """Writes every shard that is not finished, and finishes the zoo.

        Args:
            shards: what each shard is made from; the same in every run.
            load: returns the models of a shard, given its number and items.
            name: returns the name of a shard, given its number and items.
            skipped: what was left out before there were shards; recorded with the first one.
            distinct: leave out models whose tensors or name an earlier model has.
            progress: counts the items.

        Raises:
            ZooError: see `write_shard` and `finish`.
        """
        for number, items in enumerate(shards):
            shard = name(number, items)
            if not self.has_shard(shard):
                self._write_candidates(shard, load(number, items), skipped if number == 0 else (), distinct)
            if progress is not None:
                progress.update(len(items))
        self.finish()
        return ZooSummary(self.models, self.skipped)

    def _write_candidates(
        self, name: str, candidates: Iterable[Candidate], skipped: Sequence[tuple[str, str]], distinct: bool
    ) -> None:
        entries: list[ZooEntry] = []
        blobs: list[bytes | RemoteWeights] = []
        left_out = list(skipped)
        contents = self._contents if distinct else {}
        ids = set(self._model_ids) if distinct else set()
        for candidate in candidates:
            if isinstance(candidate, Skip):
                left_out.append(candidate)
                continue
            entry, blob = candidate
            if entry.content in contents:
                left_out.append(Skip(str(entry.ref), f"the same tensors as {contents[entry.content]}"))
            elif entry.model_id in ids:
                left_out.append(Skip(str(entry.ref), f"another model has its name {shown(entry.model_id)}"))
            else:
                entries.append(entry)
                blobs.append(blob)
                if distinct:
                    ids.add(entry.model_id)
                    contents |= {} if entry.content is None else {entry.content: entry.model_id}
        self.write_shard(name, entries, blobs, skipped=left_out)

    def write_shard(
        self,
        name: str,
        entries: Sequence[ZooEntry],
        blobs: Sequence[bytes | RemoteWeights],
        *,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Writes one shard; the rows of a zoo follow the order of the sorted shard names.

        The generalization gap, train accuracy - test accuracy, is added where both are known.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``.
            entries: metadata of the models.
            blobs: their safetensors files as bytes, in the same order; `RemoteWeights` for a reference zoo.
            skipped: ``(file, reason)`` of what was left out.

        Raises:
            ZooError: a bad or used name, a repeated model id, an unknown result, or a full disk.
            CheckpointError: a blob is not a complete safetensors file.
        """
        if not SHARD_NAME.fullmatch(name) or name in self._ledger:
            raise ZooError(f"{self.path}: shard {name!r} is no shard name or written already; choose another name")
        if len(entries) != len(blobs):
            raise ZooError(f"{self.path}: shard {name}: {len(entries)} entries but {len(blobs)} blobs; give one each")
        rows = [self._row(entry, blob) for entry, blob in zip(entries, blobs, strict=True)]
        new: set[str] = set()
        for row in rows:
            if (model_id := row["model_id"]) in self._model_ids or model_id in new:
                raise ZooError(f"{self.path}: model id {model_id!r} is there already; give each model its own id")
            new.add(model_id)
        if self._complete:
            self._complete = False
            self._save_state()
        if rows:
            index = pa.Table.from_pylist(rows, schema=index_schema(self.results))
            _write_parquet(self._file("index", name), [index], index.schema)
            stored = [blob for blob in blobs if isinstance(blob, bytes)]
            if self._reference is bool(stored):
                raise ZooError(f"{self.path}: shard {name}: a zoo stores the weights of all its models or of none")
            if stored:
                _write_parquet(self._file("weights", name), _row_groups(index, stored), weights_schema(self.results))
        line = {"shard": name, "models": len(rows), "bytes": self._sizes(name), "skipped": [*map(list, skipped)]}
        self._append(line)
        self._ledger[name] = line
        self._model_ids |= new

    def finish(self) -> None:
        """Marks the zoo as complete.

        Raises:
            ZooError: there is no model in it, or the disk is full.
        """
        if not self._model_ids:
            reasons = "; ".join(f"{file}: {reason}" for file, reason in self.skipped[:1])
            raise ZooError(f"{self.path}: there is no model to make a zoo of ({reasons or 'none was written'})")
        for kind in ("index", "weights"):
            listed = {self._file(kind, name) for name in self._ledger}
            for orphan in set((self.path / kind).glob("*.parquet")) - listed:
                orphan.unlink()
        lines = [json.dumps({"file": file, "reason": reason}) for file, reason in self.skipped]
        write_text(self.path / "skips.jsonl", "".join(f"{line}\n" for line in lines))
        if not (self.path / "README.md").exists():  # the user may have edited it
            write_text(self.path / "README.md", README)
        self._complete = True
        self._save_state()

    def _resume(self) -> None:
        """Reads which shards are finished and what is in them."""
        ledger = self._read_ledger()
        complete = [one for one in ledger if not one["models"] or one["bytes"] == self._sizes(one["shard"])]
        self._ledger = {one["shard"]: one for one in complete}
        for name in self._shards():
            columns = read_table(self._file("index", name), ["model_id", "content"]).to_pydict()
            self._model_ids |= set(columns["model_id"])
            for model_id, content in zip(columns["model_id"], columns.get("content", ()), strict=False):
                if content is not None:
                    self._contents.setdefault(content, model_id)

    def _row(self, entry: ZooEntry, blob: bytes | RemoteWeights) -> dict[str, Any]:
        if isinstance(blob, bytes):
            header = parse_header(blob, file_size=len(blob), where=entry.model_id)
            blob = RemoteWeights(header_digest(blob, header), len(blob))
        if blob.size > MAX_BLOB_BYTES:
            raise ZooError(f"{entry.model_id}: {blob.size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")
        row = {**row_of(entry), "header": blob.header, "size": blob.size}
        if {"train_accuracy", "test_accuracy"} <= entry.results.keys() and "generalization_gap" in self.results:
            row.setdefault("generalization_gap", row["train_accuracy"] - row["test_accuracy"])
        if unknown := entry.results.keys() - set(self.results):
            known = ", ".join(self.results)
            raise ZooError(f"{entry.model_id}: no result column {min(unknown)!r}; the columns are {known}")
        return row

    def _file(self, kind: str, shard: str) -> Path:
        return self.path / kind / f"{shard}.parquet"

    def _sizes(self, shard: str) -> list[int]:
        files = [self._file(kind, shard) for kind in ("index", "weights")]
        return [file.stat().st_size if file.is_file() else 0 for file in files]

    def _read_ledger(self) -> list[dict[str, Any]]:
        path = self.path / "ledger.jsonl"
        if not path.exists():
            return []
        *lines, torn = path.read_bytes().split(b"\n")
        complete = []
        for line in lines:
            # A kill can tear the last line, a failing disk any line: such a shard is written again.
            with suppress(ValueError):
                complete.append(json.loads(line))
        if torn or len(complete) < len(lines):
            write_text(path, "".join(json.dumps(line) + "\n" for line in complete))
        return complete

    def _append(self, line: Mapping[str, Any]) -> None:
        path = self.path / "ledger.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as ledger:
                ledger.write(json.dumps(line).encode() + b"\n")
                ledger.flush()
                os.fsync(ledger.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise unwritable(path, error) from error

    def _shards(self) -> list[str]:
        return [name for name in sorted(self._ledger) if self._ledger[name]["models"]]

    def _save_state(self) -> None:
        state = {
            "version": FORMAT_VERSION,
            "complete": self._complete,
            "reference": self._reference,
            "digest": self.digest,
            "models": self.models,
            "shards": self._shards(),
            "settings": self._settings,
        }
        write_text(self.path / "zoo.json", json.dumps(state, indent=1) + "\n")


def _row_groups(index: pa.Table, blobs: Sequence[bytes]) -> Iterator[pa.Table]:
    """Cuts a shard into tables of bounded rows and bytes, each with the weights of its rows."""
    for rows in packed(range(len(blobs)), lambda row: len(blobs[row]), GROUP_ROWS, GROUP_BYTES):
        weights = pa.array([blobs[row] for row in rows], pa.large_binary())
        yield index.slice(rows[0], len(rows)).append_column("weights", weights)


def _write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes each table as one row group. Weights are stored as they are: floats hardly compress."""
    others = [name for name in schema.names if name != "weights"]
    options = {
        "compression": {name: "zstd" if name in others else "none" for name in schema.names},
        "use_dictionary": others,
        "write_statistics": others,
        "write_page_checksum": True,
    }
    with replacing(path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
