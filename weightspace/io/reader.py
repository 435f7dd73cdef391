"""Where the bytes of a file come from.

`ByteSource` is all that the rest of the package knows of a file, so that a file on the Hub, read by ranges, can
stand where a local one does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from weightspace.errors import CheckpointError


class ByteSource(ABC):
    """A file of known size that is read by byte ranges.

    Attributes:
        where: the file's name in errors.
        size: bytes in the file.
    """

    where: str
    size: int

    @abstractmethod
    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start`` to ``stop`` (exclusive) as a flat view of unsigned bytes.

        A writable view belongs to the caller alone, or is memory whose owner agreed to share it: tensors are laid over
        it without a copy. A read-only view is copied first.
        """


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
