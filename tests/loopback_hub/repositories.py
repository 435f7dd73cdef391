"""Repositories in memory: blobs, commits that never change, and the names that point to them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

_LARGE_SUFFIX = re.compile(
    r"\.(7z|arrow|bin|bz2|ckpt|gguf|gz|h5|joblib|model|msgpack|np[yz]|onnx|ot|parquet|pb|pickle|pkl|pth?|rar"
    r"|safetensors|tar|tgz|wasm|xz|zip|zst)$"
)
_LARGE_BYTES = 10 * 2**20
PIECE = 2**18
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class NoSuchRevision(LookupError):
    """A revision that no branch, tag, pull request or commit has."""


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to large file storage, as the attributes of a new repository say; empty files never do."""
    return size > 0 and (size > _LARGE_BYTES or _LARGE_SUFFIX.search(path) is not None)


@dataclass(frozen=True, eq=False)
class Blob:
    """The content of one file: bytes, or a file on disk that is read only where it is asked for."""

    source: bytes | Path
    size: int
    oid: str
    """Git's name of the content, or of the pointer file that stands for it in git."""
    sha256: str | None = None
    """Name in large file storage; None for what git itself holds."""
    pointer_size: int = 0

    @staticmethod
    def of(path: str, content: bytes | str | Path) -> Blob:
        """The blob that ``content`` becomes when it is uploaded as ``path``."""
        if isinstance(content, Path):
            if is_large(path, content.stat().st_size):
                return Blob.large(content, _sha256_of_file(content))
            content = content.read_bytes()
        content = content.encode() if isinstance(content, str) else content
        if is_large(path, len(content)):
            return Blob.large(content, hashlib.sha256(content).hexdigest())
        return Blob.regular(content)

    @staticmethod
    def regular(content: bytes) -> Blob:
        """A file that git itself holds."""
        return Blob(content, len(content), _git_oid(content))

    @staticmethod
    def large(source: bytes | Path, sha256: str) -> Blob:
        """A file in large file storage. ``sha256`` is believed: ``source`` is not read."""
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Blob(source, size, _git_oid(pointer), sha256, len(pointer))

    @property
    def etag(self) -> str:
        """What the client names the file in its cache."""
        return self.sha256 or self.oid

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop``."""
        return b"".join(self.pieces(start, self.size if stop is None else min(stop, self.size)))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` in pieces of at most ``PIECE``."""
        if isinstance(self.source, bytes):
            for position in range(start, stop, PIECE):
                yield self.source[position : min(position + PIECE, stop)]
            return
        with self.source.open("rb", buffering=0) as file:
            file.seek(start)
            for position in range(start, stop, PIECE):
                yield file.read(min(PIECE, stop - position))


@dataclass(frozen=True, eq=False)
class Commit:
    """One state of all files. ``files`` is never changed, so that a pinned commit goes on serving what it held."""

    sha: str
    parent: Commit | None
    files: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: datetime

    @cached_property
    def folders(self) -> dict[str, str]:
        """Every folder with its git name."""
        contents: dict[str, Any] = {}
        for path, blob in sorted(self.files.items()):
            for folder in _parents(path):
                contents.setdefault(folder, hashlib.sha1()).update(f"{path}\0{blob.oid}\0".encode())
        return {folder: digest.hexdigest() for folder, digest in contents.items()}

    @cached_property
    def paths(self) -> list[str]:
        """Files and folders in the order in which they are listed."""
        return sorted({*self.files, *self.folders})

    def history(self) -> Iterator[Commit]:
        """This commit and the ones before it, last first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> Commit:
        """The commit that gave a file or folder the content that it has here."""
        changed = self
        for commit in self.history():
            if commit._name_of(path) != self._name_of(path):
                break
            changed = commit
        return changed

    def _name_of(self, path: str) -> str | None:
        return self.files[path].oid if path in self.files else self.folders.get(path)


@dataclass
class Pull:
    """A discussion, or a pull request with commits of its own under ``refs/pr/N``."""

    number: int
    title: str
    author: str
    date: datetime
    is_pull_request: bool
    status: str = "open"
    events: list[dict[str, Any]] = field(default_factory=list)
    base: Commit | None = None
    merged: str | None = None


@dataclass(eq=False)
class Repository:
    """One repository: its settings and what its names point to."""

    type: str
    id: str
    private: bool = False
    gated: bool | str = False
    downloads: int = 0
    likes: int = 0
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_heads: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    @property
    def namespace(self) -> str:
        """User or organisation."""
        return self.id.partition("/")[0]

    @property
    def created(self) -> datetime:
        """Time of the first commit."""
        return next(iter(self.commits.values())).date

    @property
    def last_modified(self) -> datetime:
        """Time of the last commit on main."""
        return self.branches["main"].date

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request, or commit sha of at least seven digits names.

        ``HEAD`` is main.
        """
        revision = "main" if revision == "HEAD" else revision
        for names in (self.branches, self.tags, self.pull_heads, self.commits):
            if revision in names:
                return names[revision]
        if re.fullmatch(r"[0-9a-f]{7,39}", revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise NoSuchRevision(revision)

    def heads_with(self, revision: str) -> dict[str, Commit] | None:
        """The names that a commit on ``revision`` would move, or None if it cannot be committed to."""
        return next((heads for heads in (self.branches, self.pull_heads) if revision in heads), None)

    def new_commit(
        self,
        parent: Commit | None,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str = "",
        author: str = "loopback",
        number: int = 0,
    ) -> Commit:
        """A commit of ``changes`` (None deletes) on ``parent``, which no name points to yet.

        Its time is the ``number``-th second of 2026, so that equal commits in equal order have equal shas.
        """
        files = dict(parent.files) if parent else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        date = _EPOCH + timedelta(seconds=number)
        digest = hashlib.sha1(f"{parent.sha if parent else ''}\0{title}\0{message}\0{author}\0{date}".encode())
        digest.update(f"{self.type}\0{self.id}".encode())
        for path in sorted(files):
            digest.update(f"\0{path}\0{files[path].oid}".encode("utf-8", "surrogatepass"))
        commit = Commit(digest.hexdigest(), parent, files, title, message, author, date)
        self.commits[commit.sha] = commit
        return commit


def _parents(path: str) -> Iterator[str]:
    for position, character in enumerate(path):
        if character == "/":
            yield path[:position]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
