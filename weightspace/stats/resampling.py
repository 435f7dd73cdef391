"""Estimates with intervals and the level of chance. The unit is the run: its checkpoints are near copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

_LEVELS = (2.5, 97.5)
# Bounds one block of pairwise comparisons to some tens of MB.
_PAIRS = 2**22


@dataclass(frozen=True)
class Estimate:
    """A measured number, its uncertainty, and its distribution if the labels meant nothing.

    Attributes:
        value: the number; NaN where it is undefined.
        low: lower end of its 95 % interval; NaN where it is unknown.
        high: upper end.
        null_mean: mean of the number under permutation; None where there is no test.
        null_low: lower end of the range that holds 95 % of the permutations.
        null_high: upper end.
        p_value: share of permutations, the observed order counted as one of them, that reach the number.
    """

    value: float
    low: float
    high: float
    null_mean: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    p_value: float | None = None


def run_weights(runs: int, generator: np.random.Generator) -> Float[np.ndarray, "runs"]:
    """Draws one replicate of the Bayesian bootstrap (Rubin, 1981): a weight a run, one on average.

    Unlike runs drawn with replacement, weighted ones are never copied or lost: no run becomes its own neighbour, and
    no dataset vanishes.
    """
    weights = generator.exponential(size=runs)
    return weights / weights.mean()


def run_counts(runs: int, generator: np.random.Generator) -> Int[np.ndarray, "runs"]:
    """Draws runs with replacement, and counts how often each is drawn."""
    return np.bincount(generator.integers(runs, size=runs), minlength=runs) if runs else np.zeros(0, dtype=np.int64)


def permutation_within(blocks: Int[np.ndarray, "runs"], generator: np.random.Generator) -> Int[np.ndarray, "runs"]:
    """Draws a permutation that moves runs within their blocks only."""
    order = np.empty(len(blocks), dtype=np.int64)
    order[np.argsort(blocks, kind="stable")] = np.lexsort((generator.random(len(blocks)), blocks))
    return order


def with_interval(
    value: float, replicates: Sequence[float] | np.ndarray, bounds: tuple[float, float] = (-1.0, 1.0)
) -> Estimate:
    """Gives a number its 95 % interval from bootstrap replicates, or ``bounds`` where there is none.

    The replicates' deviations from their own mean are laid around the value: a replicate weighs fewer runs effectively,
    and that moves the level of every statistic that depends on their number, a share of variance for one.
    """
    if not len(replicates):
        return Estimate(value, *bounds)
    low, high = np.clip(np.percentile(replicates, _LEVELS) - np.mean(replicates) + value, *bounds)
    return Estimate(float(value), min(float(low), float(value)), max(float(high), float(value)))


def permutation_p(observed: float, null: Sequence[float] | np.ndarray) -> float:
    """Computes the one-sided p-value (1 + #{null >= observed}) / (1 + #null) (Phipson and Smyth, 2010)."""
    ties = 1e-9 * max(1.0, abs(observed))
    return float((1 + np.count_nonzero(np.asarray(null) >= observed - ties)) / (1 + len(null)))


def estimated(
    value: float,
    replicates: Sequence[float] | np.ndarray,
    null: Sequence[float] | np.ndarray,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Estimate:
    """Puts an estimate together from bootstrap replicates and from the values under permutation."""
    low, high = map(float, np.percentile(null, _LEVELS))
    estimate, mean = with_interval(value, replicates, bounds), float(np.mean(null))
    return replace(estimate, null_mean=mean, null_low=low, null_high=high, p_value=permutation_p(value, null))


def mean_estimate(values: Float[np.ndarray, "values"], generator: np.random.Generator, draws: int = 2000) -> Estimate:
    """Computes a mean with the percentile interval of the Bayesian bootstrap; no interval (NaN) for a single value."""
    low = high = float("nan")
    if len(values) > 1:
        weights = generator.exponential(size=(draws, len(values)))
        low, high = map(float, np.percentile(weights @ values / weights.sum(1), _LEVELS))
    return Estimate(float(values.mean()), low, high)


def pooled_interval(replicates: Iterable[Float[np.ndarray, "_replicates"]]) -> tuple[float, float]:
    """Computes the 95 % percentile interval of the replicates of several splits; NaN where none is defined.

    Pooling keeps what the split itself changes inside the interval, beside what the draw of test runs changes.
    """
    pooled = np.concatenate(list(replicates))
    pooled = pooled[np.isfinite(pooled)]
    low, high = np.percentile(pooled, _LEVELS) if len(pooled) else (np.nan, np.nan)
    return float(low), float(high)


class RunBootstrap:
    """Recomputes a metric on test sets whose *runs* are drawn again with replacement (cluster bootstrap).

    Resampling models would take the checkpoints of one run for independent evidence and give intervals that are too
    narrow. A replicate only needs to know how often each run was drawn: all metrics follow from sums over runs and
    over pairs of runs, so that no replicate is ever materialised. Each method computes the function of its name in
    `weightspace.stats.measures` for every replicate, NaN where it is undefined.

    Args:
        run_ids: the run of each test model.
        generator: draws the runs.
        replicates: number of resampled test sets.
    """

    def __init__(
        self, run_ids: Shaped[np.ndarray, "models"], generator: np.random.Generator, replicates: int = 1000
    ) -> None:
        """Draws how often each run appears in each replicate."""
        runs, member = np.unique(np.asarray(run_ids).astype(str), return_inverse=True)
        self._order = np.argsort(member, kind="stable")
        self._starts = np.searchsorted(member[self._order], np.arange(len(runs)))
        self._member = np.eye(len(runs))[member[self._order]]
        drawn = generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=replicates)
        self.counts: Int[np.ndarray, "replicates runs"] = drawn

    def r2(
        self, targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes R^2."""
        # Sums of squares about the common mean lose no digits to a far origin.
        y = targets - targets.mean()
        columns = np.stack([np.ones_like(y), y, y**2, (targets - predictions) ** 2], axis=1)
        models, total, square, error = self.sums(columns).T
        variance = square - total**2 / models
        # Rounding leaves a replicate of equal targets a variance just off zero.
        return 1 - _ratio(error, variance, variance > 1e-12 * square)

    def kendall_tau(
        self, targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes Kendall's tau-b; copies of one model are tied."""
        concordance, untied_targets, untied_predictions = self._pair_sums(targets, predictions)
        return _ratio(concordance, np.sqrt(untied_targets * untied_predictions))

    def auc(
        self, positive: Bool[np.ndarray, "models"], scores: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes the area under the ROC curve, from the concordance of pairs of a positive and a negative model."""
        concordance, pairs, _ = self._pair_sums(positive.astype(np.float64), scores)
        return _ratio(concordance, pairs) / 2 + 0.5

    def balanced_accuracy(
        self, members: Bool[np.ndarray, "models groups"], hits: Bool[np.ndarray, "models groups"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes balanced accuracy over the groups that have a model in the replicate."""
        size, right = self.sums(members.astype(np.float64)), self.sums((members & hits).astype(np.float64))
        recall = np.divide(right, size, out=np.zeros_like(size), where=size > 0)
        means: np.ndarray = recall.sum(axis=1) / (size > 0).sum(axis=1)
        return means

    def sums(self, columns: Float[np.ndarray, "models columns"]) -> Float[np.ndarray, "replicates columns"]:
        """Sums columns over the models of every replicate."""
        sums: np.ndarray = self.counts @ np.add.reduceat(columns[self._order], self._starts, axis=0)
        return sums

    def _pair_sums(self, one: np.ndarray, other: np.ndarray) -> Iterable[Float[np.ndarray, "replicates"]]:
        """Sums over pairs of models: their concordance, pairs that are untied in ``one``, and in ``other``."""
        sides = one[self._order], other[self._order]
        sums = np.zeros((3, len(self._starts), len(self._starts)))
        step = max(1, _PAIRS // max(1, len(one)))
        for begin in range(0, len(one), step):
            part = slice(begin, begin + step)
            first, second = (np.sign(side[part, None] - side).astype(np.int8) for side in sides)
            for number, signs in enumerate((first * second, np.abs(first), np.abs(second))):
                sums[number] += self._member[part].T @ np.add.reduceat(signs, self._starts, axis=1, dtype=np.int32)
        return (((self.counts @ total) * self.counts).sum(axis=1) for total in sums)


def _ratio(above: np.ndarray, below: np.ndarray, defined: np.ndarray | None = None) -> np.ndarray:
    where = below > 0 if defined is None else defined
    return np.divide(above, below, out=np.full_like(below, np.nan), where=where)
