"""Repositories of the Hub, pinned to a commit, and their files, read by byte ranges.

Files are downloaded whole only where a caller needs them whole. Fetched ranges are kept in huggingface_hub's assets
cache (``HF_ASSETS_CACHE``), beside the files that huggingface_hub itself keeps, which are used where they exist.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import httpx2
from huggingface_hub import (
    DatasetInfo,
    HfApi,
    HfFileMetadata,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, tqdm

from weightspace.errors import HubError
from weightspace.io.folders import Folder, is_visible
from weightspace.io.header import shown
from weightspace.io.hub import (
    COMMIT_SHA,
    LIBRARY,
    TIMEOUT,
    HubEntry,
    HubOptions,
    Listings,
    RepoType,
    assets_folder,
    call_hub,
    hub_error,
    is_transient_cause,
    offline_error,
)
from weightspace.io.ranges import Range, SpanStore, spans, subtract, union
from weightspace.io.reader import ByteSource, Piece, open_file
from weightspace.schema import ModelRef

CONNECTIONS = 8
"""Requests under way at once: more gained nothing at 30 ms of latency."""

_SHOWN_BYTES = 8 * 2**20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\*|\d+)")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HubRepo(Folder):
    """A repository at one commit, or a folder inside it. It never changes, whatever happens to its branches.

    Attributes:
        repo_id: ``org/name``.
        sha: the commit.
        entries: files by path, the whole repository's.
        options: how the Hub is reached.
        fetched_bytes: what came over the network so far.
    """

    def __init__(
        self,
        repo_id: str,
        sha: str,
        entries: Iterable[HubEntry],
        options: HubOptions | None = None,
        *,
        repo_type: RepoType = "model",
        path: str = "",
    ) -> None:
        """Takes what a listing says, and the folder ``path``, empty for all of it; `open_repo` asks the Hub."""
        self.repo_id, self.sha, self.repo_type = repo_id, sha, repo_type
        self.options = options or HubOptions()
        self.entries: Mapping[str, HubEntry] = {entry.path: entry for entry in entries}
        self.fetched_bytes = 0
        self._counting = threading.Lock()
        self._prefix = f"{path}/" if path else ""
        self._name = f"{repo_id}@{sha[:12]}"
        self.where = f"{self._name}:{path}" if path else self._name

    def __str__(self) -> str:
        """Returns the repository with its commit, shortened, and the folder."""
        return self.where

    def folder(self, path: str) -> HubRepo:
        """Returns the folder at a path of the repository."""
        return HubRepo(self.repo_id, self.sha, self.entries.values(), self.options, repo_type=self.repo_type, path=path)

    @cached_property
    def _files(self) -> tuple[str, ...]:
        # Nobody can choose a file whose name cannot be printed.
        below = (path.removeprefix(self._prefix) for path in self.entries if path.startswith(self._prefix))
        return tuple(sorted(path for path in below if path.isprintable() and is_visible(path) and path[0] != "/"))

    def names(self, parent: str = "") -> Sequence[str]:
        """Returns the files directly inside; see `Folder.names`."""
        prefix = f"{parent}/" if parent else ""
        below = (path.removeprefix(prefix) for path in self._files if path.startswith(prefix))
        return [path for path in below if "/" not in path]

    def has(self, name: str) -> bool:
        """Whether there is a file at this relative path."""
        return self._prefix + name in self.entries

    def tree(self) -> Sequence[str]:
        """Returns the files of the tree below; see `Folder.tree`."""
        return self._files

    def open(self, name: str) -> HubFile:
        """Opens a file to be read by ranges; nothing is read yet.

        Raises:
            HubError: there is no such file.
        """
        if not self.has(name):
            raise HubError(f"{self}: no file {shown(name)}; the repository has {len(self.entries)} others")
        return HubFile(self, self.entries[self._prefix + name])

    def local_path(self, name: str) -> Path:
        """Fetches a whole file into huggingface_hub's own cache; see `Folder.local_path`."""
        found = call_hub(
            self.title(name),
            hf_hub_download,
            self.repo_id,
            self._prefix + name,
            repo_type=self.repo_type,
            revision=self.sha,
            token=self.options.token,
            local_files_only=self.options.local_files_only,
            library_name=LIBRARY,
        )
        return Path(found)

    def cached(self, path: str) -> Path | None:
        """Returns where huggingface_hub's cache holds the whole file of the repository, or None."""
        found = try_to_load_from_cache(self.repo_id, path, revision=self.sha, repo_type=self.repo_type)
        return Path(found) if isinstance(found, str) else None

    def count(self, size: int) -> None:
        """Adds to the bytes that came over the network."""
        with self._counting:
            self.fetched_bytes += size

    def ref(self, name: str = "") -> ModelRef:
        """Returns the reference of a file or of the folder, pinned to the commit."""
        return ModelRef(self.repo_id, self.sha, (self._prefix + name).rstrip("/") or None)

    def title(self, name: str) -> str:
        """Returns repository, commit and path of a file."""
        return f"{self._name}:{self._prefix}{name}"


