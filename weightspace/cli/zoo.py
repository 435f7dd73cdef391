"""``weightspace zoo`` and ``weightspace crawl``: many models as one dataset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import COUNT, PATH, Amount, Result, command, output_option, settings_from
from weightspace.printing import emit, listing, reasons, table

if TYPE_CHECKING:
    from weightspace.crawl.plan import Plan
    from weightspace.io.hub import HubOptions
    from weightspace.zoo.dataset import Zoo

_SORTS = ("downloads", "likes", "createdAt", "lastModified", "trendingScore")
_MOST_SHOWN = 10


@click.group()
def zoo() -> None:
    """Zoos: many models as one dataset."""


@command("config", group=zoo)
@output_option("Folder of the zoo.")
@click.option("--runs", type=int, show_default="from the settings", help="Models to train.")
@click.option("--seed", type=int, show_default="from the settings", help="Seed of the grid and of the training.")
def train_command(output: Path, config: Path | None, **overrides: Any) -> Result:
    """Train a zoo on image datasets.

    Many models are trained at once. After an interruption, the same command goes on.
    """
    from weightspace.zoo.training import ZooSettings, train_zoo

    return _described(train_zoo(settings_from(ZooSettings, config, overrides), output))


@command(group=zoo)
@click.argument("folder", type=PATH)
@output_option("Folder of the zoo.")
@click.option("--strict", is_flag=True, help="Refuse the whole folder if any model cannot be used.")
def import_command(folder: Path, output: Path, strict: bool) -> Result:
    """Import a folder of safetensors files.

    The folder is any tree with a metadata.jsonl.

    Models that cannot be used are left out and listed with the reason, here and in the zoo's skips.jsonl.
    """
    from weightspace.zoo.importing import import_folder

    return _written(output, import_folder(folder, output, on_problem="error" if strict else "skip"), " imported")


@command(group=zoo)
@click.argument("paths", metavar="ZOO...", nargs=-1, required=True)
@output_option("Folder of the new zoo.")
def join_command(paths: tuple[str, ...], output: Path) -> Result:
    """Make one zoo of several.

    Models whose tensors another one has already are left out. After an interruption, the same command goes on.
    """
    from weightspace.zoo.transfer import join_zoos

    return _written(output, join_zoos(paths, output), " joined")


@command(group=zoo)
@click.argument("path", metavar="ZOO", type=PATH)
def info_command(path: Path) -> Result:
    """Describe a zoo.

    ZOO is a folder, or org/name[@revision] on the Hub; so it is wherever a zoo is read.
    """
    from weightspace.zoo.dataset import load_zoo

    return _described(load_zoo(path))


@command(group=zoo)
@click.argument("path", metavar="ZOO", type=PATH)
@output_option("A new or an empty folder.")
def export_command(path: Path, output: Path) -> Result:
    """Write a zoo as safetensors files.

    With its metadata.jsonl, the folder can be imported again.
    """
    from weightspace.zoo.dataset import load_zoo
    from weightspace.zoo.transfer import export_folder

    count = export_folder(load_zoo(path), output)
    return {"folder": str(output), "models": count}, [f"{output}: {count:,} models"]


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


@command("token")
@output_option("Folder of the zoo.")
@click.option("--task", help="Pipeline tag, e.g. image-classification.")
@click.option("--author", help="User or organisation.")
@click.option("--library", help="Library that the models are for, e.g. transformers.")
@click.option("--license", "licences", multiple=True, help="Licence id, e.g. apache-2.0; any of several.")
@click.option("--filter", "tags", multiple=True, help="Tag of the Hub; all of several.")
@click.option("--search", help="Text in the names of repositories.")
@click.option("--base-model", help="Model that they were made from, as org/name.")
@click.option("--adapters/--no-adapters", default=None, show_default="both", help="LoRA adapters only, or none.")
@click.option("--max-params", type=Amount(), show_default="any", help="Most parameters of a model, e.g. 50M.")
@click.option("--limit", type=COUNT, default=1000, help="Most repositories.")
@click.option("--sort", type=click.Choice(_SORTS), default="downloads", help="Which repositories come first.")
@click.option("--shard", type=Part(), default="1/1", help="The part that this machine crawls, into a zoo of its own.")
@click.option("--reference", is_flag=True, help="Leave the weights on the Hub; they are read when they are needed.")
@click.option("--jobs", type=COUNT, default=8, help="Models fetched at once.")
@click.option("--ray", is_flag=True, help="Fetch on a Ray cluster: that of RAY_ADDRESS, or else this machine.")
@click.option("--dry-run", is_flag=True, help="Show what would be fetched, and stop.")
def crawl(output: Path, jobs: int, ray: bool, dry_run: bool, options: HubOptions, **wanted: Any) -> Result:
    """Make a zoo of models on the Hub.

    Weights are only read from safetensors files. Models that cannot be used are left out and listed with the reason,
    here and in the zoo's skips.jsonl. After an interruption, the same command goes on with the same models.

    Zoos of several shards become one with `weightspace zoo join`.
    """
    from weightspace.crawl.plan import CrawlSettings, make_plan, read_plan
    from weightspace.crawl.run import crawl as crawl_hub
    from weightspace.crawl.run import prepare_crawl

    settings = CrawlSettings(**wanted)
    if dry_run:
        begun = read_plan(output)
        plan = begun if begun is not None and begun.settings == settings else make_plan(settings, options)
        record, lines = _planned(plan)
        record["repositories"] = [repo.repo_id for repo in plan.repos if repo.checkpoints]
        return record, [*lines, *listing("cannot be fetched", plan.problems)]
    plan = prepare_crawl(settings, output, options)
    emit(_planned(plan)[1], err=True)
    summary = crawl_hub(plan, output, jobs=jobs, options=options, ray=ray)
    record, lines = _written(output, summary)
    return {**record, "bytes": summary.fetched}, lines


def _written(output: Path, summary: Any, how: str = "") -> tuple[dict[str, Any], list[str]]:
    """Says how many models a new zoo has, and what was left out of it."""
    record = {"zoo": str(output), "models": summary.models, "skipped": reasons(summary.skipped)}
    return record, [f"{output}: {summary.models:,} models{how}", *listing("left out", summary.skipped)]


def _planned(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    wanted = [repo for repo in plan.repos if repo.checkpoints]
    record: dict[str, Any] = {
        "models": plan.models,
        "bytes": sum(repo.size or 0 for repo in wanted),
        "unknown_sizes": sum(repo.size is None for repo in wanted),
        "licences": _counted(repo.facts.licence for repo in wanted),
        "tasks": _counted(repo.facts.task for repo in wanted),
        "not_asked_for": dict(plan.excluded),
        "cannot_be_fetched": reasons(plan.problems),
    }
    unknown = f", and {record['unknown_sizes']:,} of unknown size" if record["unknown_sizes"] else ""
    lines = [f"plan: {plan.models:,} models of {len(wanted):,} repositories, {record['bytes']:,} bytes{unknown}"]
    for title in ("licences", "tasks", "not_asked_for"):
        counts = list(record[title].items())
        parts = [f"{name} {count:,}" for name, count in counts[:_MOST_SHOWN]]
        parts += [f"{len(counts) - _MOST_SHOWN} more"] if len(counts) > _MOST_SHOWN else []
        lines += [f"  {title.replace('_', ' ')}: {', '.join(parts)}"] if parts else []
    return record, [*lines, *([f"  cannot be fetched: {len(plan.problems):,}"] if plan.problems else [])]


def _counted(values: Iterable[str | None]) -> dict[str, int]:
    counts = Counter("none stated" if value is None else value for value in values)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _described(zoo: Zoo) -> Result:
    opened = zoo.usable()
    index = opened.index
    results = {
        name: {
            "models": len(values),
            "lowest": float(values.min()),
            "mean": float(values.mean()),
            "highest": float(values.max()),
        }
        for name in opened.result_names
        if len(values := index[name].dropna())
    }
    architectures = [
        {
            "header": header,
            "models": int((index["header"] == header).sum()),
            "layers": len(architecture.layers),
            "parameters": architecture.numel,
            "permutation_groups": len(architecture.groups),
        }
        for header, architecture in opened.architectures.items()
    ]
    record: dict[str, Any] = {
        "zoo": opened.location,
        "models": len(opened),
        "runs": int(index["run_id"].nunique()),
        "bytes": int(index["size"].sum()),
        "datasets": {str(name): int(count) for name, count in index["dataset"].value_counts().items()},
        "architectures": architectures,
        "results": results,
        "unusable": reasons(opened.left_out),
    }
    ranges = [(name, *values.values()) for name, values in results.items()]
    return record, [
        f"{record['zoo']}: {record['models']:,} models of {record['runs']:,} runs, {record['bytes']:,} bytes",
        f"datasets: {len(record['datasets'])}",
        f"architectures: {len(architectures)}",
        *table(list(architectures[0]), [list(one.values()) for one in architectures]),
        f"results: {len(results)}",
        *(table(("result", "models", "lowest", "mean", "highest"), ranges) if ranges else ()),
        *(listing("models that cannot be used", opened.left_out) if opened.left_out else ()),
    ]
