"""How well one tower finds what belongs to it in another, beside chance and with intervals over training runs.

A query has any number of right answers: many models share a dataset or a result. It is served by the first of them, so
that what counts is how many wrong ones stand before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln

from weightspace.stats.measures import found_correlation
from weightspace.stats.resampling import Estimate, with_interval

CUTOFFS = (1, 5, 10)

Similarity = Float[np.ndarray, "queries candidates"]
Positives = Bool[np.ndarray, "queries candidates"]


@dataclass(frozen=True)
class Retrieval:
    """What queries find among candidates; chance stands in the ``null_mean`` of each estimate.

    Attributes:
        queries: number of queries that have a right answer.
        candidates: number of candidates.
        recall: by k, the share of queries with a right answer among the first k.
        median_rank: median over queries of the rank of the first right answer, 1 for the best.
    """

    queries: int
    candidates: int
    recall: Mapping[int, Estimate]
    median_rank: Estimate


def same_identity(
    queries: Int[np.ndarray, "queries"], candidates: Int[np.ndarray, "candidates"]
) -> Bool[np.ndarray, "queries candidates"]:
    """Says which pairs share an identity, as of datasets; a negative number is an unknown one, and matches none."""
    return (queries[:, None] == candidates) & (queries[:, None] >= 0)


def first_ranks(similarity: Similarity, positives: Positives) -> Int[np.ndarray, "queries"]:
    """Ranks the first right answer of each query among the wrong ones, 1 for the best.

    A wrong answer that is as similar as the right one stands before it: who finds all alike finds nothing.
    """
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~positives).sum(axis=1)


def retrieval(
    similarity: Similarity,
    positives: Positives,
    generator: np.random.Generator,
    *,
    query_runs: Int[np.ndarray, "queries"] | None = None,
    candidate_runs: Int[np.ndarray, "candidates"] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    draws: int = 1000,
) -> Retrieval | None:
    """Measures retrieval. Queries without a right answer are left out.

    Intervals hold for runs drawn with replacement on the sides that consist of models. Weights on candidates instead of
    draws would leave the first answer what it is, and its interval empty.

    Args:
        similarity: of each query to each candidate, in any unit.
        positives: which candidates are right.
        generator: draws the runs.
        query_runs: run of each query, from 0 on; None where queries are no models.
        candidate_runs: run of each candidate, from 0 on; None where candidates are no models.
        cutoffs: the k of recall at k.
        draws: bootstrap replicates.

    Returns:
        The measures, or None where no query has a right answer.
    """
    asked = positives.any(axis=1)
    if not asked.any():
        return None
    similarity, positives = similarity[asked], positives[asked]
    query_runs = None if query_runs is None else query_runs[asked]
    ranks = first_ranks(similarity, positives)
    replicates = [
        _replicate(similarity, positives, ranks, query_runs, candidate_runs, cutoffs, generator) for _ in range(draws)
    ]
    drawn = np.array([replicate for replicate in replicates if replicate is not None]).reshape(-1, len(cutoffs) + 1)
    right, count = positives.sum(axis=1), positives.shape[1]
    recall = {
        k: replace(
            _with_interval(float((ranks <= k).mean()), drawn[:, column], (0.0, 1.0)),
            null_mean=float(_chance(count, right, k).mean()),
        )
        for column, k in enumerate(cutoffs)
    }
    median = _with_interval(float(np.median(ranks)), drawn[:, -1], (1.0, float(count)))
    # Of p right answers among c in random order, the first comes at (c + 1) / (p + 1) on average.
    return Retrieval(len(ranks), count, recall, replace(median, null_mean=float(np.median((count + 1) / (right + 1)))))


def result_correlation(
    similarity: Similarity,
    wanted: Float[np.ndarray, "queries"],
    known: Float[np.ndarray, "candidates"],
    generator: np.random.Generator,
    *,
    candidate_runs: Int[np.ndarray, "candidates"],
    first: int = 10,
    draws: int = 1000,
) -> Estimate | None:
    """Measures how far the first models that are found have the results asked for; see `found_correlation`.

    Args:
        similarity: of each wanted result to each model.
        wanted: the results asked for.
        known: results of the models, NaN where they are not known; these are left out.
        generator: draws the runs.
        candidate_runs: run of each model, from 0 on.
        first: models a query.
        draws: bootstrap replicates, of runs drawn with replacement.

    Returns:
        The correlation, or None where all results are alike.
    """
    there = np.isfinite(known)
    order = np.argsort(-similarity[:, there], axis=1, kind="stable")
    found, runs = known[there][order], candidate_runs[there][order]
    value = found_correlation(wanted, found, first)
    if value is None:
        return None
    drawn = (
        found_correlation(wanted, found, first, _drawn(int(runs.max()) + 1, generator)[runs]) for _ in range(draws)
    )
    return _with_interval(value, np.array([one for one in drawn if one is not None]), (-1.0, 1.0))


def _replicate(
    similarity: Similarity,
    positives: Positives,
    ranks: Int[np.ndarray, "queries"],
    query_runs: Int[np.ndarray, "queries"] | None,
    candidate_runs: Int[np.ndarray, "candidates"] | None,
    cutoffs: Sequence[int],
    generator: np.random.Generator,
) -> list[float] | None:
    """Measures with drawn runs; None where they leave no query with a right answer."""
    sides = [runs for runs in (query_runs, candidate_runs) if runs is not None]
    drawn = _drawn(max((int(runs.max()) + 1 for runs in sides), default=0), generator)
    queries = np.ones(len(ranks), dtype=np.int64) if query_runs is None else drawn[query_runs]
    if candidate_runs is not None:
        counts = drawn[candidate_runs]
        right = positives & (counts > 0)
        best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks = 1 + ((similarity >= best) & ~positives) @ counts
        queries = queries * right.any(axis=1)
    if not queries.any():
        return None
    ranks = np.repeat(ranks, queries)
    return [*(float((ranks <= k).mean()) for k in cutoffs), float(np.median(ranks))]


def _drawn(runs: int, generator: np.random.Generator) -> Int[np.ndarray, "runs"]:
    """Says how often each run is drawn, with replacement."""
    return np.bincount(generator.integers(runs, size=runs), minlength=runs) if runs else np.zeros(0, dtype=np.int64)


def _chance(candidates: int, right: Int[np.ndarray, "queries"], k: int) -> Float[np.ndarray, "queries"]:
    """Computes 1 - C(c - p, k) / C(c, k): how likely p right ones of c in random order have one among the first k."""
    wrong = candidates - right
    misses = np.zeros(len(right))
    some = wrong >= k
    logs = gammaln(wrong[some] + 1) - gammaln(wrong[some] - k + 1)
    logs += gammaln(candidates - k + 1) - gammaln(candidates + 1)
    misses[some] = np.exp(logs)
    return 1 - misses


def _with_interval(value: float, replicates: Float[np.ndarray, "draws"], bounds: tuple[float, float]) -> Estimate:
    return with_interval(value, replicates, bounds) if len(replicates) else Estimate(value, *bounds)
