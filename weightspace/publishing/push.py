"""One commit that takes a folder to the Hub, and the card that goes with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from weightspace.cards.record import (
    CARD,
    RECORD,
    CardRecord,
    card_digest,
    is_edited,
    notes_of,
    read_text,
    render_card,
    weights_digest,
)
from weightspace.errors import HubError, WeightspaceError
from weightspace.io.header import shown
from weightspace.io.hub import LIBRARY, HubEntry, HubOptions, RepoType, call_hub
from weightspace.io.hub_repo import HubRepo
from weightspace.io.locations import is_repo_id
from weightspace.publishing.contents import Contents, Kind, PlannedFile, PushSettings, gather, text_file
from weightspace.zoo.writer import README

_LARGEST_CARD = 2**20


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


def push_folder(
    folder: str | Path,
    repo_id: str,
    settings: PushSettings | None = None,
    *,
    options: HubOptions | None = None,
    confirm: Callable[[PushPlan], bool] | None = None,
) -> tuple[PushPlan, CommitInfo | None]:
    """Publishes an encoder, a zoo or plain models; nothing in the folder is changed.

    A repository is made if it is not there, and updated in one commit otherwise. What it holds already is not sent
    again, so that a push that was interrupted goes on when it is given again.

    Args:
        folder: what to publish.
        repo_id: ``org/name``.
        settings: see `PushSettings`.
        options: how the Hub is reached.
        confirm: is shown the plan before anything is sent, and returns whether to go on; always if left out.

    Returns:
        The plan, and the commit; None if ``confirm`` stopped it.

    Raises:
        WeightspaceError: there is nothing to publish, or it is unfinished or damaged.
        HubError: the Hub refuses or is out of reach.
    """
    settings, options = settings or PushSettings(), options or HubOptions()
    if not is_repo_id(repo_id):
        raise WeightspaceError(f"{repo_id}: not a repository of the Hub; write org/name")
    if settings.create_pr and settings.revision is not None:
        raise WeightspaceError(
            f"revision {settings.revision}: a pull request is opened against the default branch; leave one of them out"
        )
    with tempfile.TemporaryDirectory(prefix="weightspace-push-") as workspace:
        folder = Path(folder).expanduser()
        contents = gather(folder, repo_id, settings, options, Path(workspace))
        plan = _planned(folder, contents, repo_id, settings, options)
        if confirm is not None and not confirm(plan):
            return plan, None
        return plan, _carry_out(plan, options)


def _planned(folder: Path, contents: Contents, repo_id: str, settings: PushSettings, options: HubOptions) -> PushPlan:
    repo_type = contents.repo_type
    info = _find(repo_id, repo_type, settings, options)
    repo = None
    if info is not None:
        entries = [HubEntry(file.rfilename, file.size) for file in info.siblings or ()]
        repo = HubRepo(repo_id, str(info.sha), entries, options, repo_type=repo_type)
    card, own, notices = _card(folder, contents, repo, settings)
    record = CardRecord(contents.facts, card_digest(card), weights_digest(folder))
    files = [*contents.files, text_file(RECORD, record.to_json())]
    if own is not None:
        files.append(text_file(CARD, own))
    present = repo.entries if repo else ()
    removed = {path for path in present if any(fnmatchcase(path, pattern) for pattern in contents.superseded)}
    return PushPlan(
        kind=contents.kind,
        repo_id=repo_id,
        repo_type=repo_type,
        files=tuple(sorted(files, key=lambda file: file.path)),
        left_out=contents.left_out,
        removed=tuple(sorted(removed - {file.path for file in files})),
        notices=(*contents.notices, *notices),
        present=repo.sha if repo else None,
        private=settings.private if info is None else bool(info.private),
        settings=settings,
        record=record,
        card=card,
    )


def _find(
    repo_id: str, repo_type: RepoType, settings: PushSettings, options: HubOptions
) -> ModelInfo | DatasetInfo | None:
    """Looks at what is there now: the branch to be changed, or the default branch if it is yet to be made."""
    api = HfApi(token=options.token, library_name=LIBRARY)
    info = None
    for revision in dict.fromkeys((settings.revision, None)):
        try:
            info = call_hub(
                repo_id, api.repo_info, repo_id, repo_type=repo_type, revision=revision, files_metadata=True
            )
            break
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
                break
            if not isinstance(cause, RevisionNotFoundError):
                raise
    if info is None and settings.create_pr:
        raise HubError(f"{repo_id}: no such {repo_type} to open a pull request in; push without --create-pr")
    if info is not None and settings.private and not info.private:
        raise HubError(f"{repo_id}: is public already; make it private on its page, or push without --private")
    assert info is None or isinstance(info, ModelInfo | DatasetInfo)
    return info


def _card(
    folder: Path, contents: Contents, repo: HubRepo | None, settings: PushSettings
) -> tuple[str, str | None, tuple[str, ...]]:
    """Renders the card with the notes that people wrote, here or on the Hub, and finds out whose card is published.

    People's own cards win over rendered ones, and what they changed on the Hub over what lies here.

    Returns:
        The card as rendered, what is published in its place (None: what is there stays), and what to say of it.
    """

    def on_hub(path: str) -> str | None:
        entry = repo.entries.get(path) if repo else None
        if repo is None or entry is None or entry.size is None or entry.size > _LARGEST_CARD:
            return None
        return repo.local_path(path).read_text(encoding="utf-8", errors="replace")

    own, there = read_text(folder / CARD), on_hub(CARD)
    if own == README:  # what every zoo is made with says nothing
        own = None
    rendered = render_card(contents.facts, notes_of(own or "") or notes_of(there or ""))
    if not settings.replace_card:
        if there is not None and there != own and is_edited(there, on_hub(RECORD)):
            words = "the card on the Hub was written or changed there and stays; --replace-card replaces it"
            return rendered, None, (words,)
        if own is not None and is_edited(own, read_text(folder / RECORD)):
            words = f"{CARD} was written or changed by hand and is published as it is; --replace-card renders it anew"
            return rendered, own, (words,)
    return rendered, rendered, ()


def _carry_out(plan: PushPlan, options: HubOptions) -> CommitInfo:
    api = HfApi(token=options.token, library_name=LIBRARY)
    repo_id, repo_type, settings = plan.repo_id, plan.repo_type, plan.settings
    if plan.present is None:
        call_hub(repo_id, api.create_repo, repo_id, repo_type=repo_type, private=plan.private, exist_ok=True)
    if settings.revision is not None:
        branch = settings.revision
        call_hub(repo_id, api.create_branch, repo_id, branch=branch, repo_type=repo_type, exist_ok=True)

    def commit() -> CommitInfo:
        return api.create_commit(
            repo_id,
            repo_type=repo_type,
            operations=[
                *(CommitOperationAdd(file.path, file.content) for file in plan.files),
                *(CommitOperationDelete(path) for path in plan.removed),
            ],
            commit_message=settings.message or f"Upload {plan.kind} with weightspace",
            revision=settings.revision,
            create_pr=settings.create_pr,
        )

    try:
        return call_hub(repo_id, commit)
    except ValueError as error:  # the Hub does not accept the metadata of the card
        raise HubError(f"{repo_id}: {shown(' '.join(str(error).split()))}; correct {CARD}") from error
