"""Locations: a path, or ``org/name[@revision][:path]`` on the Hub, and the folder that either stands for."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from weightspace.errors import CheckpointError, HubError
from weightspace.io.folders import Folder, LocalFolder
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.io.hub_repo import open_repo
from weightspace.schema import ModelRef

_HUB = re.compile(r"(?P<repo>[^/@:\\]+/[^/@:\\]+)(?:@(?P<revision>[^@:]*))?(?::(?P<subfolder>.*))?")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_LONGEST_REPO = 96  # the Hub's own limit


def parse_ref(text: str) -> ModelRef:
    """Parses a path or ``org/name[@revision][:subfolder]``; ``parse_ref(str(ref))`` gives an equal ref.

    What exists on this machine is a path, whatever it looks like. Otherwise ``a/b`` may be a path or a repository,
    which is found out when it is opened; followed by ``@`` or ``:`` it is a repository and its parts are checked. All
    else is a path.

    Raises:
        CheckpointError: the text is empty, unprintable or a URL, or the repository, revision or subfolder is malformed.
    """
    if not text.strip() or not text.isprintable():
        raise CheckpointError(f"{text!a}: not a model; write a path or org/name[@revision][:subfolder]")
    if "://" in text:
        raise CheckpointError(f"{text}: URLs are not opened; write a path or org/name[@revision][:subfolder]")
    match = _HUB.fullmatch(text)
    if match is None or text.startswith((".", "~")) or _exists(text):
        return ModelRef(text)
    repo, revision, subfolder = match["repo"], match["revision"], match["subfolder"]
    if revision is None and subfolder is None:
        return ModelRef(text)
    _check_repo(repo, text)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/")):
        raise CheckpointError(
            f"{text}: revision {revision!r} is no branch, tag or commit; write org/name@main or a sha"
        )
    if subfolder is not None and not is_inside(subfolder):
        raise CheckpointError(
            f"{text}: subfolder {subfolder!r} must be a relative path inside the repository without '..'"
        )
    return ModelRef(repo, revision, subfolder)


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a repository on the Hub, ``org/name``; it may be a path all the same."""
    parts = text.split("/")
    return (
        len(parts) == 2
        and len(text) <= _LONGEST_REPO
        and not text.endswith(".git")
        and all(_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
    )


def locate(location: str | Path | ModelRef, options: HubOptions | None = None) -> tuple[Folder, str | None] | None:
    """Finds the folder or file that a location stands for; every model of the library is opened through it.

    What exists on this machine is never looked for on the Hub, and a `Path` is only looked for on this machine. A
    repository is pinned to a commit.

    Args:
        location: a path, ``org/name[@revision][:path]``, or either of them parsed.
        options: how the Hub is reached.

    Returns:
        The folder, and the name of the file in it if the location is a file; None if there is no such file or folder
        and it is not the name of a repository.

    Raises:
        CheckpointError: the location is malformed, or the repository has no such path.
        HubError: the Hub lacks the repository, refuses, or is out of reach.
    """
    ref = location if isinstance(location, ModelRef) else ModelRef(str(location))
    if isinstance(location, str):
        ref = parse_ref(location)
    path, may_be_path = Path(ref.location), ref.revision is None and ref.subfolder is None
    if may_be_path and path.is_dir():
        return LocalFolder(path), None
    if may_be_path and path.exists():
        return LocalFolder(path.parent), path.name
    if isinstance(location, Path) or not is_repo_id(ref.location):
        return None
    try:
        repo = open_repo(ref.location, ref.revision, options)
    except HubError as error:
        if may_be_path:
            raise HubError(f"{error}; nor is there a file or folder of that name here") from error.__cause__
        raise
    inside = ref.subfolder or ""
    if inside in repo.entries:
        parent, _, name = inside.rpartition("/")
        return repo.folder(parent), name
    folder = repo.folder(inside)
    if inside and not folder.tree():
        raise CheckpointError(f"{ref}: the repository has no file or folder {shown(inside)}; check the name")
    return folder, None


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a name longer than the file system allows, or a folder that may not be read
        return False


def _check_repo(repo: str, text: str) -> None:
    if not is_repo_id(repo):
        raise CheckpointError(
            f"{text}: {repo!r} is neither an existing path nor a repository; write org/name with letters, digits, "
            f"'-', '_' and '.', {_LONGEST_REPO} characters at most"
        )


def is_inside(name: str) -> bool:
    """Whether a text is a plain relative path inside a repository."""
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and "\\" not in name and name != "."
