"""Colours and marks for the datasets of a zoo, up to 32 of them distinguishable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

MAX_DATASETS = 32
_HUES = 8
# Lightness levels that stand out from a white and from a near-black page alike.
_LIGHT, _DARK = 0.78, 0.48
_GREY = "#8a8f98"


@dataclass(frozen=True)
class Mark:
    """How the models of one dataset are drawn: a disc, or a ring where ``hollow``."""

    colour: str
    hollow: bool = False


@dataclass(frozen=True)
class Legend:
    """A legend in rows and columns.

    Attributes:
        marks: the mark of each dataset.
        columns: headings; one empty heading where the datasets form a plain list.
        rows: label and one mark a column, None where a combination does not occur.
        variants: whether the ids are variants of each other: hue stands for the row, shade and filling for the column.
    """

    marks: Mapping[str, Mark]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Mark | None, ...]], ...]
    variants: bool


def dataset_legend(datasets: Sequence[str]) -> Legend:
    """Chooses marks for the datasets of some models.

    Ids in the manner of ``name?classes=0-1-2&rotation=90&polarity=inverted`` are taken apart: rows and hues are class
    subsets, columns are orientations and polarities. Beyond 32 datasets, the rarest share one grey row.

    Args:
        datasets: one id a model, in any order and with repetitions.
    """
    counts = Counter(datasets)
    common = sorted(counts, key=lambda one: (-counts[one], one))
    rest = common[MAX_DATASETS - 1 :] if len(common) > MAX_DATASETS else []
    shown = sorted(set(common) - set(rest), key=_natural)
    parts = {one: _taken_apart(one) for one in shown}
    groups = sorted({group for group, _ in parts.values()}, key=_natural)
    views = sorted(
        {view for _, view in parts.values()}, key=lambda view: (_natural(view[0]), view[1] != "normal", view)
    )
    shades = list(dict.fromkeys(rotation for rotation, _ in views))

    def mark(group: str, view: tuple[str, str]) -> Mark:
        number = groups.index(group)
        if len(views) > 1:
            hue, shade, of = number / len(groups), shades.index(view[0]), len(shades)
        else:
            hue, shade, of = number % _HUES / min(_HUES, len(groups)), number // _HUES, math.ceil(len(groups) / _HUES)
        lightness = (_LIGHT + _DARK) / 2 if of == 1 else _DARK + (_LIGHT - _DARK) * shade / (of - 1)
        return Mark(_colour(lightness, hue), view[1] != "normal")

    marks = {one: mark(*parts[one]) for one in shown}
    taken = {parts[one]: marks[one] for one in shown}
    columns = tuple(_view_label(view) for view in views) if len(views) > 1 else ("",)
    rows = [(_group_label(group, groups), tuple(taken.get((group, view)) for view in views)) for group in groups]
    if rest:
        grey = Mark(_GREY)
        marks |= dict.fromkeys(rest, grey)
        rows.append((f"{len(rest)} rarer datasets", (grey, *[None] * (len(columns) - 1))))
    return Legend(marks, columns, tuple(rows), len(views) > 1)


def _taken_apart(dataset: str) -> tuple[str, tuple[str, str]]:
    """Splits an id into what is learnt (base and classes) and how it is shown (rotation, polarity)."""
    base, _, query = dataset.partition("?")
    options = dict(parse_qsl(query))
    view = (options.pop("rotation", "0"), options.pop("polarity", "normal"))
    rest = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{base}?{rest}" if rest else base, view


def _group_label(group: str, groups: Sequence[str]) -> str:
    base, _, query = group.partition("?")
    options = dict(parse_qsl(query))
    if len({one.partition("?")[0] for one in groups}) > 1 or len(groups) == 1:
        return f"{base} {_words(options)}".strip()
    return _words(options) or "all classes"


def _words(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _view_label(view: tuple[str, str]) -> str:
    rotation, polarity = view
    return f"{rotation}°" if polarity == "normal" else f"{rotation}° {polarity}"


def _natural(text: str) -> tuple[int, str]:
    return len(text), text


def _colour(lightness: float, hue: float) -> str:
    """Converts OKLCH (Ottosson, 2020), whose lightness is even to the eye over all hues, to sRGB."""
    angle, chroma = 2 * math.pi * (hue + 0.08), 0.13
    a, b = chroma * math.cos(angle), chroma * math.sin(angle)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(max(value, 0.0), 1.0))):02x}" for value in linear)


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
