"""Do models of the same dataset cluster? Three measures, within an architecture and between architectures.

All of them compare runs by the cosine distance of their embeddings and count pairs of runs from different *blocks*.
Within an architecture every run is a block of its own. Between architectures the blocks are the architectures, so that
only runs of different architectures meet.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from weightspace.stats.resampling import Estimate, estimated, permutation_within, run_weights

NEAREST = "nearest neighbour"
MEASURES = ("silhouette", "adjusted Rand index", NEAREST)
_LEAST = (-1.0, -1.0, 0.0)

_CHUNK_ENTRIES = 2**22
_STARTS = 4
_NEIGHBOURS = 32
# An exponential weight of mean one is below this with probability 1 / e.
_ABSENT = -math.log(1 - 1 / math.e)

Blocks = Int[np.ndarray, "runs"]


def clustering(
    units: Float[np.ndarray, "runs dims"],
    labels: Int[np.ndarray, "runs"],
    blocks: Blocks | None,
    generator: np.random.Generator,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """Measures how far the runs of one label stand together.

    Labels are permuted among runs, within their blocks where there are blocks; intervals are those of the Bayesian
    bootstrap over runs. k-means finds as many clusters as there are labels, once; its clusters are the same in all
    draws.

    Args:
        units: embeddings of length 1.
        labels: the dataset of each run, or one of its characteristics, from 0 on; at least two runs a label, and with
            blocks at least two blocks a label.
        blocks: architecture of each run to compare runs of different architectures, or None to compare all.
        generator: draws k-means' starts, permutations and weights.
        draws: number of permutations and of bootstrap replicates.

    Returns:
        The ``MEASURES`` by name; see `silhouette`, `adjusted_rand` and `agreement`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal runs make fewer clusters than requested
        means = KMeans(int(labels.max()) + 1, n_init=_STARTS, random_state=int(generator.integers(2**31))).fit(units)
    clusters, neighbours = means.labels_.astype(np.int64), nearest(units, blocks)

    def measured(labels: Int[np.ndarray, "runs"], weights: Float[np.ndarray, "runs"]) -> tuple[float, ...]:
        return (
            silhouette(units, labels, weights, blocks),
            adjusted_rand(clusters, labels, weights, blocks),
            agreement(neighbours, labels, weights),
        )

    together, ones = np.zeros_like(labels) if blocks is None else blocks, np.ones(len(labels))
    values = measured(labels, ones)
    replicates = [measured(labels, run_weights(len(labels), generator)) for _ in range(draws)]
    null = [measured(labels[permutation_within(together, generator)], ones) for _ in range(draws)]
    columns = zip(values, np.transpose(replicates), np.transpose(null), strict=True)
    return {
        name: estimated(*column, bounds=(least, 1.0))
        for name, column, least in zip(MEASURES, columns, _LEAST, strict=True)
    }


def silhouette(
    units: Float[np.ndarray, "runs dims"],
    labels: Int[np.ndarray, "runs"],
    weights: Float[np.ndarray, "runs"],
    blocks: Blocks | None = None,
) -> float:
    """Computes the mean silhouette (Rousseeuw, 1987) of labelled runs.

    ``s = (b - a) / max(a, b)``: ``a`` is a run's mean distance to the other runs of its label, ``b`` the least mean
    distance to the runs of another one. The distance is ``1 - cos``. Where all distances are zero, so is ``s``.
    """
    distances = 1 - _mean_cosines(units, labels, weights, blocks)
    runs = np.arange(len(units))
    own = distances[runs, labels]
    distances[runs, labels] = np.inf
    other = distances.min(axis=1)
    largest = np.maximum(own, other)
    values = np.divide(other - own, largest, out=np.zeros_like(own), where=largest > 1e-12)
    return float(weights @ values / weights.sum())


def _mean_cosines(
    units: np.ndarray, labels: np.ndarray, weights: np.ndarray, blocks: np.ndarray | None
) -> Float[np.ndarray, "runs labels"]:
    """Mean cosine of each run with the runs of each label, those of its own block left out."""
    member = (labels[:, None] == np.arange(labels.max() + 1)) * weights[:, None]
    if blocks is None:
        # A run's cosine with itself is one.
        return (units @ (units.T @ member) - member) / (member.sum(axis=0) - member)
    total, count = units.T @ member, member.sum(axis=0)
    means = np.empty_like(member)
    for block in np.unique(blocks):
        here = np.flatnonzero(blocks == block)
        own, inside = units[here], member[here]
        means[here] = own @ (total - own.T @ inside) / (count - inside.sum(axis=0))
    return means


def adjusted_rand(
    clusters: Int[np.ndarray, "runs"],
    labels: Int[np.ndarray, "runs"],
    weights: Float[np.ndarray, "runs"],
    blocks: Blocks | None = None,
) -> float:
    """Computes the adjusted Rand index (Hubert and Arabie, 1985) of clusters and labels.

    ``(n - e) / ((p + q) / 2 - e)`` with ``e = p q / t``: of ``t`` pairs of runs from different blocks, ``p`` share a
    cluster, ``q`` a label, and ``n`` both. A pair counts as much as the product of its weights.
    """

    def pairs(cells: Int[np.ndarray, "runs"]) -> float:
        """Weight of the pairs of runs that share a cell and stand in different blocks."""
        shared = np.bincount(cells, weights)
        within = weights if blocks is None else np.bincount(cells * (blocks.max() + 1) + blocks, weights)
        return float(shared @ shared - within @ within) / 2

    both, in_cluster, in_label = (pairs(cells) for cells in (clusters * (labels.max() + 1) + labels, clusters, labels))
    expected = in_cluster * in_label / pairs(np.zeros_like(labels))
    most = (in_cluster + in_label) / 2
    return (both - expected) / (most - expected) if most > expected else 0.0


def nearest(
    units: Float[np.ndarray, "runs dims"], blocks: Blocks | None = None, count: int = _NEIGHBOURS
) -> Int[np.ndarray, "runs neighbours"]:
    """Lists other runs by their distance from each run, the nearest first: in other blocks where there are blocks.

    They are ``count``, or as many as every run has. Of equally near runs the one with the lower number comes first.
    """
    runs = np.arange(len(units))
    own = runs if blocks is None else blocks
    count = min(count, len(units) - int(np.unique(own, return_counts=True)[1].max()))
    found = np.empty((len(units), count), dtype=np.int64)
    step = max(1, _CHUNK_ENTRIES // len(units))
    for start in range(0, len(units) if count else 0, step):
        part = runs[start : start + step]
        distances = -units[part] @ units.T
        distances[own[part, None] == own] = np.inf
        near = np.sort(np.argpartition(distances, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(np.take_along_axis(distances, near, axis=1), axis=1, kind="stable")
        found[part] = np.take_along_axis(near, order, axis=1)
    return found


def agreement(
    neighbours: Int[np.ndarray, "runs neighbours"], labels: Int[np.ndarray, "runs"], weights: Float[np.ndarray, "runs"]
) -> float:
    """Computes the share of runs whose nearest neighbour has their label.

    Runs of little weight are no neighbours, as many as a bootstrap sample lacks: otherwise intervals would leave out
    that another zoo has other neighbours.
    """
    present = weights > _ABSENT * weights.mean()
    first = present[neighbours].argmax(axis=1)
    return float(weights @ (labels == labels[neighbours[np.arange(len(labels)), first]]) / weights.sum())
