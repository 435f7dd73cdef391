"""How well one tower finds what belongs to it in another, beside chance and with intervals over training runs.

A query has any number of right answers: many models share a dataset or a result. It is served by the first of them, so
that what counts is how many wrong ones stand before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom

from weightspace.stats.measures import found_correlation
from weightspace.stats.resampling import Estimate, run_counts, with_interval

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


def first_ranks(
    similarity: Similarity, positives: Positives, counts: Int[np.ndarray, "candidates"] | None = None
) -> Int[np.ndarray, "queries"]:
    """Ranks the first right answer of each query among the wrong ones, 1 for the best.

    A wrong answer that is as similar as the right one stands before it: a query that finds all candidates alike finds
    nothing. ``counts`` says how often each candidate occurs, once if left out.
    """
    counts = np.ones(similarity.shape[1], dtype=np.int64) if counts is None else counts
    best = np.where(positives & (counts > 0), similarity, -np.inf).max(axis=1, keepdims=True)
    ranks: np.ndarray = 1 + ((similarity >= best) & ~positives) @ counts
    return ranks


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
    answered = positives.any(axis=1)
    if not answered.any():
        return None
    similarity, positives = similarity[answered], positives[answered]
    query_runs = None if query_runs is None else query_runs[answered]
    ranks = first_ranks(similarity, positives)
    runs = max((int(side.max()) + 1 for side in (query_runs, candidate_runs) if side is not None), default=0)

    def measured(ranks: Int[np.ndarray, "queries"]) -> list[float]:
        return [*(float((ranks <= k).mean()) for k in cutoffs), float(np.median(ranks))]

    def resampled() -> list[float] | None:
        """Measures with drawn runs; None where they leave no query with a right answer."""
        drawn, resampled_ranks = run_counts(runs, generator), ranks
        queries = np.ones(len(ranks), dtype=np.int64) if query_runs is None else drawn[query_runs]
        if candidate_runs is not None:
            counts = drawn[candidate_runs]
            resampled_ranks = first_ranks(similarity, positives, counts)
            queries = queries * (positives & (counts > 0)).any(axis=1)
        return measured(np.repeat(resampled_ranks, queries)) if queries.any() else None

    replicates = [replicate for _ in range(draws) if (replicate := resampled()) is not None]
    *recalls, medians = np.array(replicates).reshape(-1, len(cutoffs) + 1).T
    *values, median = measured(ranks)
    right, count = positives.sum(axis=1), positives.shape[1]
    recall = {
        # Chance: p right answers among c in random order have one among the first k.
        k: replace(
            with_interval(value, drawn, (0.0, 1.0)),
            null_mean=float((1 - hypergeom.pmf(0, count, right, min(k, count))).mean()),
        )
        for k, value, drawn in zip(cutoffs, values, recalls, strict=True)
    }
    # Of p right answers among c in random order, the first comes at (c + 1) / (p + 1) on average.
    median_rank = replace(
        with_interval(median, medians, (1.0, float(count))), null_mean=float(np.median((count + 1) / (right + 1)))
    )
    return Retrieval(len(ranks), count, recall, median_rank)


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
    """Measures how far the first models that are found have the requested results; see `found_correlation`.

    Args:
        similarity: of each requested result to each model.
        wanted: the requested results.
        known: results of the models, NaN where they are not known; these are left out.
        generator: draws the runs.
        candidate_runs: run of each model, from 0 on.
        first: models a query.
        draws: bootstrap replicates, of runs drawn with replacement.

    Returns:
        The correlation, or None where all results are alike.
    """
    finite = np.isfinite(known)
    order = np.argsort(-similarity[:, finite], axis=1, kind="stable")
    found, runs = known[finite][order], candidate_runs[finite][order]
    value = found_correlation(wanted, found, first)
    if value is None:
        return None
    drawn = (
        found_correlation(wanted, found, first, run_counts(int(runs.max()) + 1, generator)[runs]) for _ in range(draws)
    )
    return with_interval(value, [one for one in drawn if one is not None])
