"""What a crawl has fetched and not yet put into a shard: a file for each checkpoint, whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightspace.crawl.fetch import Fetched
from weightspace.errors import CheckpointError
from weightspace.io.header import parse_header
from weightspace.schema import ModelRef, ReportedMetric, ZooEntry
from weightspace.zoo.content import content_digest
from weightspace.zoo.writer import RemoteWeights

SPOOL = "fetched"
"""Name of the spool in the folder of the zoo, while the crawl goes on."""

_SUFFIX = ".fetched"
_PREFIX = 8


class Spool:
    """A folder of fetched checkpoints, by their number in the plan.

    A file is the length of a JSON record in 8 bytes, the record, and the weights. Files are not synced to disk one by
    one: what a machine lost in a crash is found out by its content, and fetched again.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the spool in ``folder``, which need not exist; removes what a kill left half written."""
        self._folder = folder
        for partial in folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def sizes(self) -> dict[int, int]:
        """Returns the bytes of the weights in each whole file, by its number; removes damaged files."""
        found = {}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            size = self._checked_size(int(path.stem))
            if size is None:
                path.unlink()
            else:
                found[int(path.stem)] = size
        return found

    def put(self, number: int, fetched: Fetched) -> int:
        """Keeps what was fetched, and returns the bytes of its weights.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        path = self._path(number)
        partial = path.with_name(f".{path.name}.partial")
        entry, weights = fetched.model or (None, b"")
        blob = b"" if isinstance(weights, RemoteWeights) else weights
        record = {
            "entry": None if entry is None else asdict(entry),
            "remote": asdict(weights) if isinstance(weights, RemoteWeights) else None,
            "skipped": fetched.skipped,
            "stored": len(blob),
        }
        text = json.dumps(record).encode()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.writelines([len(text).to_bytes(_PREFIX, "little"), text, blob])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return len(blob)

    def get(self, number: int) -> Fetched:
        """Returns what was put."""
        content = self._path(number).read_bytes()
        start = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
        record = json.loads(content[_PREFIX:start])
        blob = content[start:]
        if record["stored"] != len(blob):
            raise ValueError(f"{len(blob)} bytes of {record['stored']}")
        skipped = None if record["skipped"] is None else (record["skipped"][0], record["skipped"][1])
        model: tuple[ZooEntry, bytes | RemoteWeights] | None = None
        if record["entry"] is not None:
            weights = blob if record["remote"] is None else RemoteWeights(**record["remote"])
            model = _entry(record["entry"]), weights
        return Fetched(model, skipped)

    def drop(self, numbers: range) -> None:
        """Removes what stands in a finished shard."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07d}{_SUFFIX}"

    def _checked_size(self, number: int) -> int | None:
        try:
            model = self.get(number).model
            if model is None:
                return 0
            entry, weights = model
            if isinstance(weights, RemoteWeights):
                return 0
            header = parse_header(weights, file_size=len(weights), where="spool")
            return len(weights) if content_digest(weights, header) == entry.content else None
        except (ValueError, LookupError, TypeError, CheckpointError):
            return None


def _entry(record: Mapping[str, Any]) -> ZooEntry:
    values = {
        **record,
        "ref": ModelRef(**record["ref"]),
        "lineage": tuple(record["lineage"]),
        "datasets": tuple(record["datasets"]),
        "metrics": tuple(ReportedMetric(**metric) for metric in record["metrics"]),
    }
    return ZooEntry(**values)
