"""Files and their content: atomic writes, where a file is complete under its name or absent, and values for JSON."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def json_ready(value: Any) -> Any:
    """Converts a value to what JSON can hold: NaN and infinities become null, arrays lists, and unknown types text."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
