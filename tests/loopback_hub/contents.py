"""Endpoints about files: trees, uploads, commits, downloads."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import uuid
from typing import Any
from urllib.parse import parse_qs, quote

from loopback_hub.facts import safetensors_header, shards
from loopback_hub.messages import Call, HubError, Response, answer
from loopback_hub.pulls import open_pull
from loopback_hub.repositories import Blob, Commit, is_large
from loopback_hub.routing import commit_at, reach, route
from loopback_hub.state import HubState

_SLOW_PAGE = 50


@route("GET", "/api/{kind}/{id}/tree/{revision}")
@route("GET", "/api/{kind}/{id}/tree/{revision}/{path}")
def tree(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str, path: str = "") -> Response:
    repository = reach(hub, call, repo_type, repo_id)
    commit = commit_at(repository, revision)
    if path and path not in commit.folders:
        raise _no_entry(path, commit)
    prefix = f"{path}/" if path else ""
    paths = [name for name in commit.paths if name.startswith(prefix)]
    if not call.asks("recursive"):
        paths = [name for name in paths if "/" not in name[len(prefix) :]]
    expand = call.asks("expand")
    page, headers = call.page(paths, min(hub.page_size, _SLOW_PAGE) if expand else hub.page_size)
    return answer([_row(commit, name, expand) for name in page], headers=headers)


@route("POST", "/api/{kind}/{id}/paths-info/{revision}")
def paths_info(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str) -> Response:
    commit = commit_at(reach(hub, call, repo_type, repo_id), revision)
    if call.headers.get("Content-Type", "").startswith("application/json"):
        asked = call.json()
        paths, expand = asked["paths"], bool(asked.get("expand"))
    else:
        form = parse_qs(call.body.read().decode())
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[-1].lower() == "true"
    return answer([_row(commit, path, expand) for path in paths if path in commit.files or path in commit.folders])


@route("POST", "/api/{kind}/{id}/preupload/{revision}")
def preupload(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str) -> Response:
    pulls = call.asks("create_pr") or revision.startswith("refs/pr/")
    repository = reach(hub, call, repo_type, repo_id, "read" if pulls else "write")
    present = commit_at(repository, revision).files
    asked = call.json()
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
    rows = []
    for file in asked["files"]:
        path = file["path"]
        rows.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path, file["size"]) else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                "oid": present[path].etag if path in present else None,
            }
        )
    return answer({"files": rows, "commitOid": repository.at(revision).sha})


@route("POST", r"/{prefix}{id}.git/info/lfs/objects/batch")
def lfs_batch(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    reach(hub, call, repo_type, repo_id, "read")
    call.signed_in()
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    verify = f"{call.endpoint}/{prefix}{repo_id}.git/info/lfs/objects/verify"
    objects = []
    for wanted in call.json()["objects"]:
        row = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.large:
            upload = f"{call.endpoint}/lfs/{wanted['oid']}?size={wanted['size']}"
            row["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
        objects.append(row)
    return answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{name}")
def lfs_upload(hub: HubState, call: Call, name: str) -> Response:
    if call.headers.get("Authorization"):
        raise HubError(400, None, "signed addresses take no Authorization")
    partial = hub.folder / f"{uuid.uuid4().hex}.part"
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for piece in call.body.pieces():
            digest.update(piece)
            size += file.write(piece)
    if digest.hexdigest() != name or str(size) != call.one("size"):
        partial.unlink()
        raise HubError(400, None, f"{size} bytes of sha256 {digest.hexdigest()} came as {name}")
    hub.large[name] = Blob.large(partial.replace(hub.folder / name), name)
    return Response(200, {"ETag": f'"{name}"'})


@route("POST", r"/{prefix}{id}.git/info/lfs/objects/verify")
def lfs_verify(hub: HubState, call: Call, repo_type: str, repo_id: str) -> Response:
    reach(hub, call, repo_type, repo_id, "read")
    said = call.json()
    blob = hub.large.get(said["oid"])
    if blob is None or blob.size != said["size"]:
        raise HubError(404, None, f"no object {said['oid']} of {said['size']} bytes was uploaded")
    return answer({})


@route("POST", "/api/{kind}/{id}/commit/{revision}")
def commit_files(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str) -> Response:
    create_pr = call.asks("create_pr")
    repository = reach(hub, call, repo_type, repo_id, "read" if create_pr else "write")
    author = call.signed_in().name
    lines = [json.loads(line) for line in call.body.read().splitlines() if line.strip()]
    header = lines[0]["value"]
    title, message = header["summary"], header.get("description", "")
    with hub.lock:
        head = commit_at(repository, revision)
        if repository.heads_with(revision) is None:
            raise HubError(404, "RevisionNotFound", f"{revision} is no branch")
        wanted = header.get("parentCommit")
        parent = commit_at(repository, wanted) if wanted else head
        if parent is not head and not create_pr:
            raise HubError(412, None, f"{revision} is at {head.sha} and no longer at {wanted}")
        changes = _changes(hub, parent, lines[1:])
        prefix = f"{call.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if create_pr:
            pull = open_pull(hub, repository, parent, title, message, author, changes)
            sha = repository.pull_heads[f"refs/pr/{pull.number}"].sha
            pull_url = f"{prefix}/discussions/{pull.number}"
            return answer({"commitUrl": f"{prefix}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_url})
        sha = hub.add_commit(repository, revision, changes, title, message, author).sha
    return answer({"success": True, "commitUrl": f"{prefix}/commit/{sha}", "commitOid": sha})


@route("GET", "/{prefix}{id}/resolve/{revision}/{path}")
def resolve(hub: HubState, call: Call, repo_type: str, repo_id: str, revision: str, path: str) -> Response:
    repository = reach(hub, call, repo_type, repo_id, "read")
    commit = commit_at(repository, revision)
    if path not in commit.files:
        raise _no_entry(path, commit)
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"'}
    if blob.sha256 is None:
        return _part(blob, headers, call.headers.get("Range"))
    headers.update({"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)})
    if hub.mode == "cdn":
        origin = call.endpoint.replace("127.0.0.1", "localhost")
        location = f"{origin}/cdn/{blob.sha256}?file={quote(f'{repo_id}/{path}', safe='/')}"
        return Response(302, {**headers, "Location": location})
    return _part(blob, headers, call.headers.get("Range"))


@route("GET", "/cdn/{name}")
def cdn(hub: HubState, call: Call, name: str) -> Response:
    if call.headers.get("Authorization"):
        raise HubError(400, None, "signed addresses take no Authorization")
    if name not in hub.large:
        raise HubError(404, None, "no such object")
    return _part(hub.large[name], {"ETag": f'"{name}"'}, call.headers.get("Range"))


@route("GET", "/api/models/{id}/safetensors-metadata/{path}")
def safetensors_metadata(hub: HubState, call: Call, repo_id: str, path: str) -> Response:
    commit = commit_at(reach(hub, call, "model", repo_id, "read"), "main")
    if path not in commit.files:
        raise _no_entry(path, commit)
    try:
        index = json.loads(commit.files[path].read())
    except ValueError:
        raise HubError(400, None, f"{path} is no index") from None
    headers = {}
    for shard in shards(index):
        header = safetensors_header(commit.files[shard]) if shard in commit.files else None
        if header is None:
            raise _no_entry(shard, commit)
        headers[shard] = header
    return answer({"index": {"metadata": index.get("metadata")}, "headers": headers})


def _row(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "directory", "oid": commit.folders.get(path), "size": 0, "path": path}
    if path in commit.files:
        blob = commit.files[path]
        row.update(type="file", oid=blob.oid, size=blob.size)
        if blob.sha256:
            row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    if expand:
        last = commit.last_change(path)
        row["lastCommit"] = {"id": last.sha, "title": last.title, "date": f"{last.date:%Y-%m-%dT%H:%M:%S.000Z}"}
    return row


def _changes(hub: HubState, parent: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob | None]:
    changes: dict[str, Blob | None] = {}
    for line in lines:
        value = line["value"]
        path = value["path"]
        match line["key"]:
            case "file":
                content = value["content"]
                _check_name(path)
                decoded = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                changes[path] = Blob.regular(decoded)
            case "lfsFile":
                _check_name(path)
                if value["oid"] not in hub.large:
                    raise HubError(400, None, f"{path}: large file {value['oid']} was not uploaded")
                changes[path] = hub.large[value["oid"]]
            case "deletedFile" if path in parent.files:
                changes[path] = None
            case "deletedFolder" if path.rstrip("/") in parent.folders:
                prefix = path.rstrip("/") + "/"
                changes.update(dict.fromkeys(name for name in parent.files if name.startswith(prefix)))
            case "deletedFile" | "deletedFolder":
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            case other:
                raise HubError(400, None, f"unknown operation {other!r}")
    return changes


def _check_name(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\x00-\x1f\x7f]", path):
        raise HubError(400, None, "A file of the commit has an invalid name")


def _no_entry(path: str, commit: Commit) -> HubError:
    return HubError(404, "EntryNotFound", f"Entry not found: {path}", {"X-Repo-Commit": commit.sha})


def _part(blob: Blob, headers: dict[str, str], asked: str | None) -> Response:
    """The blob, or the one range of it that was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if match is None or not any(match.groups()):
        return Response(200, headers, blob=blob, start=0, stop=blob.size)
    first, last = match.groups()
    start = int(first) if first else max(blob.size - int(last), 0)
    stop = min(int(last) + 1, blob.size) if first and last else blob.size
    if start >= stop:
        raise HubError(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Response(206, headers, blob=blob, start=start, stop=stop)
