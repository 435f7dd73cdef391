"""``weightspace push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import json_option
from weightspace.cli.output import print_json, print_list, printable

if TYPE_CHECKING:
    from weightspace.publishing import Published, PushPlan


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--yes", is_flag=True, help="Do not ask before making a public repository.")
@click.option("--revision", show_default="the default branch", help="Branch to push to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--license", "licence", metavar="ID", help="Licence of what is published, e.g. apache-2.0.")
@click.option("--zoo", metavar="ORG/ZOO", help="Where the zoo that an encoder was trained on lies on the Hub.")
@click.option("--message", help="First line of the commit.")
@click.option("--replace-card", is_flag=True, help="Replace a card that was changed outside of its notes.")
@click.option(
    "--save-card", type=click.Path(path_type=Path), help="Markdown file to write the card to, and its facts beside it."
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--token", show_default="that of `hf auth login` or HF_TOKEN", help="Token for the Hub.")
@json_option
def push(
    folder: Path,
    repo_id: str,
    private: bool,
    yes: bool,
    revision: str | None,
    create_pr: bool,
    licence: str | None,
    zoo: str | None,
    message: str | None,
    replace_card: bool,
    save_card: Path | None,
    dry_run: bool,
    token: str | None,
    as_json: bool,
) -> None:
    """Publish an encoder, a zoo or models on the Hub.

    Weights go up as safetensors, with a card of the recorded facts. Models of a zoo whose licence forbids it stay here.

    Asks before it makes a public repository. An existing repository is updated in one commit.
    """
    from weightspace.io.hub import HubOptions
    from weightspace.publishing import PushSettings, push_folder

    settings = PushSettings(private, revision, create_pr, licence, zoo, replace_card, message)

    def confirm(plan: PushPlan) -> bool:
        if not as_json:
            _print_plan(plan)
        if save_card is not None:
            _save_card(plan, save_card)
        return not dry_run and (yes or not plan.makes_public or _asked(plan))

    plan, done = push_folder(folder, repo_id, settings, options=HubOptions(token=token), confirm=confirm)
    if as_json:
        print_json(_record(plan, done))
    elif done is None:
        click.echo("nothing was sent")
    elif done.commit == plan.present:
        click.echo("the repository holds all of it already; nothing was changed")
    else:
        click.echo(f"published: {done.pull_request or done.url}")


def _asked(plan: PushPlan) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{plan.repo_id} would be a new public repository and there is nobody to ask; give --yes or --private"
        )
    return click.confirm(f"Make the public repository {plan.repo_id}?", err=True)


def _print_plan(plan: PushPlan) -> None:
    state = "private" if plan.private else "public"
    what = f"a new {state}" if plan.present is None else f"the {state}"
    branch = f", branch {plan.settings.revision}" if plan.settings.revision else ""
    how = " by a pull request" if plan.settings.create_pr else ""
    click.echo(f"{plan.kind} to {what} {plan.repo_type} repository {plan.repo_id}{branch}{how}")
    click.echo(f"files: {len(plan.files):,}, {plan.bytes:,} bytes")
    shown = plan.files if len(plan.files) <= _LISTED else plan.files[:_LISTED]
    for file in shown:
        click.echo(f"  {printable(file.path)}  {file.size:,}")
    if len(plan.files) > len(shown):
        click.echo(f"  and {len(plan.files) - len(shown):,} more")
    if plan.left_out:
        print_list("left out", [f"{file}: {reason}" for file, reason in plan.left_out])
    if plan.removed:
        print_list("removed there", plan.removed)
    for notice in plan.notices:
        click.echo(f"note: {printable(notice)}", err=True)


_LISTED = 40


def _save_card(plan: PushPlan, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan.card, encoding="utf-8")
    path.with_suffix(".json").write_text(plan.record.to_json(), encoding="utf-8")


def _record(plan: PushPlan, done: Published | None) -> dict[str, Any]:
    return {
        "repository": plan.repo_id,
        "type": plan.repo_type,
        "kind": plan.kind,
        "private": plan.private,
        "revision": plan.settings.revision,
        "new": plan.present is None,
        "files": [{"path": file.path, "bytes": file.size} for file in plan.files],
        "left_out": [{"file": file, "reason": reason} for file, reason in plan.left_out],
        "removed": list(plan.removed),
        "notices": list(plan.notices),
        "changed": done is not None and done.commit != plan.present,
        "commit": done.commit if done else None,
        "url": done.url if done else None,
        "pull_request": done.pull_request if done else None,
    }
