"""Probes: how much of what is known of a model can be read off a representation of its weights.

The protocol of every table: split by run, representations and standardisation fitted on the training models, what has
to be chosen (ridge penalty, boosting rounds) chosen on the validation models, two measures on the test models with an
interval over resampled runs and split seeds, and both once more on the test models neuron-permuted. Numbers are judged
by R^2 and Kendall's tau, labels by balanced accuracy and the area under the ROC curve (AUC). The estimators are the
same: a label is a column of zeros and ones, whose prediction estimates its probability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from weightspace.errors import SettingsError, ZooError
from weightspace.probes.labels import Labels
from weightspace.probes.representations import Representation
from weightspace.stats.measures import auc, balanced_accuracy, kendall_tau, r2
from weightspace.stats.resampling import RunBootstrap, pooled_interval
from weightspace.zoo.splits import MIN_RUNS, Split, split_by_dataset, split_by_run

# Relative to a standardised feature's own variance.
PENALTIES = tuple(float(p) for p in np.logspace(-6, 4, 21))
_CHUNK_ENTRIES = 2**22
_PRINTED_LABELS = 12


# --- estimators ------------------------------------------------------------------------------------------------------


class RidgePath(RegressorMixin, BaseEstimator):
    """Ridge regression in float64 whose penalty is chosen on validation data, one for each target.

    With standardised features ``Z`` and centred targets ``y`` of ``n`` models, the coefficients minimise
    ``|y - Z c|^2 / n + penalty * |c|^2`` (Hoerl and Kennard, 1970). One eigendecomposition of ``Z^T Z / n``, or of
    ``Z Z^T / n`` where that is smaller, gives the coefficients of all penalties and targets. Constant features get
    coefficient zero. Features of new models are clipped to the range of the training models: a straight line says
    nothing beyond it, and one diverged model would otherwise outweigh a whole test set.

    Args:
        penalties: positive numbers to choose from.

    Attributes:
        penalty_: the chosen penalty; an array with one a target where ``y`` has two axes.
        coef_: coefficients of the standardised features, ``(features)`` or ``(targets, features)``.
        intercept_: mean of the training targets, a number or ``(targets)``.
    """

    def __init__(self, penalties: Any = PENALTIES) -> None:
        """Remembers the penalties."""
        self.penalties = penalties

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> RidgePath:  # noqa: N803
        """Fits the path on ``X, y`` and keeps the penalty with the least squared error on ``X_val, y_val``.

        Without validation data the penalty comes from generalised cross-validation (Golub et al., 1979).
        """
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), multi_output=True, y_numeric=True)  # noqa: N806
        targets = np.asarray(y, dtype=np.float64).reshape(len(X), -1)
        self._standardise(X)
        centre = targets.mean(axis=0)
        eigenvalues, basis, projected = self._decompose(X, targets - centre)
        penalties = np.asarray(self.penalties, dtype=np.float64)
        shrunk = projected / (eigenvalues[:, None] + penalties[:, None, None])  # (penalties, rank, targets)
        if X_val is None:
            freedom = (eigenvalues / (eigenvalues + penalties[:, None])).sum(axis=1) + 1
            error = self._errors(X, targets - centre, basis, shrunk)
            error = error / np.maximum(1 - freedom / len(X), 1e-9)[:, None] ** 2
        else:
            X_val = validate_data(self, X_val, dtype=(np.float64, np.float32), reset=False)  # noqa: N806
            held = np.asarray(y_val, dtype=np.float64).reshape(len(X_val), -1)
            error = self._errors(X_val, held - centre, basis, shrunk)
        best = error.argmin(axis=0)
        coefficients = (basis @ shrunk[best, :, np.arange(targets.shape[1])].T).T
        single = y.ndim == 1
        self.penalty_ = penalties[best[0]] if single else penalties[best]
        self.coef_ = coefficients[0] if single else coefficients
        self.intercept_ = centre[0] if single else centre
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Predicts ``(models)`` or ``(models, targets)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)  # noqa: N806
        predicted: np.ndarray = (
            np.concatenate([part @ self.coef_.T for part in self._standardised(X)]) + self.intercept_
        )
        return predicted

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _standardise(self, X: np.ndarray) -> None:  # noqa: N803
        self._low, self._high = X.min(axis=0), X.max(axis=0)
        self._mean = X.mean(axis=0, dtype=np.float64)
        self._inverse_scale = np.ones(X.shape[1])
        variance = sum(np.square(part).sum(axis=0) for part in self._standardised(X)) / len(X)
        # Rounding gives a constant feature a standard deviation just off zero.
        floor = 10 * np.finfo(X.dtype).eps * np.maximum(np.abs(self._low), np.abs(self._high))
        scale = np.sqrt(variance)
        self._inverse_scale = np.divide(1, scale, out=np.zeros_like(scale), where=scale > floor)

    def _standardised(self, X: np.ndarray) -> Iterator[Float[np.ndarray, "chunk features"]]:  # noqa: N803
        step = max(1, _CHUNK_ENTRIES // X.shape[1])
        for begin in range(0, len(X), step):
            part = np.clip(X[begin : begin + step], self._low, self._high).astype(np.float64)
            yield (part - self._mean) * self._inverse_scale

    def _decompose(self, X: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # noqa: N803
        """Returns eigenvalues, basis and projection: the coefficients are ``basis @ (projection / (values + p))``."""
        models, features = X.shape
        if features <= models:
            gram, against = np.zeros((features, features)), np.zeros((features, targets.shape[1]))
            begin = 0
            for part in self._standardised(X):
                gram += part.T @ part
                against += part.T @ targets[begin : begin + len(part)]
                begin += len(part)
            values, vectors = np.linalg.eigh(gram / models)
            return np.maximum(values, 0), vectors, vectors.T @ against / models
        whole = np.concatenate(list(self._standardised(X)))
        values, vectors = np.linalg.eigh(whole @ whole.T / models)
        return np.maximum(values, 0), whole.T @ vectors, vectors.T @ targets / models

    def _errors(self, X: np.ndarray, targets: np.ndarray, basis: np.ndarray, shrunk: np.ndarray) -> np.ndarray:  # noqa: N803
        codes = np.concatenate([part @ basis for part in self._standardised(X)])
        return np.stack([np.square(targets - codes @ one).mean(axis=0) for one in shrunk])


@dataclass(frozen=True)
class ProbeData:
    """What an estimator is fitted on: ``widths`` are the columns of each target, one each if there are none."""

    features: Float[np.ndarray, "train features"]
    targets: Float[np.ndarray, "train targets"]
    validation_features: Float[np.ndarray, "validation features"]
    validation_targets: Float[np.ndarray, "validation targets"]
    widths: tuple[int, ...] = ()


Predictor = Callable[[Float[np.ndarray, "models features"]], Float[np.ndarray, "models targets"]]


def _ridge(data: ProbeData, seed: int) -> Predictor:
    fitted = RidgePath().fit(data.features, data.targets, data.validation_features, data.validation_targets)
    return fitted.predict


def _boosting(data: ProbeData, seed: int) -> Predictor:
    def fit(target: int) -> HistGradientBoostingRegressor:
        estimator = HistGradientBoostingRegressor(
            max_iter=200,
            learning_rate=0.1,
            max_leaf_nodes=15,
            early_stopping=True,
            n_iter_no_change=10,
            random_state=seed,
        )
        return estimator.fit(
            data.features,
            data.targets[:, target],
            X_val=data.validation_features,
            y_val=data.validation_targets[:, target],
        )

    fitted = [fit(target) for target in range(data.targets.shape[1])]
    return lambda features: np.stack([estimator.predict(features) for estimator in fitted], axis=1)


def _extra_trees(data: ProbeData, seed: int) -> Predictor:
    def fit(columns: Float[np.ndarray, "train columns"]) -> ExtraTreesRegressor:
        estimator = ExtraTreesRegressor(100, max_features=0.33, min_samples_leaf=3, n_jobs=-1, random_state=seed)
        estimator.fit(data.features, columns if columns.shape[1] > 1 else columns[:, 0])
        # Threads add up the trees in any order, which changes the last bits of a prediction from call to call.
        return estimator.set_params(n_jobs=1)

    ends = np.cumsum(data.widths or (1,) * data.targets.shape[1])
    fitted = [fit(columns) for columns in np.split(data.targets, ends[:-1], axis=1)]
    return lambda features: np.hstack([estimator.predict(features).reshape(len(features), -1) for estimator in fitted])


ESTIMATORS: dict[str, Callable[[ProbeData, int], Predictor]] = {
    "ridge": _ridge,
    "boosting": _boosting,
    "extra-trees": _extra_trees,
}
# Trees on raw weights or linear codes cost most and say least, so these get ridge alone.
STANDARD_ESTIMATORS: dict[str, tuple[str, ...]] = {
    "s(W)": ("ridge", "boosting"),
    "s(W)+invariants": ("ridge", "extra-trees"),
    "autoencoder": ("ridge", "boosting", "extra-trees"),
    "joint": ("ridge", "boosting", "extra-trees"),
}


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What one probe predicted for the test models of one split.

    Attributes:
        rows: which models these are.
        targets: what is true of them.
        predicted: what the probe says.
        permuted: what it says of the same models neuron-permuted; NaN where no symmetry is known.
    """

    rows: Int[np.ndarray, "test"]
    targets: Float[np.ndarray, "test"]
    predicted: Float[np.ndarray, "test"]
    permuted: Float[np.ndarray, "test"]


