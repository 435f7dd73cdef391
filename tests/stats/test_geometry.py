from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from weightspace.stats.geometry import (
    Geometry,
    characteristic_dissimilarities,
    feature_dissimilarity,
    known_geometry,
    representational_similarity,
    weight_dissimilarity,
    weight_geometry,
)


def trained(centres: np.ndarray, runs: int, noise: float, generator: np.random.Generator) -> Geometry:
    datasets = np.repeat(np.arange(len(centres)), runs)
    return weight_geometry(
        centres[datasets] + noise * generator.normal(size=(len(datasets), centres.shape[1])), datasets
    )


def squared(centres: np.ndarray) -> np.ndarray:
    return squareform(pdist(centres, "sqeuclidean"))


def test_distances_between_datasets_are_right_on_average_whatever_the_number_of_runs() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 10))
    datasets = np.repeat([0, 1, 2], [2, 3, 20])
    draws = []
    for _ in range(4000):
        values = centres[datasets] + 2 * generator.normal(size=(25, 10))
        draws.append(weight_dissimilarity(values, datasets, np.ones(25)))
    error = np.std(draws, axis=0) / np.sqrt(4000)
    assert (np.abs(np.mean(draws, axis=0) - squared(centres)) <= 4 * error + 1e-9).all()


def test_weights_stand_for_copies_in_the_mean() -> None:
    generator = np.random.default_rng(0)
    values, datasets = generator.normal(size=(9, 4)), np.arange(9) % 3
    weights = generator.integers(1, 4, size=9).astype(float)
    found = weight_dissimilarity(values, datasets, weights)
    means, errors = [], []
    for dataset in range(3):
        own, here = values[datasets == dataset], weights[datasets == dataset]
        mean = np.average(own, axis=0, weights=here)
        share = (here**2).sum() / here.sum() ** 2
        means.append(mean)
        errors.append(np.average(((own - mean) ** 2).sum(axis=1), weights=here) / (1 - share) * share)
    assert found[0, 1] == pytest.approx(((means[0] - means[1]) ** 2).sum() - errors[0] - errors[1])
    assert np.array_equal(found, found.T) and not found.diagonal().any()


def test_the_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(0)
    one, other = squared(generator.normal(size=(9, 3))), squared(generator.normal(size=(9, 3)))
    other[other > 5] = 5  # ties
    pairs = np.triu_indices(9, 1)
    found = representational_similarity(known_geometry(one), known_geometry(other), generator, 99)
    assert found is not None
    assert found.value == pytest.approx(spearmanr(one[pairs], other[pairs])[0])
    assert found.low == pytest.approx(found.high)  # nothing in it depends on runs


def test_a_shared_geometry_is_found_across_spaces_of_different_size() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(12, 3))
    turned = centres @ np.linalg.qr(generator.normal(size=(7, 3)))[0].T
    one, other = trained(centres, 10, 0.5, generator), trained(turned, 8, 0.5, generator)
    for compared in (other, known_geometry(squared(centres))):
        found = representational_similarity(one, compared, generator, 199)
        assert found is not None and found.p_value == 0.005
        assert found.null_high < 0.5 < found.low < found.value < found.high


@pytest.mark.slow
def test_unrelated_geometries_reach_small_p_values_as_seldom_as_they_should() -> None:
    generator = np.random.default_rng(0)
    p_values = []
    for _ in range(60):
        one, other = squared(generator.normal(size=(8, 2))), squared(generator.normal(size=(8, 2)))
        found = representational_similarity(known_geometry(one), known_geometry(other), generator, 79)
        assert found is not None
        p_values.append(found.p_value)
    assert np.count_nonzero(np.array(p_values) <= 0.1) <= 13  # of 60; more has probability 0.3 %
    assert 0.35 < np.mean(p_values) < 0.65


def test_without_an_order_there_is_no_correlation() -> None:
    generator = np.random.default_rng(0)
    flat = known_geometry(1 - np.eye(6))
    assert representational_similarity(trained(np.eye(6), 3, 1.0, generator), flat, generator, 20) is None


def test_characteristics_of_variants() -> None:
    ids = [
        "digits?classes=0-1-2",
        "digits?classes=1-2-3&rotation=270",
        "digits?classes=2-1-0&rotation=180&polarity=inverted",
        "digits",
    ]
    found = characteristic_dissimilarities(ids)
    assert set(found) == {"characteristics", "classes", "rotation", "polarity"}
    assert found["classes"][0] == pytest.approx([0, 0.5, 0, 0.25])  # all classes: 0 to 3 are named
    assert found["rotation"][0] == pytest.approx([0, 0.5, 1, 0])
    assert found["polarity"][0] == pytest.approx([0, 0, 1, 0])
    assert found["characteristics"][0] == pytest.approx([0, 1 / 3, 2 / 3, 0.25 / 3])


def test_characteristics_of_ids_that_say_nothing_but_a_name() -> None:
    found = characteristic_dissimilarities(["mnist", "org/cifar", "a set?of=things", "mnist"])
    assert list(found) == ["base"]
    assert np.array_equal(found["base"], [[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]])
    sizes = characteristic_dissimilarities(["org/x?size=8", "org/x?size=16"])
    assert list(sizes) == ["image_size"]


def test_features_are_compared_by_direction_from_their_mean() -> None:
    features = np.array([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]]) + 5
    assert feature_dissimilarity(features) == pytest.approx(np.array([[0, 0, 2], [0, 0, 2], [2, 2, 0]]), abs=1e-12)
    assert np.isfinite(feature_dissimilarity(np.ones((3, 2)))).all()
