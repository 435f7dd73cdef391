"""Rows of the probe table, their records and how a terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from weightspace.files import json_ready
from weightspace.printing import table
from weightspace.stats.resampling import Estimate

_PRINTED_LABELS = 12
_NAN = float("nan")


@dataclass(frozen=True)
class Measure:
    """A measure of probes: what tables call it, and its names in the records of rows."""

    title: str
    name: str
    short: str

    @property
    def low(self) -> str:
        """Name of the lower end of its interval."""
        return f"{self.short}_low"

    @property
    def high(self) -> str:
        """Name of the upper end of its interval."""
        return f"{self.short}_high"

    @property
    def permuted(self) -> str:
        """Name of the measure on neuron-permuted test models."""
        return f"permuted_{self.short}"


R2 = Measure("R2", "r2", "r2")
TAU = Measure("tau", "kendall_tau", "tau")
BALANCED_ACCURACY = Measure("balanced accuracy", "balanced_accuracy", "balanced_accuracy")
AUC = Measure("AUC", "auc", "auc")


@dataclass(frozen=True)
class Score(Estimate):
    """Mean of a measure over the split seeds, with the interval of resampled test runs, pooled over the seeds.

    Attributes:
        permuted: the same of the same probe on the same test models neuron-permuted; NaN where no symmetry is known.
    """

    permuted: float = _NAN


@dataclass(frozen=True)
class Predictions:
    """What one probe predicted for the test models of one split.

    Attributes:
        rows: which models these are.
        targets: what is true of them.
        predicted: what the probe says.
        permuted: what it says of the same models neuron-permuted; NaN where no symmetry is known.
    """

    rows: Int[np.ndarray, "test"]
    targets: Float[np.ndarray, "test *columns"]
    predicted: Float[np.ndarray, "test *columns"]
    permuted: Float[np.ndarray, "test *columns"]


@dataclass(frozen=True)
class ProbeRow:
    """One line of the probe table.

    Attributes:
        representation: name of what the probe looked at.
        estimator: name of the probe.
        target: what it predicts.
        seeds: split seeds.
        dimensions: numbers that describe one model.
        models: models that have the target.
        dropped: models that were left out because their target is missing, NaN or Inf.
        scores: by the name of the measure. ``r2`` and ``kendall_tau`` (tau-b) for numbers. ``balanced_accuracy`` for
            labels: the share of right answers, each category weighing the same; for labels that do not exclude each
            other the mean over labels of the right answers among models with and among models without it. And ``auc``:
            how often a model with a label has the higher prediction than one without; mean over labels. A score that is
            undefined is NaN, see ``note``.
        chance: balanced accuracy of always the same answer; that of the AUC is one half.
        labels: names of the labels; none for numbers.
        unseen_datasets: datasets of the test models, which no training model has; 0 if the split is not by dataset.
        note: what a reader of the numbers has to know, parted by semicolons, or empty.
        predictions: of the first seed, for numbers.
    """

    representation: str
    estimator: str
    target: str
    seeds: tuple[int, ...]
    dimensions: int
    models: int
    dropped: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    chance: float = _NAN
    labels: tuple[str, ...] = ()
    unseen_datasets: int = 0
    note: str = ""
    predictions: Predictions | None = field(default=None, repr=False, compare=False)

    @property
    def measures(self) -> tuple[Measure, Measure]:
        """The two measures of its target."""
        return (BALANCED_ACCURACY, AUC) if self.labels else (R2, TAU)


def rows_to_records(rows: Sequence[ProbeRow]) -> list[dict[str, Any]]:
    """Builds one flat JSON-ready mapping a row: NaN becomes None, predictions are left out."""
    return [_record(row) for row in rows]


def _record(row: ProbeRow) -> dict[str, Any]:
    record = {name: value for name, value in vars(row).items() if name not in ("scores", "predictions")}
    for measure in (R2, TAU, BALANCED_ACCURACY, AUC):
        score = row.scores.get(measure.name, Score(_NAN, _NAN, _NAN))
        named = {measure.name: score.value, measure.low: score.low, measure.high: score.high}
        record |= {**named, measure.permuted: score.permuted}
    return dict(json_ready(record))


def format_table(rows: Sequence[ProbeRow]) -> str:
    """Formats the rows for a terminal, one table a target, notes below.

    Each cell reads ``mean [low, high]``; the last two columns are the means on neuron-permuted test models.
    """
    tables = []
    for target in dict.fromkeys(row.target for row in rows):
        same = [row for row in rows if row.target == target]
        titles = [measure.title for measure in same[0].measures]
        head = ["representation", "estimator", "dims", *(f"{title} [95 %]" for title in titles)]
        lines = table(
            [*head, *(f"{title} permuted" for title in titles)],
            (
                (
                    *(row.representation, row.estimator, row.dimensions),
                    *(_cell(row.scores[measure.name]) for measure in row.measures),
                    *(_number(row.scores[measure.name].permuted) for measure in row.measures),
                )
                for row in same
            ),
        )
        notes = (f"  note: {note} ({where})" for note, where in _notes(same).items())
        tables.append("\n".join([_heading(same[0]), *lines, *notes]))
    return "\n\n".join(tables)


def _heading(row: ProbeRow) -> str:
    dropped = f", {row.dropped} left out without it" if row.dropped else ""
    unseen = f", tested on {row.unseen_datasets} unseen datasets" if row.unseen_datasets else ""
    text = f"{row.target}: {row.models} models{dropped}{unseen}, split seeds {', '.join(map(str, row.seeds))}"
    if not row.labels:
        return text
    names = ", ".join(row.labels[:_PRINTED_LABELS]) + (", ..." if len(row.labels) > _PRINTED_LABELS else "")
    return f"{text}; {len(row.labels)} labels ({names}), chance {_number(row.chance)}, AUC 0.500"


def _notes(rows: Sequence[ProbeRow]) -> dict[str, str]:
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            by_note.setdefault(note, []).append(f"{row.representation}, {row.estimator}")
    return {note: "all" if len(where) == len(rows) else "; ".join(where) for note, where in by_note.items()}


def _cell(score: Score) -> str:
    value = _number(score.value)
    return value if math.isnan(score.value) else f"{value} [{_number(score.low)}, {_number(score.high)}]"


def _number(value: float) -> str:
    # A raw-weight probe can be off by powers of ten; a column of zeros behind the point helps nobody then.
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"
