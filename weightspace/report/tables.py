"""Lays records out as tables of the report: explanations of the weights, and comparisons of sampled models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightspace.evaluation.comparison import REFINED_SCRATCH, SAMPLES, accuracy_after
from weightspace.probes.explain import ACROSS, ALL
from weightspace.report.findings import is_learned
from weightspace.report.numbers import difference, readable

_SHOWN_FACTORS = 6
_ACCURACY = accuracy_after(0).removesuffix("0 epochs")

Words = tuple[str | int | float, ...]
"""Text in pieces, so that its numbers keep all their digits."""


@dataclass(frozen=True)
class Cell:
    """A number with what stands below it.

    Attributes:
        value: the number.
        low: lower end of its 95 % interval, or None.
        high: upper end.
        note: more about it.
    """

    value: float
    low: float | None = None
    high: float | None = None
    note: Words = ()


@dataclass(frozen=True)
class Line:
    """One row; a cell that is None was not measured, and ``marked`` rows are those to look at first."""

    name: str
    about: Words
    cells: tuple[Cell | None, ...]
    marked: bool = False


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        name: its heading.
        about: what else its caption says.
        corner: what the rows are.
        columns: name of each column and what stands below it.
        lines: the rows.
        style: how its numbers are printed.
    """

    name: str
    about: Words
    corner: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    style: str = "decimals"


# --- what the weights say about their data ---------------------------------------------------------------------------


