from __future__ import annotations

import json

import pytest

from weightspace.cli.output import print_json, print_list, print_table


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), (1.5, "ü")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, "ü"]]}


def test_numbers_stand_right_and_text_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "count", "mean"), [("a", 1234567, 0.123456), ("long name", 2, 10.0)], indent="  ")
    assert capsys.readouterr().out.splitlines() == [
        "  name           count    mean",
        "  a          1,234,567  0.1235",
        "  long name          2      10",
    ]


def test_text_of_others_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [("a\x1b[31m",)])
    print_list("files", ["b\rc"])
    print_list("notes", [])
    assert capsys.readouterr().out == "name\na\\x1b[31m\nfiles: 1\n  b\\rc\nnotes: none\n"
