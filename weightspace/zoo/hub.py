"""Zoos on the Hub: pinned to a commit, then fetched whole or read by ranges."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from weightspace.errors import HubError, ZooError
from weightspace.io.header import MAX_HEADER_BYTES
from weightspace.io.hub import LIBRARY, HubOptions, call_hub
from weightspace.io.hub_repo import HubRepo, open_repo
from weightspace.io.locations import is_repo_id, parse_ref
from weightspace.io.reader import ByteSource
from weightspace.zoo.storage import read_state


def open_zoo_repo(location: str, revision: str | None, options: HubOptions) -> HubRepo:
    """Pins the dataset repository of a zoo to a commit.

    Args:
        location: ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit; the default branch if neither names one.
        options: how the Hub is reached.

    Raises:
        ZooError: the location is no repository, names two revisions, or the repository holds no zoo.
        HubError: the Hub lacks it, refuses, or is out of reach.
    """
    ref = parse_ref(location)
    if not is_repo_id(ref.location) or ref.subfolder is not None:
        raise ZooError(f"{location}: no such folder; give the folder of a zoo or org/name[@revision] of the Hub")
    if revision is not None and ref.revision is not None and revision != ref.revision:
        raise ZooError(f"{location}: revision {revision!r} is asked for as well; name one of the two")
    try:
        repo = open_repo(ref.location, revision or ref.revision, options, repo_type="dataset")
    except HubError as error:
        raise HubError(f"dataset {error}; nor is there a folder of that name here") from error
    size = repo.entries["zoo.json"].size if "zoo.json" in repo.entries else None
    if size is None and "zoo.json" not in repo.entries:
        raise ZooError(f"{repo}: no zoo (there is no zoo.json); give a dataset that `weightspace push` made")
    if size is not None and size > MAX_HEADER_BYTES:
        raise ZooError(f"{repo}: {size} bytes of zoo.json are above the limit of {MAX_HEADER_BYTES}; not a zoo")
    return repo


def fetch_zoo(repo: HubRepo, *, weights: bool) -> Path:
    """Fetches ``zoo.json`` and the shards that it names into huggingface_hub's own cache.

    Args:
        repo: what `open_zoo_repo` returns.
        weights: the weights too, and not only what is known of the models.

    Returns:
        The folder in the cache.

    Raises:
        ZooError: ``zoo.json`` is damaged.
        HubError: a file cannot be had.
    """
    folder = repo.local_path("zoo.json").parent
    state = read_state(folder)
    assert state is not None
    if not state["complete"]:
        return folder  # opening it says so
    kinds = ("index", "weights") if weights and not state["reference"] else ("index",)
    wanted = [f"{kind}/{name}.parquet" for kind in kinds for name in state["shards"]]
    if missing := _missing(folder, wanted):
        call_hub(
            str(repo),
            snapshot_download,
            repo.repo_id,
            repo_type=repo.repo_type,
            revision=repo.sha,
            allow_patterns=missing,
            token=repo.options.token,
            local_files_only=repo.options.local_files_only,
            library_name=LIBRARY,
        )
    if missing := _missing(folder, wanted):
        raise ZooError(f"{repo}:{missing[0]}: zoo.json names it but the repository lacks it; push the zoo again")
    return folder


def _missing(folder: Path, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not (folder / path).is_file()]


class SourceFile(io.RawIOBase):
    """A `ByteSource` as a file that can be sought in, for readers that want one."""

    def __init__(self, source: ByteSource) -> None:
        """Opens ``source`` at its first byte; nothing is read yet."""
        self._source, self._place = source, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The next byte to be read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a byte, as any file does."""
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}
        self._place = max(0, starts[whence] + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills ``buffer`` as far as the file goes."""
        target = memoryview(buffer).cast("B")
        stop = min(self._source.size, self._place + len(target))
        if stop <= self._place:
            return 0
        content = self._source.read(self._place, stop)
        target[: len(content)] = content
        self._place = stop
        return len(content)
