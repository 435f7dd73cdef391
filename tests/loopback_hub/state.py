"""What the Hub holds: repositories, large files, users; and the direct way for tests to fill it, without HTTP."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from loopback_hub.facts import Facts, derive
from loopback_hub.messages import User
from loopback_hub.repositories import Blob, Commit, Repository

Content = bytes | str | Path
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class HubState:
    """Repositories in memory, uploaded large files in a temporary folder that goes with the object."""

    token = "hf_loopback_administrator"
    """Of a user who may read and write everything; `add_user` makes others."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.mode: Literal["lfs", "cdn"] = "lfs"
        """``lfs`` serves large files itself; ``cdn`` redirects to another origin, which takes no ``Authorization``."""
        self.page_size = 1000
        """Most rows of one page of a listing or a tree."""
        self._folder = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self.clear()

    def clear(self) -> None:
        """Forgets repositories, users and settings."""
        with self.lock:
            self.mode, self.page_size = "lfs", 1000
            self.repositories: dict[tuple[str, str], Repository] = {}
            self.moved: dict[tuple[str, str], str] = {}
            self.large: dict[str, Blob] = {}
            self.users = {self.token: User("loopback", administrator=True)}
            self._commits = 0
            self._facts: dict[Commit, Facts] = {}
            for blob in Path(self._folder.name).iterdir():
                blob.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """Where uploaded large files lie, by sha256."""
        return Path(self._folder.name)

    def add_user(self, name: str, organizations: Iterable[str] = ()) -> str:
        """Adds a user who may write under their own and their organisations' names; returns the token."""
        token = f"hf_loopback_{name}"
        self.users[token] = User(name, tuple(organizations))
        return token

    def create(
        self,
        repo_id: str,
        files: Mapping[str, Content] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool | str = False,
        downloads: int = 0,
        likes: int = 0,
    ) -> str:
        """Makes a repository with one commit of ``files``, whose names are not checked; returns the commit's sha.

        A ``Path`` is served from where it lies; large ones are hashed once and not copied.
        """
        with self.lock:
            if (repo_type, repo_id) in self.repositories:
                raise ValueError(f"there is a {repo_type} {repo_id!r} already; use commit to add files")
            repository = Repository(repo_type, repo_id, private, gated, downloads, likes)
            self.repositories[repo_type, repo_id] = repository
            self.moved.pop((repo_type, repo_id), None)
            blobs = {path: Blob.of(path, content) for path, content in (files or {}).items()}
            return self.add_commit(repository, "main", blobs, "initial commit").sha

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, Content] | None = None,
        *,
        delete: Iterable[str] = (),
        revision: str = "main",
        repo_type: str = "model",
        title: str = "update",
    ) -> str:
        """Adds a commit to a branch; returns its sha."""
        changes: dict[str, Blob | None] = {path: Blob.of(path, content) for path, content in (files or {}).items()}
        changes.update(dict.fromkeys(delete))
        return self.add_commit(self.repository(repo_id, repo_type), revision, changes, title).sha

    def add_file(
        self, repo_id: str, path_in_repo: str, local_path: Path, *, sha256: str | None = None, repo_type: str = "model"
    ) -> str:
        """Commits a large file that is served from where it lies and is not read now, such as a sparse one.

        Without ``sha256`` a name is made from place and size. Returns the commit's sha.
        """
        size = local_path.stat().st_size
        name = sha256 or hashlib.sha256(f"{local_path.resolve()}\0{size}".encode()).hexdigest()
        repository = self.repository(repo_id, repo_type)
        changes = {path_in_repo: Blob.large(local_path, name)}
        return self.add_commit(repository, "main", changes, f"add {path_in_repo}").sha

    def add_folder(self, folder: Path) -> list[str]:
        """Makes a model of each ``folder/org/name``, whose files are served from where they lie; returns the ids."""
        added = []
        for root in sorted(path for path in folder.glob("*/*") if path.is_dir()):
            repo_id = root.relative_to(folder).as_posix()
            files = [path for path in sorted(root.rglob("*")) if path.is_file()]
            self.create(repo_id, {path.relative_to(root).as_posix(): path for path in files})
            added.append(repo_id)
        return added

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository, to look at or to set what has no method here (``downloads``, ``granted``, ...)."""
        return self.repositories[repo_type, repo_id]

    def grant(self, repo_id: str, user: str, repo_type: str = "model") -> None:
        """Lets a user read a gated repository."""
        self.repository(repo_id, repo_type).granted.add(user)

    def move(self, old: str, new: str, repo_type: str = "model") -> None:
        """Renames a repository; the old name redirects from now on."""
        with self.lock:
            repository = self.repositories.pop((repo_type, old))
            repository.id = new
            self.repositories[repo_type, new] = repository
            self.moved.pop((repo_type, new), None)
            self.moved[repo_type, old] = new

    def delete(self, repo_id: str, repo_type: str = "model") -> None:
        """Removes a repository."""
        with self.lock:
            del self.repositories[repo_type, repo_id]

    def new_commit(
        self,
        repository: Repository,
        parent: Commit | None,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str = "",
        author: str = "loopback",
    ) -> Commit:
        """A commit that no name points to yet; its large files can be had from now on."""
        with self.lock:
            self._commits += 1
            self.large.update({blob.sha256: blob for blob in changes.values() if blob and blob.sha256})
            return repository.new_commit(parent, changes, title, message, author, number=self._commits)

    def add_commit(
        self,
        repository: Repository,
        revision: str,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str = "",
        author: str = "loopback",
    ) -> Commit:
        """A commit that a branch or pull request points to from now on."""
        with self.lock:
            heads = repository.heads_with(revision) or repository.branches
            commit = self.new_commit(repository, heads.get(revision), changes, title, message, author)
            heads[revision] = commit
            return commit

    def facts(self, repository: Repository, commit: Commit) -> Facts:
        """What is derived from a commit's files, once."""
        with self.lock:
            if commit not in self._facts:
                self._facts[commit] = derive(repository.type, commit.files)
            return self._facts[commit]
