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
from weightspace.publishing.contents import (
    WEIGHTS,
    Contents,
    encoder_contents,
    kind_of,
    models_contents,
    text_file,
    zoo_contents,
)
from weightspace.publishing.plan import Published, PushPlan, PushSettings
from weightspace.zoo.writer import README

_LARGEST_CARD = 2**20


def push_folder(
    folder: str | Path,
    repo_id: str,
    settings: PushSettings | None = None,
    *,
    options: HubOptions | None = None,
    confirm: Callable[[PushPlan], bool] | None = None,
) -> tuple[PushPlan, Published | None]:
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
        The plan, and what was done; None if ``confirm`` stopped it.

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
        plan = _planned(Path(folder).expanduser(), repo_id, settings, options, Path(workspace))
        if confirm is not None and not confirm(plan):
            return plan, None
        return plan, _carry_out(plan, options)


def _planned(folder: Path, repo_id: str, settings: PushSettings, options: HubOptions, workspace: Path) -> PushPlan:
    kind = kind_of(folder)
    repo_type: RepoType = "dataset" if kind == "zoo" else "model"
    if kind == "zoo":
        contents = zoo_contents(folder, repo_id, settings, workspace)
    elif kind == "encoder":
        contents = encoder_contents(folder, repo_id, settings, options)
    else:
        contents = models_contents(folder, repo_id, settings)
    remote = _find(repo_id, repo_type, settings, options)
    card = _card(folder, contents, remote, settings)
    record = CardRecord(contents.facts, card_digest(card.rendered), weights_digest(folder))
    files = [*contents.files, text_file(RECORD, record.to_json())]
    if card.published is not None:
        files.append(text_file(CARD, card.published))
    superseded = ("index/*.parquet", "weights/*.parquet") if kind == "zoo" else WEIGHTS
    present = remote.repo.entries if remote else {}
    removed = {path for path in present if any(fnmatchcase(path, pattern) for pattern in superseded)}
    return PushPlan(
        kind=kind,
        repo_id=repo_id,
        repo_type=repo_type,
        files=tuple(sorted(files, key=lambda file: file.path)),
        left_out=contents.left_out,
        removed=tuple(sorted(removed - {file.path for file in files})),
        notices=(*contents.notices, *card.notices),
        present=remote.repo.sha if remote else None,
        private=remote.private if remote else settings.private,
        settings=settings,
        record=record,
        card=card.rendered,
    )


@dataclass(frozen=True)
class _Remote:
    """A repository as it is now."""

    repo: HubRepo
    private: bool

    def text(self, path: str) -> str | None:
        """A small text file of it, or None."""
        entry = self.repo.entries.get(path)
        if entry is None or entry.size is None or entry.size > _LARGEST_CARD:
            return None
        return self.repo.local_path(path).read_text(encoding="utf-8", errors="replace")


def _find(repo_id: str, repo_type: RepoType, settings: PushSettings, options: HubOptions) -> _Remote | None:
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
    if info is None:
        if settings.create_pr:
            raise HubError(f"{repo_id}: no such {repo_type} to open a pull request in; push without --create-pr")
        return None
    if settings.private and not info.private:
        raise HubError(f"{repo_id}: is public already; make it private on its page, or push without --private")
    assert isinstance(info, ModelInfo | DatasetInfo)
    entries = [HubEntry(file.rfilename, file.size) for file in info.siblings or ()]
    return _Remote(HubRepo(repo_id, str(info.sha), entries, options, repo_type=repo_type), bool(info.private))


@dataclass(frozen=True)
class _Card:
    """The card as rendered, what is published in its place (None: what is there stays), and what to say of it."""

    rendered: str
    published: str | None
    notices: tuple[str, ...] = ()


def _card(folder: Path, contents: Contents, remote: _Remote | None, settings: PushSettings) -> _Card:
    """Renders the card with the notes that people wrote, here or on the Hub, and finds out whose card is published.

    People's own cards win over rendered ones, and what they changed on the Hub over what lies here.
    """
    own, record = read_text(folder / CARD), read_text(folder / RECORD)
    if own == README:  # what every zoo is made with says nothing
        own = None
    there, there_record = (remote.text(CARD), remote.text(RECORD)) if remote else (None, None)
    rendered = render_card(contents.facts, notes_of(own or "") or notes_of(there or ""))
    if settings.replace_card:
        return _Card(rendered, rendered)
    if there is not None and there != own and is_edited(there, there_record):
        words = "the card on the Hub was written or changed there and stays; --replace-card replaces it"
        return _Card(rendered, None, (words,))
    if own is not None and is_edited(own, record):
        words = f"{CARD} was written or changed by hand and is published as it is; --replace-card renders it anew"
        return _Card(rendered, own, (words,))
    return _Card(rendered, rendered)


def _carry_out(plan: PushPlan, options: HubOptions) -> Published:
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
        done = call_hub(repo_id, commit)
    except ValueError as error:  # the Hub does not accept the metadata of the card
        raise HubError(f"{repo_id}: {shown(' '.join(str(error).split()))}; correct {CARD}") from error
    return Published(done.oid, done.commit_url, done.pr_url)
