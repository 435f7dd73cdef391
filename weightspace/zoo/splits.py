"""Splits that keep the checkpoints of one training run on one side, and if need be all models of a dataset.

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
    _check(fractions)
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


def split_by_dataset(
    run_ids: Shaped[np.ndarray, "models"],
    datasets: Shaped[np.ndarray, "models"],
    seed: int,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    *,
    test_datasets: Collection[str] | None = None,
    test_runs: Collection[str] | None = None,
) -> Split:
    """Draws a split whose test models are of datasets that no other model was trained on.

    The other runs are split into training and validation in the proportion of their fractions. On no side are runs with
    a model whose dataset is not known, and runs with models of both kinds of datasets.

    Args:
        run_ids: the run that each model belongs to.
        datasets: what each model was trained on; None or NaN where it is not known.
        seed: number of the split.
        fractions: the last is the share of the *datasets* for testing, at least one.
        test_datasets: fixes the datasets for testing, e.g. to those that an encoder never saw.
        test_runs: of these datasets, tests on these runs alone and leaves the others on no side.

    Raises:
        SettingsError: the fractions are not three positive numbers that add up to one.
        ZooError: fewer than two datasets are known, or a side would be empty.
    """
    _check(fractions)
    runs = np.asarray(run_ids).astype(str)
    known = np.array([isinstance(dataset, str) for dataset in datasets], dtype=bool)
    names = np.unique(np.asarray(datasets)[known].astype(str))
    if len(names) < 2:
        raise ZooError(f"datasets: {len(names)} known, too few to leave one unseen; name those of more models")
    if test_datasets is None:
        drawn = np.random.default_rng(seed).permutation(names)
        test_datasets = set(drawn[: min(len(names) - 1, max(1, round(fractions[2] * len(names))))])
    unseen = known & np.isin(np.asarray(datasets, dtype=object).astype(str), list(test_datasets))
    seen = known & ~unseen
    # A run of both kinds would be torn apart, and what is not known of a model's data may be on either side.
    tested = unseen & ~np.isin(runs, runs[~unseen])
    rest = seen & ~np.isin(runs, runs[~seen])
    if test_runs is not None:
        tested &= np.isin(runs, [str(run) for run in test_runs])
    left = np.random.default_rng(seed).permutation(np.unique(runs[rest]))
    if not tested.any() or len(left) < 2:
        raise ZooError(
            f"datasets: {len(np.unique(runs[tested]))} runs to test on and {len(left)} of other datasets; have at "
            "least 1 and 2, each of one known dataset"
        )
    validated = left[: max(1, round(fractions[1] / (fractions[0] + fractions[1]) * len(left)))]
    validation = rest & np.isin(runs, validated)
    return Split(np.flatnonzero(rest & ~validation), np.flatnonzero(validation), np.flatnonzero(tested))


def _check(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SettingsError(
            f"fractions: {fractions!r} is not three positive numbers that add up to 1; use 0.7 0.15 0.15"
        )
