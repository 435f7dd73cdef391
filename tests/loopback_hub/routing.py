"""Which function answers which request, and who may reach a repository."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote, unquote

from loopback_hub.messages import Call, HubError, Moved, Response
from loopback_hub.repositories import Commit, NoSuchRevision, Repository
from loopback_hub.state import KINDS, HubState

_PARTS = {
    "kind": "(?P<kind>models|datasets|spaces)",
    "prefix": "(?P<prefix>datasets/|spaces/|)",
    "id": "(?P<id>[^/]+/[^/]+?)",
    "revision": "(?P<revision>[^/]+)",
    "path": "(?P<path>.+)",
    "name": "(?P<name>[^/]+)",
    "number": "(?P<number>[0-9]+)",
}
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Response]]] = []


def route(method: str, template: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Makes a function the answer to requests whose path fits ``template``.

    Its parts stand in braces and are given by name, unquoted; ``kind`` and ``prefix`` come as ``repo_type``, ``id`` as
    ``repo_id``.
    """
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda part: _PARTS[part[1]], template.replace(".", r"\.")))

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append((method, pattern, function))
        return function

    return register


def dispatch(hub: HubState, call: Call) -> Response:
    """The answer to a request; ``HEAD`` is answered as ``GET``."""
    method = "GET" if call.method == "HEAD" else call.method
    for registered, pattern, function in _ROUTES:
        if registered == method and (match := pattern.fullmatch(call.path)):
            try:
                return function(hub, call, **_arguments(match))
            except Moved as moved:
                old, new = quote(moved.old), quote(moved.new)
                return Response(307, {"Location": call.target.replace(f"/{old}", f"/{new}", 1)})
    raise HubError(501, None, f"the loopback Hub has no endpoint {call.method} {call.path}")


def reach(
    hub: HubState, call: Call, repo_type: str, repo_id: str, to: Literal["see", "read", "write"] = "see"
) -> Repository:
    """The repository, if it is there and the user may see it, read its files, or write.

    As on the real Hub nobody learns whether a private repository exists: not found is 401 for the anonymous, else 404.
    """
    repository = hub.repositories.get((repo_type, repo_id))
    if repository is None and (repo_type, repo_id) in hub.moved:
        raise Moved(repo_id, hub.moved[repo_type, repo_id])
    if repository is None or not visible(call, repository):
        raise HubError(404 if call.user else 401, "RepoNotFound", "Repository not found")
    owns = call.user is not None and call.user.owns(repository.namespace)
    if to == "write" and not owns:
        raise HubError(403 if call.user else 401, None, f"You have no write access to {repo_type} {repo_id}")
    if to != "see" and repository.gated and not owns:
        if call.user is None:
            raise HubError(401, "GatedRepo", f"Access to {repo_type} {repo_id} is restricted: please log in.")
        if call.user.name not in repository.granted:
            raise HubError(403, "GatedRepo", f"Access to {repo_type} {repo_id} is restricted: ask for access.")
    return repository


def visible(call: Call, repository: Repository) -> bool:
    """Whether the user may know of a repository."""
    return not repository.private or (call.user is not None and call.user.owns(repository.namespace))


def commit_at(repository: Repository, revision: str) -> Commit:
    """The commit that a revision names."""
    try:
        return repository.at(revision)
    except NoSuchRevision:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None


def _arguments(match: re.Match[str]) -> dict[str, Any]:
    parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
    if "kind" in parts:
        parts["repo_type"] = KINDS[parts.pop("kind")]
    if "prefix" in parts:
        parts["repo_type"] = KINDS.get(parts.pop("prefix").rstrip("/"), "model")
    if "id" in parts:
        parts["repo_id"] = parts.pop("id")
    return parts
