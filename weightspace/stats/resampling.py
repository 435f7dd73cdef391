"""Estimates with what chance would give beside them. The unit is the run: its checkpoints are near copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A measured number, its uncertainty, and its distribution if the labels meant nothing.

    Attributes:
        value: the number.
        low: lower end of its 95 % interval.
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


def permutation_within(blocks: Int[np.ndarray, "runs"], generator: np.random.Generator) -> Int[np.ndarray, "runs"]:
    """Draws a permutation that moves runs within their blocks only."""
    places = np.argsort(blocks, kind="stable")
    shuffled = np.lexsort((generator.random(len(blocks)), blocks))
    order = np.empty_like(places)
    order[places] = shuffled
    return order


def with_interval(
    value: float, replicates: Sequence[float] | np.ndarray, bounds: tuple[float, float] = (-1.0, 1.0)
) -> Estimate:
    """Gives a number its 95 % interval from bootstrap replicates.

    The replicates' deviations from their own mean are laid around the value: a replicate weighs fewer runs effectively,
    and that moves the level of every statistic that depends on their number, a share of variance for one.
    """
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
    low, high = np.percentile(null, _LEVELS)
    return replace(
        with_interval(value, replicates, bounds),
        null_mean=float(np.mean(null)),
        null_low=float(low),
        null_high=float(high),
        p_value=permutation_p(value, null),
    )
