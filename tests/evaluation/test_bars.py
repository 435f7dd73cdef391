from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from weightspace.evaluation.bars import Bar, judge
from weightspace.evaluation.proof import (
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
    Group,
    ProofRow,
    accuracy_after,
    difference,
)

ZERO, ONE = accuracy_after(0), accuracy_after(1)


def row(
    measure: str,
    subject: str,
    values: Sequence[float],
    half: float | None = 0.0,
    *,
    datasets: Group = "seen",
    sampler: str = "it",
) -> ProofRow:
    mean = float(np.mean(values))
    low, high = (None, None) if half is None else (mean - half, mean + half)
    named = tuple((f"dataset {number}", value) for number, value in enumerate(values))
    return ProofRow(sampler, datasets, measure, subject, mean, low, high, named)


def named(bars: Sequence[Bar]) -> Mapping[tuple[str, str], Bar]:
    return {(bar.measure, bar.subject): bar for bar in bars}


def test_models_are_compared_dataset_by_dataset() -> None:
    """Both means have wide intervals, and yet one is above the other on every dataset."""
    ours, theirs = row(ZERO, SAMPLES, (0.5, 0.7, 0.9), 0.2), row(ZERO, ZOO, (0.51, 0.71, 0.91), 0.2)
    (bar,) = judge([ours, theirs])
    expected = difference(ours, theirs, share=0.95)
    assert (bar.sampler, bar.datasets, bar.subject) == ("it", "seen", "samples - 95 % of zoo models of the condition")
    assert (bar.value, bar.low, bar.high) == (expected.value, expected.low, expected.high)
    assert bar.value == pytest.approx(0.7 - 0.95 * 0.71)
    assert (bar.asked, bar.holds, bar.of, bar.outcome) == ("at least 0", 3, 3, "met")


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
def test_a_bar_within_the_interval_is_undecided(value: float, half: float | None, outcome: str) -> None:
    rows = [row(SPEARMAN, SAMPLES, (value, value), half)]
    if half is not None:  # without rounding
        rows = [ProofRow("it", "seen", SPEARMAN, SAMPLES, value, round(value - half, 9), value + half, rows[0].values)]
    (bar,) = judge(rows)
    assert (bar.asked, bar.outcome) == ("at least 0.8", outcome)


@pytest.mark.parametrize(("ours", "outcome"), [(0.4, "met"), (0.5, "met"), (0.6, "not met")])
def test_errors_may_overlap_as_much_and_no_more(ours: float, outcome: str) -> None:
    rows = [row(OVERLAP, SAMPLES, (ours, ours)), row(OVERLAP, INDEPENDENT, (0.5, 0.5))]
    (bar,) = judge(rows)
    assert (bar.subject, bar.asked, bar.outcome) == (f"samples - {INDEPENDENT}", "at most 0", outcome)


@pytest.mark.parametrize(("last", "holds", "outcome"), [(0.9, 3, "met"), (0.5, 2, "not met"), (0.1, 2, "not met")])
def test_training_from_scratch_has_to_be_beaten_on_every_dataset(last: float, holds: int, outcome: str) -> None:
    rows = [row(ONE, SAMPLES, (0.9, 0.9, last)), row(ONE, SCRATCH, (0.5, 0.5, 0.5))]
    (bar,) = judge(rows)
    assert (bar.asked, bar.holds, bar.of, bar.outcome) == ("above 0 on every dataset", holds, 3, outcome)


def test_what_is_asked_depends_on_the_datasets() -> None:
    subjects = (SAMPLES, SCRATCH, ZOO, BEST, NOISE, AVERAGE, ALIGNED_AVERAGE, REFINED_SCRATCH)
    groups: tuple[Group, ...] = ("seen", "unseen")
    rows = [
        *(row(measure, s, (0.5, 0.6), datasets=group) for group in groups for measure in (ZERO, ONE) for s in subjects),
        *(row(SPEARMAN, SAMPLES, (0.9, 0.9), datasets=group) for group in groups),
        row(DISTANCE, SAMPLES, (1.0, 1.0)),
    ]
    bars = judge(rows)
    always = [(ZERO, f"samples - {REFINED_SCRATCH}"), (ONE, f"samples - {SCRATCH}")]
    assert list(named([bar for bar in bars if bar.datasets == "seen"])) == [
        (ZERO, f"samples - 95 % of {ZOO}"),
        (SPEARMAN, SAMPLES),
        *always,
    ]
    assert list(named([bar for bar in bars if bar.datasets == "unseen"])) == [
        *((ZERO, f"samples - {subject}") for subject in (BEST, AVERAGE, ALIGNED_AVERAGE)),
        *always,
    ]
    # Equal is not above.
    assert {bar.outcome for bar in bars if bar.asked.startswith("above")} == {"not met"}


def test_every_sampler_is_judged_by_its_own_rows() -> None:
    rows = [
        row(ZERO, subject, (value, value), sampler=sampler)
        for sampler, value in (("kde", 0.9), ("flow", 0.1))
        for subject, value in ((SAMPLES, value), (ZOO, 0.5))
    ]
    assert [(bar.sampler, bar.outcome) for bar in judge(rows)] == [("kde", "met"), ("flow", "not met")]


def test_what_was_not_measured_is_not_judged() -> None:
    assert judge([]) == []
    assert judge([row(ZERO, SAMPLES, (0.5,)), row(ZERO, BEST, (0.4,)), row(ZERO, AVERAGE, (0.4,))]) == []
    apart = ProofRow("it", "seen", OVERLAP, INDEPENDENT, 0.5, None, None, (("elsewhere", 0.5),))
    assert judge([row(OVERLAP, SAMPLES, (0.5,)), apart]) == []
