"""Discussions and pull requests, as far as clients need them to publish with ``create_pr``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopback_hub.messages import Call, HubError, Response, answer
from loopback_hub.repositories import Blob, Commit, Pull, Repository
from loopback_hub.routing import commit_at, reach, route
from loopback_hub.state import HubState


def open_pull(
    hub: HubState,
    repository: Repository,
    base: Commit,
    title: str,
    description: str,
    author: str,
    changes: Mapping[str, Blob | None] | None,
) -> Pull:
    """Opens a pull request with one commit of ``changes`` on ``base``; a discussion if they are None."""
    number = len(repository.pulls) + 1
    pull = Pull(number, title, author, base.date, changes is not None, base=base)
    if changes is not None:
        head = hub.new_commit(repository, base, changes, title, description, author) if changes else base
        repository.pull_heads[f"refs/pr/{number}"] = head
        pull.date = head.date
    repository.pulls[number] = pull
    _tell(pull, author, "comment", edited=False, hidden=False, latest={"raw": description})
    if changes:
        _tell(pull, author, "commit", subject=title, oid=head.sha)
    return pull


@route("GET", "/api/{kind}/{id}/discussions")
def list_pulls(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id)
    pulls = list(repository.pulls.values())
    if kind := call.one("type"):
        pulls = [pull for pull in pulls if pull.is_pull_request == (kind == "pull_request")]
    if status := call.one("status"):
        pulls = [pull for pull in pulls if (pull.status in ("open", "draft")) == (status == "open")]
    if author := call.one("author"):
        pulls = [pull for pull in pulls if pull.author == author]
    return answer({"discussions": [_shown(repository, p) for p in pulls], "count": len(pulls), "start": 0})


@route("POST", "/api/{kind}/{id}/discussions")
def create_pull(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    repository, author = reach(hub, call, repo_type, repo_id, "read"), call.signed_in().name
    asked = call.json()
    changes: dict[str, Blob | None] | None = {} if asked.get("pullRequest") else None
    with hub.lock:
        base = commit_at(repository, "main")
        pull = open_pull(hub, repository, base, asked["title"], asked.get("description", ""), author, changes)
    pull.status = "draft" if pull.is_pull_request else "open"
    return answer({"num": pull.number, "pullRequest": pull.is_pull_request})


@route("GET", "/api/{kind}/{id}/discussions/{number}")
def show_pull(hub: HubState, call: Call, repo_type: str, repo_id: str, number: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id)
    pull = _pull(repository, number)
    shown = {**_shown(repository, pull), "events": pull.events}
    if pull.is_pull_request:
        shown.update(changes={"base": "refs/heads/main", "mergeCommitId": pull.merged}, filesWithConflicts=[], diff="")
    return answer(shown)


@route("POST", "/api/{kind}/{id}/discussions/{number}/{name}")
def change_pull(hub: HubState, call: Call, repo_type: str, repo_id: str, number: str, name: str) -> Response:
    """Comments, renames, opens, closes or merges."""
    repository = reach(hub, call, repo_type, repo_id, "read" if name in ("comment", "title") else "write")
    pull, author, asked = _pull(repository, number), call.signed_in().name, call.json()
    if name == "comment":
        event = _tell(pull, author, "comment", edited=False, hidden=False, latest={"raw": asked["comment"]})
        return answer({"newMessage": event})
    if name == "title":
        old, pull.title = pull.title, asked["title"]
        return answer({"newTitle": _tell(pull, author, "title-change", **{"from": old, "to": pull.title})})
    if name == "status":
        pull.status = asked["status"]
        return answer({"newStatus": _tell(pull, author, "status-change", status=pull.status)})
    if name == "merge":
        _merge(hub, repository, pull, author)
        return answer({})
    raise HubError(501, None, f"the loopback Hub cannot do {name} with a discussion")


def _merge(hub: HubState, repository: Repository, pull: Pull, author: str) -> None:
    if not pull.is_pull_request or pull.status in ("merged", "closed"):
        raise HubError(400, None, "This cannot be merged")
    head, base = repository.pull_heads[f"refs/pr/{pull.number}"].files, pull.base.files if pull.base else {}
    changes = {path: head.get(path) for path in {*head, *base} if head.get(path) is not base.get(path)}
    pull.merged = hub.add_commit(repository, "main", changes, pull.title, author=author).sha
    pull.status = "merged"
    _tell(pull, author, "status-change", status="merged")


def _pull(repository: Repository, number: str) -> Pull:
    if int(number) not in repository.pulls:
        raise HubError(404, None, f"There is no discussion {number}")
    return repository.pulls[int(number)]


def _shown(repository: Repository, pull: Pull) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "status": pull.status,
        "author": {"name": pull.author},
        "createdAt": f"{pull.date:%Y-%m-%dT%H:%M:%S.000Z}",
        "isPullRequest": pull.is_pull_request,
        "repo": {"name": repository.id, "type": repository.type},
    }


def _tell(pull: Pull, author: str, kind: str, **data: Any) -> dict[str, Any]:
    event = {
        "id": f"{pull.number}-{len(pull.events)}",
        "type": kind,
        "author": {"name": author},
        "createdAt": f"{pull.date:%Y-%m-%dT%H:%M:%S.000Z}",
        "data": data,
    }
    pull.events.append(event)
    return event
