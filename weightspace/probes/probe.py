"""Probes: how much of what is known of a model can be read off a representation of its weights.

The protocol of every table: split by run, representations and standardisation fitted on the training models, what has
to be chosen (ridge penalty, boosting rounds) chosen on the validation models, two measures on the test models with an
interval over resampled runs and split seeds, and both once more on the test models neuron-permuted. Numbers are judged
by R^2 and Kendall's tau, labels by balanced accuracy and the area under the ROC curve (AUC). The estimators are the
same: a label is a column of zeros and ones, whose prediction estimates its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from threadpoolctl import threadpool_limits

from weightspace.errors import SettingsError, ZooError
from weightspace.probes.estimators import ESTIMATORS, STANDARD_ESTIMATORS, ProbeData
from weightspace.probes.representations import Representation
from weightspace.probes.rows import AUC, BALANCED_ACCURACY, R2, TAU, Predictions, ProbeRow, Score
from weightspace.probes.targets import Labels
from weightspace.stats.measures import auc, balanced_accuracy, kendall_tau, r2
from weightspace.stats.resampling import RunBootstrap, pooled_interval
from weightspace.zoo.splits import MIN_RUNS, Split, split_by_dataset, split_by_run

_NAN = float("nan")


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
    columns = {name: _columns(name, target, run_ids) for name, target in targets.items()}
    keys = [(name, one, estimator) for name in targets for one in representations for estimator in chosen[one]]
    results: dict[tuple[str, str, str], list[_Result]] = {key: [] for key in keys}
    unseen: dict[str, int] = {}

    def split_of(rows: Int[np.ndarray, "known"], seed: int) -> Split:
        if datasets is None:
            split = split_by_run(run_ids[rows], seed, test_runs=test_runs)
        else:
            split = split_by_dataset(
                run_ids[rows], datasets[rows], seed, test_datasets=test_datasets, test_runs=test_runs
            )
        return Split(rows[split.train], rows[split.validation], rows[split.test])

    # One BLAS and OpenMP thread gives the same bits on any number of cores; on matrices of this size more threads gain
    # little, and where the cores are busy they wait for each other many times longer than they work.
    with threadpool_limits(1):
        for known, rows in _same_models(columns):
            group = {name: (targets[name], columns[name]) for name in known}
            for seed in seeds:
                split = split_of(rows, seed)
                unseen |= dict.fromkeys(known, 0 if datasets is None else len(set(datasets[split.test])))
                bootstrap = RunBootstrap(run_ids[split.test], np.random.default_rng(seed), replicates)
                for key, result in _results(representations, chosen, group, split, bootstrap, seed):
                    results[key].append(result)
                    if progress:
                        progress(sum(map(len, results.values())), len(keys) * len(seeds))
    return [_row(key, results[key], tuple(seeds), targets[key[0]], columns[key[0]], unseen[key[0]]) for key in keys]


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


def _same_models(columns: Mapping[str, np.ndarray]) -> Iterator[tuple[list[str], Int[np.ndarray, "known"]]]:
    """Groups the targets that are known for the same models, which share splits and decompositions."""
    groups: dict[bytes, list[str]] = {}
    for name, values in columns.items():
        groups.setdefault(np.isfinite(values[:, 0]).tobytes(), []).append(name)
    for names in groups.values():
        yield names, np.flatnonzero(np.isfinite(columns[names[0]][:, 0]))


# --- one probe on one split ------------------------------------------------------------------------------------------


_Metric = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True)
class _Result:
    """One probe, one target, one split; by measure its value, its replicates, and its value on permuted models."""

    measured: Mapping[str, tuple[float, Float[np.ndarray, "replicates"], float]]
    dimensions: int
    notes: tuple[str, ...]
    chance: float
    predictions: Predictions | None


def _results(
    representations: Mapping[str, Representation],
    estimators: Mapping[str, Sequence[str]],
    group: Mapping[str, tuple[Shaped[np.ndarray, "_models"] | Labels, Float[np.ndarray, "models _columns"]]],
    split: Split,
    bootstrap: RunBootstrap,
    seed: int,
) -> Iterator[tuple[tuple[str, str, str], _Result]]:
    """Judges every probe of targets with the same models; keys are (target, representation, estimator)."""
    train, validation, test = split.train, split.validation, split.test
    widths = tuple(columns.shape[1] for _, columns in group.values())
    values = np.hstack([columns for _, columns in group.values()])
    slices = {name: slice(end - width, end) for name, end, width in zip(group, np.cumsum(widths), widths, strict=True)}
    shares = values[train].mean(axis=0)
    for name, (target, _) in group.items():
        exclusive = isinstance(target, Labels) and target.exclusive
        if exclusive and not (values[test, slices[name]] * shares[slices[name]]).any():
            raise ZooError(
                f"target {name!r}: no category of the test models has a training model; choose another target"
            )
    for representation in representations:
        fitted = representations[representation].fit(train)
        data = ProbeData(fitted.features(train), values[train], fitted.features(validation), values[validation], widths)
        seen, moved = fitted.features(test), fitted.permuted_features(test)
        movable = np.isfinite(moved).all(axis=1)
        for estimator in estimators[representation]:
            predict = ESTIMATORS[estimator](data, seed)
            predicted, permuted = predict(seen), np.full((len(test), values.shape[1]), np.nan)
            if movable.any():
                permuted[movable] = predict(moved[movable])
            for name, own in slices.items():
                outcome = Predictions(test, values[test, own], predicted[:, own], permuted[:, own])
                result = _judged(group[name][0], shares[own], outcome, bootstrap, fitted.dimensions)
                yield (name, representation, estimator), result


def _judged(
    target: Shaped[np.ndarray, "_models"] | Labels,
    shares: np.ndarray,
    outcome: Predictions,
    bootstrap: RunBootstrap,
    dimensions: int,
) -> _Result:
    """Applies the metrics of a target, and their resampled versions, to what was predicted."""
    truth, predicted, permuted = outcome.targets, outcome.predicted, outcome.permuted
    moved = np.isfinite(permuted).all(axis=1)
    metrics = _label_metrics(target, shares, bootstrap) if isinstance(target, Labels) else _number_metrics(bootstrap)
    measured = {
        name: (metric(truth, predicted), resampled(truth, predicted), metric(truth[moved], permuted[moved]))
        for name, (metric, resampled) in metrics.items()
    }
    notes, chance, predictions = [], _NAN, None
    if isinstance(target, Labels):
        chance = target.chance(truth)
        notes = [target.note] if target.note else []
        positive = truth == 1
        if not (positive.any(axis=0) & ~positive.all(axis=0)).all():
            notes.append("the AUC leaves out labels that all test models have, or none")
    else:
        predictions = Predictions(outcome.rows, truth[:, 0], predicted[:, 0], permuted[:, 0])
        if np.ptp(truth) == 0:
            notes.append("R2 and tau are undefined where all test targets are equal")
        elif np.ptp(predicted) == 0:
            notes.append("tau is undefined where all predictions are equal")
    if not moved.any():
        notes.append("no neuron permutation of the test models is known")
    elif not moved.all():
        notes.append("permuted columns leave out test models without a known permutation")
    return _Result(measured, dimensions, tuple(notes), chance, predictions)


def _number_metrics(bootstrap: RunBootstrap) -> dict[str, tuple[_Metric, _Metric]]:
    def of_numbers(metric: _Metric) -> _Metric:
        return lambda truth, predicted: metric(truth[:, 0], predicted[:, 0])

    return {
        R2.name: (of_numbers(r2), of_numbers(bootstrap.r2)),
        TAU.name: (of_numbers(kendall_tau), of_numbers(bootstrap.kendall_tau)),
    }


def _label_metrics(labels: Labels, shares: np.ndarray, bootstrap: RunBootstrap) -> dict[str, tuple[_Metric, _Metric]]:
    def of_groups(metric: _Metric) -> _Metric:
        return lambda truth, predicted: metric(labels.members(truth), labels.answers(predicted, shares))

    def of_labels(metric: _Metric) -> _Metric:
        return lambda truth, scores: np.array([metric(truth[:, i] == 1, scores[:, i]) for i in range(truth.shape[1])])

    areas, resampled = of_labels(auc), of_labels(bootstrap.auc)
    return {
        BALANCED_ACCURACY.name: (of_groups(balanced_accuracy), of_groups(bootstrap.balanced_accuracy)),
        AUC.name: (lambda *sides: _mean(areas(*sides)), lambda *sides: _column_means(resampled(*sides))),
    }


def _row(
    key: tuple[str, str, str],
    results: Sequence[_Result],
    seeds: tuple[int, ...],
    target: Shaped[np.ndarray, "_models"] | Labels,
    columns: np.ndarray,
    unseen_datasets: int,
) -> ProbeRow:
    name, representation, estimator = key
    models = int(np.isfinite(columns[:, 0]).sum())
    scores = {}
    for measure in results[0].measured:
        values, replicates, permuted = zip(*(result.measured[measure] for result in results), strict=True)
        scores[measure] = Score(_mean(values), *pooled_interval(replicates), permuted=_mean(permuted))
    return ProbeRow(
        representation=representation,
        estimator=estimator,
        target=name,
        seeds=seeds,
        dimensions=max(result.dimensions for result in results),
        models=models,
        dropped=len(columns) - models,
        scores=scores,
        chance=_mean(result.chance for result in results),
        labels=target.names if isinstance(target, Labels) else (),
        unseen_datasets=unseen_datasets,
        note="; ".join(dict.fromkeys(note for result in results for note in result.notes)),
        predictions=results[0].predictions,
    )


def _mean(numbers: Iterable[float]) -> float:
    defined = [number for number in numbers if math.isfinite(number)]
    return float(np.mean(defined)) if defined else _NAN


def _column_means(rows: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "columns"]:
    """Means of what is defined in each column; NaN where nothing is."""
    means: np.ndarray = np.ma.masked_invalid(rows).mean(axis=0).filled(np.nan)
    return means
