"""Criteria for samples, and whether a comparison shows that they are met.

Models are compared dataset by dataset: the mean of the differences decides, with its 95 % interval over the datasets
(`ComparisonRow.minus`). Two means whose intervals overlap may differ clearly all the same, for some datasets are harder
than others for all models alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightspace.evaluation.comparison import (
    ALIGNED_AVERAGE,
    AVERAGE,
    BEST,
    INDEPENDENT,
    OVERLAP,
    REFINED_SCRATCH,
    SAMPLES,
    SCRATCH,
    ComparisonRow,
    Group,
    accuracy_after,
)

Outcome = Literal["met", "not met", "undecided"]
_SIDES: Mapping[str, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
}


@dataclass(frozen=True)
class Criterion:
    """A bound for a number of the samples or, with a baseline, for its difference to the baseline's.

    Attributes:
        measure: see `ComparisonRow`.
        side: on which side of ``bound`` the number has to be.
        bound: see ``side``.
        baseline: the other models.
        share: of their number that is subtracted.
        group: datasets that it applies to; None stands for all.
        everywhere: whether it has to hold on every dataset, and not only in the mean.
    """

    measure: str
    side: Literal["at least", "above", "at most"]
    bound: float = 0.0
    baseline: str | None = None
    share: float = 1.0
    group: Group | None = None
    everywhere: bool = False

    def __str__(self) -> str:
        """Names the side and the bound."""
        return f"{self.side} {self.bound:g}{' on every dataset' if self.everywhere else ''}"

    def holds(self, value: float) -> bool:
        """Whether a number is on the right side."""
        return _SIDES[self.side](value, self.bound)

    def outcome(self, row: ComparisonRow) -> Outcome:
        """Decides the criterion; undecided where the interval contains the bound, or where there is no interval."""
        if self.everywhere:
            return "met" if all(self.holds(value) for _, value in row.values) else "not met"
        if row.low is None or row.high is None or self.holds(row.low) != self.holds(row.high):
            return "undecided"
        return "met" if self.holds(row.low) else "not met"


@dataclass(frozen=True)
class CriterionRow:
    """A criterion applied to a sampler; the first seven fields are those of a `ComparisonRow`.

    Attributes:
        requirement: the side and the bound.
        holds: number of datasets that the criterion holds on by themselves.
        of: number of datasets.
        outcome: see `Criterion.outcome`.
    """

    sampler: str
    datasets: Group
    measure: str
    subject: str
    value: float
    low: float | None
    high: float | None
    requirement: str
    holds: int
    of: int
    outcome: Outcome


BETTER_THAN_BASELINES = (
    *(Criterion(accuracy_after(0), "above", baseline=one, group="unseen") for one in (BEST, AVERAGE, ALIGNED_AVERAGE)),
    Criterion(accuracy_after(0), "above", baseline=REFINED_SCRATCH),
    Criterion(accuracy_after(1), "above", baseline=SCRATCH),
    Criterion(OVERLAP, "at most", baseline=INDEPENDENT),
)
"""Samples are worth their generator and are new models: what holds for samplers of any kind."""


def check(rows: Sequence[ComparisonRow], criteria: Sequence[Criterion] = BETTER_THAN_BASELINES) -> list[CriterionRow]:
    """Applies criteria to every sampler and group of datasets, in the order of ``rows``.

    Args:
        rows: what `weightspace.evaluation.comparison.compare` returned.
        criteria: the criteria; those whose numbers were not measured are left out.
    """
    found = {(row.sampler, row.datasets, row.measure, row.subject): row for row in rows}
    groups = dict.fromkeys((row.sampler, row.datasets) for row in rows)
    return [checked for group in groups for checked in _checked(found, *group, criteria)]


def _checked(
    rows: Mapping[tuple[str, Group, str, str], ComparisonRow], sampler: str, group: Group, criteria: Sequence[Criterion]
) -> Iterator[CriterionRow]:
    for criterion in criteria:
        row = rows.get((sampler, group, criterion.measure, SAMPLES))
        if row is None or criterion.group not in (None, group):
            continue
        if criterion.baseline is not None:
            other = rows.get((sampler, group, criterion.measure, criterion.baseline))
            if other is None or not dict(row.values).keys() & dict(other.values).keys():
                continue
            row = row.minus(other, share=criterion.share)
        held = sum(criterion.holds(value) for _, value in row.values)
        numbers = (row.measure, row.subject, row.value, row.low, row.high)
        yield CriterionRow(sampler, group, *numbers, str(criterion), held, len(row.values), criterion.outcome(row))
