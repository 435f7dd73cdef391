"""The model card of a weight encoder."""

from __future__ import annotations

import html
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from weightspace.errors import WeightspaceError

_MARKDOWN = re.compile(r"([\\`*_\[\]|#~$])")


@dataclass(frozen=True)
class TrainingZoo:
    """The models that an encoder was trained on; what is not known stays empty.

    Attributes:
        name: what the zoo is called.
        digest: of the settings that its content follows from.
        hub_id: ``org/name`` where it lies on the Hub.
        models: number of models.
        runs: number of training runs they come from.
        architectures: their names.
        datasets: ids of the datasets that they were trained on.
        licences: number of models under each licence of the sources.
    """

    name: str
    digest: str | None = None
    hub_id: str | None = None
    models: int | None = None
    runs: int | None = None
    architectures: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    licences: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One measured number with its 95 % interval; NaN or None where something is not known."""

    method: str
    value: float
    low: float | None = None
    high: float | None = None


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


def write_encoder_card(folder: str | Path, facts: EncoderFacts) -> Path:
    """Writes ``README.md`` for an encoder, whole or not at all; an existing one is replaced.

    Measured numbers go into the table, and those of the encoder into the ``model-index`` of the metadata as well.

    Args:
        folder: where the encoder was saved; created if need be.
        facts: what to say. Texts in it are escaped.

    Returns:
        Path of the card.

    Raises:
        WeightspaceError: the folder cannot be written.
    """
    template = resources.files("weightspace.cards").joinpath("templates", "encoder.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=template,
        facts=facts,
        table=list(_table(facts.measurements)),
        text=_text,
        code=_code,
    )
    path = Path(folder) / "README.md"
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as file:
                file.write(str(card).rstrip() + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WeightspaceError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from error
    return path


def _metadata(facts: EncoderFacts) -> ModelCardData:
    zoo = facts.zoo
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=zoo.hub_id or zoo.name,
            dataset_name=zoo.name,
            metric_type=one.metric,
            metric_name=f"{one.metric_name}, {one.task}",
            metric_value=float(one.score.value),
        )
        for one in facts.measurements
        if zoo is not None and math.isfinite(one.score.value)
    ]
    return ModelCardData(
        model_name=facts.name,
        library_name="weightspace",
        pipeline_tag="feature-extraction",
        license=facts.licence,
        tags=list(dict.fromkeys(("weightspace", "weight-space-learning", *facts.tags))),
        datasets=[zoo.hub_id] if zoo is not None and zoo.hub_id else None,
        metrics=list(dict.fromkeys(one.metric for one in facts.measurements)) or None,
        eval_results=results or None,
    )


def _table(measurements: tuple[Measurement, ...]) -> Iterator[tuple[str, str, str, str]]:
    """Gives the cells task, metric, method and value, the encoder's row before its baselines'."""
    for one in measurements:
        yield _text(one.task), _text(one.metric_name), f"**{_text(one.score.method)}**", f"**{_number(one.score)}**"
        for score in one.baselines:
            yield "", "", _text(score.method), _number(score)


def _number(score: Score) -> str:
    if not math.isfinite(score.value):
        return "n/a"
    if score.low is None or score.high is None or not math.isfinite(score.low + score.high):
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _text(value: object) -> str:
    """Makes one line of Markdown that shows the value as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _code(value: object) -> str:
    """Makes JSON (which Python reads as well where it is a text) that cannot end the code block it stands in."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str).replace("`", "\\u0060")
