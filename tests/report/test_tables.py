from __future__ import annotations

import dataclasses
from typing import Any

from weightspace.evaluation import comparison as proof
from weightspace.evaluation import criteria
from weightspace.probes.explain import ACROSS, ALL
from weightspace.report.tables import Cell, cluster_tables, criterion_tables, sample_tables, variance_tables
from weightspace.stats.clustering import MEASURES


def clustered(description: str, models: str, measure: str, value: float, label: str = "dataset") -> dict[str, Any]:
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1, "null_mean": 0.03, "p_value": 0.005}
    row = {"description": description, "models": models, "label": label, "groups": 3, "runs": 20, "measure": measure}
    return {**row, "estimate": estimate}


def share(description: str, name: str, value: float, part: str = "factor", models: str = ALL) -> dict[str, Any]:
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1, "p_value": 0.005}
    row = {"description": description, "models": models, "runs": 20}
    return {**row, "share": {"name": name, "kind": "data", "part": part, "share": estimate}}


def proven(sampler: str, measure: str, subject: str, value: float, datasets: int = 2) -> dict[str, Any]:
    values = [[f"dataset {number}", value] for number in range(datasets)]
    row = {"sampler": sampler, "datasets": "seen", "measure": measure, "subject": subject, "values": values}
    return {**row, "value": value, "low": value - 0.1, "high": value + 0.1}


def test_descriptions_of_the_same_runs_stand_side_by_side() -> None:
    rows = [
        clustered(description, models, measure, 0.5)
        for description in ("joint", "s(W)")
        for models in ("mlp", ACROSS)
        for measure in MEASURES
    ]
    (table,) = cluster_tables([*rows, clustered("joint", "mlp", MEASURES[0], 0.9, "polarity")])
    assert [(line.name, line.about[0], line.marked) for line in table.lines] == [
        ("joint", "mlp", True),
        ("s(W)", "mlp", False),
        ("joint", "across", True),
        ("s(W)", "across", False),
    ]
    assert table.columns[2:4] == (("Adjusted Rand index", ""), ("by chance", ""))
    assert table.lines[0].cells[:2] == (Cell(0.5, 0.4, 0.6), Cell(0.03, note=("p ", 0.005)))
    assert cluster_tables([clustered("joint", "mlp", MEASURES[0], 0.9, "polarity")]) == []


def test_a_measure_that_is_missing_leaves_its_cells_empty() -> None:
    rows = [clustered("joint", "mlp", measure, 0.5) for measure in MEASURES]
    (table,) = cluster_tables([*rows, clustered("s(W)", "mlp", MEASURES[0], 0.1)])
    assert table.lines[1].cells[2:] == (None,) * 4


def test_the_largest_parts_come_first_and_sums_last() -> None:
    rows = [share("joint", f"factor {number}", number / 100) for number in range(9)]
    rows += [share("joint", "data x data", 0.5, "interactions"), share("joint", "all of data", 0.9, "together")]
    rows += [share("joint", "shared", 0.9, "shared"), share("joint", "residual", 0.9, "residual")]
    rows += [share("s(W)", "factor 0", 0.7), share("joint", "factor 8", 0.99, models="mlp")]
    (table,) = variance_tables(rows)
    names = [line.name for line in table.lines]
    assert names[:3] == ["factor 0", "data \N{MULTIPLICATION SIGN} data", "factor 8"]
    assert len(names) == 7 and names[-1] == "all of data"
    assert [line.marked for line in table.lines] == [False] * 6 + [True]
    assert "".join(map(str, table.about)) == "all architectures, 20 runs; the 6 largest of 10 parts"
    assert table.lines[2].cells == (Cell(0.08, 0.08 - 0.1, 0.08 + 0.1, ("p ", 0.005)), None)


def test_architectures_that_nothing_compares_have_a_table_each() -> None:
    tables = variance_tables([share("s(W)", "classes", 0.1, models=models) for models in ("mlp", "cnn")])
    assert [table.about[0] for table in tables] == ["mlp", "cnn"]


