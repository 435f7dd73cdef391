"""``weightspace probe``."""

from __future__ import annotations

from pathlib import Path

import click

from weightspace.cli.options import json_option
from weightspace.cli.output import print_json


@click.command()
@click.argument("zoo", type=click.Path(path_type=Path))
@click.option("--encoder", "encoders", multiple=True, help="Trained encoder to compare with the baselines; repeatable.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("test_accuracy",),
    help="What to predict: a result, a hyper-parameter (log10:NAME for its logarithm), or classes; repeatable.",
)
@click.option("--unseen-datasets", is_flag=True, help="Test on models of datasets that no training model has.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), help="Seed of a split; repeatable.")
@json_option
def probe(
    zoo: Path,
    encoders: tuple[str, ...],
    targets: tuple[str, ...],
    unseen_datasets: bool,
    seeds: tuple[int, ...],
    as_json: bool,
) -> None:
    """Predict what is known of a zoo's models from their weights.

    Baselines and, where given, encoders stand side by side.

    Numbers are judged by R2 and Kendall's tau; names, and the classes that a model was trained on, by balanced accuracy
    and AUC. Splits keep the checkpoints of a run together. Every number stands once more for neuron-permuted test
    models.
    """
    from weightspace.probes.rows import format_table, rows_to_records
    from weightspace.probes.zoo import probe_zoo

    rows = probe_zoo(zoo, encoders, targets, seeds=seeds, unseen_datasets=unseen_datasets)
    if as_json:
        print_json(rows_to_records(rows))
    else:
        click.echo(format_table(rows))