_NAN = float("nan")


@dataclass(frozen=True)
class ProbeRow:
    """One line of the probe table: means over the split seeds, with 95 % intervals of resampled test runs.

    Numbers have ``r2`` and ``kendall_tau``, labels ``balanced_accuracy`` and ``auc``; the others are NaN.

    Attributes:
        representation: name of what the probe looked at.
        estimator: name of the probe.
        target: what it predicts.
        seeds: split seeds.
        dimensions: numbers that describe one model.
        models: models that have the target.
        dropped: models that were left out because their target is missing, NaN or Inf.
        r2: share of the test targets' variance that is predicted; NaN where it is undefined, see ``note``.
        r2_low: lower end of its interval (pooled over the seeds).
        r2_high: upper end.
        kendall_tau: rank correlation tau-b; NaN where it is undefined.
        tau_low: lower end of its interval.
        tau_high: upper end.
        permuted_r2: ``r2`` of the same probe on the same test models neuron-permuted; NaN where no symmetry is known.
        permuted_tau: ``kendall_tau`` of the same.
        balanced_accuracy: share of right answers, each category weighing the same; for labels that do not exclude each
            other the mean over labels of the right answers among models with and among models without it.
        balanced_accuracy_low: lower end of its interval.
        balanced_accuracy_high: upper end.
        auc: how often a model with a label has the higher prediction than one without; mean over labels.
        auc_low: lower end of its interval.
        auc_high: upper end.
        permuted_balanced_accuracy: ``balanced_accuracy`` on the same test models neuron-permuted.
        permuted_auc: ``auc`` of the same.
        chance: balanced accuracy of always the same answer; that of the AUC is one half.
        labels: names of the labels; none for numbers.
        unseen_datasets: datasets of the test models, which no training model has; 0 if the split is not by dataset.
        note: what a reader of the numbers has to know, parted by semicolons, or empty.
        predictions: of the first seed, for numbers.
    """

    representation: str
    estimator: str
    target: str
    seeds: tuple[int, ...]
    dimensions: int
    models: int
    dropped: int = 0
    r2: float = _NAN
    r2_low: float = _NAN
    r2_high: float = _NAN
    kendall_tau: float = _NAN
    tau_low: float = _NAN
    tau_high: float = _NAN
    permuted_r2: float = _NAN
    permuted_tau: float = _NAN
    balanced_accuracy: float = _NAN
    balanced_accuracy_low: float = _NAN
    balanced_accuracy_high: float = _NAN
    auc: float = _NAN
    auc_low: float = _NAN
    auc_high: float = _NAN
    permuted_balanced_accuracy: float = _NAN
    permuted_auc: float = _NAN
    chance: float = _NAN
    labels: tuple[str, ...] = ()
    unseen_datasets: int = 0
    note: str = ""
    predictions: Predictions | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class _Measure:
    """One measure of one probe on one split."""

    value: float
    replicates: Float[np.ndarray, "replicates"]
    permuted: float


