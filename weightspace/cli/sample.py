"""``weightspace sample`` and ``weightspace evaluate-samples``: sampled models, and how good they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import (
    COUNT,
    Result,
    command,
    ensure_codes,
    joint_option,
    output_option,
    temperature_option,
)
from weightspace.printing import table

if TYPE_CHECKING:
    from weightspace.evaluation.comparison import ComparisonRow
    from weightspace.evaluation.criteria import CriterionRow
    from weightspace.io.hub import HubOptions
    from weightspace.sampling.request import SampledModels, WrittenModel

_FROM_SAMPLER = "from the sampler"
_SETTINGS = {
    "flow": ("dataset_guidance", "result_guidance", "steps", "solver"),
    "codes": ("dataset_guidance", "result_guidance", "temperature"),
    "selected": ("candidates", "images"),
    "bootstrapped": ("candidates", "images"),
}
"""The options that are settings of a sampler, by its name."""

_SAMPLER_OPTIONS = {"refine", *(name for names in _SETTINGS.values() for name in names)}


@command("hub", "pickle")
@joint_option
@click.option("--prior", help="Trained prior: a folder, or org/name of the Hub.")
@click.option(
    "--sampler", show_default="that of the prior, or kde", help="e.g. flow, kde+bootstrapped or flow+refined."
)
@click.option("--zoo", help="For kde: zoo of the models to sample around.")
@click.option("--encoder", show_default="that of the prior", help="For kde: trained weight autoencoder.")
@click.option("--dataset", help="Sample for this dataset: a folder or an id, e.g. digits?rotation=90.")
@click.option("--result", help='Sample models that have it, e.g. 0.95, ">=0.9" or "test_loss<0.3".')
@click.option("--architecture", help="config.json, or a model of the architecture: a path or org/name of the Hub.")
@click.option("-n", "count", type=COUNT, default=16, help="Models to sample.")
@output_option("A new or an empty folder.")
@click.option("--seed", type=int, default=0, help="Seed of everything random.")
@click.option(
    "--guidance-dataset",
    "dataset_guidance",
    type=float,
    show_default=_FROM_SAMPLER,
    help="How much the dataset counts.",
)
@click.option(
    "--guidance-result", "result_guidance", type=float, show_default=_FROM_SAMPLER, help="How much the result counts."
)
@click.option("--steps", type=COUNT, show_default=_FROM_SAMPLER, help="Steps of the flow.")
@click.option("--solver", type=click.Choice(["euler", "heun"]), show_default=_FROM_SAMPLER)
@temperature_option
@click.option("--candidates", type=COUNT, help="Samples to choose each model from.")
@click.option("--images", type=COUNT, help="Training images that candidates are scored on.")
@click.option("--refine", type=COUNT, help="Steps of gradient refinement on the dataset.")
@click.option("--edit", "edited", help="Model to move towards the dataset and the result, instead of sampling anew.")
@click.option("--strength", type=click.FloatRange(0, 1), default=0.5, help="Of --edit: 0 leaves it, 1 samples anew.")
def sample(
    joint: str,
    prior: str | None,
    sampler: str | None,
    zoo: str | None,
    encoder: str | None,
    output: Path,
    options: HubOptions,
    allow_pickle: bool,
    **values: Any,
) -> Result:
    """Sample models for a dataset and a result, and evaluate them.

    Without --dataset or --result, models for any are sampled. The sampler is that of --prior; kde needs --zoo and
    --encoder instead.

    The folder can be imported by `weightspace zoo import` and published by `weightspace push`.
    """
    from weightspace.encoder import load_encoder
    from weightspace.sampling.base import Sources
    from weightspace.sampling.factory import default_sampler, open_sampler
    from weightspace.sampling.request import SampleRequest, ensure_empty, sample_models, write_models
    from weightspace.zoo.dataset import load_zoo

    chosen = {name: values.pop(name) for name in _SAMPLER_OPTIONS}
    settings = {sampler: {name: chosen[name] for name in names} for sampler, names in _SETTINGS.items()}
    settings["refined"] = {"steps": chosen["refine"]}
    request = SampleRequest(**values)
    ensure_empty(output)
    condition = request.open(options)
    name = sampler or ("kde" if prior is None else default_sampler(prior, options))
    ensure_codes(chosen["temperature"], [name])
    if chosen["candidates"] is not None and not {"selected", "bootstrapped"} & set(name.split("+")):
        name = f"{name}+selected"
    if chosen["refine"] is not None and not name.endswith("+refined"):
        name = f"{name}+refined"
    loaded = load_encoder(joint, options)
    opened_zoo = None if zoo is None else load_zoo(zoo).usable()
    sources = Sources(loaded, () if prior is None else (prior,), opened_zoo, encoder, options)
    opened = open_sampler(name, sources, settings)
    models = sample_models(request, condition, opened, loaded, options, allow_pickle=allow_pickle)
    written = write_models(output, models)
    record = {
        "folder": str(output),
        **asdict(models.facts),
        "models": [asdict(one) for one in written],
        "mean": None if models.accuracies is None else float(models.accuracies.mean()),
        "chance": models.chance,
        "before": models.before,
        "not_evaluated": models.not_evaluated,
    }
    return record, [f"{output}: {len(written):,} models by {models.facts.sampler}", *_obtained(models, written)]


def _obtained(models: SampledModels, written: list[WrittenModel]) -> list[str]:
    if models.accuracies is None:
        return [f"not evaluated: {models.not_evaluated}"]
    requested = models.facts.result or "any"
    rows = [(one.file.partition("/")[0], requested, f"{one.results['test_accuracy']:.3f}") for one in written]
    known = {"mean": models.accuracies.mean(), "before": models.before, "chance": models.chance}
    rows += [(name, "", f"{value:.3f}") for name, value in known.items() if value is not None]
    return table(("model", "requested", "obtained test_accuracy"), rows)


@command("hub", "pickle")
@click.argument("zoo")
@joint_option
@click.option("--prior", "priors", multiple=True, help="Trained prior: a folder, or org/name of the Hub; repeatable.")
@click.option("--encoder", show_default="that of the prior", help="Trained weight autoencoder, which kde needs.")
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    show_default="kde and those of the priors",
    help="e.g. kde+bootstrapped+refined; repeatable.",
)
@click.option("--datasets", type=COUNT, default=8, help="Datasets of each kind.")
@click.option("-n", "count", type=COUNT, default=16, help="Models of each condition.")
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
@output_option("JSON file of the results.")
def evaluate_samples(
    zoo: str,
    joint: str,
    priors: tuple[str, ...],
    encoder: str | None,
    samplers: tuple[str, ...],
    epochs: tuple[int, ...],
    temperature: float | None,
    output: Path,
    options: HubOptions,
    allow_pickle: bool,
    **extent: Any,
) -> Result:
    """Evaluate samplers: the accuracy of their models, and whether they are new.

    ZOO is the zoo that the joint model was trained on.

    Models are sampled for datasets and results of the zoo, fine-tuned, and compared with the zoo's own, with training
    from scratch and with other models that need no generator. Intervals (95 %) are over datasets; a comparison with a
    baseline is undecided where the interval of the paired differences contains 0.
    """
    from weightspace.encoder import load_encoder
    from weightspace.evaluation.accuracy import FineTuning
    from weightspace.evaluation.comparison import ComparisonSettings
    from weightspace.evaluation.criteria import check
    from weightspace.sampling.base import Sources
    from weightspace.sampling.evaluate import EvaluationSettings, evaluate_samplers, plan_evaluation
    from weightspace.sampling.factory import default_sampler, open_sampler
    from weightspace.zoo.dataset import load_zoo
    from weightspace.zoo.storage import write_text

    settings = EvaluationSettings(**extent, comparison=ComparisonSettings(FineTuning(epochs=epochs)))
    loaded, opened_zoo = load_encoder(joint, options), load_zoo(zoo).usable()
    sources = Sources(loaded, priors, opened_zoo, encoder, options)
    names = samplers or (*(default_sampler(prior, options) for prior in priors), "kde")
    ensure_codes(temperature, names)
    opened = {name: open_sampler(name, sources, {"codes": {"temperature": temperature}}) for name in names}
    ready = {name: one.sampler for name, one in opened.items()}
    plan = plan_evaluation(opened_zoo, loaded, settings, options, allow_pickle=allow_pickle)
    rows = evaluate_samplers(ready, opened_zoo, loaded, settings, plan)
    criteria = check(rows)
    record = {
        "zoo": opened_zoo.location,
        "samplers": {name: {"sources": one.sources, "settings": one.settings} for name, one in opened.items()},
        "settings": asdict(settings),
        "left_out": plan.left_out,
        "rows": [asdict(row) for row in rows],
        "criteria": [asdict(row) for row in criteria],
    }
    write_text(output, json.dumps(record, indent=1) + "\n")
    left_out = [f"left out: {reason}" for reason in plan.left_out.values()]
    return record, [*_lines(rows, criteria, list(opened)), *left_out, f"comparison: {output}"]


def _lines(rows: Sequence[ComparisonRow], criteria: Sequence[CriterionRow], samplers: list[str]) -> list[str]:
    """Lays out the measurements, the samplers side by side, and the criteria; the seen datasets first."""
    lines = []
    for group in dict.fromkeys(row.datasets for row in rows):
        own = [row for row in rows if row.datasets == group]
        lines.append(f"{group} datasets: {max(len(row.values) for row in own)}")
        cells = {(row.measure, row.subject, row.sampler): _number(row) for row in own}
        subjects: dict[str, dict[str, None]] = {}
        for row in own:
            subjects.setdefault(row.measure, {})[row.subject] = None
        measured = [
            (measure if place == 0 else "", of, *(cells.get((measure, of, name), "") for name in samplers))
            for measure, found in subjects.items()
            for place, of in enumerate(found)
        ]
        lines += table(("measure", "of", *samplers), measured)
        held = [
            (
                row.sampler,
                row.outcome,
                row.measure,
                row.subject,
                _number(row),
                row.requirement,
                f"{row.holds} of {row.of}",
            )
            for row in criteria
            if row.datasets == group
        ]
        head = ("sampler", "criterion", "measure", "of", "found", "requirement", "holds on")
        lines += table(head, held) if held else []
    return lines


def _number(found: ComparisonRow | CriterionRow) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
