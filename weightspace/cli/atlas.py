"""``weightspace atlas``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightspace.cli.options import hub_options, json_option
from weightspace.cli.output import print_json

if TYPE_CHECKING:
    from weightspace.io.hub import HubOptions


@click.command()
@click.argument("zoo")
@click.option("--encoder", help="Folder of a trained encoder, or org/name on the Hub.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
@click.option("--columns", show_default="all", help="What to show of each model, e.g. dataset,test_accuracy.")
@click.option("--seed", type=int, default=0, help="Seed of the map.")
@hub_options
@json_option
def atlas(
    zoo: str,
    encoder: str | None,
    output: Path,
    columns: str | None,
    seed: int,
    options: HubOptions,
    as_json: bool,
) -> None:
    """Draw a zoo as an interactive page: a map to search, colour and zoom.

    ZOO is a zoo, which needs an encoder, or the file that `weightspace embed` wrote.

    The page is one file that asks for nothing from outside.
    """
    from weightspace.report.atlas import build_atlas, embedded_models, write_atlas

    models = embedded_models(zoo, encoder, options)
    chosen = None if columns is None else [name.strip() for name in columns.split(",")]
    made = build_atlas(models, Path(zoo).name.removesuffix(".parquet"), chosen, seed)
    write_atlas(made, output)
    if as_json:
        names = list(made.columns)
        print_json({"output": str(output), "models": len(made.names), "left_out": made.left_out, "columns": names})
        return
    left_out = f", {made.left_out:,} without a finite embedding left out" if made.left_out else ""
    click.echo(f"{output}: {len(made.names):,} models{left_out}")
