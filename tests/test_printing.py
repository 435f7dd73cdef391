from __future__ import annotations

import json
import logging

import pytest

from weightspace.printing import LONGEST, emit, emit_json, emit_warnings, listing, table


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"a": float("nan"), "b": [float("inf"), (1.5, "ü")]})
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


def test_every_line_is_escaped_and_bounded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    emit(["a\x1b[2J\u202eb", "x" * 10**6, "\x9b" * LONGEST])
    escaped, long, worse = capsys.readouterr().out.splitlines()
    assert escaped == "a\\x1b[2J\\u202eb"
    assert long == "x" * (LONGEST - 1) + "…" and len(worse) == LONGEST
    emit_json(["a\x9bb\u202e", "ü"])
    out = capsys.readouterr().out
    assert "\x9b" not in out and "\u202e" not in out and "ü" in out
    assert json.loads(out) == ["a\x9bb\u202e", "ü"]
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    emit_warnings()
    record = logging.LogRecord("weightspace.x", logging.WARNING, "", 0, "%s: odd", ("b\nc\x1b[0m",), None)
    logging.lastResort.handle(record)  # type: ignore[union-attr]
    assert capsys.readouterr().err == "b c\\x1b[0m: odd\n"
