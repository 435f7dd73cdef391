"""``weightspace probe``."""

from __future__ import annotations

from pathlib import Path

import click

from weightspace.cli.options import json_option
from weightspace.cli.output import print_json


@click.command()
@click.argument("zoo", type=click.Path(path_type=Path))
@click.option("--encoder", help="Folder of a trained encoder to compare with the baselines.")
@click.option("--target", "targets", multiple=True, default=("test_accuracy",), help="Result to predict; repeatable.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), help="Seed of a split; repeatable.")
@json_option
def probe(zoo: Path, encoder: str | None, targets: tuple[str, ...], seeds: tuple[int, ...], as_json: bool) -> None:
    """Predict results of a zoo from its weights.

    Baselines and, where given, an encoder stand side by side.

    Splits keep the checkpoints of a run together. Every number stands once more for neuron-permuted test models.
    """
    from weightspace.probes.probe import format_table, rows_to_records
    from weightspace.probes.zoo import probe_zoo

    rows = probe_zoo(zoo, encoder, targets, seeds=seeds)
    if as_json:
        print_json(rows_to_records(rows))
    else:
        click.echo(format_table(rows))
