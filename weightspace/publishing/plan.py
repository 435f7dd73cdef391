"""What a push would do, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightspace.cards.record import CardRecord
from weightspace.io.hub import RepoType

Kind = Literal["encoder", "zoo", "models"]


@dataclass(frozen=True)
class PushSettings:
    """How something is published.

    Attributes:
        private: make a new repository private.
        revision: branch to push to, made if it is not there; the default branch if None.
        create_pr: open a pull request instead of changing a branch.
        licence: licence id of what is published, as the Hub writes it.
        zoo: ``org/name`` where the zoo that an encoder was trained on lies on the Hub.
        replace_card: replace a card that people have changed outside of its notes.
        message: first line of the commit.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    licence: str | None = None
    zoo: str | None = None
    replace_card: bool = False
    message: str | None = None


@dataclass(frozen=True)
class PlannedFile:
    """A file to be published: its path in the repository, its bytes or where they lie, and their number."""

    path: str
    content: Path | bytes
    size: int


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        kind: what the folder holds.
        repo_id: where it goes.
        repo_type: ``"dataset"`` for a zoo, ``"model"`` for all else.
        files: in the order of their paths.
        left_out: ``(file, reason)`` of what stays here.
        removed: files of the repository that the new ones supersede.
        notices: what the publisher should know, one sentence each.
        present: commit that is there now; None if there is no such repository.
        private: whether the repository is or will be private.
        settings: how it is published.
        record: the facts that the card was rendered from.
        card: the card as rendered, also where a person's own is published in its place.
    """

    kind: Kind
    repo_id: str
    repo_type: RepoType
    files: tuple[PlannedFile, ...]
    left_out: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]
    notices: tuple[str, ...]
    present: str | None
    private: bool
    settings: PushSettings
    record: CardRecord
    card: str

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def makes_public(self) -> bool:
        """Whether it makes a new public repository."""
        return self.present is None and not self.private


@dataclass(frozen=True)
class Published:
    """What a push did: the commit, its address, and that of the pull request if there is one."""

    commit: str
    url: str
    pull_request: str | None = None
