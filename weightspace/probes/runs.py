"""The runs of a zoo as an experiment: one model a run, its dataset, its architecture, and what was varied."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from weightspace.data.images import variant_of
from weightspace.errors import ZooError
from weightspace.stats.variance import Factor, Kind
from weightspace.zoo.dataset import Zoo

MIN_RUNS = 10
"""Fewer runs than this say nothing about a question."""

_MAX_VALUES = 12
_BINS = 5
_MAX_FACTORS = 32
# A factor that more runs lack is left out; otherwise the runs are.
_MOST_MISSING = 0.1
_MISSING = -1
_DATA = ("base", "classes", "rotation", "polarity", "image_size", "train_size", "label_noise")
_IN_DATASET_ID = _DATA[:5]
# The factor "architecture" stands for them.
_NO_FACTOR = ("family", "architecture")


@dataclass(frozen=True, eq=False)
class RunTable:
    """The runs of a zoo, each by its last checkpoint.

    Attributes:
        rows: row of each run's last checkpoint in the zoo.
        datasets: dataset id of each run, or None where it is not known.
        architectures: name of each run's architecture.
        factors: what was varied.
        notes: what was left out and why, one sentence each.
    """

    rows: Int[np.ndarray, "runs"]
    datasets: tuple[str | None, ...]
    architectures: tuple[str, ...]
    factors: tuple[Factor, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.rows)

    def where(self, kept: Bool[np.ndarray, "runs"]) -> RunTable:
        """Returns the table of some of the runs; factors that do not vary among them go."""
        chosen = np.flatnonzero(kept)
        factors = [_relevelled(replace(factor, codes=factor.codes[chosen])) for factor in self.factors]
        return replace(
            self,
            rows=self.rows[chosen],
            datasets=tuple(self.datasets[run] for run in chosen),
            architectures=tuple(self.architectures[run] for run in chosen),
            factors=tuple(factor for factor in factors if len(factor.levels) > 1),
        )


def run_table(zoo: Zoo, runs: Collection[str] | None = None) -> RunTable:
    """Reads the runs of a zoo, or those named in ``runs``.

    A dataset id is taken apart into its base, class set, rotation, polarity and image size; hyper-parameters are those
    that the zoo's index names, numbers of more than 12 values cut at their quintiles. A factor that more than a tenth
    of the runs lack is left out, and so are the runs that lack another one.

    Raises:
        ZooError: the zoo has none of the runs.
    """
    rows = last_checkpoints(zoo.index)
    if runs is not None:
        rows = rows[zoo.index["run_id"].iloc[rows].isin(runs).to_numpy()]
    if not len(rows):
        raise ZooError(f"{zoo.location}: none of the {len(runs or ())} requested runs; give runs of this zoo")
    index = zoo.index.iloc[rows]
    entries = [zoo.entry(row) for row in rows]
    sizes = [{name: entry.results[name] for name in ("train_size",) if name in entry.results} for entry in entries]
    given = [{**entry.hyperparameters, **size} for entry, size in zip(entries, sizes, strict=True)]
    datasets = tuple(text if isinstance(text, str) else None for text in index["dataset"])
    architectures = _architecture_names(zoo, rows)
    said = {dataset: _characteristics(dataset) for dataset in {*datasets, None}}
    columns = {name: [said[dataset][name] for dataset in datasets] for name in _IN_DATASET_ID}
    columns |= _hyperparameter_columns(given)
    notes, factors = [], [_factor("architecture", list(architectures))]
    for name, values in columns.items():
        factor = _factor(name, values)
        missing = int((factor.codes == _MISSING).sum())
        if missing > _MOST_MISSING * len(rows):
            if missing < len(rows):
                notes.append(f"{name} is left out: {missing:,} of {len(rows):,} runs do not say it.")
        elif len(factor.levels) > max(2, len(rows) // 5):
            notes.append(f"{name} is left out: it has {len(factor.levels):,} values in {len(rows):,} runs.")
        else:
            factors.append(factor)
    complete = np.all([factor.codes != _MISSING for factor in factors], axis=0)
    if not complete.all():
        notes.append(f"{int((~complete).sum()):,} of {len(rows):,} runs are left out: they lack a factor.")
    constant = [factor.name for factor in factors if len(np.unique(factor.codes[complete])) == 1]
    if constant:
        notes.append(f"Without a share, being the same in all runs: {', '.join(constant)}.")
    return RunTable(rows, datasets, architectures, tuple(factors), tuple(notes)).where(complete)


def last_checkpoints(index: pd.DataFrame) -> Int[np.ndarray, "runs"]:
    """Returns the row of each run's last checkpoint, by step, then by epoch, then by place in the zoo."""
    order = pd.DataFrame({"run_id": index["run_id"].to_numpy(), "row": np.arange(len(index))})
    for name in ("step", "epoch"):
        order[name] = index[name].to_numpy(dtype=np.float64) if name in index else math.nan
    last = order.sort_values(["step", "epoch", "row"], na_position="first").groupby("run_id")["row"].last()
    return np.sort(last.to_numpy())


