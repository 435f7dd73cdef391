from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from weightspace.evaluation.comparison import (
    ALIGNED_AVERAGE,
    AVERAGE,
    BEST,
    DISTANCE,
    INDEPENDENT,
    NOISE,
    OVERLAP,
    REFINED_SCRATCH,
    SAMPLES,
    SCRATCH,
    SPEARMAN,
    ZOO,
    ComparisonRow,
    Group,
    accuracy_after,
)
from weightspace.evaluation.criteria import BETTER_THAN_BASELINES, Criterion, CriterionRow, check

ZERO, ONE = accuracy_after(0), accuracy_after(1)
CRITERIA = (
    Criterion(ZERO, "at least", baseline=ZOO, share=0.95, group="seen"),
    Criterion(SPEARMAN, "at least", 0.8, group="seen"),
    Criterion(ONE, "above", baseline=SCRATCH, everywhere=True),
)


def row(
    measure: str,
    subject: str,
    values: Sequence[float],
    half: float | None = 0.0,
    *,
    datasets: Group = "seen",
    sampler: str = "it",
) -> ComparisonRow:
    mean = float(np.mean(values))
    low, high = (None, None) if half is None else (mean - half, mean + half)
    named = tuple((f"dataset {number}", value) for number, value in enumerate(values))
    return ComparisonRow(sampler, datasets, measure, subject, mean, low, high, named)


def named(rows: Sequence[CriterionRow]) -> Mapping[tuple[str, str], CriterionRow]:
    return {(row.measure, row.subject): row for row in rows}


def test_models_are_compared_dataset_by_dataset() -> None:
    """Both means have wide intervals, and yet one is above the other on every dataset."""
    ours, theirs = row(ZERO, SAMPLES, (0.5, 0.7, 0.9), 0.2), row(ZERO, ZOO, (0.51, 0.71, 0.91), 0.2)
    (one,) = check([ours, theirs], CRITERIA)
    expected = ours.minus(theirs, share=0.95)
    assert (one.sampler, one.datasets, one.subject) == ("it", "seen", "samples - 95 % of zoo models of the condition")
    assert (one.value, one.low, one.high) == (expected.value, expected.low, expected.high)
    assert one.value == pytest.approx(0.7 - 0.95 * 0.71)
    assert (one.requirement, one.holds, one.of, one.outcome) == ("at least 0", 3, 3, "met")


@pytest.mark.parametrize(
    ("value", "half", "outcome"),
    [
        (0.85, 0.05, "met"),
        (0.85, 0.06, "undecided"),
        (0.75, 0.05, "undecided"),
        (0.75, 0.04, "not met"),
        (0.99, None, "undecided"),
    ],
)
def test_a_bound_within_the_interval_is_undecided(value: float, half: float | None, outcome: str) -> None:
    rows = [row(SPEARMAN, SAMPLES, (value, value), half)]
    if half is not None:  # without rounding
        rows = [
            ComparisonRow("it", "seen", SPEARMAN, SAMPLES, value, round(value - half, 9), value + half, rows[0].values)
        ]
    (one,) = check(rows, CRITERIA)
    assert (one.requirement, one.outcome) == ("at least 0.8", outcome)


@pytest.mark.parametrize(("ours", "outcome"), [(0.4, "met"), (0.5, "met"), (0.6, "not met")])
def test_errors_may_overlap_as_much_and_no_more(ours: float, outcome: str) -> None:
    rows = [row(OVERLAP, SAMPLES, (ours, ours)), row(OVERLAP, INDEPENDENT, (0.5, 0.5))]
    (one,) = check(rows)
    assert (one.subject, one.requirement, one.outcome) == (f"samples - {INDEPENDENT}", "at most 0", outcome)


@pytest.mark.parametrize(("last", "holds", "outcome"), [(0.9, 3, "met"), (0.5, 2, "not met"), (0.1, 2, "not met")])
def test_training_from_scratch_has_to_be_beaten_on_every_dataset(last: float, holds: int, outcome: str) -> None:
    rows = [row(ONE, SAMPLES, (0.9, 0.9, last)), row(ONE, SCRATCH, (0.5, 0.5, 0.5))]
    (one,) = check(rows, CRITERIA)
    assert (one.requirement, one.holds, one.of, one.outcome) == ("above 0 on every dataset", holds, 3, outcome)


def test_criteria_depend_on_the_datasets() -> None:
    subjects = (SAMPLES, SCRATCH, ZOO, BEST, NOISE, AVERAGE, ALIGNED_AVERAGE, REFINED_SCRATCH)
    groups: tuple[Group, ...] = ("seen", "unseen")
    rows = [
        *(row(measure, s, (0.5, 0.6), datasets=group) for group in groups for measure in (ZERO, ONE) for s in subjects),
        *(row(SPEARMAN, SAMPLES, (0.9, 0.9), datasets=group) for group in groups),
        row(DISTANCE, SAMPLES, (1.0, 1.0)),
    ]
    found = check(rows, (*CRITERIA[:2], *BETTER_THAN_BASELINES))
    always = [(ZERO, f"samples - {REFINED_SCRATCH}"), (ONE, f"samples - {SCRATCH}")]
    assert list(named([one for one in found if one.datasets == "seen"])) == [
        (ZERO, f"samples - 95 % of {ZOO}"),
        (SPEARMAN, SAMPLES),
        *always,
    ]
    assert list(named([one for one in found if one.datasets == "unseen"])) == [
        *((ZERO, f"samples - {subject}") for subject in (BEST, AVERAGE, ALIGNED_AVERAGE)),
        *always,
    ]
    # Equal is not above.
    assert {one.outcome for one in found if one.requirement.startswith("above")} == {"not met"}


def test_every_sampler_is_checked_by_its_own_rows() -> None:
    rows = [
        row(ZERO, subject, (value, value), sampler=sampler)
        for sampler, value in (("kde", 0.9), ("flow", 0.1))
        for subject, value in ((SAMPLES, value), (ZOO, 0.5))
    ]
    assert [(one.sampler, one.outcome) for one in check(rows, CRITERIA)] == [("kde", "met"), ("flow", "not met")]


def test_what_was_not_measured_is_not_checked() -> None:
    assert check([]) == []
    assert check([row(ZERO, SAMPLES, (0.5,)), row(ZERO, BEST, (0.4,)), row(ZERO, AVERAGE, (0.4,))]) == []
    apart = ComparisonRow("it", "seen", OVERLAP, INDEPENDENT, 0.5, None, None, (("elsewhere", 0.5),))
    assert check([row(OVERLAP, SAMPLES, (0.5,)), apart]) == []
