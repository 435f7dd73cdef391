"""``weightspace push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import PATH, Result, command
from weightspace.printing import emit, listing, reasons

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from weightspace.io.hub import HubOptions
    from weightspace.publishing import PushPlan

_LISTED = 40


@command("token")
@click.argument("folder", metavar="DIR", type=PATH)
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--yes", is_flag=True, help="Do not ask before making a public repository.")
@click.option("--revision", show_default="the default branch", help="Branch to push to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--license", "licence", metavar="ID", help="Licence of what is published, e.g. apache-2.0.")
@click.option("--zoo", metavar="ORG/ZOO", help="Where the zoo that an encoder was trained on lies on the Hub.")
@click.option("--message", help="First line of the commit.")
@click.option("--replace-card", is_flag=True, help="Replace a card that was changed outside of its notes.")
@click.option("--save-card", type=PATH, help="Markdown file to write the card to, and its facts beside it.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
def push(
    folder: Path,
    repo_id: str,
    yes: bool,
    save_card: Path | None,
    dry_run: bool,
    options: HubOptions,
    **how: Any,
) -> Result:
    """Publish an encoder, a zoo or models on the Hub.

    Weights go up as safetensors, with a card of the recorded facts. Models of a zoo whose licence forbids it stay here.

    Asks before it makes a public repository. An existing repository is updated in one commit.
    """
    from weightspace.publishing import PushSettings, push_folder

    def confirm(plan: PushPlan) -> bool:
        if not click.get_current_context().params["as_json"]:
            _show(plan)
        if save_card is not None:
            save_card.parent.mkdir(parents=True, exist_ok=True)
            save_card.write_text(plan.card, encoding="utf-8")
            save_card.with_suffix(".json").write_text(plan.record.to_json(), encoding="utf-8")
        return not dry_run and (yes or not plan.makes_public or _confirmed(plan))

    plan, done = push_folder(folder, repo_id, PushSettings(**how), options=options, confirm=confirm)
    if done is None:
        outcome = "nothing was sent"
    elif done.oid == plan.present:
        outcome = "the repository holds all of it already; nothing was changed"
    else:
        outcome = f"published: {done.pr_url or done.commit_url}"
    return _record(plan, done), [outcome]


def _confirmed(plan: PushPlan) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{plan.repo_id} would be a new public repository and there is nobody to ask; give --yes or --private"
        )
    return click.confirm(f"Make the public repository {plan.repo_id}?", err=True)


def _show(plan: PushPlan) -> None:
    state = "private" if plan.private else "public"
    what = f"a new {state}" if plan.present is None else f"the {state}"
    branch = f", branch {plan.settings.revision}" if plan.settings.revision else ""
    how = " by a pull request" if plan.settings.create_pr else ""
    lines = [
        f"{plan.kind} to {what} {plan.repo_type} repository {plan.repo_id}{branch}{how}",
        f"files: {len(plan.files):,}, {plan.bytes:,} bytes",
        *(f"  {file.path}  {file.size:,}" for file in plan.files[:_LISTED]),
        *([f"  and {len(plan.files) - _LISTED:,} more"] if len(plan.files) > _LISTED else ()),
        *(listing("left out", plan.left_out) if plan.left_out else ()),
        *(listing("removed there", plan.removed) if plan.removed else ()),
    ]
    emit(lines)
    emit((f"note: {notice}" for notice in plan.notices), err=True)


def _record(plan: PushPlan, done: CommitInfo | None) -> dict[str, Any]:
    return {
        "repository": plan.repo_id,
        "type": plan.repo_type,
        "kind": plan.kind,
        "private": plan.private,
        "revision": plan.settings.revision,
        "new": plan.present is None,
        "files": [{"path": file.path, "bytes": file.size} for file in plan.files],
        "left_out": reasons(plan.left_out),
        "removed": list(plan.removed),
        "notices": list(plan.notices),
        "changed": done is not None and done.oid != plan.present,
        "commit": done.oid if done else None,
        "url": done.commit_url if done else None,
        "pull_request": done.pr_url if done else None,
    }
