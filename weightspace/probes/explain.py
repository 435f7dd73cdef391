"""The two questions about a zoo: do models of similar datasets cluster, and what determines the weights most?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from weightspace.errors import ZooError
from weightspace.probes.runs import MIN_RUNS, RunTable
from weightspace.stats.clustering import clustering
from weightspace.stats.geometry import (
    MIN_DATASETS,
    Geometry,
    characteristic_dissimilarities,
    feature_dissimilarity,
    known_geometry,
    representational_similarity,
    weight_geometry,
)
from weightspace.stats.resampling import Estimate
from weightspace.stats.variance import JOINT, VarianceShare, variance_shares

ALL = "all"
ACROSS = "across"
FEATURES = "features"

_MAX_ARCHITECTURES = 6
_TAIL = 1.0


@dataclass(frozen=True, eq=False)
class Description:
    """A description of the runs: an encoder's embedding, or a baseline.

    Attributes:
        name: as tables show it.
        values: one row a run, in the order of the run table.
        comparable: whether the columns mean the same for all architectures.
    """

    name: str
    values: Float[np.ndarray, "runs dims"]
    comparable: bool = True


@dataclass(frozen=True)
class ClusterRow:
    """How far runs of one label stand together.

    Attributes:
        description: name of the description.
        models: name of the architecture; ``"across"`` for pairs of runs of different architectures.
        label: ``"dataset"`` or a data characteristic.
        groups: number of labels.
        runs: number of runs.
        measure: ``"silhouette"``, ``"adjusted Rand index"`` or ``"nearest neighbour"``.
        estimate: the measure.
    """

    description: str
    models: str
    label: str
    groups: int
    runs: int
    measure: str
    estimate: Estimate


@dataclass(frozen=True)
class GeometryRow:
    """Spearman's correlation of the dissimilarities of datasets in two descriptions.

    Attributes:
        description: name of the weights' description.
        models: name of the architecture whose weights are compared.
        other: what they are compared with: a characteristic of the dataset ids, ``"characteristics"`` for all of them,
            ``"features"``, or the weights of another architecture, by its name.
        datasets: number of datasets.
        estimate: the correlation.
    """

    description: str
    models: str
    other: str
    datasets: int
    estimate: Estimate


@dataclass(frozen=True)
class VarianceRow:
    """The share that something has in the variance of the runs' description.

    Attributes:
        description: name of the description.
        models: name of the architecture, or ``"all"``.
        runs: number of runs.
        share: the share.
    """

    description: str
    models: str
    runs: int
    share: VarianceShare


@dataclass(frozen=True)
class Explanation:
    """Answers to the two questions.

    Attributes:
        clusters: do runs of one dataset cluster?
        geometry: are runs of similar datasets similar?
        variance: what determines the weights?
        notes: what was left out or cannot be answered, and why, one sentence each.
    """

    clusters: tuple[ClusterRow, ...]
    geometry: tuple[GeometryRow, ...]
    variance: tuple[VarianceRow, ...]
    notes: tuple[str, ...]


def explain(
    table: RunTable,
    descriptions: Sequence[Description],
    *,
    features: Mapping[str, np.ndarray] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Explanation:
    """Answers both questions for each description of a zoo's runs.

    Columns are drawn in to their 1st and 99th percentile and standardised, for each architecture by itself unless
    architectures are compared. They are not whitened: that would lift directions in which models hardly differ to the
    rank of those in which they do. Clustering compares directions (cosine), the other two use the columns as they are.

    Args:
        table: the runs.
        descriptions: matrices with a row a run; each is judged by itself.
        features: one vector a dataset id, e.g. of a frozen image encoder, to compare the weights' geometry with.
        draws: permutations and bootstrap replicates of each number.
        seed: draws them.

    Raises:
        ZooError: there are too few runs for either question, or features do not fit each other.
    """
    if len(table) < MIN_RUNS:
        raise ZooError(f"{len(table)} runs with all factors known are too few; give a zoo of {MIN_RUNS} or more")
    clusters: list[ClusterRow] = []
    geometry: list[GeometryRow] = []
    variance: list[VarianceRow] = []
    notes = list(table.notes)
    if not any(table.datasets):
        notes.append("Whether models of similar datasets cluster cannot be said: no run names its dataset.")
    for description in descriptions:
        generator = np.random.default_rng(seed)
        scopes = _scopes(table, description, notes)
        judged = [*scopes, _pooled(scopes, table)] if len(scopes) > 1 and description.comparable else scopes
        if len(scopes) > 1 and not description.comparable:
            notes.append(
                f"{description.name}: its columns differ between architectures, which cannot be compared in it."
            )
        with threadpool_limits(1):  # thousands of small products: threads would mostly wait for each other
            for scope in judged:
                variance += _variance_rows(description.name, scope, generator, draws, notes)
            if any(table.datasets):
                for scope in judged:
                    clusters += _cluster_rows(description.name, scope, generator, draws, notes)
                geometry += _geometry_rows(description.name, scopes, features, generator, draws, notes)
    return Explanation(tuple(clusters), tuple(geometry), tuple(variance), tuple(dict.fromkeys(notes)))


@dataclass(frozen=True, eq=False)
class _Scope:
    """Runs that are judged together.

    Attributes:
        name: of their architecture, or ``"all"``.
        table: the runs.
        raw: their description.
        values: the same with standardised columns, for each architecture by itself.
    """

    name: str
    table: RunTable
    raw: Float[np.ndarray, "runs dims"]
    values: Float[np.ndarray, "runs dims"]


def _scopes(table: RunTable, description: Description, notes: list[str]) -> list[_Scope]:
    """One scope an architecture, the ones with most runs first."""
    raw = np.asarray(description.values, dtype=np.float64)
    finite = np.isfinite(raw).all(axis=1)
    if not finite.all():
        notes.append(
            f"{description.name}: {int((~finite).sum()):,} runs are left out, as their numbers are not finite."
        )
    names = np.array(table.architectures, dtype=object)
    counts = Counter(names[finite]).most_common()
    chosen = [name for name, count in counts if count >= MIN_RUNS][:_MAX_ARCHITECTURES]
    if len(chosen) < len(counts):
        runs = sum(count for name, count in counts if name not in chosen)
        notes.append(
            f"{len(counts) - len(chosen):,} architectures with {runs:,} runs are left out: "
            f"at most {_MAX_ARCHITECTURES} of {MIN_RUNS} runs or more are judged."
        )
    members = {name: finite & (names == name) for name in chosen}
    return [_Scope(name, table.where(own), raw[own], standardised(raw[own])) for name, own in members.items()]


def _pooled(scopes: Sequence[_Scope], table: RunTable) -> _Scope:
    """Runs of all scopes, in the order of the whole table."""
    order = np.argsort(np.concatenate([scope.table.rows for scope in scopes]))
    raw, values = (np.concatenate(parts)[order] for parts in ([s.raw for s in scopes], [s.values for s in scopes]))
    kept = np.isin(table.rows, np.concatenate([scope.table.rows for scope in scopes]))
    return _Scope(ALL, table.where(kept), raw, values)


def standardised(values: Float[np.ndarray, "runs dims"]) -> Float[np.ndarray, "runs dims"]:
    """Draws columns in to their 1st and 99th percentile and gives them mean 0 and variance 1; constant ones are 0.

    At least the lowest and the highest run are drawn in: one that diverged must not be the variance of a column.
    """
    low = np.percentile(values, _TAIL, axis=0, method="higher")
    high = np.percentile(values, 100 - _TAIL, axis=0, method="lower")
    drawn_in = np.clip(values, low, high)
    centred = drawn_in - drawn_in.mean(axis=0)
    spread = centred.std(axis=0)
    varied = spread > 1e-9 * np.abs(drawn_in).max(axis=0)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=varied)


# --- do models of similar datasets cluster? --------------------------------------------------------------------------


def _cluster_rows(
    description: str, scope: _Scope, generator: np.random.Generator, draws: int, notes: list[str]
) -> list[ClusterRow]:
    if not scope.values.any():
        notes.append(f"Whether models cluster in {scope.name} cannot be said: all are described by the same numbers.")
        return []
    lengths = np.linalg.norm(scope.values, axis=1, keepdims=True)
    units = scope.values / np.where(lengths > 0, lengths, 1)
    rows = []
    blocks = pd.factorize(np.array(scope.table.architectures))[0] if scope.name == ALL else None
    for label, codes in _labels(scope.table).items():
        kept = _shared(codes, blocks)
        groups, codes = np.unique(codes[kept], return_inverse=True)
        if len(groups) < 2 or len(codes) < MIN_RUNS:
            where = "in two architectures" if blocks is not None else f"in {scope.name}"
            notes.append(f"Whether runs of one {label} cluster {where} cannot be said: too few runs share one.")
            continue
        found = clustering(units[kept], codes, None if blocks is None else blocks[kept], generator, draws)
        models = ACROSS if blocks is not None else scope.name
        rows += [ClusterRow(description, models, label, len(groups), len(codes), *pair) for pair in found.items()]
    return rows


def _labels(table: RunTable) -> dict[str, np.ndarray]:
    """Labels that models may cluster by: the dataset, -1 where it is not known, and what its id says."""
    datasets = pd.factorize(np.array(table.datasets, dtype=object))[0]
    # A characteristic that is different for every dataset says the same once more.
    named = [one for one in table.factors if one.in_dataset and len(one.levels) <= datasets.max()]
    return {"dataset": datasets, **{one.name: one.codes for one in named}}


def _shared(codes: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
    """Which runs have a known label that another run, in another block where there are blocks, has too."""
    own = pd.Series(np.arange(len(codes)) if blocks is None else blocks)
    return (codes >= 0) & (own.groupby(codes).transform("nunique") > 1).to_numpy()


# --- are models of similar datasets similar? -------------------------------------------------------------------------


def _geometry_rows(
    description: str,
    scopes: Sequence[_Scope],
    features: Mapping[str, np.ndarray] | None,
    generator: np.random.Generator,
    draws: int,
    notes: list[str],
) -> list[GeometryRow]:
    rows = []
    for one, other, datasets, geometry in _comparisons(scopes, features, notes):
        found = representational_similarity(_weights(one, datasets), geometry, generator, draws)
        if found is None:
            notes.append(f"The weights of {one.name} have no order to compare with {other}: all pairs are equally far.")
        else:
            rows.append(GeometryRow(description, one.name, other, len(datasets), found))
    return rows


def _comparisons(
    scopes: Sequence[_Scope], features: Mapping[str, np.ndarray] | None, notes: list[str]
) -> Iterator[tuple[_Scope, str, list[str], Geometry]]:
    """Yields weights, the name of what they are compared with, the datasets, and their geometry."""
    for scope in scopes:
        datasets = _repeated(scope, notes)
        if len(datasets) >= MIN_DATASETS:
            for name, values in _references(datasets, features).items():
                yield scope, name, datasets, known_geometry(values)
    for one, other in combinations(scopes, 2):
        datasets = [dataset for dataset in _repeated(one, notes) if dataset in _repeated(other, notes)]
        if len(datasets) >= MIN_DATASETS:
            yield one, other.name, datasets, _weights(other, datasets)


def _repeated(scope: _Scope, notes: list[str]) -> list[str]:
    """Datasets of two runs or more, whose mean has a known error."""
    counts = Counter(dataset for dataset in scope.table.datasets if dataset is not None)
    found = sorted(dataset for dataset, count in counts.items() if count > 1)
    if len(found) < MIN_DATASETS:
        notes.append(
            f"Whether {scope.name} models of similar datasets are similar cannot be said: {len(found)} datasets have "
            f"two runs or more, and {MIN_DATASETS} are needed."
        )
    return found


def _references(datasets: Sequence[str], features: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    found = characteristic_dissimilarities(datasets)
    if features is None:
        return found
    missing = [dataset for dataset in datasets if dataset not in features]
    if missing:
        raise ZooError(f"features: none for dataset {missing[0]!r}; give one vector for each of the zoo's datasets")
    return {FEATURES: feature_dissimilarity(np.stack([features[dataset] for dataset in datasets])), **found}


def _weights(scope: _Scope, datasets: Sequence[str]) -> Geometry:
    codes = pd.Index(datasets).get_indexer(pd.Index(scope.table.datasets))
    return weight_geometry(scope.values[codes >= 0], codes[codes >= 0])


# --- what determines the weights? ------------------------------------------------------------------------------------


def _variance_rows(
    description: str, scope: _Scope, generator: np.random.Generator, draws: int, notes: list[str]
) -> list[VarianceRow]:
    if not scope.table.factors:
        notes.append(f"What determines the weights of {scope.name} cannot be said: no factor differs between its runs.")
        return []
    values = standardised(scope.raw) if scope.name == ALL else scope.values
    try:
        shares = variance_shares(values, scope.table.factors, generator, draws)
    except ZooError as error:
        notes.append(f"What determines the weights of {scope.name} cannot be said: {error}.")
        return []
    joint = [share.name for share in shares if JOINT in share.name]
    notes += [f"{name} cannot be separated among the runs of {scope.name}; their share is one." for name in joint]
    return [VarianceRow(description, scope.name, len(values), share) for share in shares]
