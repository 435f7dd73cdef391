"""Kills at chosen moments: what a folder looks like then, and whether the next run ends in the same files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CHANGES = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")


class Killed(BaseException):
    """Ends a call to the file system as a kill would, as far as files are concerned."""


class Watch:
    """Counts the calls that open or change files below a folder, and raises `Killed` at all from a chosen one on."""

    def __init__(self) -> None:
        self.folder, self.count, self.fatal = "", 0, 0
        sys.addaudithook(self._audit)  # there is no way to take it out again

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder and event in _CHANGES and self.folder in str(arguments[0]):
            self.count += 1
            if 0 < self.fatal <= self.count:
                raise Killed

    def run(self, folder: Path, work: Callable[[], T], fatal: int = 0) -> T:
        """Does work that writes into ``folder``; it dies at the call with the number ``fatal``."""
        self.folder, self.count, self.fatal = str(folder), 0, fatal
        try:
            return work()
        finally:
            self.folder = ""


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
