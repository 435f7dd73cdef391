"""Measures of predictions: R^2 and rank correlations for numbers, balanced accuracy and AUC for labels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.metrics import r2_score, roc_auc_score


def r2(targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]) -> float:
    """Computes the share of the variance of ``targets`` that is predicted; NaN where the targets are constant.

    The variance is that of the test models themselves: 0 is what their own mean reaches, and there is no lower bound.
    """
    return float(r2_score(targets, predictions)) if len(targets) and np.ptp(targets) else float("nan")


def kendall_tau(targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]) -> float:
    """Computes Kendall's tau-b, the rank correlation that allows for ties; NaN where either side is constant."""
    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return float("nan")
    return float(stats.kendalltau(targets, predictions, variant="b").statistic)


def unit_ranks(values: Float[np.ndarray, "values"]) -> Float[np.ndarray, "values"] | None:
    """Ranks values, centred and scaled so that Spearman's correlation is a dot product; None where all are equal."""
    ranks = stats.rankdata(values)
    ranks -= ranks.mean()
    length = np.linalg.norm(ranks)
    return ranks / length if length > 0 else None


def spearman(requested: Float[np.ndarray, "values"], obtained: Float[np.ndarray, "values"]) -> float:
    """Computes Spearman's correlation; NaN if all requested values are equal, 0 if all obtained ones are."""
    ranks, others = unit_ranks(requested), unit_ranks(obtained)
    if ranks is None:
        return float("nan")
    return 0.0 if others is None else float(ranks @ others)


def balanced_accuracy(members: Bool[np.ndarray, "models groups"], hits: Bool[np.ndarray, "models groups"]) -> float:
    """Computes the mean recall of the groups that have a model (Brodersen et al., 2010); NaN where none has.

    The sizes of the groups do not move it: with categories as groups, answering always the same reaches one over their
    number. Groups may overlap, which scikit-learn's metric does not allow.
    """
    present = members.any(axis=0)
    recall = (members & hits).sum(axis=0)[present] / members.sum(axis=0)[present]
    return float(recall.mean()) if len(recall) else float("nan")


def auc(positive: Bool[np.ndarray, "models"], scores: Float[np.ndarray, "models"]) -> float:
    """Computes the area under the ROC curve; NaN where all models are positive, or none."""
    return float(roc_auc_score(positive, scores)) if positive.any() and not positive.all() else float("nan")


def found_correlation(
    wanted: Float[np.ndarray, "queries"],
    found: Float[np.ndarray, "queries models"],
    first: int,
    counts: Int[np.ndarray, "queries models"] | None = None,
) -> float | None:
    """Computes Spearman's correlation between requested results and the mean result of the first models found.

    Args:
        wanted: the requested results.
        found: known results of the models, in the order in which each query finds them.
        first: models whose mean is taken.
        counts: how often each of these models counts, in the same order; once if left out.

    Returns:
        The correlation, 0 if every query finds the same, or None where fewer than two different results are requested
        or known.
    """
    if not wanted.size or not found.size or np.ptp(wanted) == 0 or np.ptp(found) == 0:
        return None
    counts = np.ones(found.shape, dtype=np.int64) if counts is None else counts
    # As many of each model as it counts, until there are ``first``.
    taken = np.clip(first - (np.cumsum(counts, axis=1) - counts), 0, counts)
    return spearman(wanted, (taken * found).sum(axis=1) / np.maximum(1, taken.sum(axis=1)))
