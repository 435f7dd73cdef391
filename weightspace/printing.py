"""How results look: lines with aligned columns for people, JSON for programs.

Names of files, tensors and models are other people's text: what would steer a terminal is escaped in every line, and no
line is longer than `LONGEST`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

from weightspace.files import json_ready

LONGEST = 2000
"""Characters of a line at most."""

# Also where a number is missing, or has its interval beside it.
_NUMBER = re.compile(r"-?(\d[\d,.]*(e[+-]\d+)?( \[.*\])?)?")


def printable(text: str) -> str:
    """Escapes what would steer a terminal, and shortens what is longer than a line."""
    escaped = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[: LONGEST + 1])
    return escaped if len(escaped) <= LONGEST else f"{escaped[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def emit(lines: Iterable[str], *, err: bool = False) -> None:
    """Prints lines to standard output, or to standard error."""
    for line in lines:
        click.echo(printable(line), err=err)


def emit_json(value: Any) -> None:
    """Prints ``value`` as JSON; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(json_ready(value), indent=1, ensure_ascii=False)
    # JSON escapes the ASCII control characters only.
    click.echo(re.sub(r"[^\n -~]", lambda one: one[0] if one[0].isprintable() else json.dumps(one[0])[1:-1], text))


def emit_warnings() -> None:
    """Prints warnings of the library, which name other people's files, like all other lines."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            emit([" ".join(record.getMessage().split())], err=True)

    logging.lastResort = Handler(logging.WARNING)


def listing(title: str, items: Iterable[str | tuple[str, str]]) -> list[str]:
    """Lays out a title with the number of items, and the items below it; a pair is a thing and the reason."""
    lines = [item if isinstance(item, str) else f"{item[0]}: {item[1]}" for item in items]
    return [f"{title}: {len(lines) if lines else 'none'}", *(f"  {printable(line)}" for line in lines)]


def reasons(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Makes JSON records of files and the reasons why they are left out."""
    return [{"file": file, "reason": reason} for file, reason in pairs]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, indent: str = "  ") -> list[str]:
    """Lays out aligned columns: numbers to the right, everything else to the left."""
    lines = [tuple(head), *(tuple(map(_text, row)) for row in rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    laid_out = []
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        text = "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)
        laid_out.append(f"{indent}{text}".rstrip())
    return laid_out


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
