"""Says of a proof whether samplers do what is asked of them.

Where models are compared, they are compared dataset by dataset: the mean of the differences decides, with its 95 %
interval over the datasets (`weightspace.evaluation.proof.difference`). Two means whose intervals overlap may differ
clearly all the same, for some datasets are harder than others for all models alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightspace.evaluation.proof import (
    ALIGNED_AVERAGE,
    AVERAGE,
    BEST,
    INDEPENDENT,
    OVERLAP,
    REFINED_SCRATCH,
    SAMPLES,
    SCRATCH,
    SPEARMAN,
    ZOO,
    Group,
    ProofRow,
    accuracy_after,
    difference,
)

Outcome = Literal["met", "not met", "undecided"]
_Sense = Literal["at least", "above", "at most"]
_SENSES: Mapping[_Sense, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
}


@dataclass(frozen=True)
class Bar:
    """Something that is asked of a sampler, and what became of it.

    Attributes:
        sampler: the sampler's name.
        datasets: whether the training models have seen the datasets.
        measure: what is measured; see `ProofRow`.
        subject: of which models, or of which two the difference is taken.
        asked: what the number has to be.
        value: mean over the datasets.
        low: lower end of its 95 % interval; None for a single dataset.
        high: upper end.
        holds: datasets that the bar holds for by themselves.
        of: datasets that were measured.
        outcome: ``"undecided"`` where the interval contains the bar, or where there is none. What is asked for on every
            dataset is met or not, dataset by dataset.
    """

    sampler: str
    datasets: Group
    measure: str
    subject: str
    asked: str
    value: float
    low: float | None
    high: float | None
    holds: int
    of: int
    outcome: Outcome


@dataclass(frozen=True)
class _Asked:
    """What is asked of samples: of a number of theirs or, beside other models, of its difference to theirs.

    Attributes:
        measure: what is measured.
        sense: on which side of ``bound`` it has to be.
        bound: see ``sense``.
        beside: the other models.
        share: of their number that is subtracted.
        group: datasets that it is asked for; None stands for all.
        everywhere: whether it is asked for on every dataset, and not only in the mean.
    """

    measure: str
    sense: _Sense
    bound: float = 0.0
    beside: str | None = None
    share: float = 1.0
    group: Group | None = None
    everywhere: bool = False

    def __str__(self) -> str:
        """Says what the number has to be."""
        return f"{self.sense} {self.bound:g}{' on every dataset' if self.everywhere else ''}"

    def holds(self, value: float) -> bool:
        """Tells whether a number is on the right side."""
        return _SENSES[self.sense](value, self.bound)

    def outcome(self, row: ProofRow) -> Outcome:
        """Says what became of it."""
        if self.everywhere:
            return "met" if all(self.holds(value) for _, value in row.values) else "not met"
        if row.low is None or row.high is None or self.holds(row.low) != self.holds(row.high):
            return "undecided"
        return "met" if self.holds(row.low) else "not met"


_AT_ONCE, _AFTER_AN_EPOCH = accuracy_after(0), accuracy_after(1)
_ASKED = (
    _Asked(_AT_ONCE, "at least", beside=ZOO, share=0.95, group="seen"),
    _Asked(SPEARMAN, "at least", 0.8, group="seen"),
    _Asked(_AT_ONCE, "above", beside=BEST, group="unseen"),
    _Asked(_AT_ONCE, "above", beside=AVERAGE, group="unseen"),
    _Asked(_AT_ONCE, "above", beside=ALIGNED_AVERAGE, group="unseen"),
    _Asked(_AT_ONCE, "above", beside=REFINED_SCRATCH),
    _Asked(_AFTER_AN_EPOCH, "above", beside=SCRATCH, everywhere=True),
    _Asked(OVERLAP, "at most", beside=INDEPENDENT),
)


def judge(rows: Sequence[ProofRow]) -> list[Bar]:
    """Says of every sampler which bars it meets.

    On seen datasets: accuracy at once at least 95 % of that of the zoo's models of the condition, a correlation of
    requested and obtained accuracy of at least 0.8. On unseen datasets: accuracy at once above the nearest dataset's
    best model and above averages of checkpoints. On both: after an epoch above models from scratch on every dataset;
    errors that overlap no more with a training model's than those of independent models; and refined samples above
    untrained weights that were refined alike.

    Args:
        rows: what `weightspace.evaluation.proof.prove` returned.

    Returns:
        Bars sampler by sampler, as in ``rows``. What was not measured is left out.
    """
    found = {(row.sampler, row.datasets, row.measure, row.subject): row for row in rows}
    places = dict.fromkeys((row.sampler, row.datasets) for row in rows)
    return [bar for place in places for bar in _judged(found, *place)]


def _judged(rows: Mapping[tuple[str, Group, str, str], ProofRow], sampler: str, datasets: Group) -> Iterator[Bar]:
    for asked in _ASKED:
        ours = rows.get((sampler, datasets, asked.measure, SAMPLES))
        if ours is None or asked.group not in (None, datasets):
            continue
        if asked.beside is not None:
            theirs = rows.get((sampler, datasets, asked.measure, asked.beside))
            if theirs is None or not dict(ours.values).keys() & dict(theirs.values).keys():
                continue
            ours = difference(ours, theirs, share=asked.share)
        yield _bar(asked, ours)


def _bar(asked: _Asked, row: ProofRow) -> Bar:
    return Bar(
        sampler=row.sampler,
        datasets=row.datasets,
        measure=row.measure,
        subject=row.subject,
        asked=str(asked),
        value=row.value,
        low=row.low,
        high=row.high,
        holds=sum(asked.holds(value) for _, value in row.values),
        of=len(row.values),
        outcome=asked.outcome(row),
    )
