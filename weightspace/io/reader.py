"""Where the bytes of a file come from.

`ByteSource` is all that the rest of the package knows of a file, so that a file on the Hub, read by ranges, can
stand where a local one does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from weightspace.errors import CheckpointError


class ByteSource(ABC):
    """A file of known size that is read by byte ranges.

    Attributes:
        where: the file's name in errors.
        size: bytes in the file.
        first_read: bytes worth reading at once from the start of a file whose header is wanted.
    """

    where: str
    size: int
    first_read: ClassVar[int] = 512

    @abstractmethod
    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start`` to ``stop`` (exclusive) as a flat view of unsigned bytes.

        A writable view belongs to the caller alone, or is memory whose owner agreed to share it: tensors are laid over
        it without a copy. A read-only view is copied first.
        """

    @classmethod
    def read_all(cls, pieces: Sequence[Piece]) -> list[memoryview]:
        """Reads pieces of files of this class, in the order of ``pieces``; see `ByteSource.read`."""
        return [piece.source.read(piece.start, piece.stop) for piece in pieces]


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` (exclusive) of a file."""

    source: ByteSource
    start: int
    stop: int


def gather(pieces: Sequence[Piece]) -> list[memoryview]:
    """Reads pieces of any files, so that sources that know how to read many at once can do so.

    Returns:
        The bytes of each piece, in the order of ``pieces``; see `ByteSource.read`.
    """
    places: dict[type[ByteSource], list[int]] = {}
    for place, piece in enumerate(pieces):
        places.setdefault(type(piece.source), []).append(place)
    views: dict[int, memoryview] = {}
    for kind, own in places.items():
        views.update(zip(own, kind.read_all([pieces[place] for place in own]), strict=True))
    return [views[place] for place in range(len(pieces))]


class MemorySource(ByteSource):
    """Bytes that are in memory (or mapped into it) already; reading copies nothing."""

    def __init__(self, blob: bytes | bytearray | memoryview, *, where: str) -> None:
        """Wraps the complete bytes of a file that is called ``where`` in errors."""
        self.where = where
        self._view = memoryview(blob).cast("B")
        self.size = len(self._view)

    def read(self, start: int, stop: int) -> memoryview:
        """Returns the range as a view; see `ByteSource.read`."""
        return self._view[start:stop]


def open_file(path: Path) -> ByteSource:
    """Maps a local file into memory; pages are read when they are touched.

    The mapping is private: writing to a tensor over it never reaches the file. It holds no file descriptor, so that
    thousands of checkpoints can be open at once, and goes with the last tensor over it.

    Raises:
        CheckpointError: the file is missing, is no regular file or cannot be read.
    """
    try:
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path}: {problem}; check the path")
        size = path.stat().st_size
        if size == 0:
            return MemorySource(b"", where=str(path))
        entries = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError, ValueError) as error:  # torch reports a failed open or mapping as RuntimeError
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    return MemorySource(entries.numpy().data, where=str(path))
