"""Atomic writes: a file is complete under its name, or absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; its file replaces ``path`` when the block ends without an error.

    The file is synced to disk before it is renamed, so that neither a kill nor a full disk leaves half of it. The
    temporary name is unique, so that processes that write the same file do not disturb each other.

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


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically; missing parent folders are created.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
