"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path`` whose file takes its place when the block ends without an error.

    The file is on disk before it takes the place, so that neither a kill nor a full disk leaves half of it; its name
    is a new one each time, so that processes that write the same file do not disturb each other.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left beside ``path``.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all, and its folder if need be.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
