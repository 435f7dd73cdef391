"""``weightspace explain``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightspace.cli.options import json_option
from weightspace.cli.output import print_json, print_list, print_table
from weightspace.errors import SettingsError

if TYPE_CHECKING:
    from weightspace.encoder import Encoder
    from weightspace.probes.explain import Explanation
    from weightspace.stats.resampling import Estimate
    from weightspace.zoo.dataset import Zoo


@click.command()
@click.argument("zoo", type=click.Path(path_type=Path))
@click.option("--encoder", required=True, help="Folder of a trained encoder, or org/name on the Hub.")
@click.option("--held-out", is_flag=True, help="Take only the runs that the encoder's training kept for tests.")
@click.option("--draws", type=click.IntRange(min=100), default=1000, help="Permutations and bootstrap replicates.")
@click.option("--seed", type=int, default=0, help="Seed of the draws.")
@json_option
def explain(zoo: Path, encoder: str, held_out: bool, draws: int, seed: int, as_json: bool) -> None:
    """Say what the weights of a zoo's models tell of their data.

    Do models of similar datasets cluster, within an architecture and between them? Which characteristics of the data,
    and which hyper-parameters, determine the weights most? The encoder's embedding stands beside s(W), the statistics
    of the raw weights.

    Every run counts once, by its last checkpoint. P-values come from permutations and are not corrected for their
    number; intervals hold 95 % and are about these datasets. An encoder that saw the datasets of its training runs
    places these runs by them: judge such a one by --held-out.
    """
    from weightspace.encoder import load_encoder
    from weightspace.probes.explain import explain as explain_runs
    from weightspace.probes.runs import run_table
    from weightspace.probes.zoo import describe_runs
    from weightspace.zoo.dataset import load_zoo

    opened, loaded = load_zoo(zoo), load_encoder(encoder)
    table = run_table(opened, _held_out(opened, loaded) if held_out else None)
    answer = explain_runs(table, describe_runs(opened, table, {"embedding": loaded}), draws=draws, seed=seed)
    if as_json:
        print_json({"zoo": str(zoo), "encoder": encoder, "runs": len(table), **dataclasses.asdict(answer)})
    else:
        _print(answer)


def _held_out(zoo: Zoo, encoder: Encoder) -> list[str]:
    """Returns the runs that the encoder's training kept for tests."""
    from weightspace.training.autoencoder import read_training

    state = read_training(encoder.path)
    if state is None or state["zoo_digest"] != zoo.digest:
        raise SettingsError(f"--held-out: {encoder.path} was not trained on {zoo.location}; leave the option out")
    return list(state["test_runs"])


def _print(answer: Explanation) -> None:
    click.echo("Do models of the same dataset cluster?")
    print_table(
        ("description", "models", "runs", "of the same", "groups", "measure", *_ESTIMATE),
        [
            (row.description, row.models, row.runs, row.label, row.groups, row.measure, *_cells(row.estimate))
            for row in answer.clusters
        ],
        indent="  ",
    )
    click.echo("\nAre models of similar datasets similar? (Spearman's correlation over pairs of datasets)")
    print_table(
        ("description", "weights of", "compared with", "datasets", *_ESTIMATE),
        [(row.description, row.models, row.other, row.datasets, *_cells(row.estimate)) for row in answer.geometry],
        indent="  ",
    )
    click.echo("\nWhat determines the weights? (share of variance, omega squared)")
    print_table(
        ("description", "models", "runs", "factor", "kind", "df", *_ESTIMATE),
        [
            (
                row.description,
                row.models,
                row.runs,
                row.share.name,
                row.share.kind,
                row.share.df,
                *_cells(row.share.share),
            )
            for row in answer.variance
        ],
        indent="  ",
    )
    click.echo()
    print_list("notes", answer.notes)


_ESTIMATE = ("value", "95 % interval", "by chance", "p")


def _cells(estimate: Estimate) -> tuple[str, str, str, str]:
    interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
    if estimate.p_value is None:
        return f"{estimate.value:.3f}", interval, "", ""
    chance = f"{estimate.null_low:.3f} to {estimate.null_high:.3f}"
    return f"{estimate.value:.3f}", interval, chance, f"{estimate.p_value:.4f}"
