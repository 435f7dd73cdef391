"""Zoos on the Hub, fetched or read by ranges; and reference zoos, whose models are read from their own repositories."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from huggingface_hub import snapshot_download

from weightspace.errors import HubError, ZooError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import shown
from weightspace.io.hub import LIBRARY, HubEntry, HubOptions, call_hub
from weightspace.io.hub_repo import CONNECTIONS, HubRepo, open_repo
from weightspace.io.locations import is_repo_id, parse_ref
from weightspace.io.reader import ByteSource
from weightspace.schema import ZooEntry
from weightspace.zoo.storage import read_state

_AHEAD_BYTES = 256 * 2**20
_MAX_STATE_BYTES = 2**25


def open_zoo_repo(location: str, revision: str | None, options: HubOptions) -> HubRepo:
    """Pins the dataset repository of a zoo, ``org/name`` or ``org/name@revision``, to a commit.

    Raises:
        ZooError: the location is no repository, names two revisions, or the repository holds no zoo.
        HubError: the repository does not exist, access is refused, or the Hub is out of reach.
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
    if size is not None and size > _MAX_STATE_BYTES:
        raise ZooError(f"{repo}: {size} bytes of zoo.json are above the limit of {_MAX_STATE_BYTES}; not a zoo")
    return repo


def fetch_zoo(repo: HubRepo, *, weights: bool) -> Path:
    """Fetches ``zoo.json`` and the shards that it names into huggingface_hub's own cache, with or without ``weights``.

    Returns:
        The folder in the cache.

    Raises:
        ZooError: ``zoo.json`` is damaged.
        HubError: a file cannot be fetched.
    """
    folder = repo.local_path("zoo.json").parent
    state = read_state(folder)
    assert state is not None
    if not state["complete"]:
        return folder  # opening it says so
    kinds = ("index", "weights") if weights and not state["reference"] else ("index",)
    wanted = [f"{kind}/{name}.parquet" for kind in kinds for name in state["shards"]]
    if missing := [path for path in wanted if not (folder / path).is_file()]:
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
    if missing := [path for path in missing if not (folder / path).is_file()]:
        raise ZooError(f"{repo}:{missing[0]}: zoo.json names it but the repository lacks it; push the zoo again")
    return folder


def open_input(file: Path | ByteSource) -> pa.NativeFile:
    """Opens a file on disk or on the Hub for pyarrow."""
    return pa.PythonFile(_SourceFile(file), mode="r") if isinstance(file, ByteSource) else pa.OSFile(str(file))


class _SourceFile(io.RawIOBase):
    """A `ByteSource` as a seekable file."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = max(0, starts[whence] + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._source.size if size < 0 else min(self._source.size, self._position + size)
        start, self._position = self._position, max(stop, self._position)
        return bytes(self._source.read(start, stop)) if start < stop else b""


def remote_blobs(models: Iterable[tuple[ZooEntry, int]]) -> Iterator[bytes]:
    """Yields the complete safetensors bytes of models on the Hub, in order, and prefetches the next ones.

    Everything is fetched once and then read from the cache.

    Args:
        models: the entry and the size in bytes of each model.

    Raises:
        HubError: a model cannot be fetched.
        CheckpointError: its content has changed.
    """
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="weightspace-zoo") as pool:
        coming: deque[tuple[Future[bytes], int]] = deque()
        ahead = 0
        try:
            for entry, size in models:
                while coming and (len(coming) == CONNECTIONS or ahead + size > _AHEAD_BYTES):
                    blob, done = coming.popleft()
                    ahead -= done
                    yield blob.result()
                coming.append((pool.submit(_read, entry, size), size))
                ahead += size
            while coming:
                yield coming.popleft()[0].result()
        finally:
            for blob, _ in coming:
                blob.cancel()


def _read(entry: ZooEntry, size: int) -> bytes:
    ref = entry.ref
    if ref.revision is None or ref.subfolder is None:
        raise HubError(f"{entry.model_id}: {shown(str(ref))} names no file at a commit of the Hub; write the zoo again")
    if ref.subfolder.endswith(".json"):
        blob = open_checkpoint(ref).to_bytes()
    else:
        # The index says all that a listing of the repository would.
        file = HubRepo(ref.location, ref.revision, [HubEntry(ref.subfolder, size, entry.content)]).open(ref.subfolder)
        blob = bytes(file.read(0, size))
    if len(blob) != size:
        raise HubError(f"{entry.model_id}: {len(blob)} bytes where the zoo was made of {size}; write the zoo again")
    return blob
