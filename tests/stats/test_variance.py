from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from weightspace.errors import ZooError
from weightspace.stats.variance import Factor, VarianceShare, variance_shares


def factor(name: str, codes: np.ndarray, kind: str = "training", in_dataset: bool = False) -> Factor:
    levels = tuple(str(level) for level in range(int(codes.max()) + 1))
    return Factor(name, kind, codes, levels, in_dataset)  # type: ignore[arg-type]


def effect(levels: int, dims: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """An effect of each level whose variance over equally many runs a level, summed over columns, is ``share``."""
    values = generator.normal(size=(levels, dims))
    values -= values.mean(axis=0)
    return values * np.sqrt(share / np.square(values).sum(axis=1).mean())


def decomposed(
    values: np.ndarray, factors: Sequence[Factor], draws: int = 100, seed: int = 0
) -> dict[str, VarianceShare]:
    return {one.name: one for one in variance_shares(values, factors, np.random.default_rng(seed), draws)}


def test_sums_of_squares_are_those_of_fitted_models() -> None:
    generator = np.random.default_rng(0)
    runs = 90
    a, b = generator.integers(3, size=runs), generator.integers(4, size=runs)
    b[:30] = a[:30]  # unbalanced
    values = generator.normal(size=(runs, 6)) + a[:, None] * generator.normal(size=6)
    found = decomposed(values, [factor("a", a), factor("b", b)])

    def error(*codes: np.ndarray) -> float:
        design = np.hstack([np.ones((runs, 1)), *(np.eye(c.max() + 1)[c] for c in codes)])
        return float(np.square(values - design @ np.linalg.lstsq(design, values, rcond=None)[0]).sum())

    mean_square = error(a, b) / (runs - 1 - 2 - 3)
    for name, rest, df in (("a", b, 2), ("b", a, 3)):
        expected = (error(rest) - error(a, b) - df * mean_square) / (error() + mean_square)
        assert found[name].df == df
        assert found[name].share.value == pytest.approx(expected)
    whole = (error() - error(a, b) - 5 * mean_square) / (error() + mean_square)
    assert found["residual"].share.value == pytest.approx(1 - whole)
    parts = [found[name].share.value for name in ("a", "b", "shared", "residual")]
    assert sum(parts) == pytest.approx(1)
    assert found["residual"].share.p_value is None


@pytest.mark.slow
def test_known_shares_lie_in_their_intervals() -> None:
    truth = {"a": 0.3, "b": 0.1, "c": 0.0}
    inside = dict.fromkeys([*truth, "residual"], 0)
    for seed in range(40):
        generator = np.random.default_rng(seed)
        codes = {
            name: generator.permutation(np.arange(240) % levels) for name, levels in zip(truth, (3, 2, 4), strict=True)
        }
        values = generator.normal(size=(240, 5)) * np.sqrt(0.6 / 5)
        for name, share in truth.items():
            values += effect(int(codes[name].max()) + 1, 5, share, generator)[codes[name]]
        found = decomposed(values, [factor(name, one) for name, one in codes.items()], seed=seed)
        for name, share in {**truth, "residual": 0.6}.items():
            estimate = found[name].share
            inside[name] += estimate.low <= share <= estimate.high
            assert estimate.value == pytest.approx(share, abs=0.09)
    assert min(inside.values()) >= 33  # of 40; fewer at 95 % coverage has probability 0.2 %


@pytest.mark.slow
def test_a_factor_that_does_nothing_reaches_small_p_values_as_seldom_as_it_should() -> None:
    p_values, shares = [], []
    for seed in range(80):
        generator = np.random.default_rng(seed)
        a, b = generator.integers(2, size=60), generator.integers(5, size=60)
        values = generator.standard_t(4, size=(60, 4)) + 3 * a[:, None]
        share = decomposed(values, [factor("a", a), factor("b", b)], draws=79, seed=seed)["b"].share
        p_values.append(share.p_value)
        shares.append(share.value)
    assert np.count_nonzero(np.array(p_values) <= 0.1) <= 16  # of 80; more has probability 0.3 %
    assert 0.38 < np.mean(p_values) < 0.62
    assert np.mean(shares) == pytest.approx(0, abs=0.004)


def test_factors_with_an_effect_are_told_from_chance() -> None:
    generator = np.random.default_rng(0)
    a = generator.permutation(np.arange(120) % 3)
    values = generator.normal(size=(120, 4)) + effect(3, 4, 1.0, generator)[a]
    share = decomposed(values, [factor("a", a)], draws=199)["a"].share
    assert share.p_value == 0.005
    assert share.null_high < 0.05 < share.low < share.value < share.high
    assert share.null_mean == pytest.approx(0, abs=0.005)


def test_factors_that_are_the_same_column_are_not_split() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(3, size=100), generator.integers(2, size=100)
    values = generator.normal(size=(100, 3)) + a[:, None]
    found = decomposed(values, [factor("a", a), factor("b", b), factor("same", 2 - a, kind="data")])
    assert set(found) == {"a + same", "b", "shared", "residual"}
    assert (found["a + same"].kind, found["a + same"].df) == ("mixed", 2)
    alone = decomposed(values, [factor("a", a), factor("b", b)])
    assert found["a + same"].share.value == pytest.approx(alone["a"].share.value)


def test_a_factor_that_follows_from_two_others_joins_them() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(2, size=200), generator.integers(2, size=200)
    values = generator.normal(size=(200, 3))
    found = decomposed(values, [factor("a", a), factor("b", b), factor("both", a + 2 * b)])
    assert set(found) == {"a + both + b", "residual"}
    assert found["a + both + b"].df == 3


def test_factors_that_differ_in_very_few_runs_are_not_split_either() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(2, size=300)
    nearly = a.copy()
    nearly[:2] = 1 - nearly[:2]
    assert "a + nearly" in decomposed(generator.normal(size=(300, 3)), [factor("a", a), factor("nearly", nearly)])
    mostly = np.where(generator.random(300) < 0.3, 1 - a, a)
    assert "mostly" in decomposed(generator.normal(size=(300, 3)), [factor("a", a), factor("mostly", mostly)])


def test_what_correlated_factors_explain_together_is_shared() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(2, size=400)
    b = np.where(generator.random(400) < 0.2, 1 - a, a)
    values = generator.normal(size=(400, 2)) + a[:, None] + b[:, None]
    found = decomposed(values, [factor("a", a), factor("b", b)])
    assert found["shared"].share.value > 0.1
    assert found["shared"].share.low > 0


def test_interactions_of_data_are_told_from_sums() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(2, size=300), generator.integers(3, size=300)
    sums = generator.normal(size=(300, 4)) + a[:, None] + b[:, None]
    parts = [factor("classes", a, "data", True), factor("rotation", b, "data", True)]
    without = decomposed(sums, parts)
    assert (without["data x data"].df, without["data x data"].part) == (2, "interactions")
    assert without["data x data"].share.value == pytest.approx(0, abs=0.02)
    product = decomposed(sums + 3 * ((a == 1) & (b == 2))[:, None], parts)
    assert product["data x data"].share.low > 0.05
    assert product["all of data"].df == 5
    assert product["all of data"].share.value > product["data x data"].share.value


def test_architectures_that_react_differently_interact() -> None:
    generator = np.random.default_rng(0)
    architecture, rate = generator.integers(2, size=300), generator.integers(3, size=300)
    values = generator.normal(size=(300, 4)) + (2 * architecture - 1)[:, None] * rate[:, None]
    found = decomposed(values, [factor("architecture", architecture, "architecture"), factor("learning_rate", rate)])
    assert found["architecture x others"].share.value > 0.2
    assert found["learning_rate"].share.value == pytest.approx(0, abs=0.02)


def test_interactions_wait_for_enough_runs() -> None:
    generator = np.random.default_rng(0)
    parts = [factor(name, np.arange(24) // step % 4, "data", True) for name, step in (("a", 1), ("b", 4))]
    assert "data x data" not in decomposed(generator.normal(size=(24, 2)), parts, draws=20)


def test_what_cannot_be_answered_is_refused() -> None:
    generator = np.random.default_rng(0)
    a = np.arange(12) % 4
    with pytest.raises(ZooError, match=r"12 runs are too few for factors of 3 degrees of freedom; give 14 or more"):
        variance_shares(generator.normal(size=(12, 2)), [factor("a", a)], generator)
    with pytest.raises(ZooError, match=r"embeddings of all 40 runs are equal"):
        variance_shares(np.ones((40, 2)), [factor("a", np.arange(40) % 4)], generator)
