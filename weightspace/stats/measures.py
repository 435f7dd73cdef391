"""How far what a joint model finds is what was asked for."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr


def found_correlation(
    wanted: Float[np.ndarray, "queries"],
    found: Float[np.ndarray, "queries models"],
    first: int,
    counts: Int[np.ndarray, "queries models"] | None = None,
) -> float | None:
    """Computes Spearman's correlation between results asked for and the mean result of the first models found.

    Args:
        wanted: the results asked for.
        found: known results of the models, in the order in which each query finds them.
        first: models whose mean is taken.
        counts: how often each of these models counts, in the same order; once if left out.

    Returns:
        The correlation, 0 if the same is found whatever is asked for, or None where fewer than two different results
        are asked for or known.
    """
    counts = np.ones(found.shape, dtype=np.int64) if counts is None else counts
    if not wanted.size or not found.size or np.ptp(wanted) == 0 or np.ptp(found) == 0:
        return None
    # As many of each model as it counts, until there are ``first``.
    taken = np.clip(first - (np.cumsum(counts, axis=1) - counts), 0, counts)
    obtained = (taken * found).sum(axis=1) / np.maximum(1, taken.sum(axis=1))
    return 0.0 if np.ptp(obtained) == 0 else float(spearmanr(wanted, obtained).statistic)
