"""The report: one self-contained HTML page about a zoo and its encoder, and the same numbers as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from weightspace.evaluation.retrieval import RetrievalRow
from weightspace.files import json_ready
from weightspace.probes.explain import Explanation
from weightspace.probes.reconstruction import ALL_ARCHITECTURES, ReconstructionRow
from weightspace.probes.rows import AUC, BALANCED_ACCURACY, R2, TAU
from weightspace.report import plots
from weightspace.report.findings import (
    clustering_answers,
    headlines,
    is_learned,
    probe_verdicts,
    reconstruction_verdicts,
    retrieval_verdicts,
    sample_verdicts,
    variance_answers,
)
from weightspace.report.legend import Legend, dataset_legend
from weightspace.report.numbers import decimals, environment, percent, readable, signed
from weightspace.report.tables import Grid, cluster_tables, criterion_tables, sample_tables, variance_tables
from weightspace.zoo.storage import write_text

_UNKNOWN_DATASET = "unknown"
_SPLITS = ("train", "validation", "eval", "test")


# Of numbers (False) and of labels (True), as tables head their columns.
_MEASURES = {
    False: (replace(R2, title="R²"), replace(TAU, title="Kendall's τ")),
    True: (AUC, replace(BALANCED_ACCURACY, title="Balanced accuracy")),
}
_PROBE_NUMBERS = [name for pair in _MEASURES.values() for one in pair for name in (one.name, one.permuted)]


@dataclass(frozen=True, eq=False)
class Curve:
    """One number of the training history over optimizer steps; a ``validation`` name is drawn with its counterpart."""

    name: str
    steps: Sequence[int | float] | np.ndarray
    values: Sequence[int | float] | np.ndarray


@dataclass(frozen=True, eq=False)
class PredictedTrue:
    """What one probe predicted for its test models, beside what is true."""

    title: str
    true: Float[np.ndarray, "models"]
    predicted: Float[np.ndarray, "models"]


@dataclass(frozen=True, eq=False)
class ZooMap:
    """Embeddings to place in the plane, with the dataset and the accuracy (NaN where unknown) of each model."""

    embeddings: Float[np.ndarray, "models d"]
    datasets: Sequence[str | None]
    accuracies: Float[np.ndarray, "models"]


@dataclass(frozen=True, eq=False)
class Report:
    """Everything the page shows; a part that is empty is left out.

    Attributes:
        title: heading of the page.
        facts: headline facts in the order to show, under the names to show.
        probes: records of probe rows: their fields by name, None for NaN.
        reconstruction: rows in the order to show; those of ``ALL_ARCHITECTURES`` decide the verdict.
        retrieval: what a joint model finds.
        explanation: whether models of one dataset cluster, and what determines the weights.
        samples: records of proof rows: their fields by name.
        sample_criteria: records of the criteria of samples.
        curves: training history.
        predictions: scatter plots to show.
        zoo_map: embeddings to draw as a map.
        settings: what the run was made with; nested mappings allowed.
        commands: command lines that make it again.
        notes: what else a reader has to know, one sentence each.
    """

    title: str
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    probes: Sequence[Mapping[str, Any]] = ()
    reconstruction: Sequence[ReconstructionRow] = ()
    retrieval: Sequence[RetrievalRow] = ()
    explanation: Explanation | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    sample_criteria: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Curve] = ()
    predictions: Sequence[PredictedTrue] = ()
    zoo_map: ZooMap | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()


def write_report(report: Report, folder: str | Path) -> Path:
    """Writes ``report.html`` and ``report.json``, each whole or not at all.

    Every number of the page comes from the JSON's records and stands in a ``<data>`` element with all its digits. NaN
    and Inf become null in the JSON and "n/a" on the page. The page asks for nothing from outside and runs no script.

    Args:
        report: what to show. All texts in it are escaped.
        folder: created if need be; an older report in it is replaced.

    Returns:
        Path of the HTML page.

    Raises:
        ZooError: the folder cannot be written.
    """
    points = None if report.zoo_map is None else plots.place_models(report.zoo_map.embeddings)
    records = _records(report, points)
    page = _page(records)
    folder = Path(folder)
    text = json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    write_text(folder / "report.json", f"{text}\n")
    write_text(folder / "report.html", page)
    return folder / "report.html"


# --- records ---------------------------------------------------------------------------------------------------------


def _records(report: Report, points: plots.MapPoints | None) -> dict[str, Any]:
    given = (report.probes, report.samples, report.sample_criteria)
    probes, samples, criteria = map(json_ready, given)
    reconstruction = [
        json_ready({**asdict(row), "compression": row.weights / row.latent_size if row.latent_size else None})
        for row in report.reconstruction
    ]
    retrieval = [json_ready(asdict(row)) for row in report.retrieval]
    explanation = None if report.explanation is None else json_ready(asdict(report.explanation))
    if explanation is not None:
        explanation["answers"] = {
            "clusters": clustering_answers(explanation["clusters"]),
            "variance": variance_answers(explanation["variance"]),
        }
    verdicts = [
        *probe_verdicts(probes),
        *reconstruction_verdicts(reconstruction),
        *retrieval_verdicts(retrieval),
        *sample_verdicts(criteria),
    ]
    zoo_map = None
    if report.zoo_map is not None and points is not None and len(points.rows):
        zoo_map = {
            "method": points.method,
            "models": len(report.zoo_map.embeddings),
            "left_out": points.left_out,
            "x": points.places[:, 0].round(4),
            "y": points.places[:, 1].round(4),
            "dataset": [report.zoo_map.datasets[row] or _UNKNOWN_DATASET for row in points.rows],
            "accuracy": np.asarray(report.zoo_map.accuracies, dtype=np.float64)[points.rows],
        }
    records: dict[str, Any] = json_ready(
        {
            "title": report.title,
            "facts": report.facts,
            "headlines": headlines(
                {"probes": probes, "reconstruction": reconstruction, "retrieval": retrieval, "samples": samples}
            ),
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "probes": probes,
            "reconstruction": reconstruction,
            "retrieval": retrieval,
            "explanation": explanation,
            "samples": samples,
            "sample_criteria": criteria,
            "map": zoo_map,
            "predictions": [vars(one) for one in report.predictions],
            "curves": [vars(one) for one in report.curves],
            "settings": report.settings,
            "commands": report.commands,
            "notes": report.notes,
        }
    )
    return records


# --- page ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figure:
    """A plot with the words around it."""

    title: str
    svg: Markup
    caption: str = ""
    keys: tuple[str, ...] = ()


def _page(records: Mapping[str, Any]) -> str:
    templates = environment(escape=True)
    templates.filters |= {"number": _number, "place": _place}
    templates.tests["learned"] = is_learned
    legend = dataset_legend(records["map"]["dataset"]) if records["map"] else None
    page: str = templates.get_template("report.html").render(
        records,
        measures=_MEASURES,
        questions=_questions(records["explanation"]),
        sample_tables=[*sample_tables(records["samples"]), *criterion_tables(records["sample_criteria"])],
        probe_tables=_tables(records["probes"], "target", _PROBE_NUMBERS, ()),
        reconstruction_tables=_tables(
            records["reconstruction"], "architecture", ("decoded_accuracy", "kept", "agreement"), ("relative_mse",)
        ),
        all_architectures=ALL_ARCHITECTURES,
        map_figures=[] if legend is None else _map_figures(records["map"], legend),
        map_legend=legend,
        prediction_figures=[_prediction_figure(i, one) for i, one in enumerate(records["predictions"])],
        curve_figures=_curve_figures(records["curves"]),
        flat_settings=_flat(records["settings"]),
    )
    return page


@dataclass(frozen=True)
class _Table:
    """Rows that belong together, the names of each row's best numbers, and what its rows have to say."""

    name: str
    rows: list[Mapping[str, Any]]
    best: list[set[str]]
    notes: dict[str, list[str]]


