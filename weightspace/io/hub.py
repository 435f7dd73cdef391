"""Calls to the Hugging Face Hub: options, retries, errors in one line, and listings of repositories in the cache."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, ParamSpec, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import constants
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
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import parse_ratelimit_headers

from weightspace.errors import CheckpointError, HubError
from weightspace.files import atomic_write_text
from weightspace.io.header import load_json_object, shown

P = ParamSpec("P")
T = TypeVar("T")
RepoType = Literal["model", "dataset"]

LIBRARY = "weightspace"
ATTEMPTS = 6
"""Times that a request is sent before its error counts."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 300.0
"""Seconds before the second attempt, doubled for each further one; and the longest wait that a server can ask for."""

COMMIT_SHA = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 30.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)


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
        """Whether the network must not be used, as set here or by ``HF_HUB_OFFLINE``."""
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
    """Calls a function that talks to the Hub, retries transient errors, and reports the others in one line.

    Rate limits, server errors and lost connections are retried after the time that the server asks for, or after waits
    that double.

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
    """Returns what an error of huggingface_hub or httpx2 means, and what to do about it, in one line."""
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
            reason = " ".join(str(error).split()) or type(error).__name__
            text = f"the Hub at {constants.ENDPOINT} is out of reach ({reason}); check the connection"
    return HubError(f"{where}: {text}")


def offline_error(where: str) -> HubError:
    """Returns the error of something that is not in the cache and may not be fetched."""
    cause = OfflineModeIsEnabled()
    error = hub_error(cause, where)
    error.__cause__ = cause
    return error


def is_transient(error: HubError) -> bool:
    """Whether the Hub could not answer, which says nothing about the repository: the same call may work later."""
    cause = error.__cause__
    # A refused token has no error class of its own; a repository that it does not open has.
    refused_token = type(cause) is HfHubHTTPError and cause.response.status_code == 401
    return refused_token or isinstance(cause, OfflineModeIsEnabled) or is_transient_cause(cause)


def is_transient_cause(error: BaseException | None) -> bool:
    """Whether a request failed in a way that a retry may fix: a lost connection, a rate limit or a server error."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return isinstance(error, httpx2.TransportError)


def _wait_before_retry(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt, or None if there is no point or no attempt left."""
    if attempt + 1 == ATTEMPTS or not is_transient_cause(error):
        return None
    wait = FIRST_WAIT * 2**attempt * random.uniform(1, 1.25)  # so that processes that failed together do not return so
    requested = _requested_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else None
    wait = wait if requested is None else requested
    return wait if wait <= LONGEST_WAIT else None


def _requested_wait(headers: Mapping[str, str]) -> float | None:
    if "Retry-After" in headers:
        with suppress(ValueError):
            return max(0.0, float(headers["Retry-After"]))
        return None  # a date: the doubling waits serve as well
    limits = parse_ratelimit_headers(headers)
    return float(limits.reset_in_seconds) if limits is not None and limits.remaining == 0 else None


def assets_folder(repo_id: str, repo_type: str) -> Path:
    """Returns the folder in huggingface_hub's assets cache where this library keeps what it fetched of a repository."""
    name = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    return Path(constants.HF_ASSETS_CACHE) / LIBRARY / name


class Listings:
    """The listings of a repository in the cache: a file for each commit, and the commit of each requested revision."""

    def __init__(self, repo_id: str, repo_type: RepoType) -> None:
        """Opens the listings of one repository; nothing is read yet."""
        self._folder = assets_folder(repo_id, repo_type)
        self._hub_cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)

    def keep(self, revision: str, sha: str, entries: Iterable[HubEntry]) -> None:
        """Stores the listing of a commit that a revision stands for."""
        with suppress(OSError):  # only means that it is requested again
            atomic_write_text(
                self._folder / "commits" / f"{sha}.json", json.dumps({"files": [asdict(one) for one in entries]})
            )
            atomic_write_text(self._folder / "refs" / quote(revision, safe=""), sha)

    def find(self, revision: str) -> tuple[str, list[HubEntry]] | None:
        """Returns commit and files of a revision from this cache, else from huggingface_hub's own, else None."""
        sha = revision if COMMIT_SHA.fullmatch(revision) else self._sha_of(revision)
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
                if COMMIT_SHA.fullmatch(sha):
                    return sha
        return None
