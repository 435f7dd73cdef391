"""Splits that keep the checkpoints of one training run on one side.

Checkpoints of a run are near copies of each other; a split that tears a run apart lets a probe look its answer up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from weightspace.errors import SettingsError, ZooError

MIN_RUNS = 10


@dataclass(frozen=True)
class Split:
    """Ascending row numbers of the models on each side; no run has models on two sides."""

    train: Int[np.ndarray, "train"]
    validation: Int[np.ndarray, "validation"]
    test: Int[np.ndarray, "test"]


def split_by_run(
    run_ids: Shaped[np.ndarray, "models"],
    seed: int,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    *,
    test_runs: Collection[str] | None = None,
) -> Split:
    """Draws a split over runs.

    Args:
        run_ids: the run that each model belongs to.
        seed: number of the split; the same seed and the same set of runs give the same split, whatever the order of
            the models.
        fractions: shares of the *runs* for training, validation and test; each side gets at least one run.
        test_runs: fixes the test side, e.g. to runs that an encoder never saw; the seed then only decides between
            training and validation, in the proportion of their fractions. Runs without a model are ignored.

    Raises:
        SettingsError: the fractions are not three positive numbers that add up to one.
        ZooError: there are fewer than ten runs, or ``test_runs`` leaves a side empty.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SettingsError(
            f"fractions: {fractions!r} is not three positive numbers that add up to 1; use 0.7 0.15 0.15"
        )
    runs = np.unique(np.asarray(run_ids).astype(str))
    if len(runs) < MIN_RUNS:
        raise ZooError(
            f"runs: {len(runs)} are too few to split; add models of at least {MIN_RUNS} runs (column `run_id`)"
        )
    fixed = np.isin(runs, [str(run) for run in test_runs or ()])
    if test_runs is not None and not 1 <= fixed.sum() <= len(runs) - 2:
        raise ZooError(
            f"test_runs: {fixed.sum()} of {len(runs)} runs are for testing; name at least 1 and leave at least 2 runs"
        )
    shuffled = np.random.default_rng(seed).permutation(runs[~fixed])
    if test_runs is None:
        tested = max(1, round(fractions[2] * len(shuffled)))
        test, shuffled = shuffled[:tested], shuffled[tested:]
    else:
        test = runs[fixed]
    validated = max(1, round(fractions[1] / (fractions[0] + fractions[1]) * len(shuffled)))
    sides = (shuffled[validated:], shuffled[:validated], test)
    return Split(*(np.flatnonzero(np.isin(np.asarray(run_ids).astype(str), side)) for side in sides))
