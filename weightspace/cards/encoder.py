"""The model card of a weight encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from weightspace.cards.rendering import decimals, render_template, text


@dataclass(frozen=True)
class TrainingZoo:
    """The models that an encoder was trained on; what is not known stays empty.

    Attributes:
        name: what the zoo is called.
        digest: of the settings that its content follows from.
        hub_id: ``org/name`` where it lies on the Hub.
        revision: commit of ``hub_id``.
        models: number of models.
        runs: number of training runs they come from.
        architectures: their names.
        datasets: ids of the datasets that they were trained on.
        licences: number of models under each licence of the sources.
    """

    name: str
    digest: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    models: int | None = None
    runs: int | None = None
    architectures: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    licences: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One measured number with its 95 % interval; NaN or None where something is not known."""

    method: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> float | None:
        """The value, or None in place of NaN and infinities."""
        return self.value if self.value is not None and math.isfinite(self.value) else None


@dataclass(frozen=True)
class Measurement:
    """What the encoder reached at one task, and what baselines reached on the same models.

    Attributes:
        task: e.g. ``"test accuracy from the embedding"``.
        metric: id of the metric, e.g. ``"r2"``.
        metric_name: how it is written, e.g. ``"R²"``.
        score: the encoder's.
        baselines: the others', on the same test models.
    """

    task: str
    metric: str
    metric_name: str
    score: Score
    baselines: tuple[Score, ...] = ()


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of an encoder; the card leaves out the section of whatever is empty.

    Attributes:
        name: heading of the card and model name of its results.
        location: folder or Hub id for the loading example.
        licence: licence id of the encoder.
        parameters: numbers the encoder itself has.
        embedding_size: length of the embedding of a model.
        tags: beside ``weightspace``.
        zoo: what it was trained on.
        config: content of its ``config.json``, or the part worth reading.
        training: settings of the training.
        measurements: on test models that it was not trained on.
        limits: what it is not good for, one sentence each.
        decodes: whether its latents can be decoded back to weights.
        samples: whether it samples weights, and embeds none.
    """

    name: str
    location: str = "path/to/this/folder"
    licence: str | None = None
    parameters: int | None = None
    embedding_size: int | None = None
    tags: tuple[str, ...] = ()
    zoo: TrainingZoo | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    limits: tuple[str, ...] = ()
    decodes: bool = True
    samples: bool = False


def render_encoder(facts: EncoderFacts) -> str:
    """Renders the card. Texts in the facts are escaped.

    Measured numbers go into the table, and those of the encoder into the ``model-index`` of the metadata as well.
    """
    return render_template("encoder", _metadata(facts), facts=facts, table=list(_table(facts.measurements)))


def _metadata(facts: EncoderFacts) -> ModelCardData:
    zoo = facts.zoo
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=zoo.hub_id or zoo.name,
            dataset_name=zoo.name,
            dataset_revision=zoo.revision,
            metric_type=one.metric,
            metric_name=f"{one.metric_name}, {one.task}",
            metric_value=one.score.known,
        )
        for one in facts.measurements
        if zoo is not None and one.score.known is not None
    ]
    return ModelCardData(
        model_name=facts.name,
        library_name="weightspace",
        pipeline_tag=None if facts.samples else "feature-extraction",
        license=facts.licence,
        tags=list(dict.fromkeys(("weightspace", "weight-space-learning", *facts.tags))),
        datasets=[zoo.hub_id] if zoo is not None and zoo.hub_id else None,
        metrics=list(dict.fromkeys(one.metric for one in facts.measurements)) or None,
        eval_results=results or None,
    )


def _table(measurements: tuple[Measurement, ...]) -> Iterator[tuple[str, str, str, str]]:
    """Gives the cells task, metric, method and value, the encoder's row before its baselines'."""
    for one in measurements:
        yield text(one.task), text(one.metric_name), f"**{text(one.score.method)}**", f"**{_number(one.score)}**"
        for score in one.baselines:
            yield "", "", text(score.method), _number(score)


def _number(score: Score) -> str:
    if score.low is None or score.high is None or not math.isfinite(score.low + score.high):
        return decimals(score.value)
    return f"{decimals(score.value)} [{score.low:.3f}, {score.high:.3f}]"
