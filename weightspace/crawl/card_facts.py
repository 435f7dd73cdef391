"""Metadata of a model: in the Hub's listing, in its card and in a trainer's log.

All of it comes from strangers: whatever has an unexpected form is ignored, and lengths are bounded.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from weightspace.io.header import shown
from weightspace.schema import ReportedMetric
from weightspace.zoo.storage import RESULTS, weights_schema

MAX_CARD_BYTES = 2**20
"""Longest card whose text is read."""

MAX_METRICS = 1000
"""Most metrics of one card; the rest is left out."""

MAX_METRIC_COLUMNS = 100
"""Most result columns that a crawl adds for the metrics of its cards; rare ones are left out."""

_LONGEST_TEXT, _LONGEST_NAME = 300, 60
_MOST_NAMES, _MOST_HYPERPARAMETERS = 1000, 200
_TEST_SPLITS = frozenset({"test", "validation", "valid", "val", "dev", "eval", "evaluation"})
_HYPERPARAMETERS = re.compile(r"^#+ *Training hyper-?parameters *$", re.IGNORECASE | re.MULTILINE)
_BULLET = re.compile(r"[-*] +([\w.\- ]{1,60}?) *: *(.{1,300})")
_STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size")
_SPEEDS = ("_runtime", "_per_second", "_compilation_time")
_FORMAT_COLUMNS = frozenset({*weights_schema(()).names, *RESULTS})


@dataclass(frozen=True)
class CardFacts:
    """Metadata of a model in the Hub's listing.

    Attributes:
        licence: licence id, or None; several are joined with commas.
        task: pipeline tag, or None.
        library: library that the model is for, or None.
        base_models: models that it was trained or merged from.
        datasets: datasets that its card names.
        metrics: all metrics of its card's model-index.
        trained_by_trainer: whether transformers' Trainer wrote the card; its text then lists hyper-parameters.
    """

    licence: str | None = None
    task: str | None = None
    library: str | None = None
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    metrics: tuple[ReportedMetric, ...] = ()
    trained_by_trainer: bool = False


def card_facts(row: Mapping[str, Any]) -> CardFacts:
    """Reads a row of the Hub's listing of models, with ``cardData``, ``config`` and ``tags``."""
    card, config, tags = as_object(row.get("cardData")), as_object(row.get("config")), _names(row.get("tags"))
    licences = _names(card.get("license")) or _tagged(tags, "license")
    peft = as_object(config.get("peft"))
    base_models = _names(card.get("base_model")) or _names(peft.get("base_model_name_or_path"))
    return CardFacts(
        licence=", ".join(licences) or None,
        task=_name(row.get("pipeline_tag")),
        library=_name(row.get("library_name")),
        base_models=base_models,
        datasets=_names(card.get("datasets")) or _tagged(tags, "dataset"),
        metrics=tuple(itertools.islice(_model_index(card.get("model-index") or row.get("model-index")), MAX_METRICS)),
        trained_by_trainer="generated_from_trainer" in tags,
    )


def metric_columns(models: Iterable[Iterable[ReportedMetric]]) -> tuple[str, ...]:
    """Returns the result columns for the numbers that models' cards report, sorted; the most frequent of very many."""
    counts = Counter(name for metrics in models for name in card_results(metrics) if name not in RESULTS)
    return tuple(sorted(sorted(counts, key=lambda name: (-counts[name], name))[:MAX_METRIC_COLUMNS]))


def card_results(metrics: Iterable[ReportedMetric]) -> dict[str, float]:
    """Returns the results that a card states unambiguously.

    Each kind of metric with a single value becomes a column of its name. ``test_accuracy`` (a fraction) and
    ``test_loss`` are the accuracy and the loss on a test or validation split, if there is a single one.
    """
    values: dict[str, set[float]] = defaultdict(set)
    for metric in metrics:
        if isinstance(metric.value, str):
            continue
        name = _column(metric.name)
        if name is not None:
            values[name].add(metric.value)
        if metric.split is not None and metric.split.lower() in _TEST_SPLITS:
            for known, value in _test_result(metric.name, metric.value).items():
                values[known].add(value)
    return {name: min(found) for name, found in values.items() if len(found) == 1}


