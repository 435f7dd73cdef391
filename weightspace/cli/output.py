"""How results look: lines with aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from weightspace.files import json_ready


def print_json(value: Any) -> None:
    """Prints ``value`` as JSON; NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(json_ready(value), indent=1, ensure_ascii=False))


def printable(text: str) -> str:
    """Escapes what would steer a terminal: names of files and tensors are other people's text."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def listing(title: str, items: Iterable[str | tuple[str, str]]) -> list[str]:
    """Lays out a title with the number of items, and the items below it; a pair is a thing and the reason."""
    lines = [item if isinstance(item, str) else f"{item[0]}: {item[1]}" for item in items]
    return [f"{title}: {len(lines) if lines else 'none'}", *(f"  {printable(line)}" for line in lines)]


def reasons(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Makes JSON records of files and the reasons why they are left out."""
    return [{"file": file, "reason": reason} for file, reason in pairs]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, indent: str = "  ") -> list[str]:
    """Lays out aligned columns: numbers to the right, everything else to the left."""
    rows = list(rows)
    lines = [tuple(head), *(tuple(map(_text, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
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
