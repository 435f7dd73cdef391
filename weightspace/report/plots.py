"""Plots as inline SVG that takes its colours and fonts from the page, so that it follows the reader's light or dark.

In every function that draws, ``name`` is unique within the page and keeps the plot's ids apart from the others', and
``label`` is what a reader gets who cannot see the plot.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from weightspace.report.legend import Legend

MAX_MAP_MODELS = 1500
# More points than this become one picture inside the SVG: a page of thousands of circles is slow to scroll.
MAX_VECTOR_POINTS = 250
# As many as can be distinguished by colour and dash.
MAX_CURVES = 2
# Fewer models than this have no neighbourhoods to preserve; their two main axes say all there is.
_LEAST_TSNE_MODELS = 12
_PCA_SIZE = 50

# Stand-ins that matplotlib accepts and that nothing else is drawn with; each becomes a variable of the page.
_VARIABLES = {
    "#010203": "--ink",
    "#020304": "--muted",
    "#030405": "--line",
    "#040506": "--accent",
    "#050607": "--second",
}
_INK, _MUTED, _LINE, _ACCENT, _SECOND = _VARIABLES
# Points in a picture keep one colour in light and dark.
_FIXED = "#3f83b8"
_UNKNOWN = "#8a8f98"
# Viridis without its ends, which would vanish on a dark or on a white page.
SCALE = LinearSegmentedColormap.from_list("scale", mpl.colormaps["viridis"](np.linspace(0.18, 0.9, 64)))
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "weightspace",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True, eq=False)
class MapPoints:
    """Models placed in the plane.

    Attributes:
        rows: which models these are, in ascending order.
        places: their coordinates, which have no unit.
        method: how they were placed.
        left_out: models that could not be placed because their embedding holds NaN or Inf.
    """

    rows: np.ndarray
    places: Float[np.ndarray, "points 2"]
    method: str
    left_out: int


def place_models(embeddings: Float[np.ndarray, "models d"], limit: int = MAX_MAP_MODELS, seed: int = 0) -> MapPoints:
    """Places models so that near neighbours in the embedding stay near: PCA, then t-SNE (van der Maaten, 2008).

    Args:
        embeddings: one row a model.
        limit: models drawn at most; beyond it, a random choice.
        seed: of that choice and of t-SNE.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    rows = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
    left_out = len(embeddings) - len(rows)
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
    chosen = embeddings[rows]
    size = min(_PCA_SIZE, *chosen.shape)
    if size < 2 or not np.ptp(chosen, axis=0).any():
        return MapPoints(rows, np.zeros((len(rows), 2)), "nothing to place: all embeddings are equal", left_out)
    codes = PCA(size, random_state=seed).fit_transform(chosen)
    if len(rows) < _LEAST_TSNE_MODELS:
        return MapPoints(rows, codes[:, :2], "PCA", left_out)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(codes)
    return MapPoints(rows, np.asarray(places, dtype=np.float64), "PCA, then t-SNE", left_out)


def map_by_dataset(
    places: Float[np.ndarray, "points 2"], datasets: Sequence[str], legend: Legend, name: str, label: str
) -> str:
    """Draws the map with the legend's marks."""
    marks = [legend.marks[dataset] for dataset in datasets]
    faces = ["none" if mark.hollow else mark.colour for mark in marks]
    with mpl.rc_context(_STYLE):
        figure, axes = _map_axes()
        _dots(axes, places, len(places), c=faces, edgecolors=[mark.colour for mark in marks], linewidths=0.7)
        return _svg(figure, name, label)


def map_by_accuracy(
    places: Float[np.ndarray, "points 2"], accuracies: Float[np.ndarray, "points"], name: str, label: str
) -> str:
    """Draws the map coloured by accuracy, models without one in grey."""
    known = np.isfinite(accuracies)
    with mpl.rc_context(_STYLE):
        figure, axes = _map_axes()
        _dots(axes, places[~known], len(places), c=_UNKNOWN, linewidths=0)
        points = _dots(axes, places[known], len(places), c=accuracies[known], cmap=SCALE, linewidths=0)
        if known.any():
            scale = figure.colorbar(points, ax=axes, orientation="horizontal", shrink=0.6, aspect=32, pad=0.03)
            scale.outline.set_visible(False)
            scale.set_label("accuracy")
            scale.solids.set_rasterized(True)  # type: ignore[union-attr]
        return _svg(figure, name, label)


def _map_axes() -> tuple[Figure, Axes]:
    figure, axes = _figure(4.8, 4.6)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _dots(axes: Axes, places: np.ndarray, points: int, **style: Any) -> PathCollection:
    """Draws some of the points of a map; the more there are, the smaller they are."""
    size = float(np.clip(9000 / max(points, 1), 8, 40))
    return axes.scatter(places[:, 0], places[:, 1], s=size, rasterized=points > MAX_VECTOR_POINTS, **style)


def predicted_true(
    true: Float[np.ndarray, "models"], predicted: Float[np.ndarray, "models"], name: str, label: str
) -> tuple[str, int]:
    """Draws predicted against true with the diagonal.

    A probe can be off by powers of ten, so the axes show the range of the true numbers and half of it on either side.

    Returns:
        The SVG, and how many points lie outside of it.
    """
    low, high = float(true.min()), float(true.max())
    margin = (high - low) / 2 or 0.5
    inside = (predicted >= low - margin) & (predicted <= high + margin)
    seen = np.concatenate([true, predicted[inside]])
    room = 0.04 * float(np.ptp(seen)) or 0.5
    limits = (float(seen.min()) - room, float(seen.max()) + room)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.3, 3.3)
        axes.plot(limits, limits, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        many = len(true) > MAX_VECTOR_POINTS
        colour = _FIXED if many else _ACCENT
        axes.scatter(true[inside], predicted[inside], s=11, c=colour, alpha=0.55, linewidths=0, rasterized=many)
        axes.set(xlim=limits, ylim=limits, xlabel="true", ylabel="predicted", aspect="equal")
        axes.locator_params(nbins=5)
        return _svg(figure, name, label), int((~inside).sum())


def curves(lines: Mapping[str, tuple[Sequence[int | float], Sequence[int | float]]], name: str, label: str) -> str:
    """Draws up to ``MAX_CURVES`` curves over optimizer steps, the second one dashed.

    The scale is logarithmic where all values are positive and the largest is over 30 times the smallest.

    Args:
        lines: ``(steps, values)`` by name.
        name: keeps the plot's ids apart.
        label: for a reader who cannot see it.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.3, 2.1)
        for (steps, values), colour, dash in zip(lines.values(), (_ACCENT, _SECOND), ("-", (0, (5, 2))), strict=False):
            few = {"marker": "o", "markersize": 3} if len(steps) < 3 else {}
            axes.plot(steps, values, color=colour, linewidth=1.4, linestyle=dash, **few)  # type: ignore[arg-type]
        finite = [value for _, values in lines.values() for value in values if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) > 30 * min(finite):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        return _svg(figure, name, label)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, name: str, label: str) -> str:
    """Writes a figure as an SVG element that can stand in an HTML page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, dpi=200, metadata=nothing)
    text = file.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    keep = {one or other for one, other in used}
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in keep else "", body)
    body = body.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, f"var({variable})")
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}'