def training_hyperparameters(card: str) -> dict[str, float | str]:
    """Reads the list below "Training hyperparameters" in a card that transformers' Trainer wrote."""
    heading = _HYPERPARAMETERS.search(card)
    if heading is None:
        return {}
    found: dict[str, float | str] = {}
    for line in card[heading.end() :].splitlines():
        if line.startswith("#") or len(found) == _MOST_HYPERPARAMETERS:
            break
        match = _BULLET.fullmatch(line.strip())
        if match and match[2].isprintable():
            found[match[1]] = _number(match[2])
    return found


@dataclass(frozen=True)
class TrainerFacts:
    """Metadata of a checkpoint in the ``trainer_state.json`` beside it.

    Attributes:
        results: ``step``, ``epoch``, and test loss and accuracy of an evaluation at this step.
        hyperparameters: settings of the training.
        metrics: all metrics of that evaluation.
    """

    results: Mapping[str, float]
    hyperparameters: Mapping[str, float | str]
    metrics: tuple[ReportedMetric, ...]


def trainer_facts(state: Mapping[str, Any]) -> TrainerFacts:
    """Reads the content of a ``trainer_state.json``."""
    step = state.get("global_step")
    numbers: dict[str, Any] = {"step": step, "epoch": state.get("epoch")}
    results = {name: float(value) for name, value in numbers.items() if _is_number(value)}
    history = as_list(state.get("log_history"))
    records = [record for record in map(as_object, history) if step is not None and record.get("step") == step]
    metrics = [
        ReportedMetric(name, _value(value), split="evaluation")
        for name, value in itertools.chain.from_iterable(record.items() for record in records)
        if name.startswith("eval_") and not name.endswith(_SPEEDS) and _name(name)
    ][:MAX_METRICS]
    for metric in metrics:
        if not isinstance(metric.value, str):
            results |= _test_result(metric.name.removeprefix("eval_"), metric.value)
    settings = {name: float(state[name]) for name in _STATE_SETTINGS if _is_number(state.get(name))}
    return TrainerFacts(results, settings, tuple(metrics))


def _test_result(name: str, value: float) -> dict[str, float]:
    """The result column for a metric on a test split, if there is one."""
    name = name.lower()
    if name == "accuracy" and 0 <= value <= 100:
        return {"test_accuracy": value if value <= 1 else value / 100}
    return {"test_loss": value} if name == "loss" else {}


def _column(name: str) -> str | None:
    plain = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")[:_LONGEST_NAME]
    return f"metric_{plain}" if plain in _FORMAT_COLUMNS else plain or None


def _model_index(index: Any) -> Iterator[ReportedMetric]:
    for result in (result for model in as_list(index) for result in as_list(as_object(model).get("results"))):
        dataset = as_object(as_object(result).get("dataset"))
        name = _name(dataset.get("type")) or _name(dataset.get("name"))
        split = _name(dataset.get("split")) or _name(as_object(dataset.get("args")).get("split"))
        for metric in map(as_object, as_list(as_object(result).get("metrics"))):
            kind = _name(metric.get("type")) or _name(metric.get("name"))
            if kind is not None and metric.get("value") is not None:
                verified = metric.get("verified") is True
                yield ReportedMetric(kind, _value(metric["value"]), name, split, verified)


def _value(value: Any) -> float | str:
    if _is_number(value):
        return float(value)
    if isinstance(value, str) and value.isprintable():
        return value[:_LONGEST_TEXT]
    return shown(value)


def _number(text: str) -> float | str:
    with suppress(ValueError):
        value = float(text)
        return value if math.isfinite(value) else text
    return text


def _is_number(value: Any) -> bool:
    with suppress(OverflowError):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    return False


def as_object(value: Any) -> Mapping[str, Any]:
    """Returns a JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Returns a JSON list; an empty one in place of anything else."""
    return value if isinstance(value, list) else []


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_TEXT else None


def _names(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else as_list(value)[:_MOST_NAMES]
    return tuple(dict.fromkeys(name for name in map(_name, values) if name is not None))


def _tagged(tags: Iterable[str], kind: str) -> tuple[str, ...]:
    return tuple(tag.removeprefix(f"{kind}:") for tag in tags if tag.startswith(f"{kind}:"))