def _tables(
    rows: Sequence[Mapping[str, Any]], by: str, largest: Sequence[str], smallest: Sequence[str]
) -> list[_Table]:
    tables = []
    for name in dict.fromkeys(row[by] for row in rows):
        same = [row for row in rows if row[by] == name]
        best: list[set[str]] = [set() for _ in same]
        for columns, pick in ((largest, max), (smallest, min)):
            for column in columns:
                for number in _best(same, column, pick):
                    best[number].add(column)
        notes: dict[str, list[str]] = {}
        for row in same:
            if row.get("note"):
                notes.setdefault(row["note"], []).append(f"{row['representation']} with {row['estimator']}")
        tables.append(_Table(name, same, best, notes))
    return tables


def _questions(explanation: Mapping[str, Any] | None) -> list[tuple[str, list[str], list[Grid]]]:
    """Returns questions about the zoo with their answers and tables."""
    if explanation is None:
        return []
    answers, clusters, variance = explanation["answers"], explanation["clusters"], explanation["variance"]
    questions = [
        ("Do models trained on the same dataset cluster?", answers["clusters"], cluster_tables(clusters)),
        ("What determines the weights most?", answers["variance"], variance_tables(variance)),
    ]
    return [question for question in questions if question[2]]


def _best(rows: Sequence[Mapping[str, Any]], column: str, pick: Callable[[Any], int | float]) -> list[int]:
    """Numbers all rows that print the same as the best, as long as that tells something apart."""
    texts = {number: decimals(row[column]) for number, row in enumerate(rows) if row[column] is not None}
    if len(set(texts.values())) < 2:
        return []
    winner = decimals(pick(rows[number][column] for number in texts))
    return [number for number, text in texts.items() if text == winner]


