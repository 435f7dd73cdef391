"""What a crawl has fetched but not yet written into a shard: one file per checkpoint, written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from weightspace.errors import WeightspaceError
from weightspace.io.header import parse_header
from weightspace.schema import ZooEntry
from weightspace.settings import settings_from_mapping
from weightspace.zoo.storage import content_digest
from weightspace.zoo.writer import Candidate, RemoteWeights, Skip

SPOOL = "fetched"
"""Name of the spool in the folder of the zoo, until the crawl is complete."""

_SUFFIX = ".fetched"
_PREFIX = 8


@dataclass(frozen=True)
class Fetched:
    """The result of fetching one checkpoint of a plan.

    Attributes:
        candidate: the model, or why it is left out; None if the Hub was out of reach.
        unreachable: why the Hub was out of reach.
        bytes: number of bytes downloaded.
    """

    candidate: Candidate | None = None
    unreachable: str | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint that was fetched into the spool.

    Attributes:
        size: bytes of its weights in the spool; None if the Hub was out of reach.
        fetched: number of bytes downloaded.
        skipped: whether it is left out of the zoo.
        unreachable: why the Hub was out of reach.
    """

    size: int | None
    fetched: int = 0
    skipped: bool = False
    unreachable: str | None = None


class Spool:
    """A folder of fetched checkpoints, by their number in the plan.

    A file is the length of a JSON record in 8 bytes, the record, and the weights. Files are not synced to disk one by
    one: damage by a crash of the machine is detected by the content, and the checkpoint is fetched again.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the spool in ``folder``, which need not exist; removes temporary files of a kill."""
        self._folder = folder
        for partial in folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def sizes(self) -> dict[int, int]:
        """Returns the bytes of the weights in each file, by number; removes damaged files."""
        found = {}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            number = int(path.stem)
            try:
                found[number] = len(_blob(self.get(number)))
            except (ValueError, LookupError, TypeError, WeightspaceError):
                path.unlink()
        return found

    def put(self, number: int, fetched: Fetched) -> Outcome:
        """Keeps what was fetched, unless the Hub was out of reach.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        candidate = fetched.candidate
        if candidate is None:
            return Outcome(None, fetched.bytes, unreachable=fetched.unreachable)
        skip = candidate if isinstance(candidate, Skip) else None
        entry, weights = (None, None) if isinstance(candidate, Skip) else candidate
        blob = _blob(candidate)
        record = {
            "entry": None if entry is None else asdict(entry),
            "remote": asdict(weights) if isinstance(weights, RemoteWeights) else None,
            "skipped": skip,
            "stored": len(blob),
        }
        text = json.dumps(record).encode()
        path = self._path(number)
        partial = path.with_name(f".{path.name}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.writelines([len(text).to_bytes(_PREFIX, "little"), text, blob])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return Outcome(len(blob), fetched.bytes, skip is not None)

    def get(self, number: int) -> Candidate:
        """Returns what was put. Raises any of several errors if the file is damaged."""
        content = self._path(number).read_bytes()
        start = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
        record, blob = json.loads(content[_PREFIX:start]), content[start:]
        if record["stored"] != len(blob):
            raise ValueError(f"{len(blob)} bytes of {record['stored']}")
        if record["entry"] is None:
            return Skip(*record["skipped"])
        entry = settings_from_mapping(ZooEntry, record["entry"])
        if record["remote"] is not None:
            return entry, RemoteWeights(**record["remote"])
        if content_digest(blob, parse_header(blob, file_size=len(blob), where="spool")) != entry.content:
            raise ValueError("other tensors than were fetched")
        return entry, blob

    def drop(self, numbers: Iterable[int]) -> None:
        """Removes what is in a finished shard."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07d}{_SUFFIX}"


def _blob(candidate: Candidate) -> bytes:
    """The weights that are stored; none of models that are skipped or stay on the Hub."""
    weights = b"" if isinstance(candidate, Skip) else candidate[1]
    return b"" if isinstance(weights, RemoteWeights) else weights
