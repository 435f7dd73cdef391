"""How results look: aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """Prints ``value`` as JSON; NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(value), indent=1, ensure_ascii=False))


def printable(text: str) -> str:
    """Escapes what would steer a terminal: names of files and tensors are other people's text."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def print_list(title: str, lines: Sequence[str]) -> None:
    """Prints a title with the number of lines, and the lines below it."""
    click.echo(f"{title}: {len(lines) if lines else 'none'}")
    for line in lines:
        click.echo(f"  {printable(line)}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], *, indent: str = "") -> None:
    """Prints aligned columns: numbers to the right, everything else to the left."""
    lines = [tuple(head), *(tuple(map(_text, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        text = "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)
        click.echo(f"{indent}{text}".rstrip())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