def _architecture_names(zoo: Zoo, rows: np.ndarray) -> tuple[str, ...]:
    """Names architectures by their family, and by their header too where a family has several."""
    headers = zoo.index["header"].to_numpy()[rows]
    families = [None if config is None else config.family for config in (zoo.families[row] for row in rows)]
    found = dict(zip(headers, families, strict=True))
    shared = [family for family in found.values() if list(found.values()).count(family) > 1]
    names = {
        header: header[:8] if family is None else f"{family} {header[:8]}" if family in shared else family
        for header, family in found.items()
    }
    return tuple(names[header] for header in headers)


def _characteristics(dataset: str | None) -> dict[str, Any]:
    if dataset is None:
        return dict.fromkeys(_IN_DATASET_ID)
    variant = variant_of(dataset)
    if variant is None:
        return dict(zip(_IN_DATASET_ID, (dataset, "all", 0, "normal", "as it is"), strict=True))
    return {
        "base": str(replace(variant.source, size=None)),
        "classes": "-".join(map(str, sorted(variant.classes))) or "all",
        "rotation": variant.rotation,
        "polarity": variant.polarity,
        "image_size": variant.size or "as it is",
    }


def _hyperparameter_columns(given: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the scalar hyper-parameters; of very many, those that most runs have."""
    known = (name for values in given for name, value in values.items() if _known(value))
    counts = Counter(name for name in known if name not in (*_NO_FACTOR, *_IN_DATASET_ID))
    names = [name for name, _ in counts.most_common(_MAX_FACTORS)]
    ordered = sorted(names, key=lambda name: _DATA.index(name) if name in _DATA else len(_DATA))
    return {name: [values.get(name) for values in given] for name in ordered}


def _known(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _factor(name: str, values: Sequence[Any]) -> Factor:
    known = np.array([_known(value) for value in values])
    found = [value for value in values if _known(value)]
    texts = [_text(value) for value in found]
    if all(isinstance(value, int | float) for value in found) and len(set(texts)) > _MAX_VALUES:
        numbers = np.array(found, dtype=np.float64)
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, _BINS + 1)[1:-1]))
        texts = [f"quintile {bin_ + 1}" for bin_ in np.searchsorted(edges, numbers)]
    levels = sorted(set(texts), key=lambda text: (len(text), text))
    codes = np.full(len(values), _MISSING)
    codes[known] = [levels.index(text) for text in texts]
    kind: Kind = "architecture" if name == "architecture" else "data" if name in _DATA else "training"
    return Factor(name, kind, codes, tuple(levels), name in _IN_DATASET_ID)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _relevelled(factor: Factor) -> Factor:
    present, codes = np.unique(factor.codes, return_inverse=True)
    return replace(factor, codes=codes, levels=tuple(factor.levels[code] for code in present))
