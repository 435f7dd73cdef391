"""What a probe is judged by, and intervals from resampled runs.

R^2 and Kendall's tau judge numbers; balanced accuracy and the area under the ROC curve judge labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

from weightspace.errors import SettingsError, install_command

if TYPE_CHECKING:
    import evaluate

# Bounds one block of the pairwise comparisons behind tau to some tens of MB.
_PAIRS = 2**22


def r2(targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]) -> float:
    """Computes the share of the targets' variance that is predicted: ``1 - sum (y - f)^2 / sum (y - mean(y))^2``.

    The variance is that of ``targets`` as given (the test models), so 0 is what their own mean would reach and a bad
    probe is negative without bound.

    Returns:
        NaN where the targets are constant: the measure is undefined there, and 0 or 1 would be an invention.
    """
    if not len(targets) or np.ptp(targets) == 0:
        return float("nan")
    residual = np.square(targets - predictions).sum()
    return float(1 - residual / np.square(targets - targets.mean()).sum())


def kendall_tau(targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]) -> float:
    """Computes Kendall's tau-b, the rank correlation that allows for ties.

    Returns:
        NaN where targets or predictions are constant: they have no ranks.
    """
    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return float("nan")
    return float(stats.kendalltau(targets, predictions, variant="b").statistic)


def balanced_accuracy(members: Bool[np.ndarray, "models groups"], hits: Bool[np.ndarray, "models groups"]) -> float:
    """Computes the mean, over the groups that have a model, of the share of a group's models that are hits.

    With the models of each category as groups, and the right answers as hits, this is balanced accuracy (Brodersen et
    al., 2010), which the sizes of the categories do not move: answering always the same reaches one over the number of
    categories.
    """
    present = members.any(axis=0)
    recall = (members & hits).sum(axis=0)[present] / members.sum(axis=0)[present]
    return float(recall.mean()) if len(recall) else float("nan")


def auc(positive: Bool[np.ndarray, "models"], scores: Float[np.ndarray, "models"]) -> float:
    """Computes the area under the ROC curve: how often a positive model has the higher score, ties counted half.

    Returns:
        NaN where all models are positive, or none.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