def _map_figures(zoo_map: Mapping[str, Any], legend: Legend) -> list[_Figure]:
    places = np.stack([zoo_map["x"], zoo_map["y"]], axis=1)
    datasets, accuracies = zoo_map["dataset"], np.array(zoo_map["accuracy"], dtype=np.float64)
    known = int(np.isfinite(accuracies).sum())
    by_dataset = plots.map_by_dataset(
        places, datasets, legend, "map-dataset", f"Map of {len(places)} models coloured by {len(legend.marks)} datasets"
    )
    by_accuracy = plots.map_by_accuracy(
        places, accuracies, "map-accuracy", f"The same map coloured by accuracy, which is known for {known} models"
    )
    return [
        _Figure("By dataset", Markup(by_dataset)),
        _Figure("By accuracy", Markup(by_accuracy), "Grey: accuracy not known." if known < len(places) else ""),
    ]


def _prediction_figure(number: int, prediction: Mapping[str, Any]) -> _Figure:
    pairs = np.array([prediction["true"], prediction["predicted"]], dtype=np.float64).reshape(2, -1)
    true, predicted = pairs[:, np.isfinite(pairs).all(axis=0)]
    if not len(true):
        return _Figure(prediction["title"], Markup(), "No model has both numbers.")
    label = f"Predicted against true, {prediction['title']}, {len(true)} models"
    svg, outside = plots.predicted_true(true, predicted, f"prediction-{number}", label)
    caption = f"{len(true):,} test models"
    return _Figure(prediction["title"], Markup(svg), f"{caption}, {outside:,} outside the plot" if outside else caption)


def _curve_figures(curves: Sequence[Mapping[str, Any]]) -> list[_Figure]:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for curve in curves:
        pairs = [pair for pair in zip(curve["steps"], curve["values"], strict=True) if None not in pair]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            panel = _measured(curve["name"])
            if len(panels.get(panel, ())) == plots.MAX_CURVES:
                panel = curve["name"]
            panels.setdefault(panel, {})[curve["name"]] = (list(steps), list(values))
    figures = []
    for number, (panel, lines) in enumerate(panels.items()):
        ends = tuple(f"{readable(name)} ends at {values[-1]:.3g}" for name, (_, values) in lines.items())
        svg = plots.curves(lines, f"curve-{number}", f"Training curve of {readable(panel)}: {'; '.join(ends)}")
        figures.append(_Figure(readable(panel), Markup(svg), keys=ends))
    return figures


def _measured(name: str) -> str:
    """Leaves out on which models a curve was measured: ``validation_loss``, ``train/loss`` and ``loss`` go together."""
    first, *rest = re.split(r"[_/ -]", name, maxsplit=1)
    return (rest[0] if rest else "loss") if first in _SPLITS else name


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", value))
    return lines


def _plain_number(value: int | float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return signed(f"{value:,.0f}")
    return signed(f"{value:.4g}")


_STYLES: dict[str, Callable[[int | float], str]] = {
    "decimals": decimals,
    "percent": percent,
    "times": lambda value: f"{value:.1f} \N{MULTIPLICATION SIGN}",
    "plain": _plain_number,
    "exact": lambda value: signed(repr(value)),
}


def _number(value: Any, style: str = "decimals", reason: str = "not measured") -> Markup | str:
    """Shows a number to a reader, with all its digits for a program; other values as they are."""
    if value is None:
        return Markup('<abbr class="none" title="{}">n/a</abbr>').format(reason)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    shown = _STYLES[style](value).replace(" ", "\N{NO-BREAK SPACE}")
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


def _place(value: int | float, start: float = 0.0, width: int = 100) -> str:
    """Turns a number into a place on an axis from ``start`` to 1; what lies outside stands at its ends."""
    return f"{width * min(max((value - start) / (1 - start), 0.0), 1.0):.1f}"
