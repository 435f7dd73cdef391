from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from weightspace.report.legend import MAX_DATASETS, dataset_legend


def test_variants_become_a_grid_and_all_marks_differ() -> None:
    classes = ("", "classes=0-1-2-3-4", "classes=5-6-7-8-9", "classes=0-2-4-6-8")
    views = product(("", "rotation=90", "rotation=180", "rotation=270"), ("", "polarity=inverted"))
    ids = ["digits?" + "&".join(filter(None, (one, *view))) for view in views for one in classes]
    ids[0] = "digits"
    legend = dataset_legend(ids * 3)
    assert legend.variants and len(ids) == 32
    assert legend.columns[:3] == ("0°", "0° inverted", "90°")
    assert [label for label, _ in legend.rows][:2] == ["all classes", "classes 0-1-2-3-4"]
    assert len(set(legend.marks.values())) == 32
    assert [mark.hollow for mark in legend.rows[0][1] if mark] == [False, True] * 4


def test_plain_ids_become_a_list_of_different_marks() -> None:
    ids = [f"org/name{i}" for i in range(MAX_DATASETS)]
    legend = dataset_legend(ids)
    assert not legend.variants and legend.columns == ("",)
    assert [label for label, _ in legend.rows] == ids
    assert len(set(legend.marks.values())) == MAX_DATASETS


def test_the_rarest_of_many_share_one_row() -> None:
    legend = dataset_legend([f"d{i}" for i in range(40)] + [f"d{i}" for i in range(20, 40)])
    assert len(legend.rows) == MAX_DATASETS
    assert legend.rows[-1][0] == "9 rarer datasets"
    assert legend.marks["d8"] == legend.marks["d19"] != legend.marks["d39"]


def test_bases_are_named_where_there_are_several() -> None:
    legend = dataset_legend(["a?classes=0-1&size=8", "b", "b?rotation=90"])
    assert [label for label, _ in legend.rows] == ["b", "a classes 0-1, size 8"]
    assert legend.rows[1][1][1] is None


@given(st.lists(st.text(max_size=12), min_size=1, max_size=60))
def test_any_ids_get_a_mark(ids: list[str]) -> None:
    legend = dataset_legend(ids)
    assert set(legend.marks) == set(ids)
    assert all(len(mark.colour) == 7 for mark in legend.marks.values())
    assert {mark for _, marks in legend.rows for mark in marks if mark} == set(legend.marks.values())
