from __future__ import annotations

import numpy as np
import pytest

from weightspace.stats.resampling import (
    estimated,
    permutation_p,
    permutation_within,
    run_weights,
    with_interval,
)


def test_weights_are_positive_and_one_on_average() -> None:
    weights = run_weights(500, np.random.default_rng(0))
    assert weights.min() > 0
    assert weights.mean() == pytest.approx(1)
    assert weights.std() == pytest.approx(1, abs=0.15)  # an exponential's, as large as that of counts drawn with return


def test_a_permutation_stays_within_its_blocks() -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(3, size=60)
    order = permutation_within(blocks, generator)
    assert sorted(order) == list(range(60))
    assert np.array_equal(blocks[order], blocks)
    assert not np.array_equal(order, np.arange(60))


def test_permutations_of_one_block_are_uniform() -> None:
    generator = np.random.default_rng(0)
    orders = [tuple(permutation_within(np.zeros(3, dtype=int), generator)) for _ in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 850 and counts.max() < 1150


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=400)
    replicates = [values @ run_weights(400, generator) / 400 for _ in range(4000)]
    estimate = with_interval(values.mean(), replicates)
    half = 1.96 * values.std() / 20
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.08)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.08)
    assert estimate.p_value is None and estimate.null_mean is None


def test_replicates_on_another_level_do_not_move_the_interval() -> None:
    estimate = with_interval(0.5, np.linspace(0.6, 0.8, 101))
    assert (estimate.low, estimate.high) == pytest.approx((0.405, 0.595))
    assert with_interval(0.95, np.linspace(0.6, 0.8, 101)).high == 1


def test_p_counts_the_observed_order_and_ties() -> None:
    assert permutation_p(1.0, np.zeros(99)) == 0.01
    assert permutation_p(0.0, np.zeros(99)) == 1.0
    assert permutation_p(0.3, [0.1 + 0.2, 0.0, 1.0]) == 0.75
    estimate = estimated(0.5, [0.4, 0.6], np.linspace(-0.2, 0.2, 41))
    assert (estimate.null_mean, estimate.null_low, estimate.null_high) == pytest.approx((0, -0.19, 0.19))
    assert estimate.p_value == pytest.approx(1 / 42)
