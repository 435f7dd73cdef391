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

MAX_METRICS = 10_000
"""Most metrics of one card; the crawl says how many more it has."""

MAX_METRIC_COLUMNS = 100
"""Most result columns that a crawl adds for the metrics of its cards; rare ones are left out."""

_LONGEST_TEXT, _LONGEST_NAME = 300, 60
_MOST_NAMES, _MOST_HYPERPARAMETERS = 1000, 200
_TEST_SPLITS = frozenset({"test", "validation", "valid", "val", "dev", "eval", "evaluation"})
_HYPERPARAMETERS = re.compile(r"^#+ *Training hyper-?parameters *$", re.IGNORECASE | re.MULTILINE)
_ACHIEVED = re.compile(r"^.*achieves the following results on the evaluation set: *$", re.IGNORECASE | re.MULTILINE)
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,20})?) ?%")
_BULLET = re.compile(r"[-*] +([\w.\- ]{1,60}?) *: *(.{1,300})")
_STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size")
_FRACTIONS = re.compile(
    r"""_(accuracy|acc|f1|fscore|precision|recall|sensitivity|specificity|auc|auroc|ap|map|m?iou|dice|jaccard|em|match
    |(sacre)?bleu|rouge(1|2|l|lsum)?|meteor|chrf|ndcg|mrr|pearson|spearman|matthews|mcc|kappa|v_measure|top[15])_""",
    re.VERBOSE,
)
"""Names of metrics that are 1 at best: a larger value is a percentage."""

_NO_FRACTIONS = re.compile("_(loss|error|time|std|count|size)_")
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
        metrics=tuple(itertools.islice(_model_index(row), MAX_METRICS)),
        trained_by_trainer="generated_from_trainer" in tags,
    )


def metrics_left_out(row: Mapping[str, Any]) -> int:
    """Counts the metrics of a row of the listing that are above the limit."""
    return sum(1 for _ in itertools.islice(_model_index(row), MAX_METRICS, None))


def metric_columns(models: Iterable[Iterable[ReportedMetric]]) -> tuple[str, ...]:
    """Returns the result columns for the numbers that models' cards report, sorted; the most frequent of very many."""
    counts = Counter(name for metrics in models for name in card_results(metrics) if name not in RESULTS)
    return tuple(sorted(sorted(counts, key=lambda name: (-counts[name], name))[:MAX_METRIC_COLUMNS]))


def card_results(metrics: Iterable[ReportedMetric]) -> dict[str, float]:
    """Returns the results that a card states unambiguously.

    Each kind of metric with a single value becomes a column of its name. Percentages become fractions, so that a column
    has one unit; what is neither a possible fraction nor a percentage of such a metric is left out. ``test_accuracy``
    and ``test_loss`` are the accuracy and the loss on a test or validation split, if there is a single one.
    """
    values: dict[str, set[float]] = defaultdict(set)
    for metric in metrics:
        name, value = column_of(metric.name), _in_one_unit(metric)
        if name is None or value is None:
            continue
        values[name].add(value)
        if metric.split is not None and metric.split.lower() in _TEST_SPLITS:
            for known, result in _test_result(metric.name, value).items():
                values[known].add(result)
    return {name: min(found) for name, found in values.items() if len(found) == 1}


def _in_one_unit(metric: ReportedMetric) -> float | None:
    """The value as a fraction if the metric is 1 at best; None if it is no number or impossible."""
    if isinstance(metric.value, str):
        percent = _PERCENT.fullmatch(metric.value)
        return None if percent is None else float(percent[1]) / 100
    name = f"_{column_of(metric.name)}_"
    if not _FRACTIONS.search(name) or _NO_FRACTIONS.search(name):
        return metric.value
    value = metric.value if abs(metric.value) <= 1 else metric.value / 100
    return value if abs(value) <= 1 else None


def training_hyperparameters(card: str) -> dict[str, float | str]:
    """Reads the list below "Training hyperparameters" in a card that transformers' Trainer wrote."""
    return _listed(card, _HYPERPARAMETERS)


def _listed(card: str, heading: re.Pattern[str]) -> dict[str, float | str]:
    """Reads the names and values of the list below a heading, up to the next one."""
    start = heading.search(card)
    found: dict[str, float | str] = {}
    for line in () if start is None else card[start.end() :].splitlines():
        if line.startswith("#") or len(found) == _MOST_HYPERPARAMETERS:
            break
        match = _BULLET.fullmatch(line.strip())
        if match and match[2].isprintable():
            found[match[1]] = _number(match[2])
    return found


def card_text_facts(card: str) -> TrainerFacts:
    """Reads the text of a card that transformers' Trainer wrote: its hyper-parameters, and the results of its weights.

    Step and epoch are those of the row of the table of results that has the same loss: the last row may be of other
    weights than the best ones, which are kept.
    """
    achieved = _listed(card, _ACHIEVED)
    metrics = tuple(ReportedMetric(name, value, split="evaluation") for name, value in achieved.items())
    results = {name: value for name, value in card_results(metrics).items() if name in RESULTS}
    loss = next((value for name, value in achieved.items() if name.lower() == "loss"), None)
    for row in _table(card):
        if loss is not None and row.get("validation loss") == loss:
            results |= {name: value for name in ("epoch", "step") if _is_number(value := row.get(name))}  # type: ignore[misc]
    return TrainerFacts(results, training_hyperparameters(card), metrics)


def _table(card: str) -> Iterator[dict[str, float | str]]:
    """Yields the rows of the card's first table with a column of validation losses."""
    head: list[str] = []
    for line in card.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if head and not cells:
            return
        if head:
            yield dict(zip(head, map(_number, cells), strict=False))
        elif "Validation Loss" in cells:
            head = [cell.lower() for cell in cells]


@dataclass(frozen=True)
class TrainerFacts:
    """Metadata of a checkpoint in the ``trainer_state.json`` beside it, or in the card that the Trainer wrote.

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
        if (value := _in_one_unit(metric)) is not None:
            results |= _test_result(metric.name.removeprefix("eval_"), value)
    settings = {name: float(state[name]) for name in _STATE_SETTINGS if _is_number(state.get(name))}
    return TrainerFacts(results, settings, tuple(metrics))


def _test_result(name: str, value: float) -> dict[str, float]:
    """The result column for a metric on a test split, if there is one."""
    name = name.lower()
    if name == "accuracy" and value >= 0:
        return {"test_accuracy": value}
    return {"test_loss": value} if name == "loss" else {}


def column_of(name: str) -> str | None:
    """Returns the result column of a metric's name; None if it has no letter or digit."""
    plain = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")[:_LONGEST_NAME]
    return f"metric_{plain}" if plain in _FORMAT_COLUMNS else plain or None


def _model_index(row: Mapping[str, Any]) -> Iterator[ReportedMetric]:
    index = as_object(row.get("cardData")).get("model-index") or row.get("model-index")
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