def test_controls_that_all_samplers_share_stand_once() -> None:
    first, second = proof.accuracy_after(0), proof.accuracy_after(10)
    rows = [
        proven(sampler, measure, subject, value)
        for sampler, noise in (("kde", 0.3), ("flow", 0.4))
        for measure in (first, second)
        for subject, value in ((proof.SAMPLES, noise + 0.5), (proof.SCRATCH, 0.1), (proof.NOISE, noise))
    ]
    (table,) = sample_tables(rows)
    assert table.columns == (("0 epochs", ""), ("10 epochs", ""))
    assert [(line.name, line.about, line.marked) for line in table.lines] == [
        ("kde", ("samples",), True),
        ("flow", ("samples",), True),
        ("from scratch", (), False),
        ("noise on the nearest checkpoint", ("for kde",), False),
        ("noise on the nearest checkpoint", ("for flow",), False),
    ]


def test_references_stand_below_the_samples() -> None:
    rows = [
        proven("kde", proof.DISTANCE, proof.SAMPLES, 9.0),
        proven("kde", proof.DISTANCE, proof.HELD_OUT, 8.0),
        proven("kde", proof.SPEARMAN, proof.SAMPLES, 0.9, datasets=1),
    ]
    (table,) = sample_tables(rows)
    assert table.columns == (
        ("Nearest-training distance", "reference: held-out zoo models"),
        ("Requested-obtained Spearman", "no reference"),
    )
    samples, reference = table.lines
    assert (samples.name, reference.name, reference.about) == ("kde", "reference", ("for kde",))
    assert samples.cells[1] == Cell(0.9, 0.8, 1.0, (1, " of ", 2, " datasets"))
    assert reference.cells == (Cell(8.0, 7.9, 8.1), None)


def test_untrained_weights_refined_alike_stand_below_the_references() -> None:
    rows = [
        proven(sampler, proof.ERROR, subject, value)
        for sampler in ("kde", "kde+refined")
        for subject, value in ((proof.SAMPLES, 0.1), (proof.ANY, 0.2))
    ]
    rows += [proven("kde+refined", measure, proof.REFINED_SCRATCH, 0.3) for measure in (proof.SPEARMAN, proof.ERROR)]
    (table,) = sample_tables(rows)
    assert table.columns == (
        ("Requested-obtained MAE", "reference: any zoo model of the dataset"),
        ("Requested-obtained Spearman", "no reference"),
    )
    assert [(line.name, line.about, line.cells[0].value if line.cells[0] else None) for line in table.lines] == [
        ("kde", ("samples",), 0.1),
        ("reference", ("for kde",), 0.2),
        ("kde+refined", ("samples",), 0.1),
        ("reference", ("for kde+refined",), 0.2),
        ("from scratch, refined alike", ("for kde+refined",), 0.3),
    ]
    assert table.lines[-1].cells[1] == Cell(0.3, 0.3 - 0.1, 0.3 + 0.1)


def criterion(sampler: str, measure: str, outcome: criteria.Outcome, datasets: proof.Group = "seen") -> dict[str, Any]:
    subject = f"samples - {proof.BEST}"
    made = criteria.CriterionRow(sampler, datasets, measure, subject, 0.1, None, None, "above 0", 2, 3, outcome)
    return dataclasses.asdict(made)


def test_criteria_of_samplers_stand_side_by_side() -> None:
    seen, unseen = criterion_tables(
        [
            criterion("kde", proof.OVERLAP, "met"),
            criterion("flow", proof.OVERLAP, "not met"),
            criterion("flow", proof.DISTANCE, "undecided"),
            criterion("flow", proof.OVERLAP, "met", "unseen"),
        ]
    )
    assert seen.name == "Criteria of samples on seen datasets"
    assert seen.columns == (("kde", ""), ("flow", ""))
    overlap, distance = seen.lines
    assert (overlap.name, overlap.about) == (
        "Overlap of errors",
        ("samples \N{MINUS SIGN} best model of the nearest dataset: above 0",),
    )
    assert overlap.cells == (
        Cell(0.1, note=("met; holds on ", 2, " of ", 3)),
        Cell(0.1, note=("not met; holds on ", 2, " of ", 3)),
    )
    assert distance.cells[0] is None
    assert len(unseen.lines) == 1


def test_without_records_there_are_no_tables() -> None:
    assert cluster_tables([]) == variance_tables([]) == sample_tables([]) == criterion_tables([]) == []
