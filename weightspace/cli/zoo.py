"""``weightspace zoo``: many models as one dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import config_option, json_option, settings_from
from weightspace.cli.output import print_json, print_list, print_table

if TYPE_CHECKING:
    from weightspace.zoo.dataset import Zoo


@click.group()
def zoo() -> None:
    """Zoos: many models as one dataset."""


@zoo.command("train")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the zoo.")
@config_option
@click.option("--runs", type=int, show_default="from the settings", help="Models to train.")
@click.option("--seed", type=int, show_default="from the settings", help="Seed of the grid and of the training.")
@json_option
def train_command(output: Path, config: Path | None, runs: int | None, seed: int | None, as_json: bool) -> None:
    """Train a zoo on image datasets.

    Many models are trained at once. After an interruption, the same command goes on.
    """
    from weightspace.zoo.training import ZooSettings, train_zoo

    trained = train_zoo(settings_from(ZooSettings, config, {"runs": runs, "seed": seed}), output)
    _print_zoo(trained, as_json)


@zoo.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the zoo.")
@click.option("--strict", is_flag=True, help="Refuse the whole folder if any model cannot be used.")
@json_option
def import_command(folder: Path, output: Path, strict: bool, as_json: bool) -> None:
    """Import a folder of safetensors files.

    The folder is any tree with a metadata.jsonl.

    Models that cannot be used are left out and listed with the reason, here and in the zoo's skips.jsonl.
    """
    from weightspace.zoo.importing import import_folder

    summary = import_folder(folder, output, on_problem="error" if strict else "skip")
    if as_json:
        skipped = [{"file": file, "reason": reason} for file, reason in summary.skipped]
        print_json({"zoo": str(output), "models": summary.models, "skipped": skipped})
        return
    click.echo(f"{output}: {summary.models:,} models imported")
    print_list("left out", [f"{file}: {reason}" for file, reason in summary.skipped])


@zoo.command("join")
@click.argument("paths", metavar="ZOO...", nargs=-1, required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the new zoo.")
@json_option
def join_command(paths: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Make one zoo of several.

    Models whose tensors another one has already are left out. After an interruption, the same command goes on.
    """
    from weightspace.zoo.transfer import join_zoos

    summary = join_zoos(paths, output)
    if as_json:
        skipped = [{"file": file, "reason": reason} for file, reason in summary.skipped]
        print_json({"zoo": str(output), "models": summary.models, "skipped": skipped})
        return
    click.echo(f"{output}: {summary.models:,} models joined")
    print_list("left out", [f"{file}: {reason}" for file, reason in summary.skipped])


@zoo.command("info")
@click.argument("path", metavar="ZOO", type=click.Path(path_type=Path))
@json_option
def info_command(path: Path, as_json: bool) -> None:
    """Describe a zoo.

    ZOO is a folder, or org/name[@revision] on the Hub; so it is wherever a zoo is read.
    """
    from weightspace.zoo.dataset import load_zoo

    _print_zoo(load_zoo(path), as_json)


@zoo.command("export")
@click.argument("path", metavar="ZOO", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new or an empty folder.")
@json_option
def export_command(path: Path, output: Path, as_json: bool) -> None:
    """Write a zoo as safetensors files.

    With its metadata.jsonl, the folder can be imported again.
    """
    from weightspace.zoo.dataset import load_zoo
    from weightspace.zoo.transfer import export_folder

    count = export_folder(load_zoo(path), output)
    if as_json:
        print_json({"folder": str(output), "models": count})
    else:
        click.echo(f"{output}: {count:,} models")


def _print_zoo(opened: Zoo, as_json: bool) -> None:
    record = _record(opened)
    if as_json:
        print_json(record)
        return
    click.echo(f"{record['zoo']}: {record['models']:,} models of {record['runs']:,} runs, {record['bytes']:,} bytes")
    click.echo(f"datasets: {len(record['datasets'])}")
    click.echo(f"architectures: {len(record['architectures'])}")
    columns = ("header", "models", "layers", "parameters", "permutation_groups")
    print_table(columns, [[a[c] for c in columns] for a in record["architectures"]], indent="  ")
    click.echo(f"results: {len(record['results'])}")
    if record["results"]:
        statistics = ("models", "lowest", "mean", "highest")
        rows = [[name, *(values[s] for s in statistics)] for name, values in record["results"].items()]
        print_table(("result", *statistics), rows, indent="  ")


def _record(opened: Zoo) -> dict[str, Any]:
    index = opened.index
    results = {name: index[name].dropna() for name in opened.result_names}
    return {
        "zoo": opened.location,
        "models": len(opened),
        "runs": int(index["run_id"].nunique()),
        "bytes": int(index["size"].sum()),
        "datasets": {str(name): int(count) for name, count in index["dataset"].value_counts().items()},
        "architectures": [
            {
                "header": header,
                "models": int((index["header"] == header).sum()),
                "layers": len(architecture.layers),
                "parameters": architecture.numel,
                "permutation_groups": len(architecture.groups),
            }
            for header, architecture in opened.architectures.items()
        ],
        "results": {
            name: {
                "models": len(values),
                "lowest": float(values.min()),
                "mean": float(values.mean()),
                "highest": float(values.max()),
            }
            for name, values in results.items()
            if len(values)
        },
    }
