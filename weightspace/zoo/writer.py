"""Writing a zoo, in steps that a kill at any moment cannot spoil."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from weightspace.errors import ZooError
from weightspace.io.header import parse_header
from weightspace.schema import ZooEntry
from weightspace.zoo.storage import (
    FORMAT_VERSION,
    GROUP_BYTES,
    GROUP_ROWS,
    MAX_BLOB_BYTES,
    RESULTS,
    SHARD_NAME,
    header_digest,
    index_schema,
    is_partial,
    read_state,
    read_table,
    replacing,
    unwritable,
    weights_schema,
    write_text,
)

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
    """Weights that stay where they are, in place of their bytes.

    Attributes:
        header: digest of the header, see `header_digest`.
        size: bytes of the whole model.
    """

    header: str
    size: int


class ZooWriter:
    """Writes a zoo shard by shard; a writer that was killed goes on where the last finished shard ended.

    A shard counts once its line stands in the ledger, which is appended after both of its files are complete under
    their final names. Whatever else lies in the folder's ``index`` and ``weights`` is left over from a kill: it is
    written again, or removed by ``finish``. One process at a time writes a zoo.
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
            settings: what the zoo's content follows from, ready for JSON; a folder holds the zoo of one settings.
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
        state = read_state(self.path)
        if state is None:
            self._begin(beside)
        elif state["digest"] != self.digest:
            old = state["settings"]
            keys = [key for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)] or ["results"]
            raise ZooError(
                f"{path}: holds a zoo of settings {state['digest']}, not {self.digest} (they differ in "
                f"{', '.join(keys)}); choose another folder or delete this one"
            )
        else:
            self._go_on(complete=state["complete"])

    @property
    def models(self) -> int:
        """Models in finished shards."""
        return len(self._model_ids)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """``(file, reason)`` of everything that was left out, in the order of the shards."""
        return tuple((file, reason) for name in sorted(self._ledger) for file, reason in self._ledger[name]["skipped"])

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the finished shards, sorted."""
        return tuple(sorted(self._ledger))

    def has_shard(self, name: str) -> bool:
        """Whether the shard is finished."""
        return name in self._ledger

    def has_model(self, model_id: str) -> bool:
        """Whether a finished shard has a model of this name."""
        return model_id in self._model_ids

    def contents(self) -> dict[str, str]:
        """Returns the model id of each content in the finished shards, the first one where several have it."""
        found: dict[str, str] = {}
        for name in self._shards():
            table = read_table(self._file("index", name), ["model_id", "content"])
            for model_id, content in zip(*(column.to_pylist() for column in table.columns), strict=True):
                if content is not None:
                    found.setdefault(content, model_id)
        return found

    def write_shard(
        self,
        name: str,
        entries: Sequence[ZooEntry],
        blobs: Sequence[bytes | RemoteWeights],
        *,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Writes one shard; rows of a zoo stand in the order of the sorted shard names.

        The generalization gap, train accuracy - test accuracy, is added where both are known.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``.
            entries: what is known of the models.
            blobs: their safetensors files as bytes, in the same order; for a reference zoo what stands for them.
            skipped: ``(file, reason)`` of what should have been here and is not.

        Raises:
            ZooError: a bad or used name, a repeated model id, an unknown result, or a full disk.
            CheckpointError: a blob is not a whole safetensors file.
        """
        if not SHARD_NAME.fullmatch(name) or name in self._ledger:
            raise ZooError(f"{self.path}: shard {name!r} is no shard name or written already; choose another name")
        if len(entries) != len(blobs):
            raise ZooError(f"{self.path}: shard {name}: {len(entries)} entries but {len(blobs)} blobs; give one each")
        rows = [self._row(entry, blob) for entry, blob in zip(entries, blobs, strict=True)]
        new = self._new_ids(rows)
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
        listed = {self._file(kind, name) for kind in ("index", "weights") for name in self._ledger}
        for kind in ("index", "weights"):
            for orphan in set((self.path / kind).glob("*.parquet")) - listed:
                orphan.unlink()
        lines = [json.dumps({"file": file, "reason": reason}) for file, reason in self.skipped]
        write_text(self.path / "skips.jsonl", "".join(f"{line}\n" for line in lines))
        if not (self.path / "README.md").exists():  # somebody may have written in it
            write_text(self.path / "README.md", README)
        self._complete = True
        self._save_state()

    def _begin(self, beside: Collection[str]) -> None:
        strangers = [file.name for file in self.path.iterdir() if not is_partial(file)] if self.path.is_dir() else []
        strangers = [name for name in strangers if name not in beside]
        if strangers:
            raise ZooError(f"{self.path}: holds {min(strangers)!r} and no zoo; choose an empty or a new folder")
        self._clear_partials()
        self._save_state()

    def _clear_partials(self) -> None:
        for partial in [*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")]:
            partial.unlink(missing_ok=True)

    def _go_on(self, *, complete: bool) -> None:
        self._clear_partials()
        self._ledger = {line["shard"]: line for line in self._read_ledger() if self._is_whole(line)}
        for name, line in self._ledger.items():
            if line["models"]:
                self._model_ids |= set(read_table(self._file("index", name), ["model_id"])["model_id"].to_pylist())
        state = read_state(self.path)
        self._complete = complete and state is not None and state["shards"] == self._shards()

    def _row(self, entry: ZooEntry, blob: bytes | RemoteWeights) -> dict[str, Any]:
        weights = blob if isinstance(blob, RemoteWeights) else _described(blob, entry.model_id)
        size = weights.size
        if size > MAX_BLOB_BYTES:
            raise ZooError(f"{entry.model_id}: {size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")
        results = dict(entry.results)
        if {"train_accuracy", "test_accuracy"} <= results.keys() and "generalization_gap" in self.results:
            results.setdefault("generalization_gap", results["train_accuracy"] - results["test_accuracy"])
        if unknown := results.keys() - set(self.results):
            known = ", ".join(self.results)
            raise ZooError(f"{entry.model_id}: no result column {min(unknown)!r}; the columns are {known}")
        try:
            texts = {
                name: json.dumps(getattr(entry, name)) for name in ("hyperparameters", "config", "lineage", "datasets")
            }
            texts["metrics"] = json.dumps([asdict(metric) for metric in entry.metrics])
        except (TypeError, ValueError) as error:
            raise ZooError(f"{entry.model_id}: not ready for JSON: {error}; use plain numbers and texts") from error
        return {
            "model_id": entry.model_id,
            "run_id": entry.run_id,
            "dataset": entry.dataset,
            **{name: float(value) for name, value in results.items()},
            **texts,
            "config": None if entry.config is None else texts["config"],
            "licence": entry.licence,
            "base_model": entry.base_model,
            "ref": str(entry.ref),
            "revision": entry.ref.revision,
            "subfolder": entry.ref.subfolder,
            "header": weights.header,
            "size": size,
            "task": entry.task,
            "content": entry.content,
        }

    def _new_ids(self, rows: Iterable[Mapping[str, Any]]) -> set[str]:
        new: set[str] = set()
        for row in rows:
            model_id = row["model_id"]
            if model_id in self._model_ids or model_id in new:
                raise ZooError(f"{self.path}: model id {model_id!r} is there already; give each model its own id")
            new.add(model_id)
        return new

    def _file(self, kind: str, shard: str) -> Path:
        return self.path / kind / f"{shard}.parquet"

    def _sizes(self, shard: str) -> list[int]:
        files = [self._file(kind, shard) for kind in ("index", "weights")]
        return [file.stat().st_size if file.is_file() else 0 for file in files]

    def _is_whole(self, line: Mapping[str, Any]) -> bool:
        return not line["models"] or bool(line["bytes"] == self._sizes(line["shard"]))

    def _read_ledger(self) -> list[dict[str, Any]]:
        path = self.path / "ledger.jsonl"
        if not path.exists():
            return []
        *lines, torn = path.read_bytes().split(b"\n")
        whole = []
        for line in lines:
            # A kill can tear the last line, a failing disk any of them: such a shard is written again.
            with suppress(ValueError):
                whole.append(json.loads(line))
        if torn or len(whole) < len(lines):
            write_text(path, "".join(json.dumps(line) + "\n" for line in whole))
        return whole

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


def _described(blob: bytes, where: str) -> RemoteWeights:
    return RemoteWeights(header_digest(blob, parse_header(blob, file_size=len(blob), where=where)), len(blob))


def _row_groups(index: pa.Table, blobs: Sequence[bytes]) -> Iterator[pa.Table]:
    """Cuts a shard into tables of bounded rows and bytes, each with the weights of its rows."""
    start = 0
    while start < len(blobs):
        stop, size = start + 1, len(blobs[start])
        while stop < len(blobs) and stop - start < GROUP_ROWS and size + len(blobs[stop]) <= GROUP_BYTES:
            size += len(blobs[stop])
            stop += 1
        weights = pa.array(blobs[start:stop], pa.large_binary())
        yield index.slice(start, stop - start).append_column("weights", weights)
        start = stop


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
