"""``weightspace sample``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import ensure_codes, hub_options, json_option, pickle_option, temperature_option
from weightspace.cli.output import print_json, print_table

if TYPE_CHECKING:
    from weightspace.io.hub import HubOptions
    from weightspace.sampling.making import Made
    from weightspace.sampling.opening import SamplerSettings
    from weightspace.sampling.writing import WrittenModel


@click.command()
@click.option("--model", "--joint", "joint", required=True, help="Joint model: a folder, or org/name of the Hub.")
@click.option("--prior", help="Trained prior: a folder, or org/name of the Hub.")
@click.option(
    "--sampler", show_default="that of the prior, or kde", help="e.g. flow, kde+bootstrapped or flow+refined."
)
@click.option("--zoo", help="For kde: zoo of the models to sample around.")
@click.option("--encoder", show_default="that of the prior", help="For kde: trained weight autoencoder.")
@click.option("--dataset", help="Sample for this dataset: a folder or an id, e.g. digits?rotation=90.")
@click.option("--result", help='Sample models that have it, e.g. 0.95, ">=0.9" or "test_loss<0.3".')
@click.option("--architecture", help="config.json, or a model of the architecture: a path or org/name of the Hub.")
@click.option("-n", "count", type=click.IntRange(min=1), default=16, help="Models to sample.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new or an empty folder.")
@click.option("--seed", type=int, default=0, help="Seed of everything random.")
@click.option("--guidance-dataset", type=float, show_default="from the sampler", help="How much the dataset counts.")
@click.option("--guidance-result", type=float, show_default="from the sampler", help="How much the result counts.")
@click.option("--steps", type=click.IntRange(min=1), show_default="from the sampler", help="Steps of the flow.")
@click.option("--solver", type=click.Choice(["euler", "heun"]), show_default="from the sampler")
@temperature_option
@click.option("--candidates", type=click.IntRange(min=1), help="Sample so many for each model and keep the best.")
@click.option("--images", type=click.IntRange(min=1), help="Training images that candidates are judged by.")
@click.option("--refine", type=click.IntRange(min=1), help="Steps of gradient refinement on the dataset.")
@click.option("--edit", "edited", help="Model to move towards the dataset and the result, in place of sampling anew.")
@click.option("--strength", type=click.FloatRange(0, 1), default=0.5, help="Of --edit: 0 leaves it, 1 samples anew.")
@hub_options
@pickle_option
@json_option
def sample(
    joint: str,
    prior: str | None,
    sampler: str | None,
    zoo: str | None,
    encoder: str | None,
    dataset: str | None,
    result: str | None,
    architecture: str | None,
    count: int,
    output: Path,
    seed: int,
    guidance_dataset: float | None,
    guidance_result: float | None,
    steps: int | None,
    solver: str | None,
    temperature: float | None,
    candidates: int | None,
    images: int | None,
    refine: int | None,
    edited: str | None,
    strength: float,
    options: HubOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Sample models for a dataset and a result, and evaluate them.

    Without --dataset or --result, models are sampled that suit any. The sampler is that of --prior; kde needs
    --zoo and --encoder in its place.

    The folder can be imported by `weightspace zoo import` and published by `weightspace push`.
    """
    from weightspace.encoder import load_encoder
    from weightspace.sampling.making import Order, check_order, make_models
    from weightspace.sampling.opening import Sources, open_sampler, prior_kind
    from weightspace.sampling.writing import ensure_empty, write_models
    from weightspace.zoo.dataset import load_zoo

    order = Order(dataset, result, architecture, edited, strength, count, seed)
    ensure_empty(output)
    blueprint = check_order(order, options)
    base = sampler or ("kde" if prior is None else prior_kind(prior, options))
    ensure_codes(temperature, [base])
    guidance = {"dataset_guidance": guidance_dataset, "result_guidance": guidance_result}
    selection = {"candidates": candidates, "images": images}
    flow, codes = {"steps": steps, "solver": solver}, {"temperature": temperature}
    settings = _settings(guidance, flow, codes, selection, {"steps": refine})
    loaded = load_encoder(joint, options)
    opened_zoo = None if zoo is None else load_zoo(zoo)
    sources = Sources(loaded, () if prior is None else (prior,), opened_zoo, encoder, options)
    opened = open_sampler(_named(base, candidates, refine), sources, settings)
    made = make_models(order, blueprint, opened, loaded, options, allow_pickle=allow_pickle)
    obtained = [] if made.accuracies is None else [{"test_accuracy": float(value)} for value in made.accuracies]
    written = write_models(output, made.flat, blueprint, made.sampling, obtained, made.statistics)
    if as_json:
        print_json(_record(output, made, written))
    else:
        _print(output, made, written)


def _named(sampler: str, candidates: int | None, refine: int | None) -> str:
    """The sampler's name with the steps that options ask for."""
    if candidates is not None and not {"selected", "bootstrapped"} & set(sampler.split("+")):
        sampler = f"{sampler}+selected"
    return sampler if refine is None or sampler.endswith("+refined") else f"{sampler}+refined"


def _settings(
    guidance: dict[str, Any],
    flow: dict[str, Any],
    codes: dict[str, Any],
    selection: dict[str, Any],
    refinement: dict[str, Any],
) -> SamplerSettings:
    """Settings of samplers with the options that were given."""
    from weightspace.sampling.codes import CodeSettings
    from weightspace.sampling.flow import FlowSettings
    from weightspace.sampling.opening import SamplerSettings
    from weightspace.sampling.refining import RefinementSettings
    from weightspace.sampling.selecting import SelectionSettings

    guidance, flow, codes, selection, refinement = (
        {name: value for name, value in part.items() if value is not None}
        for part in (guidance, flow, codes, selection, refinement)
    )
    return SamplerSettings(
        flow=FlowSettings(**guidance, **flow),
        codes=CodeSettings(**guidance, **codes),
        selection=SelectionSettings(**selection),
        refinement=RefinementSettings(**refinement),
    )


def _record(output: Path, made: Made, written: list[WrittenModel]) -> dict[str, Any]:
    evaluated = made.accuracies is not None
    return {
        "folder": str(output),
        **asdict(made.sampling),
        "models": [asdict(one) for one in written],
        "mean": float(made.accuracies.mean()) if made.accuracies is not None else None,
        "chance": made.chance,
        "before": made.before,
        "not_evaluated": None if evaluated else made.unknown,
    }


def _print(output: Path, made: Made, written: list[WrittenModel]) -> None:
    click.echo(f"{output}: {len(written):,} models by {made.sampling.sampler}")
    if made.accuracies is None:
        click.echo(f"not evaluated: {made.unknown}")
        return
    requested = made.sampling.result or "any"
    rows = [(one.file.partition("/")[0], requested, f"{one.results['test_accuracy']:.3f}") for one in written]
    rows.append(("mean", "", f"{made.accuracies.mean():.3f}"))
    if made.before is not None:
        rows.append(("before", "", f"{made.before:.3f}"))
    rows.append(("chance", "", f"{made.chance:.3f}"))
    print_table(("model", "requested", "obtained test_accuracy"), rows, indent="  ")
