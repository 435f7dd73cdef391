"""The Hugging Face Hub: calls that survive its bad moments, repositories pinned to a commit, files read by ranges.

Nothing is downloaded whole unless it is asked for whole. What was fetched is kept in huggingface_hub's assets cache
(``HF_ASSETS_CACHE``), beside the files that huggingface_hub itself keeps, which are used where they are there.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Literal, ParamSpec, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import (
    DatasetInfo,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, get_hf_file_metadata, repo_folder_name
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    tqdm,
)

from weightspace.errors import CheckpointError, HubError
from weightspace.files import write_whole
from weightspace.io.folders import Folder, is_visible
from weightspace.io.header import load_json_object, shown
from weightspace.io.ranges import Range, SpanStore, spans, subtract, union
from weightspace.io.reader import ByteSource, Piece, open_file
from weightspace.schema import ModelRef

P = ParamSpec("P")
T = TypeVar("T")
RepoType = Literal["model", "dataset"]

LIBRARY = "weightspace"
ATTEMPTS = 6
"""Times that a request is sent before its error counts."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 300.0
"""Seconds before the second attempt, doubled for each further one; and the longest wait that a server can ask for."""

CONNECTIONS = 8
"""Requests under way at once: more gained nothing at 30 ms of latency."""

_PASSING = (408, 429, 500, 502, 503, 504)
_TIMEOUT = 30.0
_SHOWN_BYTES = 8 * 2**20
_SHA = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\*|\d+)")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubOptions:
    """How the Hub is reached.

    Attributes:
        token: a user's token; None takes the one of ``hf auth login`` or ``HF_TOKEN``, False sends none.
        local_files_only: use what is in the caches and ask nobody.
        keep: keep fetched ranges in the cache.
        quiet: show no progress of large reads.
    """

    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    keep: bool = True
    quiet: bool = False

    @property
    def offline(self) -> bool:
        """Whether the network must not be used, as asked for here or by ``HF_HUB_OFFLINE``."""
        return self.local_files_only or constants.is_offline_mode()


@dataclass(frozen=True)
class HubEntry:
    """One file of a repository at one commit; what a listing does not tell is None until the file is resolved.

    Attributes:
        path: inside the repository.
        size: bytes.
        etag: sha256 of a file in large file storage, git's sha1 of any other.
    """

    path: str
    size: int | None = None
    etag: str | None = None


