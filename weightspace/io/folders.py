"""Folders of files, wherever they lie: what opening a checkpoint needs to know of its surroundings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from weightspace.errors import CheckpointError
from weightspace.io.header import MAX_HEADER_BYTES, load_json_object
from weightspace.io.reader import ByteSource, open_file
from weightspace.schema import ModelRef


class Folder(ABC):
    """A folder whose files are opened by name.

    Attributes:
        where: the folder's name in errors.
    """

    where: str

    @abstractmethod
    def names(self, parent: str = "") -> Sequence[str]:
        """Returns the names of what is directly inside a folder and no folder itself, sorted, hidden ones left out.

        Raises:
            CheckpointError: the folder cannot be listed.
        """

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file at this relative path."""

    @abstractmethod
    def tree(self) -> Sequence[str]:
        """Returns the relative POSIX paths of all that is below and no folder, sorted; hidden ones are left out."""

    @abstractmethod
    def open(self, name: str) -> ByteSource:
        """Opens a file by its relative path.

        Raises:
            CheckpointError: there is no such file, or it cannot be read.
            HubError: the Hub cannot deliver it.
        """

    @abstractmethod
    def local_path(self, name: str) -> Path:
        """Returns where the whole file lies on this machine, after fetching it if need be.

        Raises:
            HubError: the Hub cannot deliver it.
        """

    @abstractmethod
    def ref(self, name: str = "") -> ModelRef:
        """Returns the reference that opens a file again, or the folder."""

    def title(self, name: str) -> str:
        """Returns the file's name in errors."""
        return f"{self.where}/{name}"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON object, or returns None where there is no such file directly inside.

        Raises:
            CheckpointError: the file is too long or holds something else.
        """
        if not self.has(name):
            return None
        source = self.open(name)
        if source.size > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{source.where}: {source.size} bytes of JSON are above the limit of {MAX_HEADER_BYTES}"
            )
        # Some editors of Windows begin a file with a byte order mark.
        return load_json_object(bytes(source.read(0, source.size)).removeprefix(BOM_UTF8), where=source.where)

    def read_side_file(self, name: str, notes: list[str]) -> dict[str, Any] | None:
        """Reads a JSON object that weights can do without: one that cannot be read is a line in ``notes``, and None.

        Raises:
            HubError: the Hub cannot deliver it.
        """
        try:
            return self.read_json(name)
        except CheckpointError as error:
            notes.append(f"{error}; it is not used")
            return None


class LocalFolder(Folder):
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        """Takes the folder as it is; nothing is read."""
        self.where = str(path)
        self._path = path

    def names(self, parent: str = "") -> Sequence[str]:
        """Returns the files directly inside; see `Folder.names`."""
        try:
            paths = list((self._path / parent).iterdir())
        except OSError as error:
            raise CheckpointError(
                f"{self.title(parent)}: cannot be listed ({error.strerror}); check the path and its permissions"
            ) from error
        return sorted(path.name for path in paths if path.name[0] != "." and not path.is_dir())

    def has(self, name: str) -> bool:
        """Whether there is a file at this relative path."""
        return (self._path / name).is_file()

    def tree(self) -> Sequence[str]:
        """Returns the files of the tree below; see `Folder.tree`."""
        found = (path.relative_to(self._path) for path in self._path.rglob("*") if not path.is_dir())
        return sorted(path.as_posix() for path in found if is_visible(path.as_posix()))

    def open(self, name: str) -> ByteSource:
        """Maps a file into memory; see `Folder.open`."""
        return open_file(self._path / name)

    def local_path(self, name: str) -> Path:
        """Returns the path of a file."""
        return self._path / name

    def ref(self, name: str = "") -> ModelRef:
        """Returns the path of a file or of the folder as a reference."""
        return ModelRef(str(self._path / name))

    def title(self, name: str) -> str:
        """Returns the path of a file."""
        return str(self._path / name)


def is_visible(path: str) -> bool:
    """Whether no part of a relative path begins with a dot."""
    return not any(part.startswith(".") for part in PurePosixPath(path).parts)
