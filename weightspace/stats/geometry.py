"""Are the models of similar datasets similar? Representational similarity analysis of datasets and weights.

Two descriptions of the same datasets are compared by the dissimilarities that they give to pairs of datasets
(Kriegeskorte et al., 2008), so that they need neither dimensions nor units in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from weightspace.data.images import DatasetVariant, variant_of
from weightspace.stats.measures import unit_ranks
from weightspace.stats.resampling import Estimate, estimated, run_weights

MIN_DATASETS = 5
"""Fewer datasets than this have too few orders (24 for four) to test one against."""

Dissimilarity = Float[np.ndarray, "datasets datasets"]


Geometry = Callable[[np.random.Generator | None], Dissimilarity]
"""Dissimilarities of datasets: as measured (None), or those of a bootstrap replicate that the generator draws."""


def weight_geometry(values: Float[np.ndarray, "runs dims"], datasets: Int[np.ndarray, "runs"]) -> Geometry:
    """Describes datasets by the models that were trained on them; see `weight_dissimilarity`."""

    def dissimilarity(generator: np.random.Generator | None) -> Dissimilarity:
        weights = np.ones(len(values)) if generator is None else run_weights(len(values), generator)
        return weight_dissimilarity(values, datasets, weights)

    return dissimilarity


def known_geometry(dissimilarity: Dissimilarity) -> Geometry:
    """Describes datasets by what does not depend on any run."""
    return lambda generator: dissimilarity


def representational_similarity(
    one: Geometry, other: Geometry, generator: np.random.Generator, draws: int = 1000
) -> Estimate | None:
    """Computes Spearman's correlation of two geometries over all pairs of datasets.

    The null permutes whole datasets (Mantel, 1967), because pairs that share a dataset are not independent. The
    interval is that of the Bayesian bootstrap over runs: it holds for these datasets, not for others.

    Args:
        one: a description of at least ``MIN_DATASETS`` datasets.
        other: another one of the same datasets in the same order.
        generator: draws permutations and weights.
        draws: number of permutations and of bootstrap replicates.

    Returns:
        The estimate, or None where all pairs are equally far in one of them and there is no order to compare.
    """
    square = one(None)
    pairs = np.triu_indices(len(square), 1)

    def ranked(geometry: Geometry, generator: np.random.Generator | None = None) -> Float[np.ndarray, "pairs"] | None:
        # Rounding must not order what is equal.
        return unit_ranks(np.round(geometry(generator)[pairs], 9))

    ranks, others = ranked(one), ranked(other)
    if ranks is None or others is None:
        return None
    square = np.zeros_like(square)
    square[pairs] = others
    square += square.T
    orders = (generator.permutation(len(square)) for _ in range(draws))
    null = [float(ranks @ square[order[pairs[0]], order[pairs[1]]]) for order in orders]
    resampled = [(ranked(one, generator), ranked(other, generator)) for _ in range(draws)]
    replicates = [float(a @ b) for a, b in resampled if a is not None and b is not None]
    return estimated(float(ranks @ others), replicates, null)


def weight_dissimilarity(
    values: Float[np.ndarray, "runs dims"], datasets: Int[np.ndarray, "runs"], weights: Float[np.ndarray, "runs"]
) -> Dissimilarity:
    """Estimates the squared distance between the mean embeddings of datasets, without the bias of few runs.

    The distance of two means of ``n`` noisy runs is too large by the variances of the means, which are subtracted:
    ``|m_i - m_j|^2 - v_i / n_i - v_j / n_j``, in the manner of Walther et al. (2016). It can be negative.

    Args:
        values: embeddings.
        datasets: dataset of each run, from 0 on; at least two runs each.
        weights: of the runs.
    """
    member = (datasets[:, None] == np.arange(datasets.max() + 1)) * weights[:, None]
    total, squares = member.sum(axis=0), (member**2).sum(axis=0)
    means = (member.T @ values) / total[:, None]
    variance = member.T @ np.square(values).sum(axis=1) / total - np.square(means).sum(axis=1)
    error = variance * (squares / total**2) / (1 - squares / total**2)
    lengths = np.square(means).sum(axis=1) - error
    distances = lengths[:, None] + lengths - 2 * means @ means.T
    np.fill_diagonal(distances, 0)
    return distances


def feature_dissimilarity(features: Float[np.ndarray, "datasets dims"]) -> Dissimilarity:
    """Computes one minus the cosine between feature vectors of datasets, centred over the datasets."""
    centred = features - features.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    units = centred / np.where(lengths > 0, lengths, 1)
    return 1 - units @ units.T


def characteristic_dissimilarities(datasets: Sequence[str]) -> dict[str, Dissimilarity]:
    """Compares datasets by what their ids say, each characteristic between 0 and 1.

    ``base``, ``polarity`` and ``image_size`` are equal or not. ``rotation`` is the angle between two orientations over
    180 degrees. ``classes`` is one minus the Jaccard index of the class sets; sets of different bases have nothing in
    common, and "all classes" are those that occur in any id of the base. ``characteristics`` is their mean. What does
    not differ between any two datasets is left out.
    """
    variants = [variant_of(dataset) or DatasetVariant(dataset) for dataset in datasets]
    bases = [replace(variant.source, size=None) for variant in variants]

    def class_set(i: int) -> set[tuple[DatasetVariant, int]]:
        named = {
            number for base, other in zip(bases, variants, strict=True) if base == bases[i] for number in other.classes
        }
        return {(bases[i], number) for number in variants[i].classes or named or (-1,)}

    def angle(i: int, j: int) -> int:
        turn = abs(variants[i].rotation - variants[j].rotation) % 360
        return min(turn, 360 - turn)

    count = range(len(datasets))
    classes = [class_set(i) for i in count]
    measures: dict[str, Callable[[int, int], float]] = {
        "base": lambda i, j: float(bases[i] != bases[j]),
        "classes": lambda i, j: 1 - len(classes[i] & classes[j]) / max(1, len(classes[i] | classes[j])),
        "rotation": lambda i, j: angle(i, j) / 180,
        "polarity": lambda i, j: float(variants[i].polarity != variants[j].polarity),
        "image_size": lambda i, j: float(variants[i].size != variants[j].size),
    }
    found = {name: np.array([[measure(i, j) for j in count] for i in count]) for name, measure in measures.items()}
    if np.array_equal(found["classes"], found["base"]):
        del found["classes"]
    found = {name: values for name, values in found.items() if values.any()}
    if len(found) > 1:
        found = {"characteristics": np.mean(list(found.values()), axis=0), **found}
    return found
