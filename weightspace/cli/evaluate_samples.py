"""``weightspace evaluate-samples``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightspace.cli.options import ensure_codes, hub_options, json_option, pickle_option, temperature_option
from weightspace.cli.output import print_json, print_table

if TYPE_CHECKING:
    from weightspace.evaluation.bars import Bar
    from weightspace.evaluation.proof import ProofRow
    from weightspace.io.hub import HubOptions


@click.command("evaluate-samples")
@click.argument("zoo")
@click.option("--model", "--joint", "joint", required=True, help="Joint model: a folder, or org/name of the Hub.")
@click.option("--prior", "priors", multiple=True, help="Trained prior: a folder, or org/name of the Hub; repeatable.")
@click.option("--encoder", show_default="that of the prior", help="Trained weight autoencoder, which kde needs.")
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    show_default="kde and those of the priors",
    help="e.g. kde+bootstrapped+refined; repeatable.",
)
@click.option("--datasets", type=click.IntRange(min=1), default=8, help="Datasets of each kind.")
@click.option("-n", "count", type=click.IntRange(min=1), default=16, help="Models of each condition.")
@click.option(
    "--request",
    "requests",
    type=click.FloatRange(0, 1),
    multiple=True,
    show_default="bins of the joint model",
    help="Test accuracy to ask for; repeatable.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), help="Seed of samples; repeatable.")
@click.option("--epochs", type=click.IntRange(min=0), multiple=True, default=(0, 1, 10), help="Budget of fine-tuning.")
@temperature_option
@click.option("--unseen", is_flag=True, help="Also sample for the datasets that the joint model held out.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON file of the proof.")
@hub_options
@pickle_option
@json_option
def evaluate_samples(
    zoo: str,
    joint: str,
    priors: tuple[str, ...],
    encoder: str | None,
    samplers: tuple[str, ...],
    datasets: int,
    count: int,
    requests: tuple[float, ...],
    seeds: tuple[int, ...],
    epochs: tuple[int, ...],
    temperature: float | None,
    unseen: bool,
    output: Path,
    options: HubOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Prove samplers: what their models are worth, and whether they are new.

    ZOO is the zoo that the joint model was trained on.

    Models are sampled for datasets and results of the zoo, fine-tuned, and compared with the zoo's own, with training
    from scratch and with other models that need no generator. Intervals (95 %) are over datasets; a bar that lies in
    its interval is undecided.
    """
    from weightspace.encoder import load_encoder
    from weightspace.evaluation.bars import judge
    from weightspace.evaluation.finetuning import FineTuning
    from weightspace.evaluation.proof import ProofSettings
    from weightspace.sampling.codes import CodeSettings
    from weightspace.sampling.opening import SamplerSettings, Sources, open_sampler, prior_kind
    from weightspace.sampling.trials import EvaluationSettings, evaluate_samplers
    from weightspace.zoo.dataset import load_zoo
    from weightspace.zoo.storage import write_text

    settings = EvaluationSettings(
        datasets=datasets,
        count=count,
        requests=requests,
        seeds=seeds,
        unseen=unseen,
        proof=ProofSettings(FineTuning(epochs=epochs)),
    )
    loaded, opened_zoo = load_encoder(joint, options), load_zoo(zoo)
    sources = Sources(loaded, priors, opened_zoo, encoder, options)
    names = samplers or (*(prior_kind(prior, options) for prior in priors), "kde")
    ensure_codes(temperature, names)
    parts = SamplerSettings() if temperature is None else SamplerSettings(codes=CodeSettings(temperature=temperature))
    opened = {name: open_sampler(name, sources, parts) for name in names}
    ready = {name: one.sampler for name, one in opened.items()}
    rows = evaluate_samplers(ready, opened_zoo, loaded, settings, options, allow_pickle=allow_pickle)
    bars = judge(rows)
    record = {
        "zoo": opened_zoo.location,
        "samplers": {name: {"sources": one.sources, "settings": one.settings} for name, one in opened.items()},
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) for bar in bars],
    }
    write_text(output, json.dumps(record, indent=1) + "\n")
    if as_json:
        print_json(record)
    else:
        _print(rows, bars, list(opened))
        click.echo(f"proof: {output}")


def _print(rows: Sequence[ProofRow], bars: Sequence[Bar], samplers: list[str]) -> None:
    """Prints what was measured and what it says, the seen datasets first."""
    for group in dict.fromkeys(row.datasets for row in rows):
        own = [row for row in rows if row.datasets == group]
        click.echo(f"{group} datasets: {max(len(row.values) for row in own)}")
        _print_rows(own, samplers)
        _print_bars([bar for bar in bars if bar.datasets == group])


def _print_rows(rows: Sequence[ProofRow], samplers: list[str]) -> None:
    """Prints a line for each measure and subject, the samplers side by side."""
    cells = {(row.measure, row.subject, row.sampler): _number(row) for row in rows}
    subjects: dict[str, dict[str, None]] = {}
    for row in rows:
        subjects.setdefault(row.measure, {})[row.subject] = None
    lines = [
        (measure if place == 0 else "", subject, *(cells.get((measure, subject, name), "") for name in samplers))
        for measure, own in subjects.items()
        for place, subject in enumerate(own)
    ]
    print_table(("measure", "of", *samplers), lines, indent="  ")


def _print_bars(bars: Sequence[Bar]) -> None:
    """Prints a line for each bar: differences are taken dataset by dataset."""
    if bars:
        lines = [
            (bar.sampler, bar.outcome, bar.measure, bar.subject, _number(bar), bar.asked, f"{bar.holds} of {bar.of}")
            for bar in bars
        ]
        print_table(("sampler", "bar", "measure", "of", "found", "asked for", "holds on"), lines, indent="  ")


def _number(found: ProofRow | Bar) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
