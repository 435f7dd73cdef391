from __future__ import annotations

import json

import pytest

from weightspace.cli.output import listing, print_json, table


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), (1.5, "ü")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, "ü"]]}


def test_numbers_stand_right_and_text_left() -> None:
    assert table(("name", "count", "mean"), [("a", 1234567, 0.123456), ("long name", 2, 10.0)], indent="  ") == [
        "  name           count    mean",
        "  a          1,234,567  0.1235",
        "  long name          2      10",
    ]


def test_text_of_others_cannot_steer_the_terminal() -> None:
    assert table(("name",), [("a\x1b[31m",)], indent="") == ["name", "a\\x1b[31m"]
    assert listing("files", ["b\rc"]) == ["files: 1", "  b\\rc"]
    assert listing("notes", []) == ["notes: none"]


def test_a_pair_is_a_thing_and_the_reason() -> None:
    assert listing("left out", [("a.bin", "a pickle")]) == ["left out: 1", "  a.bin: a pickle"]