def open_repo(
    repo_id: str, revision: str | None = None, options: HubOptions | None = None, *, repo_type: RepoType = "model"
) -> HubRepo:
    """Pins a repository to a commit and lists its files, with one request.

    Without a network the last listing of this revision in the cache serves, as with transformers.

    Raises:
        HubError: the repository or the revision cannot be had.
    """
    options = options or HubOptions()
    where = f"{repo_id}@{revision}" if revision else repo_id
    listings = Listings(repo_id, repo_type)
    cached = listings.find(revision or "main")
    if options.offline and cached is None:
        raise offline_error(where)
    # The files of a commit never change, so a listing of one is requested once.
    if cached is not None and (options.offline or COMMIT_SHA.fullmatch(revision or "")):
        return HubRepo(repo_id, *cached, options, repo_type=repo_type)
    api = HfApi(token=options.token, library_name=LIBRARY)
    ask = partial(api.repo_info, repo_id, revision=revision, repo_type=repo_type, files_metadata=True, timeout=TIMEOUT)
    try:
        # With a cached listing there is no need to wait for a Hub that does not answer.
        info = call_hub(where, ask) if cached is None else ask()
    except (httpx2.TransportError, HfHubHTTPError) as error:
        if cached is not None and is_transient_cause(error):
            return HubRepo(repo_id, *cached, options, repo_type=repo_type)
        raise hub_error(error, where) from error
    assert isinstance(info, ModelInfo | DatasetInfo)
    if not isinstance(info.sha, str) or not COMMIT_SHA.fullmatch(info.sha):
        raise HubError(f"{where}: the Hub names no commit ({shown(info.sha)}); is {constants.ENDPOINT} a Hub?")
    files = info.siblings or ()
    entries = [HubEntry(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files]
    listings.keep(revision or "main", info.sha, entries)
    return HubRepo(repo_id, info.sha, entries, options, repo_type=repo_type)


class HubFile(ByteSource):
    """A file of a repository, read by byte ranges over several connections; whatever is in a cache is not fetched."""

    first_read = 16 * 2**10

    def __init__(self, repo: HubRepo, entry: HubEntry) -> None:
        """Opens ``entry`` of ``repo``; nothing is read yet."""
        self.where = f"{repo.repo_id}@{repo.sha[:12]}:{entry.path}"
        self._repo, self._listed = repo, entry
        self._address: HfFileMetadata | None = None
        self._asking = threading.Lock()

    @property
    def size(self) -> int:  # type: ignore[override]
        """Bytes in the file; asks the Hub if the listing did not tell."""
        if self._local is not None:
            return self._local.size
        size = self._entry.size
        if size is None:
            raise HubError(f"{self.where}: the Hub does not tell its size; it cannot be read by ranges")
        return size

    @property
    def quiet(self) -> bool:
        """Whether large reads show no progress."""
        return self._repo.options.quiet

    @property
    def etag(self) -> str | None:
        """What names the file's content, if the Hub tells: sha256 in large file storage, git's sha1 of other files."""
        return self._entry.etag

    def read(self, start: int, stop: int) -> memoryview:
        """Reads one range; see `ByteSource.read`. A file that is read whole is checked against its hash."""
        view = self.read_all([Piece(self, start, stop)])[0]
        if start == 0 and stop == self.size and self._local is None:
            self._check_content(view)
        return view

    @classmethod
    def read_all(cls, pieces: Sequence[Piece]) -> list[memoryview]:
        """Reads pieces of any files of any repositories: neighbours together, large ones in parts, all in parallel.

        Raises:
            HubError: a range cannot be had.
        """
        views: list[memoryview | None] = [None] * len(pieces)
        remote: dict[HubFile, list[int]] = {}
        for place, piece in enumerate(pieces):
            file = piece.source
            assert isinstance(file, HubFile)
            if file._local is not None:
                views[place] = file._local.read(piece.start, piece.stop)
            else:
                remote.setdefault(file, []).append(place)
        jobs = []
        for file, places in remote.items():
            wanted = [pieces[place] for place in places]
            buffers = [memoryview(bytearray(piece.stop - piece.start)) for piece in wanted]
            jobs += file._plan(wanted, buffers)
            for place, buffer in zip(places, buffers, strict=True):
                views[place] = buffer
        _run(jobs)
        return [view for view in views if view is not None]

    def _plan(self, wanted: Sequence[Piece], buffers: Sequence[memoryview]) -> list[_Job]:
        """Fills ``buffers`` from the cache, and returns what is to be fetched for the rest."""
        ranges = union((piece.start, piece.stop) for piece in wanted)
        missing = subtract(ranges, self._store.held())
        try:
            for piece, buffer in zip(wanted, buffers, strict=True):
                for start, stop in subtract([(piece.start, piece.stop)], missing):
                    self._store.read_into(buffer[start - piece.start : stop - piece.start], start)
        except OSError:
            self._store.forget()
            missing = ranges
        if missing and self._repo.options.offline:
            raise offline_error(self.where)
        targets = sorted(zip(wanted, buffers, strict=True), key=lambda target: target[0].start)
        return [_Job(self, span, tuple(_overlapping(targets, span))) for span in spans(missing)]

    @cached_property
    def _local(self) -> ByteSource | None:
        path = self._repo.cached(self._listed.path)
        return None if path is None else open_file(path)

    @cached_property
    def _entry(self) -> HubEntry:
        if self._listed.size is not None and self._listed.etag is not None:
            return self._listed
        found = self._resolve()
        return replace(self._listed, size=found.size, etag=found.etag)

    @cached_property
    def _store(self) -> SpanStore:
        etag = self._entry.etag or ""
        name = etag if _ETAG.fullmatch(etag) else hashlib.sha256(f"{self.where} {etag}".encode()).hexdigest()
        folder = assets_folder(self._repo.repo_id, self._repo.repo_type)
        return SpanStore(folder / name, self.size)

    def _resolve(self) -> HfFileMetadata:
        """Finds where the bytes lie at present: on the Hub itself, or at an address that is signed for a while."""
        with self._asking:  # threads that read parts of one file ask once
            if self._address is None:
                self._address = self._ask()
            return self._address

    def _ask(self) -> HfFileMetadata:
        repo = self._repo
        if repo.options.offline:
            raise offline_error(self.where)
        url = hf_hub_url(repo.repo_id, self._listed.path, repo_type=repo.repo_type, revision=repo.sha)
        found = call_hub(
            self.where, get_hf_file_metadata, url, token=repo.options.token, timeout=TIMEOUT, library_name=LIBRARY
        )
        listed = self._listed
        for name, expected, actual in (("size", listed.size, found.size), ("ETag", listed.etag, found.etag)):
            if expected is not None and actual is not None and expected != actual:
                raise HubError(
                    f"{self.where}: the Hub lists {name} {expected} but serves {shown(actual)}; "
                    "a proxy or mirror may be stale, try again later"
                )
        return found

    def fetch(self, span: Range) -> bytearray:
        """Reads one range over the network, going on where a broken connection left off.

        Raises:
            HubError: the range cannot be had.
        """
        start, stop = span
        content = bytearray()

        def attempt() -> None:
            url = self._resolve().location
            headers = build_hf_headers(token=self._repo.options.token, library_name=LIBRARY)
            signed = not url.startswith(f"{constants.ENDPOINT}/")
            if signed:
                headers.pop("authorization", None)  # such an address takes no token, and must not see one
            headers |= {"Range": f"bytes={start + len(content)}-{stop - 1}", "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                if signed and response.status_code in (401, 403):
                    self._address = None
                    raise httpx2.ReadError("the address of the file has expired")
                if response.is_error:
                    response.read()
                hf_raise_for_status(response)
                self._check_range(response, start + len(content))
                for chunk in response.iter_raw():
                    taken = chunk[: stop - start - len(content)]
                    if not taken:
                        break  # a server that ignores the range goes on to the end of the file
                    content.extend(taken)
                    self._repo.count(len(taken))
            if len(content) < stop - start:
                raise httpx2.ReadError(f"only {len(content)} of {stop - start} bytes came")

        call_hub(self.where, attempt)
        if self._repo.options.keep:
            self._store.add(start, content)
        return content

    def _check_range(self, response: httpx2.Response, start: int) -> None:
        served = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(served)
        begins_right = int(match[1]) == start if match else response.status_code == 200 and start == 0
        if not begins_right or (match and match[2] not in ("*", str(self.size))):
            raise HubError(
                f"{self.where}: asked for byte {start} of {self.size}, the server answers {response.status_code} "
                f"{shown(served)}; fetch the file whole with `hf download`"
            )

    def _check_content(self, content: memoryview) -> None:
        etag = self._entry.etag or ""
        if len(etag) == 64:
            digest = hashlib.sha256(content).hexdigest()
        elif len(etag) == 40:
            git = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
            git.update(content)
            digest = git.hexdigest()
        else:
            return
        if _ETAG.fullmatch(etag) and digest != etag:
            self._store.discard()
            raise HubError(f"{self.where}: the bytes do not have the listed hash {etag[:12]}; fetch it again")


@dataclass(frozen=True)
class _Job:
    """A range to fetch, and the parts of buffers that it fills: buffer, place in it, range of the file."""

    file: HubFile
    span: Range
    targets: tuple[tuple[memoryview, Range], ...]

    def run(self) -> int:
        content = memoryview(self.file.fetch(self.span))
        for target, (start, stop) in self.targets:
            target[:] = content[start - self.span[0] : stop - self.span[0]]
        return len(content)


def _overlapping(targets: Sequence[tuple[Piece, memoryview]], span: Range) -> Iterable[tuple[memoryview, Range]]:
    for piece, buffer in targets:
        if piece.start >= span[1]:
            break
        start, stop = max(piece.start, span[0]), min(piece.stop, span[1])
        if start < stop:
            yield buffer[start - piece.start : stop - piece.start], (start, stop)


def _run(jobs: Sequence[_Job]) -> None:
    total = sum(job.span[1] - job.span[0] for job in jobs)
    if len(jobs) < 2:
        for job in jobs:
            job.run()
        return
    pool = ThreadPoolExecutor(min(CONNECTIONS, len(jobs)), thread_name_prefix="weightspace-hub")
    hidden = None if total >= _SHOWN_BYTES and not jobs[0].file.quiet else True
    try:
        with tqdm(total=total, desc="fetch", unit="B", unit_scale=True, leave=False, disable=hidden) as progress:
            for size in pool.map(_Job.run, jobs):
                progress.update(size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