def call_hub(where: str, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Calls a function that talks to the Hub, again if need be, and says in one line what remains wrong.

    Rate limits, server errors and lost connections are tried again after the time that the server asks for, or after
    waits that double.

    Args:
        where: what the call is about, named in errors.
        function: raises huggingface_hub's or httpx2's errors.
        *arguments: of ``function``.
        **options: of ``function``.

    Raises:
        HubError: the repository is missing, gated or private, or the Hub is out of reach.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function(*arguments, **options)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            wait = _wait_before_retry(error, attempt)
            if wait is None:
                raise hub_error(error, where) from error
            time.sleep(wait)
        except (OfflineModeIsEnabled, EntryNotFoundError, HFValidationError) as error:
            raise hub_error(error, where) from error
    raise AssertionError("the last attempt either returns or raises")


def hub_error(error: Exception, where: str) -> HubError:
    """Says what an error of huggingface_hub or httpx2 means, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case GatedRepoError():
            text = "the repository is gated; ask for access on its page, then `hf auth login` or give a token"
        case DisabledRepoError():
            text = "the Hub has disabled this repository; choose another"
        case RepositoryNotFoundError():
            text = (
                "no such repository on the Hub, or a private one that your token does not open; check the name, "
                "or `hf auth login`"
            )
        case RevisionNotFoundError():
            text = "no such revision; name a branch, a tag or a commit of this repository"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            text = "not in the cache, and the Hub may not be asked (offline); run it online once"
        case EntryNotFoundError():
            text = "the repository has no such file; check the name"
        case HFValidationError():
            text = f"not a repository id ({' '.join(str(error).split())}); write org/name"
        case _ if status in (401, 403):
            text = "the Hub refuses access; check that your token is valid and has the permission (`hf auth login`)"
        case _ if status == 429:
            text = "the Hub limits the rate of requests; wait some minutes, or log in for a higher limit"
        case _ if status is not None:
            server = getattr(error, "server_message", None)
            text = f"the Hub answers {status}{f' ({shown(server)})' if server else ''}; try again later"
        case _:
            text = f"the Hub at {constants.ENDPOINT} is out of reach ({_reason(error)}); check the connection"
    return HubError(f"{where}: {text}")


def _not_here(where: str) -> HubError:
    cause = OfflineModeIsEnabled()
    error = hub_error(cause, where)
    error.__cause__ = cause
    return error


def is_passing(error: HubError) -> bool:
    """Whether the Hub could not be asked, which says nothing about the repository: the same may work later."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        # A token that is refused has no error of its own; a repository that it does not open has.
        return status in _PASSING or (status == 401 and type(cause) is HfHubHTTPError)
    return isinstance(cause, httpx2.TransportError | OfflineModeIsEnabled)


class HubRepo:
    """A repository at one commit. It is the same for ever, whatever happens to its branches.

    Attributes:
        repo_id: ``org/name``.
        sha: the commit.
        entries: files by path.
        options: how the Hub is reached.
    """

    def __init__(
        self,
        repo_id: str,
        sha: str,
        entries: Iterable[HubEntry],
        options: HubOptions | None = None,
        *,
        repo_type: RepoType = "model",
    ) -> None:
        """Takes what a listing says; use `open_repo` to ask the Hub."""
        self.repo_id, self.sha, self.repo_type = repo_id, sha, repo_type
        self.options = options or HubOptions()
        self.entries: Mapping[str, HubEntry] = {entry.path: entry for entry in entries}
        self.fetched_bytes = 0
        self._counting = threading.Lock()

    def __str__(self) -> str:
        """Returns the repository with its commit, cut to what people read."""
        return f"{self.repo_id}@{self.sha[:12]}"

    def folder(self, path: str = "") -> HubFolder:
        """Returns the repository, or a folder inside it."""
        return HubFolder(self, path)

    def file(self, path: str) -> HubFile:
        """Opens a file; nothing is read yet.

        Raises:
            HubError: there is no such file.
        """
        if path not in self.entries:
            raise HubError(f"{self}: no file {shown(path)}; the repository has {len(self.entries)} others")
        return HubFile(self, self.entries[path])

    def download(self, path: str) -> Path:
        """Fetches a whole file into huggingface_hub's own cache.

        Raises:
            HubError: it cannot be had.
        """
        found = call_hub(
            f"{self}:{path}",
            hf_hub_download,
            self.repo_id,
            path,
            repo_type=self.repo_type,
            revision=self.sha,
            token=self.options.token,
            local_files_only=self.options.local_files_only,
            library_name=LIBRARY,
        )
        return Path(found)

    def cached(self, path: str) -> Path | None:
        """Returns where huggingface_hub's cache holds the whole file, or None."""
        found = try_to_load_from_cache(self.repo_id, path, revision=self.sha, repo_type=self.repo_type)
        return Path(found) if isinstance(found, str) else None

    def count(self, size: int) -> None:
        """Adds to the bytes that came over the network."""
        with self._counting:
            self.fetched_bytes += size


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
    listings = _Listings(repo_id, repo_type)
    cached = listings.find(revision or "main")
    if options.offline and cached is None:
        raise _not_here(where)
    # What stands at a commit never changes, so that a listing of one need not be asked for again.
    if cached is not None and (options.offline or _SHA.fullmatch(revision or "")):
        return HubRepo(repo_id, *cached, options, repo_type=repo_type)
    api = HfApi(token=options.token, library_name=LIBRARY)
    ask = partial(api.repo_info, repo_id, revision=revision, repo_type=repo_type, files_metadata=True, timeout=_TIMEOUT)
    try:
        # With a listing at hand there is no need to wait for a Hub that does not answer.
        info = call_hub(where, ask) if cached is None else ask()
    except (httpx2.TransportError, HfHubHTTPError) as error:
        passing = isinstance(error, httpx2.TransportError) or error.response.status_code in _PASSING
        if cached is not None and passing:
            return HubRepo(repo_id, *cached, options, repo_type=repo_type)
        raise hub_error(error, where) from error
    assert isinstance(info, ModelInfo | DatasetInfo)
    if not isinstance(info.sha, str) or not _SHA.fullmatch(info.sha):
        raise HubError(f"{where}: the Hub names no commit ({shown(info.sha)}); is {constants.ENDPOINT} a Hub?")
    files = info.siblings or ()
    entries = [HubEntry(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files]
    listings.keep(revision or "main", info.sha, entries)
    return HubRepo(repo_id, info.sha, entries, options, repo_type=repo_type)


class HubFolder(Folder):
    """A repository at one commit, or a folder inside it."""

    def __init__(self, repo: HubRepo, path: str = "") -> None:
        """Takes the folder ``path`` of a repository; empty for all of it."""
        self.repo = repo
        self._prefix = f"{path}/" if path else ""
        self.where = f"{repo}:{path}" if path else str(repo)

    @cached_property
    def _files(self) -> tuple[str, ...]:
        # Nobody can choose a file whose name cannot be printed.
        own = (path.removeprefix(self._prefix) for path in self.repo.entries if path.startswith(self._prefix))
        return tuple(sorted(path for path in own if path.isprintable() and is_visible(path) and path[0] != "/"))

    def names(self) -> Sequence[str]:
        """Returns the files directly inside; see `Folder.names`."""
        return [path for path in self._files if "/" not in path]

    def has(self, name: str) -> bool:
        """Whether there is a file at this relative path."""
        return self._prefix + name in self.repo.entries

    def tree(self) -> Sequence[str]:
        """Returns the files of the tree below; see `Folder.tree`."""
        return self._files

    def open(self, name: str) -> ByteSource:
        """Opens a file to be read by ranges; see `Folder.open`."""
        return self.repo.file(self._prefix + name)

    def local_path(self, name: str) -> Path:
        """Fetches the whole file; see `Folder.local_path`."""
        return self.repo.download(self._prefix + name)

    def ref(self, name: str = "") -> ModelRef:
        """Returns the reference of a file or of the folder, pinned to the commit."""
        return ModelRef(self.repo.repo_id, self.repo.sha, (self._prefix + name).rstrip("/") or None)

    def title(self, name: str) -> str:
        """Returns repository, commit and path of a file."""
        return f"{self.repo}:{self._prefix}{name}"


class HubFile(ByteSource):
    """A file of a repository, read by byte ranges over several connections; whatever is in a cache is not fetched."""

    first_read = 16 * 2**10

    def __init__(self, repo: HubRepo, entry: HubEntry) -> None:
        """Opens ``entry`` of ``repo``; nothing is read yet."""
        self.where = f"{repo}:{entry.path}"
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
            raise _not_here(self.where)
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
        folder = _assets(self._repo.repo_id, self._repo.repo_type)
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
            raise _not_here(self.where)
        url = hf_hub_url(repo.repo_id, self._listed.path, repo_type=repo.repo_type, revision=repo.sha)
        found = call_hub(
            self.where, get_hf_file_metadata, url, token=repo.options.token, timeout=_TIMEOUT, library_name=LIBRARY
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
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
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


def _wait_before_retry(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt, or None if there is no point or no attempt left."""
    if attempt + 1 == ATTEMPTS:
        return None
    wait = FIRST_WAIT * 2**attempt * random.uniform(1, 1.25)  # so that processes that failed together do not return so
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in _PASSING:
            return None
        asked = _asked_wait(error.response.headers)
        wait = wait if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    with suppress(ValueError):
        return max(0.0, float(headers["Retry-After"])) if "Retry-After" in headers else _until_reset(headers)
    return None  # a date: the doubling waits serve as well


def _until_reset(headers: Mapping[str, str]) -> float | None:
    limits = parse_ratelimit_headers(headers)
    return float(limits.reset_in_seconds) if limits is not None and limits.remaining == 0 else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _assets(repo_id: str, repo_type: str) -> Path:
    name = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    return Path(constants.HF_ASSETS_CACHE) / LIBRARY / name


class _Listings:
    """The listings of a repository in the cache: a file for each commit, and the commit of each revision asked for."""

    def __init__(self, repo_id: str, repo_type: RepoType) -> None:
        self._folder = _assets(repo_id, repo_type)
        self._hub_cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)

    def keep(self, revision: str, sha: str, entries: Iterable[HubEntry]) -> None:
        with suppress(OSError):  # only means that it is asked for again
            write_whole(
                self._folder / "commits" / f"{sha}.json", json.dumps({"files": [asdict(one) for one in entries]})
            )
            write_whole(self._folder / "refs" / quote(revision, safe=""), sha)

    def find(self, revision: str) -> tuple[str, list[HubEntry]] | None:
        sha = revision if _SHA.fullmatch(revision) else self._sha_of(revision)
        if sha is None:
            return None
        with suppress(OSError, KeyError, TypeError, CheckpointError):
            path = self._folder / "commits" / f"{sha}.json"
            listed = load_json_object(path.read_bytes(), where=str(path))
            return sha, [HubEntry(**one) for one in listed["files"]]
        snapshot = self._hub_cache / "snapshots" / sha
        files = [path for path in snapshot.rglob("*") if path.is_file()] if snapshot.is_dir() else []
        entries = [HubEntry(PurePosixPath(path.relative_to(snapshot)).as_posix()) for path in files]
        return (sha, entries) if entries else None

    def _sha_of(self, revision: str) -> str | None:
        for path in (self._folder / "refs" / quote(revision, safe=""), self._hub_cache / "refs" / revision):
            with suppress(OSError):
                sha = path.read_text().strip()
                if _SHA.fullmatch(sha):
                    return sha
        return None