class RunBootstrap:
    """Recomputes a metric on test sets whose *runs* are drawn again with replacement (cluster bootstrap).

    Resampling models would take the checkpoints of one run for independent evidence and give intervals that are too
    narrow. A replicate only needs to know how often each run was drawn: all metrics follow from sums over runs and
    over pairs of runs, so that no replicate is ever materialised.

    Args:
        run_ids: the run of each test model.
        generator: draws the runs.
        replicates: number of resampled test sets.
    """

    def __init__(
        self, run_ids: Shaped[np.ndarray, "models"], generator: np.random.Generator, replicates: int = 1000
    ) -> None:
        """Draws how often each run appears in each replicate."""
        runs, member = np.unique(np.asarray(run_ids).astype(str), return_inverse=True)
        self._order = np.argsort(member, kind="stable")
        self._starts = np.searchsorted(member[self._order], np.arange(len(runs)))
        self._member = np.eye(len(runs))[member]
        drawn = generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=replicates)
        self.counts: Int[np.ndarray, "replicates runs"] = drawn

    def r2(
        self, targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes ``r2`` of every replicate; NaN where a replicate's targets are constant."""
        # Sums of squares about the common mean lose no digits to a far origin.
        y = (targets - targets.mean())[self._order]
        residual = (targets - predictions)[self._order]
        columns = np.stack([np.ones_like(y), y, y**2, residual**2], axis=1)
        models, total, square, error = (self.counts @ np.add.reduceat(columns, self._starts, axis=0)).T
        variance = square - total**2 / models
        # Rounding leaves a replicate of equal targets a variance just off zero.
        defined = variance > 1e-12 * square
        replicates: np.ndarray = 1 - np.divide(error, variance, out=np.full_like(variance, np.nan), where=defined)
        return replicates

    def kendall_tau(
        self, targets: Float[np.ndarray, "models"], predictions: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes ``kendall_tau`` of every replicate, copies of one model tied; NaN where one side is constant."""
        y, f = targets[self._order], predictions[self._order]
        # (3, runs, runs): sums over pairs of models of concordance, of untied targets and of untied predictions
        sums = np.zeros((3, len(self._starts), len(self._starts)))
        step = max(1, _PAIRS // max(1, len(y)))
        member = self._member[self._order]
        for begin in range(0, len(y), step):
            part = slice(begin, begin + step)
            above, ahead = (np.sign(side[part, None] - side).astype(np.int8) for side in (y, f))
            for number, signs in enumerate((above * ahead, np.abs(above), np.abs(ahead))):
                sums[number] += member[part].T @ np.add.reduceat(signs, self._starts, axis=1, dtype=np.int32)
        concordance, untied_y, untied_f = (((self.counts @ total) * self.counts).sum(axis=1) for total in sums)
        scale = np.sqrt(untied_y * untied_f)
        replicates: np.ndarray = np.divide(concordance, scale, out=np.full_like(scale, np.nan), where=scale > 0)
        return replicates

    def balanced_accuracy(
        self, members: Bool[np.ndarray, "models groups"], hits: Bool[np.ndarray, "models groups"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes ``balanced_accuracy`` of every replicate, over the groups that have a model in it."""
        size, right = (self.counts @ (self._member.T @ marks) for marks in (members, members & hits))
        recall = np.divide(right, size, out=np.zeros_like(size), where=size > 0)
        replicates: np.ndarray = recall.sum(axis=1) / (size > 0).sum(axis=1)
        return replicates

    def auc(
        self, positive: Bool[np.ndarray, "models"], scores: Float[np.ndarray, "models"]
    ) -> Float[np.ndarray, "replicates"]:
        """Computes ``auc`` of every replicate; NaN where all its models are positive, or none."""
        own, others = self._member[positive], self._member[~positive]
        step = max(1, _PAIRS // max(1, len(others)))
        lead = np.zeros((own.shape[1], others.shape[1]))
        for begin in range(0, len(own), step):
            part = slice(begin, begin + step)
            lead += own[part].T @ (np.sign(scores[positive][part, None] - scores[~positive]) @ others)
        pairs = (self.counts @ own.sum(axis=0)) * (self.counts @ others.sum(axis=0))
        won = ((self.counts @ lead) * self.counts).sum(axis=1)
        replicates: np.ndarray = np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0) / 2 + 0.5
        return replicates


def interval(replicates: Iterable[Float[np.ndarray, "_replicates"]], level: float = 0.95) -> tuple[float, float]:
    """Computes the percentile interval of the replicates of several splits, pooled.

    Pooling keeps what the split itself changes inside the interval, beside what the draw of test runs changes.

    Returns:
        Lower and upper end; NaN where no replicate is defined.
    """
    pooled = np.concatenate(list(replicates))
    pooled = pooled[np.isfinite(pooled)]
    if not len(pooled):
        return float("nan"), float("nan")
    low, high = np.quantile(pooled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"r2": r2, "kendall_tau": kendall_tau}


def evaluate_metric(name: str) -> evaluate.EvaluationModule:
    """Builds ``"r2"`` or ``"kendall_tau"`` as a metric of the ``evaluate`` library.

    It needs no download (``evaluate.load`` does) and keeps its inputs in memory: ``metric.compute(predictions=...,
    references=...)`` returns ``{name: value}``.

    Raises:
        SettingsError: the name is unknown, or ``evaluate`` is not installed.
    """
    if name not in _METRICS:
        raise SettingsError(f"metric: unknown name {name!r}; known names: {', '.join(_METRICS)}")
    try:
        # Importing evaluate takes seconds, which only its users should pay.
        import datasets
        import evaluate
    except ImportError as error:
        raise SettingsError(
            f"metric {name}: the evaluate library is missing ({error}); {install_command('metrics')}"
        ) from error
    function = _METRICS[name]

    class ProbeMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            number = datasets.Value("float64")
            return evaluate.MetricInfo(
                description=(function.__doc__ or "").strip(),
                citation="",
                features=datasets.Features({"predictions": number, "references": number}),
            )

        def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
            return {name: function(np.asarray(references, dtype=float), np.asarray(predictions, dtype=float))}

    return ProbeMetric(config_name=name, keep_in_memory=True)