def cluster_tables(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tabulates whether runs of one dataset stand together, descriptions of the same runs side by side.

    Args:
        rows: records of cluster rows; those of other labels than the dataset are left out.
    """
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["label"] == "dataset":
            found.setdefault((row["models"], row["description"]), {})[row["measure"]] = row
    if not found:
        return []
    scopes = list(dict.fromkeys(scope for scope, _ in found))
    measures = list(dict.fromkeys(measure for own in found.values() for measure in own))
    lines = []
    for scope, description in sorted(found, key=lambda key: scopes.index(key[0])):
        own = found[scope, description]
        first = next(iter(own.values()))
        where = "across" if scope == ACROSS else scope
        about = (where, ", ", first["runs"], " runs, ", first["groups"], " datasets")
        cells = [cell for measure in measures for cell in _beside_chance(own.get(measure))]
        lines.append(Line(description, about, tuple(cells), is_learned(description)))
    columns = [column for measure in measures for column in ((_headed(measure), ""), ("by chance", ""))]
    return [Grid("Runs of one dataset", (), "Weights described by", tuple(columns), tuple(lines))]


def _beside_chance(row: Mapping[str, Any] | None) -> tuple[Cell | None, Cell | None]:
    if row is None:
        return None, None
    estimate = row["estimate"]
    return _cell(estimate), Cell(estimate["null_mean"], note=("p ", estimate["p_value"]))


def variance_tables(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tabulates the largest shares of variance, a column a description, and what data and training have together.

    One table for all architectures, or one for each where no description compares them.

    Args:
        rows: records of variance rows.
    """
    scopes = list(dict.fromkeys(row["models"] for row in rows))
    return [
        _variance_table(scope, [row for row in rows if row["models"] == scope])
        for scope in ([ALL] if ALL in scopes else scopes)
    ]


def _variance_table(scope: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    descriptions = list(dict.fromkeys(row["description"] for row in rows))
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        share = row["share"]
        found.setdefault((share["part"], share["name"], share["kind"]), {})[row["description"]] = share["share"]
    single = [key for key in found if key[0] in ("factor", "interactions")]
    largest = sorted(single, key=lambda key: -max(one["value"] for one in found[key].values()))[:_SHOWN_FACTORS]
    together = [key for key in found if key[0] == "together"]
    lines = []
    for part, name, kind in (*largest, *together):
        own = found[part, name, kind]
        described = "its factors and their interactions" if part == "together" else f"{kind}, {part}"
        shares = [own.get(description) for description in descriptions]
        cells = tuple(_cell(share, ("p ", share["p_value"]) if share else ()) for share in shares)
        lines.append(
            Line(readable(name).replace(" x ", " \N{MULTIPLICATION SIGN} "), (described,), cells, part == "together")
        )
    models = "all architectures" if scope == ALL else scope
    about = (models, ", ", rows[0]["runs"], " runs; the ", len(largest), " largest of ", len(single), " parts")
    columns = tuple((description, "") for description in descriptions)
    return Grid("Share of the variance of the weights' description", about, "Part", columns, tuple(lines), "percent")


def _cell(record: Mapping[str, Any] | None, note: Words = ()) -> Cell | None:
    return None if record is None else Cell(record["value"], record["low"], record["high"], note)


# --- sampled models --------------------------------------------------------------------------------------------------


def sample_tables(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tabulates comparisons of samplers: for each group of datasets the accuracies, then novelty and fidelity.

    Args:
        rows: records of comparison rows.
    """
    tables = []
    for group in dict.fromkeys(row["datasets"] for row in rows):
        own = [row for row in rows if row["datasets"] == group]
        accuracies = [row for row in own if row["measure"].startswith(_ACCURACY)]
        others = [row for row in own if not row["measure"].startswith(_ACCURACY)]
        tables += [_accuracy_table(group, accuracies)] if accuracies else []
        tables += [_novelty_table(group, others)] if others else []
    return tables


def criterion_tables(criteria: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tabulates criteria of samplers with their outcomes, for each group of datasets.

    Args:
        criteria: records of criteria.
    """
    tables = []
    for group in dict.fromkeys(row["datasets"] for row in criteria):
        own = [row for row in criteria if row["datasets"] == group]
        samplers = _names(own, "sampler")
        found = {(row["measure"], row["subject"], row["requirement"], row["sampler"]): row for row in own}
        lines = [
            Line(
                _headed(measure),
                (f"{difference(subject)}: {requirement}",),
                tuple(_criterion_cell(found.get((measure, subject, requirement, sampler))) for sampler in samplers),
            )
            for measure, subject, requirement in dict.fromkeys(key[:3] for key in found)
        ]
        columns = tuple((sampler, "") for sampler in samplers)
        tables.append(Grid(f"Criteria of samples on {group} datasets", (), "Measure", columns, tuple(lines)))
    return tables


def _criterion_cell(row: Mapping[str, Any] | None) -> Cell | None:
    return _cell(row, (f"{row['outcome']}; holds on ", row["holds"], " of ", row["of"]) if row else ())


def _accuracy_table(group: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    measures, datasets = _names(rows, "measure"), _datasets(rows)
    samplers = _names(rows, "sampler")
    found: dict[tuple[str, tuple[float | None, ...]], tuple[list[str], tuple[Cell | None, ...]]] = {}
    keys = dict.fromkeys((row["sampler"], row["subject"]) for row in rows)
    for sampler, subject in sorted(keys, key=lambda key: key[1] != SAMPLES):
        own = {row["measure"]: row for row in rows if (row["sampler"], row["subject"]) == (sampler, subject)}
        cells = tuple(_sample_cell(own.get(measure), datasets) for measure in measures)
        # Controls that do not look at the samples are the same for all samplers.
        name = sampler if subject == SAMPLES else subject
        known, _ = found.setdefault((name, tuple(cell.value if cell else None for cell in cells)), ([], cells))
        known.append(sampler)
    lines = []
    for (name, _), (known, cells) in found.items():
        partly = () if len(known) == len(samplers) else (f"for {', '.join(known)}",)
        lines.append(Line(name, ("samples",) if name in samplers else partly, cells, marked=name in samplers))
    columns = tuple((measure.removeprefix(_ACCURACY), "") for measure in measures)
    return Grid(f"Test accuracy on {group} datasets", _counted(datasets), "Models", columns, tuple(lines))


def _novelty_table(group: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    measures, datasets = _names(rows, "measure"), _datasets(rows)
    references = {row["measure"]: row["subject"] for row in rows if row["subject"] not in (SAMPLES, REFINED_SCRATCH)}
    lines = []
    for sampler in _names(rows, "sampler"):
        kinds: dict[str, dict[str, Mapping[str, Any]]] = {SAMPLES: {}, "reference": {}}
        for row in rows:
            if row["sampler"] == sampler:
                kind = row["subject"] if row["subject"] in (SAMPLES, REFINED_SCRATCH) else "reference"
                kinds.setdefault(kind, {})[row["measure"]] = row
        for kind, own in kinds.items():
            name, about = (sampler, kind) if kind == SAMPLES else (kind, f"for {sampler}")
            cells = tuple(_sample_cell(own.get(measure), datasets) for measure in measures)
            lines.append(Line(name, (about,), cells, marked=kind == SAMPLES))
    columns = tuple(
        (_headed(measure), f"reference: {references[measure]}" if measure in references else "no reference")
        for measure in measures
    )
    return Grid(f"Novelty and fidelity on {group} datasets", _counted(datasets), "Models", columns, tuple(lines))


def _sample_cell(row: Mapping[str, Any] | None, datasets: int) -> Cell | None:
    own = datasets if row is None else len(row["values"])
    return _cell(row, () if own == datasets else (own, " of ", *_counted(datasets)))


def _counted(datasets: int) -> Words:
    return datasets, " dataset" if datasets == 1 else " datasets"


def _datasets(rows: Iterable[Mapping[str, Any]]) -> int:
    return len({dataset for row in rows for dataset, _ in row["values"]})


def _names(rows: Iterable[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _headed(measure: str) -> str:
    """Starts a heading with a capital and leaves names within as they are."""
    return f"{measure[:1].upper()}{measure[1:]}"
