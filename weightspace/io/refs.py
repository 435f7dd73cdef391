"""Text to `ModelRef`: where a model lives, checked before anything is opened."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from weightspace.errors import CheckpointError
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
    if subfolder is not None and not _is_inside(subfolder):
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


def _is_inside(subfolder: str) -> bool:
    path = PurePosixPath(subfolder)
    return (
        str(path) == subfolder
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in subfolder
        and subfolder != "."
    )
