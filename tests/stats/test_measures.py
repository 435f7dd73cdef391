from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from weightspace.stats.measures import auc, balanced_accuracy, kendall_tau, r2, spearman
from weightspace.stats.resampling import RunBootstrap, pooled_interval

RUNS = np.array(["a", "b", "a", "c", "c", "c", "b", "d", "e", "e"])


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 4, 10).astype(float)
    return targets, targets + rng.integers(-1, 2, 10)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=30))
def test_r2_and_tau_agree_with_their_references(pairs: list[tuple[float, float]]) -> None:
    targets, predictions = np.array(pairs).round(1).T
    if np.ptp(targets) == 0:
        assert math.isnan(r2(targets, predictions))
        return
    assert r2(targets, predictions) == pytest.approx(r2_score(targets, predictions), rel=1e-9, abs=1e-9)
    if np.ptp(predictions) > 0:
        expected = stats.kendalltau(targets, predictions).statistic
        assert kendall_tau(targets, predictions) == pytest.approx(expected)


def test_constant_targets_and_predictions_are_undefined_and_not_zero() -> None:
    ones, line = np.ones(5), np.arange(5.0)
    assert math.isnan(r2(ones, ones)) and math.isnan(r2(ones, line))
    assert math.isnan(kendall_tau(ones, line)) and math.isnan(kendall_tau(line, ones))
    assert r2(line, np.full(5, 2.0)) == 0.0
    bootstrap = RunBootstrap(np.arange(5), np.random.default_rng(0), 20)
    assert np.isnan(bootstrap.r2(ones * 0.1, line)).all()
    assert np.isnan(bootstrap.kendall_tau(line, ones)).all()


def test_spearman_has_no_value_without_an_order_of_requests_and_is_zero_where_all_obtain_the_same() -> None:
    rng = np.random.default_rng(0)
    requested, obtained = rng.integers(5, size=(2, 30)).astype(float)
    assert spearman(requested, obtained) == pytest.approx(stats.spearmanr(requested, obtained).statistic)
    assert math.isnan(spearman(np.ones(5), np.arange(5.0))) and spearman(np.arange(5.0), np.ones(5)) == 0.0


def test_replicates_equal_metrics_of_test_sets_written_out(data: tuple[np.ndarray, np.ndarray]) -> None:
    targets, predictions = data
    bootstrap = RunBootstrap(RUNS, np.random.default_rng(0), 40)
    assert (bootstrap.counts.sum(axis=1) == 5).all()
    fast_r2, fast_tau = bootstrap.r2(targets, predictions), bootstrap.kendall_tau(targets, predictions)
    for counts, one_r2, one_tau in zip(bootstrap.counts, fast_r2, fast_tau, strict=True):
        drawn = np.concatenate(
            [np.tile(np.flatnonzero(run == RUNS), n) for run, n in zip("abcde", counts, strict=True)]
        )
        expected = [r2(targets[drawn], predictions[drawn]), kendall_tau(targets[drawn], predictions[drawn])]
        np.testing.assert_allclose([one_r2, one_tau], expected, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30))
def test_measures_of_labels_agree_with_their_references(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    positive, categories = truth == 1, np.unique(truth)
    if positive.all() or not positive.any():
        assert math.isnan(auc(positive, predicted * 1.0))
    else:
        assert auc(positive, predicted * 1.0) == pytest.approx(roc_auc_score(positive, predicted))
    members, hits = truth[:, None] == np.arange(4), predicted[:, None] == np.arange(4)
    expected = np.mean([(predicted[truth == one] == one).mean() for one in categories])
    assert balanced_accuracy(members, hits) == pytest.approx(expected)
    if len(categories) > 1 and set(predicted) <= set(truth):
        assert balanced_accuracy(members, hits) == pytest.approx(balanced_accuracy_score(truth, predicted))


def test_replicates_of_label_measures_equal_test_sets_written_out(data: tuple[np.ndarray, np.ndarray]) -> None:
    targets, predictions = data
    members, hits = targets[:, None] == np.arange(4), predictions[:, None] == np.arange(4)
    positive = targets >= 2
    bootstrap = RunBootstrap(RUNS, np.random.default_rng(0), 40)
    replicates = bootstrap.balanced_accuracy(members, hits), bootstrap.auc(positive, predictions)
    for counts, accuracy, area in zip(bootstrap.counts, *replicates, strict=True):
        drawn = np.concatenate(
            [np.tile(np.flatnonzero(run == RUNS), n) for run, n in zip("abcde", counts, strict=True)]
        )
        expected = [balanced_accuracy(members[drawn], hits[drawn]), auc(positive[drawn], predictions[drawn])]
        np.testing.assert_allclose([accuracy, area], expected, atol=1e-12)
    assert np.isnan(bootstrap.auc(np.ones(10, dtype=bool), predictions)).all()


@pytest.mark.parametrize("metric", ["kendall_tau", "auc"])
def test_pairs_are_compared_by_chunks(
    metric: str, data: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, predictions = data
    bootstrap = RunBootstrap(RUNS, np.random.default_rng(0), 10)
    truth = targets >= 2 if metric == "auc" else targets
    whole = getattr(bootstrap, metric)(truth, predictions)
    monkeypatch.setattr("weightspace.stats.resampling._PAIRS", 25)
    np.testing.assert_array_equal(getattr(bootstrap, metric)(truth, predictions), whole)


def test_checkpoints_of_one_run_are_not_independent_evidence() -> None:
    rng = np.random.default_rng(0)
    targets, noise = np.repeat(rng.normal(size=(2, 40)), 10, axis=1)
    width = {}
    for name, runs in (("runs", np.repeat(np.arange(40), 10)), ("models", np.arange(400))):
        low, high = pooled_interval([RunBootstrap(runs, np.random.default_rng(1)).r2(targets, targets + 0.5 * noise)])
        width[name] = high - low
    assert width["runs"] > 2 * width["models"]


def test_interval_pools_splits_and_leaves_undefined_replicates_out() -> None:
    low, high = pooled_interval([np.linspace(0, 1, 101), np.linspace(1, 2, 101), np.full(50, np.nan)])
    assert (low, high) == (pytest.approx(0.05, abs=0.01), pytest.approx(1.95, abs=0.01))
    assert all(math.isnan(end) for end in pooled_interval([np.full(3, np.nan)]))
