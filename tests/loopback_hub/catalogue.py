"""Endpoints about repositories: making them, listing them, what is known about one, its names."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import yaml

from loopback_hub.facts import Facts
from loopback_hub.messages import Call, HubError, Response, answer
from loopback_hub.repositories import Blob, Commit, Repository
from loopback_hub.routing import commit_at, reach, route, visible
from loopback_hub.state import KINDS, HubState

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_LISTED = "likes private downloads tags pipeline_tag library_name createdAt trendingScore"
_FULL = "author sha lastModified gated disabled siblings"
_INFO = f"{_LISTED} {_FULL} config cardData safetensors model-index baseModels usedStorage spaces"
_NEVER_KNOWN = """downloadsAllTime evalResults gguf inference inferenceProviderMapping mask_token widgetData
    resourceGroup childrenModelCount securityRepoStatus description citation paperswithcode_id mainSize xetEnabled
    transformersInfo"""
_LISTED_BY = """filter author search sort direction limit full config cardData expand num_parameters pipeline_tag gated
    cursor"""


@route("GET", "/api/whoami-v2")
def whoami(hub: HubState, call: Call) -> Response:
    user = call.signed_in()
    token = {"displayName": "loopback", "role": "write"}
    return answer(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name,
            "orgs": [{"type": "org", "id": name, "name": name} for name in user.organizations],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@route("POST", "/api/repos/create")
def create(hub: HubState, call: Call) -> Response:
    asked = call.json()
    repo_type, repo_id = _named(call, asked)
    url = f"{call.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
    with hub.lock:
        if (repo_type, repo_id) in hub.repositories:
            body = {"error": f"You already created this {repo_type} repo", "url": url, "name": repo_id, "id": repo_id}
            return answer(body, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.create(repo_id, {".gitattributes": _ATTRIBUTES}, repo_type=repo_type, private=private)
    return answer({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(hub: HubState, call: Call) -> Response:
    repo_type, repo_id = _named(call, call.json())
    reach(hub, call, repo_type, repo_id, "write")
    hub.delete(repo_id, repo_type)
    return answer({})


@route("POST", "/api/repos/move")
def move(hub: HubState, call: Call) -> Response:
    asked = call.json()
    repo_type, old, new = asked.get("type") or "model", asked["fromRepo"], asked["toRepo"]
    reach(hub, call, repo_type, old, "write")
    if not call.signed_in().owns(new.partition("/")[0]):
        raise HubError(403, None, f"You have no write access to {new}")
    if (repo_type, new) in hub.repositories:
        raise HubError(409, None, f"There is a {repo_type} {new} already")
    hub.move(old, new, repo_type)
    return answer({})


@route("PUT", "/api/{kind}/{id}/settings")
def settings(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id, "write")
    asked = call.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repository.gated = asked["gated"]
    return answer({"private": repository.private, "gated": repository.gated})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubState, call: Call) -> Response:
    match = re.match(r"\ufeff?---\s*\n(.*?)\n?---\s*(\n|$)", call.json()["content"].replace("\r\n", "\n"), re.DOTALL)
    if match is None:
        return answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return answer({"errors": [{"message": str(error)}], "warnings": []}, status=400)
    if metadata is not None and not isinstance(metadata, dict):
        return answer({"errors": [{"message": "the metadata is no mapping"}], "warnings": []}, status=400)
    return answer({"errors": [], "warnings": []})


@route("GET", "/api/{kind}")
def list_repositories(hub: HubState, call: Call, repo_type: str) -> Response:
    unknown = set(call.query) - set(_LISTED_BY.split())
    if unknown:
        raise HubError(501, None, f"the loopback Hub cannot list by {', '.join(sorted(unknown))}")
    with hub.lock:
        found = [
            (repository, hub.facts(repository, repository.at("main")))
            for (kind, _), repository in hub.repositories.items()
            if kind == repo_type and visible(call, repository)
        ]
    found = [(repository, facts) for repository, facts in found if _wanted(call, repository, facts)]
    _sort(found, call.one("sort") or "trendingScore", ascending=call.one("direction") == "1")
    fields = call.query.get("expand") or [
        *_LISTED.split(),
        *(_FULL.split() if call.asks("full") else ()),
        *(key for key in ("config", "cardData") if call.asks(key)),
    ]
    limit = int(call.one("limit") or hub.page_size)
    page, headers = call.page(found, max(1, min(limit, hub.page_size)))
    rows = [_described(repo, repo.at("main"), facts, fields, blobs=False) for repo, facts in page]
    return answer(rows, headers=headers)


@route("GET", "/api/{kind}/{id}")
@route("GET", "/api/{kind}/{id}/revision/{revision}")
def info(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str = "main") -> Response:
    repository = reach(hub, call, repo_type, repo_id)
    commit = commit_at(repository, revision)
    facts = hub.facts(repository, commit)
    fields = call.query.get("expand") or _INFO.split()
    return answer(_described(repository, commit, facts, fields, blobs=call.asks("blobs")))


@route("GET", "/api/{kind}/{id}/auth-check")
@route("GET", "/api/{kind}/{id}/auth-check/{name}")
def auth_check(hub: HubState, call: Call, repo_type: str, repo_id: str, name: str = "read") -> Response:
    reach(hub, call, repo_type, repo_id, "write" if name == "write" else "read")
    return answer({})


@route("GET", "/api/{kind}/{id}/refs")
def refs(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id)
    shown: dict[str, Any] = {"converts": []}
    for key, prefix, names in (
        ("branches", "refs/heads/", repository.branches),
        ("tags", "refs/tags/", repository.tags),
    ):
        shown[key] = [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c.sha} for n, c in names.items()]
    if call.one("include_prs"):
        heads = repository.pull_heads.items()
        shown["pullRequests"] = [{"name": n, "ref": n, "targetCommit": c.sha} for n, c in heads]
    return answer(shown)


@route("GET", "/api/{kind}/{id}/commits/{revision}")
def commits(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str) -> Response:
    history = list(commit_at(reach(hub, call, repo_type, repo_id), revision).history())
    page, headers = call.page(history, 50)
    rows = [
        {"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": _time(c.date)}
        for c in page
    ]
    return answer(rows, headers=headers)


@route("POST", "/api/{kind}/{id}/branch/{name}")
def create_branch(hub: HubState, call: Call, repo_type: str, repo_id: str, name: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id, "write")
    if name.startswith("refs/"):
        raise HubError(400, None, f"Invalid reference for a branch: {name}")
    return _name(repository.branches, name, commit_at(repository, call.json().get("startingPoint") or "main"))


@route("POST", "/api/{kind}/{id}/tag/{revision}")
def create_tag(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id, "write")
    return _name(repository.tags, call.json()["tag"], commit_at(repository, revision))


@route("DELETE", "/api/{kind}/{id}/branch/{name}")
def delete_branch(hub: HubState, call: Call, repo_type: str, repo_id: str, name: str) -> Response:
    if name == "main":
        raise HubError(403, None, "main cannot be deleted")
    return _forget(reach(hub, call, repo_type, repo_id, "write").branches, name)


@route("DELETE", "/api/{kind}/{id}/tag/{name}")
def delete_tag(hub: HubState, call: Call, repo_type: str, repo_id: str, name: str) -> Response:
    return _forget(reach(hub, call, repo_type, repo_id, "write").tags, name)


@route("GET", "/api/agent-harnesses")
@route("GET", "/api/telemetry/{path}")
def nothing(hub: HubState, call: Call, path: str = "") -> Response:
    """Clients ask this of every Hub; there is nothing to tell."""
    return answer({})


def _described(
    repository: Repository, commit: Commit, facts: Facts, fields: list[str], *, blobs: bool
) -> dict[str, Any]:
    """The fields that were asked for, of those that there are."""
    row: dict[str, Any] = {"_id": repository.id, "id": repository.id}
    if repository.type == "model":
        row["modelId"] = repository.id
    for field in fields:
        if field == "siblings":
            row[field] = [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())]
        elif field in _FIELDS:
            value = _FIELDS[field](repository, commit, facts)
            if value is not None:
                row[field] = value
        elif field not in _NEVER_KNOWN.split():
            raise HubError(400, None, f"expand has no {field!r}")
    return row


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if blobs:
        row.update(size=blob.size, blobId=blob.oid)
        if blob.sha256:
            row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return row


def _base_models(facts: Facts) -> dict[str, Any] | None:
    if not facts.base_models:
        return None
    relation = next(tag.split(":")[1] for tag in facts.tags if tag.startswith("base_model:") and tag.count(":") > 1)
    return {"relation": relation, "models": [{"_id": name, "id": name} for name in facts.base_models]}


_FIELDS: dict[str, Callable[[Repository, Commit, Facts], Any]] = {
    "author": lambda repository, commit, facts: repository.namespace,
    "sha": lambda repository, commit, facts: commit.sha,
    "lastModified": lambda repository, commit, facts: _time(repository.last_modified),
    "createdAt": lambda repository, commit, facts: _time(repository.created),
    "private": lambda repository, commit, facts: repository.private,
    "gated": lambda repository, commit, facts: repository.gated,
    "disabled": lambda repository, commit, facts: False,
    "downloads": lambda repository, commit, facts: repository.downloads,
    "likes": lambda repository, commit, facts: repository.likes,
    "trendingScore": lambda repository, commit, facts: 0,
    "tags": lambda repository, commit, facts: facts.tags,
    "cardData": lambda repository, commit, facts: facts.card or None,
    "model-index": lambda repository, commit, facts: facts.card.get("model-index"),
    "config": lambda repository, commit, facts: facts.config,
    "library_name": lambda repository, commit, facts: facts.library,
    "pipeline_tag": lambda repository, commit, facts: facts.task,
    "safetensors": lambda repository, commit, facts: facts.safetensors,
    "baseModels": lambda repository, commit, facts: _base_models(facts),
    "usedStorage": lambda repository, commit, facts: sum(blob.size for blob in commit.files.values()),
    "spaces": lambda repository, commit, facts: [],
}


def _wanted(call: Call, repository: Repository, facts: Facts) -> bool:
    """Whether a repository passes all filters of a listing."""
    query = call.query
    if not set(query.get("filter", ())) <= set(facts.tags):
        return False
    if not all(text.lower() in repository.id.lower() for text in query.get("search", ())):
        return False
    if (author := call.one("author")) and author != repository.namespace:
        return False
    if (task := call.one("pipeline_tag")) and task != facts.task:
        return False
    if call.one("gated") is not None and call.asks("gated") != bool(repository.gated):
        return False
    bounds = call.one("num_parameters")
    return bounds is None or _within(facts.parameters, bounds)


def _within(parameters: int | None, bounds: str) -> bool:
    """Whether a count lies within bounds such as ``min:1.5M,max:6B``."""
    limits = {}
    for bound in bounds.split(","):
        match = re.fullmatch(r"(min|max):([\d.]+)([KMBT]?)", bound.strip(), re.IGNORECASE)
        if match is None:
            raise HubError(400, None, f"num_parameters has no bound {bound!r}")
        limits[match[1].lower()] = float(match[2]) * 1000 ** " KMBT".index(match[3].upper() or " ")
    return parameters is not None and limits.get("min", 0) <= parameters <= limits.get("max", float("inf"))


def _sort(found: list[tuple[Repository, Facts]], key: str, *, ascending: bool) -> None:
    keys: dict[str, Callable[[Repository], Any]] = {
        "createdAt": lambda repository: repository.created,
        "lastModified": lambda repository: repository.last_modified,
        "downloads": lambda repository: repository.downloads,
        "likes": lambda repository: repository.likes,
        "trendingScore": lambda repository: 0,
    }
    if key not in keys:
        raise HubError(400, None, f"cannot sort by {key!r}")
    found.sort(key=lambda pair: keys[key](pair[0]), reverse=not ascending)


def _named(call: Call, asked: dict[str, Any]) -> tuple[str, str]:
    """Type and id of the repository that a request to make or delete one names; its sender must own the namespace."""
    user = call.signed_in()
    namespace = asked.get("organization") or user.name
    repo_type = asked.get("type") or "model"
    if repo_type not in KINDS.values() or not re.fullmatch(r"[\w.-]{1,96}", asked["name"]):
        raise HubError(400, None, f"there can be no {repo_type} {asked['name']!r}")
    if not user.owns(namespace):
        raise HubError(
            403, None, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
        )
    return repo_type, f"{namespace}/{asked['name']}"


def _name(names: dict[str, Commit], name: str, commit: Commit) -> Response:
    if name in names:
        raise HubError(409, None, f"Reference already exists: {name}")
    names[name] = commit
    return answer({})


def _forget(names: dict[str, Commit], name: str) -> Response:
    if names.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
    return answer({})


def _time(date: datetime) -> str:
    return f"{date:%Y-%m-%dT%H:%M:%S.000Z}"