@dataclass(frozen=True)
class _Score:
    """One probe, one target, one split; measures by the names of their fields in a row."""

    measures: Mapping[str, _Measure]
    dimensions: int
    chance: float = _NAN
    notes: tuple[str, ...] = ()
    predictions: Predictions | None = None


def probe_table(
    representations: Mapping[str, Representation],
    targets: Mapping[str, Shaped[np.ndarray, "_models"] | Labels],
    run_ids: Shaped[np.ndarray, "models"],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    estimators: Mapping[str, Sequence[str]] | None = None,
    test_runs: Collection[str] | None = None,
    datasets: Shaped[np.ndarray, "models"] | None = None,
    test_datasets: Collection[str] | None = None,
    replicates: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> list[ProbeRow]:
    """Probes every representation for every target.

    Args:
        representations: by the name that the table prints.
        targets: numbers or labels to predict; models whose number is NaN or Inf, or whose labels are not known, are
            left out for this target, and counted.
        run_ids: the run of each model; splits never tear a run apart.
        seeds: one split each.
        estimators: names of ``ESTIMATORS`` by representation, ridge where none are given; ``STANDARD_ESTIMATORS`` if
            None.
        test_runs: runs to test on at every seed, e.g. those that an encoder never saw; drawn by the seed if None.
        datasets: of the models, to test on those of datasets that no training model has; see `split_by_dataset`.
        test_datasets: these datasets; drawn by the seed if None.
        replicates: resampled test sets an interval.
        progress: called with (done, total) after each scored probe.

    Returns:
        One row for each target, representation and estimator, in the order given.

    Raises:
        ZooError: fewer than ten runs have a target, lengths differ, or no category of a test model is among those of
            the training models.
        SettingsError: an estimator or representation is unknown, or there are no seeds.
    """
    chosen = _chosen_estimators(representations, estimators)
    if not seeds:
        raise SettingsError("seeds: none given; name at least one split seed, three for a table")
    run_ids = np.asarray(run_ids).astype(str)
    labels = {name: target for name, target in targets.items() if isinstance(target, Labels)}
    values = {name: _columns(name, target, run_ids) for name, target in targets.items()}
    total, done = len(targets) * len(seeds) * sum(map(len, chosen.values())), 0
    scores: dict[tuple[str, str, str], list[_Score]] = {}
    unseen: dict[str, int] = {}
    # One BLAS and OpenMP thread gives the same bits on any number of cores; on matrices of this size more threads gain
    # little, and where the cores are busy they wait for each other many times longer than they work.
    with threadpool_limits(1):
        for known, rows in _same_models(values):
            for seed in seeds:
                if datasets is None:
                    split = split_by_run(run_ids[rows], seed, test_runs=test_runs)
                else:
                    split = split_by_dataset(
                        run_ids[rows], datasets[rows], seed, test_datasets=test_datasets, test_runs=test_runs
                    )
                    unseen |= dict.fromkeys(known, len(set(datasets[rows][split.test])))
                split = Split(rows[split.train], rows[split.validation], rows[split.test])
                bootstrap = RunBootstrap(run_ids[split.test], np.random.default_rng(seed), replicates)
                for key, score in _scores(representations, chosen, known, labels, split, bootstrap, seed=seed):
                    scores.setdefault(key, []).append(score)
                    done += 1
                    if progress:
                        progress(done, total)
    return [
        _row(
            (name, representation, estimator),
            scores[name, representation, estimator],
            tuple(seeds),
            values[name],
            labels.get(name),
            unseen.get(name, 0),
        )
        for name in targets
        for representation in representations
        for estimator in chosen[representation]
    ]


def _scores(
    representations: Mapping[str, Representation],
    estimators: Mapping[str, Sequence[str]],
    values: Mapping[str, np.ndarray],
    labels: Mapping[str, Labels],
    split: Split,
    bootstrap: RunBootstrap,
    *,
    seed: int,
) -> Iterator[tuple[tuple[str, str, str], _Score]]:
    """Scores everything on one split; keys are (target, representation, estimator)."""
    targets, widths = np.hstack(list(values.values())), tuple(column.shape[1] for column in values.values())
    places = {name: slice(end - width, end) for name, end, width in zip(values, np.cumsum(widths), widths, strict=True)}
    train, validation, test = split.train, split.validation, split.test
    shares = targets[train].mean(axis=0)
    for name in set(labels) & set(values):
        if labels[name].exclusive and not (targets[test, places[name]] * shares[places[name]]).any():
            raise ZooError(
                f"target {name!r}: no category of the test models has a training model; choose another target"
            )
    for representation in representations:
        fitted = representations[representation].fit(train)
        data = ProbeData(
            fitted.features(train), targets[train], fitted.features(validation), targets[validation], widths
        )
        seen, moved = fitted.features(test), fitted.permuted_features(test)
        movable = np.isfinite(moved).all(axis=1)
        for estimator in estimators[representation]:
            predict = ESTIMATORS[estimator](data, seed)
            predicted, permuted = predict(seen), np.full((len(test), targets.shape[1]), np.nan)
            if movable.any():
                permuted[movable] = predict(moved[movable])
            for name, place in places.items():
                outcome = targets[test, place], predicted[:, place], permuted[:, place]
                if name in labels:
                    score = _label_score(labels[name], shares[place], *outcome, bootstrap, fitted.dimensions)
                else:
                    score = _number_score(
                        Predictions(test, *(one[:, 0] for one in outcome)), bootstrap, fitted.dimensions
                    )
                yield (name, representation, estimator), score


def _chosen_estimators(
    representations: Mapping[str, Representation], estimators: Mapping[str, Sequence[str]] | None
) -> dict[str, Sequence[str]]:
    for name, wanted in (estimators or {}).items():
        if name not in representations:
            known = ", ".join(representations)
            raise SettingsError(f"estimators: {name!r} is no representation of this table; known: {known}")
        for estimator in wanted:
            if estimator not in ESTIMATORS:
                raise SettingsError(f"estimators: unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    source = STANDARD_ESTIMATORS if estimators is None else estimators
    return {name: source.get(name, ("ridge",)) for name in representations}


def _columns(name: str, target: Any, run_ids: np.ndarray) -> Float[np.ndarray, "models columns"]:
    given, tail = (target.values, (len(target.names),)) if isinstance(target, Labels) else (target, ())
    try:
        columns = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ZooError(f"target {name!r}: not a column of numbers; choose a numeric result, or give Labels") from None
    if columns.shape != (len(run_ids), *tail):
        raise ZooError(f"target {name!r}: shape {columns.shape} for {len(run_ids)} models; give one number a model")
    columns = columns.reshape(len(run_ids), -1)
    columns[~np.isfinite(columns).all(axis=1)] = np.nan
    runs = len(np.unique(run_ids[np.isfinite(columns[:, 0])]))
    if runs < MIN_RUNS:
        raise ZooError(
            f"target {name!r}: known for {runs} runs, too few to probe; add models of at least {MIN_RUNS} runs, or "
            "choose another target"
        )
    return columns


def _same_models(values: Mapping[str, np.ndarray]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Groups the targets that are known for the same models, which share splits and decompositions."""
    groups: dict[bytes, dict[str, np.ndarray]] = {}
    for name, columns in values.items():
        groups.setdefault(np.isfinite(columns[:, 0]).tobytes(), {})[name] = columns
    for known in groups.values():
        yield known, np.flatnonzero(np.isfinite(next(iter(known.values()))[:, 0]))


def _number_score(outcome: Predictions, bootstrap: RunBootstrap, dimensions: int) -> _Score:
    truth, predicted = outcome.targets, outcome.predicted
    moved = np.isfinite(outcome.permuted)
    notes = []
    if np.ptp(truth) == 0:
        notes.append("R2 and tau are undefined where all test targets are equal")
    elif np.ptp(predicted) == 0:
        notes.append("tau is undefined where all predictions are equal")
    told = truth[moved], outcome.permuted[moved]
    measures = {
        "r2": _Measure(r2(truth, predicted), bootstrap.r2(truth, predicted), r2(*told)),
        "kendall_tau": _Measure(
            kendall_tau(truth, predicted), bootstrap.kendall_tau(truth, predicted), kendall_tau(*told)
        ),
    }
    return _Score(measures, dimensions, notes=(*notes, *_permutation_notes(moved)), predictions=outcome)


def _label_score(
    labels: Labels,
    shares: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    permuted: np.ndarray,
    bootstrap: RunBootstrap,
    dimensions: int,
) -> _Score:
    moved = np.isfinite(permuted).all(axis=1)
    members, columns = labels.members(truth), range(truth.shape[1])
    hits, moved_hits = labels.answers(predicted, shares), labels.answers(permuted[moved], shares)
    areas = [auc(truth[:, i] == 1, predicted[:, i]) for i in columns]
    moved_areas = [auc(truth[moved, i] == 1, permuted[moved, i]) for i in columns]
    replicates = np.stack([bootstrap.auc(truth[:, i] == 1, predicted[:, i]) for i in columns])
    measures = {
        "balanced_accuracy": _Measure(
            balanced_accuracy(members, hits),
            bootstrap.balanced_accuracy(members, hits),
            balanced_accuracy(members[moved], moved_hits),
        ),
        "auc": _Measure(_mean(areas), _column_means(replicates), _mean(moved_areas)),
    }
    notes = [labels.note] if labels.note else []
    if not all(map(math.isfinite, areas)):
        notes.append("the AUC leaves out labels that all test models have, or none")
    return _Score(measures, dimensions, labels.chance(truth), (*notes, *_permutation_notes(moved)))


def _permutation_notes(moved: np.ndarray) -> list[str]:
    if not moved.any():
        return ["no neuron permutation of the test models is known"]
    return [] if moved.all() else ["permuted columns leave out test models without a known permutation"]


def _row(
    key: tuple[str, str, str],
    scores: list[_Score],
    seeds: tuple[int, ...],
    columns: np.ndarray,
    labels: Labels | None,
    unseen_datasets: int,
) -> ProbeRow:
    target, representation, estimator = key
    models = int(np.isfinite(columns[:, 0]).sum())
    measured: dict[str, float] = {}
    for name in scores[0].measures:
        same, short = [score.measures[name] for score in scores], name.removeprefix("kendall_")
        measured[name] = _mean(measure.value for measure in same)
        measured[f"{short}_low"], measured[f"{short}_high"] = pooled_interval(measure.replicates for measure in same)
        measured[f"permuted_{short}"] = _mean(measure.permuted for measure in same)
    return ProbeRow(
        representation=representation,
        estimator=estimator,
        target=target,
        seeds=seeds,
        dimensions=max(score.dimensions for score in scores),
        models=models,
        dropped=len(columns) - models,
        chance=_mean(score.chance for score in scores),
        labels=() if labels is None else labels.names,
        unseen_datasets=unseen_datasets,
        note="; ".join(dict.fromkeys(note for score in scores for note in score.notes)),
        predictions=scores[0].predictions,
        **measured,
    )


def _mean(numbers: Iterable[float]) -> float:
    defined = [number for number in numbers if math.isfinite(number)]
    return float(np.mean(defined)) if defined else _NAN


def _column_means(rows: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "columns"]:
    """Means of what is defined in each column; NaN where nothing is."""
    defined = np.isfinite(rows)
    count = defined.sum(axis=0)
    means: np.ndarray = np.divide(
        np.where(defined, rows, 0).sum(axis=0), count, out=np.full(len(count), np.nan), where=count > 0
    )
    return means


# --- printing --------------------------------------------------------------------------------------------------------


def rows_to_records(rows: Sequence[ProbeRow]) -> list[dict[str, Any]]:
    """Builds one JSON-ready mapping a row: NaN becomes None, predictions are left out."""
    names = [f.name for f in dataclasses.fields(ProbeRow) if f.name != "predictions"]
    return [{name: _plain(getattr(row, name)) for name in names} for row in rows]


def format_table(rows: Sequence[ProbeRow]) -> str:
    """Formats the rows for a terminal, one table a target, notes below.

    Each cell reads ``mean [low, high]``; the last two columns are the means on neuron-permuted test models.
    """
    tables = []
    for target in dict.fromkeys(row.target for row in rows):
        same = [row for row in rows if row.target == target]
        measures = ("balanced accuracy", "AUC") if same[0].labels else ("R2", "tau")
        intervals, permuted = (f"{name} [95 %]" for name in measures), (f"{name} permuted" for name in measures)
        head = ("representation", "estimator", "dims", *intervals, *permuted)
        cells = [(row.representation, row.estimator, str(row.dimensions), *_measured(row)) for row in same]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [_heading(same[0])]
        for line in (head, *cells):
            aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  " + "  ".join(aligned).rstrip())
        for note, where in _notes(same).items():
            lines.append(f"  note: {note} ({where})")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _heading(row: ProbeRow) -> str:
    dropped = f", {row.dropped} left out without it" if row.dropped else ""
    unseen = f", tested on {row.unseen_datasets} unseen datasets" if row.unseen_datasets else ""
    text = f"{row.target}: {row.models} models{dropped}{unseen}, split seeds {', '.join(map(str, row.seeds))}"
    if not row.labels:
        return text
    more = ", ..." if len(row.labels) > _PRINTED_LABELS else ""
    names = ", ".join(row.labels[:_PRINTED_LABELS])
    return f"{text}; {len(row.labels)} labels ({names}{more}), chance {_number(row.chance)}, AUC 0.500"


def _measured(row: ProbeRow) -> tuple[str, str, str, str]:
    if row.labels:
        return (
            _with_interval(row.balanced_accuracy, row.balanced_accuracy_low, row.balanced_accuracy_high),
            _with_interval(row.auc, row.auc_low, row.auc_high),
            _number(row.permuted_balanced_accuracy),
            _number(row.permuted_auc),
        )
    return (
        _with_interval(row.r2, row.r2_low, row.r2_high),
        _with_interval(row.kendall_tau, row.tau_low, row.tau_high),
        _number(row.permuted_r2),
        _number(row.permuted_tau),
    )


def _notes(rows: Sequence[ProbeRow]) -> dict[str, str]:
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            by_note.setdefault(note, []).append(f"{row.representation}, {row.estimator}")
    return {note: "all" if len(where) == len(rows) else "; ".join(where) for note, where in by_note.items()}


def _with_interval(value: float, low: float, high: float) -> str:
    return _number(value) if math.isnan(value) else f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    # A raw-weight probe can be off by powers of ten; a column of zeros behind the point helps nobody then.
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value
