"""The card of plain models: weights of any architecture, one model or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from weightspace.cards.rendering import decimals, render_template, text


@dataclass(frozen=True)
class ModelFacts:
    """One model: what its file and its row of ``metadata.jsonl`` tell.

    Attributes:
        file: path inside the repository; empty where the repository is one model.
        architecture: its class or family, or None.
        parameters: numbers it has.
        dtypes: numbers by stored dtype.
        dataset: what it was trained on, or None.
        results: as recorded, by name.
    """

    file: str = ""
    architecture: str | None = None
    parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    dataset: str | None = None
    results: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingFacts:
    """How models were sampled in place of trained.

    Attributes:
        sampler: what drew them, e.g. ``"flow"``.
        sources: names of what the sampler was made of, e.g. of the joint model, by their role.
        dataset: what they were asked to be good for, or None.
        result: which results were asked for, as it was written, or None.
        edited: the model that they were made from, or None.
        seed: what everything random was drawn from.
        settings: how the sampler was used.
    """

    sampler: str
    sources: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None = None
    result: str | None = None
    edited: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelsFacts:
    """What is known of a folder of models; the card leaves out the section of whatever is empty.

    Attributes:
        name: heading of the card.
        location: folder or Hub id for the loading example.
        licence: licence id of the weights.
        base_model: what they were made from, a Hub id, or None.
        models: those that the card lists.
        others: number of models beyond them.
        config: content of ``config.json`` where there is one model.
        sampling: how they came about if they were sampled.
    """

    name: str
    location: str = "path/to/this/folder"
    licence: str | None = None
    base_model: str | None = None
    models: tuple[ModelFacts, ...] = ()
    others: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    sampling: SamplingFacts | None = None


def render_models(facts: ModelsFacts) -> str:
    """Renders the card. Texts in the facts are escaped."""
    names = tuple(dict.fromkeys(name for one in facts.models for name in one.results))
    table = [
        (
            text(one.file or facts.name),
            text(one.architecture or ""),
            f"{one.parameters:,}",
            text(", ".join(one.dtypes)),
            text(one.dataset or ""),
            *(decimals(one.results[name]) if name in one.results else "" for name in names),
        )
        for one in facts.models
    ]
    first = facts.models[0].file if facts.models else ""
    example = f"{facts.location}:{first}" if first else facts.location
    use = "sampled for" if facts.sampling else "trained on"
    head = ("model", "architecture", "parameters", "stored as", use, *map(text, names))
    return render_template("models", _metadata(facts), facts=facts, head=head, table=table, example=example)


def _metadata(facts: ModelsFacts) -> ModelCardData:
    # The library's datasets are image datasets with labels, so that this accuracy is one of image classification.
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=one.dataset,
            dataset_name=one.dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=one.results["test_accuracy"],
        )
        for one in facts.models
        if len(facts.models) + facts.others == 1 and one.dataset is not None and "test_accuracy" in one.results
    ]
    return ModelCardData(
        model_name=facts.name,
        library_name="weightspace",
        license=facts.licence,
        tags=["weightspace"],
        base_model=facts.base_model,
        eval_results=results or None,
    )
