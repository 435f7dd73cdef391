"""``weightspace crawl``: models of the Hub become a zoo."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import Amount, json_option
from weightspace.cli.output import print_json, print_list, printable

if TYPE_CHECKING:
    from weightspace.crawl.plan import Plan

_SORTS = ("downloads", "likes", "createdAt", "lastModified", "trendingScore")
_MOST_SHOWN = 10


class Part(click.ParamType):
    """One of several equal parts, ``i/n`` with i from 1 to n."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Reads the text of an option."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part; write 1/4 to 4/4 on four machines", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the zoo.")
@click.option("--task", help="Pipeline tag, e.g. image-classification.")
@click.option("--author", help="User or organisation.")
@click.option("--library", help="Library that the models are for, e.g. transformers.")
@click.option("--license", "licences", multiple=True, help="Licence id, e.g. apache-2.0; any of several.")
@click.option("--filter", "tags", multiple=True, help="Tag of the Hub; all of several.")
@click.option("--search", help="Text in the names of repositories.")
@click.option("--base-model", help="Model that they were made from, as org/name.")
@click.option("--adapters/--no-adapters", default=None, show_default="both", help="LoRA adapters only, or none.")
@click.option("--max-params", type=Amount(), show_default="any", help="Most parameters of a model, e.g. 50M.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, help="Most repositories.")
@click.option("--sort", type=click.Choice(_SORTS), default="downloads", help="Which repositories come first.")
@click.option("--shard", type=Part(), default="1/1", help="The part that this machine crawls, into a zoo of its own.")
@click.option("--reference", is_flag=True, help="Leave the weights on the Hub; they are read when they are needed.")
@click.option("--jobs", type=click.IntRange(min=1), default=8, help="Models fetched at once.")
@click.option("--ray", is_flag=True, help="Fetch on a Ray cluster: that of RAY_ADDRESS, or else this machine.")
@click.option("--token", show_default="that of `hf auth login` or HF_TOKEN", help="Token for the Hub.")
@click.option("--dry-run", is_flag=True, help="Show what would be fetched, and stop.")
@json_option
def crawl(output: Path, jobs: int, ray: bool, token: str | None, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Make a zoo of models on the Hub.

    Weights are only read from safetensors files. Models that cannot be used are left out and listed with the reason,
    here and in the zoo's skips.jsonl. After an interruption, the same command goes on with the same models.

    Zoos of several shards become one with `weightspace zoo join`.
    """
    from weightspace.crawl.plan import CrawlSettings, make_plan, read_plan
    from weightspace.crawl.run import crawl as crawl_hub
    from weightspace.crawl.run import prepare_crawl
    from weightspace.io.hub import HubOptions

    settings, options = CrawlSettings(**asked), HubOptions(token=token)
    if dry_run:
        begun = read_plan(output)
        plan = begun if begun is not None and begun.settings == settings else make_plan(settings, options)
        if as_json:
            print_json({**_record(plan), "repositories": [repo.repo_id for repo in plan.repos if repo.checkpoints]})
        else:
            _show_plan(plan, err=False)
            print_list("cannot be fetched", [f"{what}: {reason}" for what, reason in plan.problems])
        return
    plan = prepare_crawl(settings, output, options)
    _show_plan(plan, err=True)
    summary = crawl_hub(plan, output, jobs=jobs, options=options, ray=ray)
    if as_json:
        skipped = [{"file": file, "reason": reason} for file, reason in summary.skipped]
        print_json({"zoo": str(output), "models": summary.models, "bytes": summary.fetched, "skipped": skipped})
        return
    click.echo(f"{output}: {summary.models:,} models")
    print_list("left out", [f"{file}: {reason}" for file, reason in summary.skipped])


def _record(plan: Plan) -> dict[str, Any]:
    wanted = [repo for repo in plan.repos if repo.checkpoints]
    return {
        "models": plan.models,
        "bytes": sum(repo.size or 0 for repo in wanted),
        "unknown_sizes": sum(repo.size is None for repo in wanted),
        "licences": _counted(repo.facts.licence for repo in wanted),
        "tasks": _counted(repo.facts.task for repo in wanted),
        "not_asked_for": dict(plan.excluded),
        "cannot_be_fetched": [{"file": what, "reason": reason} for what, reason in plan.problems],
    }


def _counted(values: Any) -> dict[str, int]:
    counts = Counter("none stated" if value is None else value for value in values)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _show_plan(plan: Plan, *, err: bool) -> None:
    record = _record(plan)
    repos = sum(bool(repo.checkpoints) for repo in plan.repos)
    unknown = f", and {record['unknown_sizes']:,} of unknown size" if record["unknown_sizes"] else ""
    lines = [f"plan: {record['models']:,} models of {repos:,} repositories, {record['bytes']:,} bytes{unknown}"]
    for title in ("licences", "tasks", "not_asked_for"):
        counts = list(record[title].items())
        parts = [f"{printable(name)} {count:,}" for name, count in counts[:_MOST_SHOWN]]
        parts += [f"{len(counts) - _MOST_SHOWN} more"] if len(counts) > _MOST_SHOWN else []
        if parts:
            lines.append(f"  {title.replace('_', ' ')}: {', '.join(parts)}")
    if record["cannot_be_fetched"]:
        lines.append(f"  cannot be fetched: {len(record['cannot_be_fetched']):,}")
    for line in lines:
        click.echo(line, err=err)
