from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from weightspace.stats.clustering import MEASURES, adjusted_rand, agreement, clustering, nearest, silhouette
from weightspace.stats.resampling import run_weights, with_interval


def some_units(runs: int = 60, dims: int = 5, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(runs, dims))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def planted(labels: np.ndarray, strength: float, dims: int = 8, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(labels.max() + 1, dims))
    values = strength * centres[labels] + generator.normal(size=(len(labels), dims))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def labels_of(runs: int, groups: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(runs) % groups)


def test_silhouette_and_rand_index_are_scikit_learns() -> None:
    units, labels, clusters, ones = some_units(), labels_of(60, 4), labels_of(60, 5, seed=2), np.ones(60)
    clusters[:20] = labels[:20]
    assert silhouette(units, labels, ones) == pytest.approx(silhouette_score(units, labels, metric="cosine"))
    assert adjusted_rand(clusters, labels, ones) == pytest.approx(adjusted_rand_score(labels, clusters))


def test_weights_count_a_run_more_often_but_never_pair_it_with_itself() -> None:
    units, labels, clusters = some_units(12), labels_of(12, 3), labels_of(12, 3, seed=2)
    weights = np.random.default_rng(0).integers(1, 4, size=12).astype(float)
    distances = 1 - units @ units.T
    assert silhouette(units, labels, weights) == pytest.approx(
        np.average([_plain_silhouette(distances, labels, weights, run) for run in range(12)], weights=weights)
    )
    pairs = [
        (weights[i] * weights[j], clusters[i] == clusters[j], labels[i] == labels[j])
        for i, j in combinations(range(12), 2)
    ]
    assert adjusted_rand(clusters, labels, weights) == pytest.approx(_plain_rand(pairs))


def _plain_silhouette(distances: np.ndarray, labels: np.ndarray, weights: np.ndarray, run: int, blocks=None) -> float:
    blocks = np.arange(len(labels)) if blocks is None else blocks
    means = {}
    for label in set(labels):
        members = [i for i in range(len(labels)) if labels[i] == label and blocks[i] != blocks[run]]
        means[label] = np.average(distances[run, members], weights=weights[members])
    own = means.pop(labels[run])
    other = min(means.values())
    return (other - own) / max(own, other)


def _plain_rand(pairs: list[tuple[float, bool, bool]]) -> float:
    total = sum(weight for weight, _, _ in pairs)
    p = sum(weight for weight, cluster, _ in pairs if cluster)
    q = sum(weight for weight, _, label in pairs if label)
    both = sum(weight for weight, cluster, label in pairs if cluster and label)
    expected = p * q / total
    return (both - expected) / ((p + q) / 2 - expected)


def test_between_blocks_only_pairs_of_different_blocks_count() -> None:
    units, labels, clusters = some_units(24), labels_of(24, 3), labels_of(24, 3, seed=2)
    blocks, weights = labels_of(24, 2, seed=3), np.random.default_rng(0).exponential(size=24)
    distances = 1 - units @ units.T
    plain = [_plain_silhouette(distances, labels, weights, run, blocks) for run in range(24)]
    assert silhouette(units, labels, weights, blocks) == pytest.approx(np.average(plain, weights=weights))
    pairs = [
        (weights[i] * weights[j], clusters[i] == clusters[j], labels[i] == labels[j])
        for i, j in combinations(range(24), 2)
        if blocks[i] != blocks[j]
    ]
    assert adjusted_rand(clusters, labels, weights, blocks) == pytest.approx(_plain_rand(pairs))
    for run, found in enumerate(nearest(units, blocks)):
        others = np.flatnonzero(blocks != blocks[run])
        assert np.array_equal(found, others[distances[run, others].argsort()])


def test_the_nearest_run_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    units = some_units(50)
    units[7] = units[3]
    whole = nearest(units)
    assert whole.shape == (50, 32)
    assert whole[7, 0] == 3 and whole[3, 0] == 7
    monkeypatch.setattr("weightspace.stats.clustering._CHUNK_ENTRIES", 150)
    assert np.array_equal(nearest(units), whole)


def test_agreement_counts_the_nearest_run_that_is_there() -> None:
    neighbours, labels = np.array([[1, 2], [0, 2], [0, 1]]), np.array([0, 0, 1])
    assert agreement(neighbours, labels, np.ones(3)) == pytest.approx(2 / 3)
    # Without the run 0, the run 1 has the run 2 for a neighbour; all runs still count.
    assert agreement(neighbours, labels, np.array([0.2, 1.4, 1.4])) == pytest.approx(0.2 / 3)


def test_the_interval_of_agreement_is_as_wide_as_its_spread_over_zoos() -> None:
    labels, centres = np.arange(240) % 12, np.random.default_rng(0).normal(size=(12, 10)) / 2
    values, halves = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        runs = centres[labels] + generator.normal(size=(240, 10))
        neighbours = nearest(runs / np.linalg.norm(runs, axis=1, keepdims=True))
        values.append(agreement(neighbours, labels, np.ones(240)))
        replicates = [agreement(neighbours, labels, run_weights(240, generator)) for _ in range(100)]
        estimate = with_interval(values[-1], replicates)
        halves.append((estimate.high - estimate.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(values), rel=0.25)


def test_equal_embeddings_have_no_silhouette() -> None:
    assert silhouette(np.tile([[1.0, 0.0]], (6, 1)), labels_of(6, 2), np.ones(6)) == 0


@pytest.mark.parametrize("across", [False, True])
def test_planted_clusters_are_found(across: bool) -> None:
    labels = np.arange(80) % 4
    blocks = np.repeat([0, 1], 40) if across else None
    found = clustering(planted(labels, 2.0), labels, blocks, np.random.default_rng(0), draws=199)
    assert tuple(found) == MEASURES
    for estimate in found.values():
        assert estimate.p_value == 0.005
        assert estimate.null_high < estimate.low <= estimate.value <= estimate.high <= 1
    assert found["nearest neighbour"].null_mean == pytest.approx(0.25, abs=0.03)
    assert found["adjusted Rand index"].null_mean == pytest.approx(0, abs=0.02)


def test_clusters_that_two_architectures_do_not_share_are_not_found_across() -> None:
    labels, blocks = np.arange(80) % 4, np.repeat([0, 1], 40)
    units = np.concatenate([planted(labels[:40], 2.0, seed=0), planted(labels[:40], 2.0, seed=5)])
    within = clustering(units[:40], labels[:40], None, np.random.default_rng(0), draws=99)
    assert within["nearest neighbour"].p_value == 0.01
    across = clustering(units, labels, blocks, np.random.default_rng(0), draws=99)
    assert across["silhouette"].value < 0 < within["silhouette"].value
    assert across["nearest neighbour"].value < 0.6 < within["nearest neighbour"].value


@pytest.mark.slow
def test_labels_that_mean_nothing_reach_small_p_values_as_seldom_as_they_should() -> None:
    generator = np.random.default_rng(0)
    found = [clustering(some_units(30, seed=seed), labels_of(30, 3, seed), None, generator, 39) for seed in range(60)]
    for measure in MEASURES:
        p_values = np.array([one[measure].p_value for one in found])
        assert np.count_nonzero(p_values <= 0.1) <= 13  # of 60; more has probability 0.3 %
        assert 0.35 < p_values.mean() < 0.65


def test_the_same_seed_gives_the_same_numbers() -> None:
    labels = labels_of(40, 4)
    one, other = (clustering(some_units(40), labels, None, np.random.default_rng(3), 50) for _ in range(2))
    assert one == other
