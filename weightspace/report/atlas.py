"""The atlas: every model of a zoo as one dot on an interactive page that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.colors import to_hex
from sklearn.neighbors import KNeighborsRegressor

from weightspace.encoder import embed_zoo, load_encoder
from weightspace.errors import ZooError
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.io.locations import is_repo_id
from weightspace.report import plots
from weightspace.report.legend import MAX_DATASETS, dataset_legend
from weightspace.report.numbers import environment
from weightspace.stats.clustering import nearest
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.storage import reading, write_text

NEIGHBOURS = 10
"""Nearest neighbours that the page lists for each model."""

MAX_COLUMNS = 40
"""Columns that the page shows unless they are named; those known of the most models stay."""

# The time of t-SNE grows faster than the zoo: this many models take seconds, 20,000 take minutes.
_LANDMARKS = 5000
_ANCHORS = 3
# A column whose spread is below this share of its size holds rounding errors only.
_LEAST_SPREAD = 1e-6
_MAX_TEXT = 200
_SHADES = 64
_NAME, _EMBEDDING = "model_id", "embedding"
_JSON_OBJECTS = ("hyperparameters", "config")
# Digests and addresses that no reader compares; the link to the Hub is made from them.
_UNSHOWN = ("header", "content", "revision", "subfolder")
_EMPTY = ("", "[]", "{}")
_PINNED = re.compile(r"([^@:]+)@([0-9a-f]{40})(?![^:])")

Value: TypeAlias = str | int | float | bool


@dataclass(frozen=True, eq=False)
class Atlas:
    """Models in the plane, with what is known of each and which others are like it.

    Attributes:
        title: what the models are.
        names: one a model; not necessarily unique.
        pages: address of each model's page on the Hub, or None.
        columns: what is known: a value a model, or None, by name.
        left_out_columns: how many columns beyond these there are.
        places: coordinates between -1 and 1, which have no unit.
        method: how the models were placed.
        neighbours: row numbers of each model's nearest neighbours, nearest first.
        distances: cosine distance to each, from 0 to 2.
        left_out: models that could not be placed because their embedding holds NaN or Inf.
    """

    title: str
    names: Sequence[str]
    pages: Sequence[str | None]
    columns: Mapping[str, Sequence[Value | None]]
    left_out_columns: int
    places: Float[np.ndarray, "models 2"]
    method: str
    neighbours: Int[np.ndarray, "models neighbours"]
    distances: Float[np.ndarray, "models neighbours"]
    left_out: int


def embedded_models(
    location: str | Path, encoder: str | Path | None = None, options: HubOptions | None = None
) -> pd.DataFrame:
    """Returns one row a model with its ``embedding``.

    Args:
        location: a zoo, which is embedded now, or the parquet file that ``weightspace embed`` wrote.
        encoder: folder of the encoder, or ``org/name`` on the Hub; for a zoo only.
        options: how the Hub is reached.

    Raises:
        WeightspaceError: there is nothing to read, or the encoder is missing or one too many.
    """
    if Path(location).is_file():
        if encoder is not None:
            raise ZooError(f"{location}: holds embeddings already; leave out the encoder, or give a zoo")
        with reading(location):
            frame: pd.DataFrame = pq.read_table(location).to_pandas()
        for name in (_NAME, _EMBEDDING):
            if name not in frame:
                raise ZooError(f"{location}: no column {name!r}; give a file that `weightspace embed` wrote")
        return frame
    if encoder is None:
        raise ZooError(f"{location}: a zoo needs an encoder; name one, or give a file that `weightspace embed` wrote")
    zoo = load_zoo(location).usable()
    return zoo.index.assign(embedding=list(embed_zoo(load_encoder(encoder, options), zoo)))


def build_atlas(models: pd.DataFrame, title: str, columns: Sequence[str] | None = None, seed: int = 0) -> Atlas:
    """Places models and finds their neighbours, both by standardised embeddings.

    Args:
        models: one row a model with ``model_id``, ``embedding`` and anything else; what ``hyperparameters`` and
            ``config`` hold as JSON objects becomes columns too.
        title: heading of the page.
        columns: what to show, in this order; by default everything that is known of some model.
        seed: draws the models that are placed first, and is that of t-SNE.

    Raises:
        ZooError: no model has a finite embedding, embeddings differ in length, or a column is unknown.
    """
    embeddings = _stacked(models[_EMBEDDING])
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.any():
        raise ZooError(f"{title}: none of {len(models)} models has a finite embedding; embed the zoo again")
    models, embeddings = models[finite].reset_index(drop=True), _standardised(embeddings[finite])
    places, method = _placed(embeddings, seed)
    neighbours, distances = nearest_neighbours(embeddings)
    known, left_out_columns = _known(models, columns)
    return Atlas(
        title=title,
        names=[_text(name) for name in models[_NAME]],
        pages=_hub_pages(models),
        columns=known,
        left_out_columns=left_out_columns,
        places=places,
        method=method,
        neighbours=neighbours,
        distances=distances,
        left_out=int((~finite).sum()),
    )


def write_atlas(atlas: Atlas, path: str | Path) -> Path:
    """Writes the page, whole or not at all; it asks for nothing from outside, and all texts in it are escaped.

    Raises:
        ZooError: the file cannot be written.
    """
    path = Path(path)
    script = files("weightspace.report").joinpath("templates/atlas.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        environment(escape=True)
        .get_template("atlas.html")
        .render(
            title=atlas.title,
            models=len(atlas.names),
            method=atlas.method,
            left_out=atlas.left_out,
            left_out_columns=atlas.left_out_columns,
            script=Markup(script),
            script_digest=digest,
            records=Markup(_inert_json(_records(atlas))),
        )
    )
    write_text(path, page)
    return path


def nearest_neighbours(
    embeddings: Float[np.ndarray, "models d"], count: int = NEIGHBOURS
) -> tuple[Int[np.ndarray, "models neighbours"], Float[np.ndarray, "models neighbours"]]:
    """Finds the nearest other models of each by cosine distance, exactly; ties go to the lower row.

    Zero vectors, which have no direction, count as equal to each other and unlike all others.

    Args:
        embeddings: one row a model, finite.
        count: neighbours at most.

    Returns:
        Row numbers and distances, nearest first.
    """
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    zero = norms == 0
    directions = np.hstack([embeddings / np.where(zero, 1, norms), zero]).astype(np.float32)
    neighbours = nearest(directions, count=count)
    cosines = [np.einsum("md,md->m", directions, directions[column]) for column in neighbours.T]
    distances = np.clip(1 - np.stack([*cosines, np.zeros(len(directions))], axis=1), 0, 2)
    return neighbours, distances[:, :-1].astype(np.float32)


# --- places ----------------------------------------------------------------------------------------------------------


def _stacked(embeddings: pd.Series) -> Float[np.ndarray, "models d"]:
    sizes = sorted({np.size(one) for one in embeddings})
    if len(sizes) != 1 or not sizes[0]:
        raise ZooError(f"embeddings: of sizes {shown(sizes)}, not of one; embed all models with one encoder")
    return np.stack([np.asarray(one, dtype=np.float64) for one in embeddings])


def _standardised(embeddings: Float[np.ndarray, "models d"]) -> Float[np.ndarray, "models d"]:
    """Brings each column to mean 0 and variance 1; constant columns become 0."""
    largest = np.abs(embeddings).max(axis=0)
    shares = embeddings / np.where(largest > 0, largest, 1)  # whose squares cannot overflow
    spread = shares.std(axis=0)
    varied = spread > _LEAST_SPREAD
    return np.where(varied, (shares - shares.mean(axis=0)) / np.where(varied, spread, 1), 0.0)


def _placed(embeddings: Float[np.ndarray, "models d"], seed: int) -> tuple[Float[np.ndarray, "models 2"], str]:
    """Places a sample by t-SNE, and every other model among its nearest of the sample."""
    points = plots.place_models(embeddings, _LANDMARKS, seed)
    places = np.zeros((len(embeddings), 2))
    places[points.rows] = points.places
    others = np.setdiff1d(np.arange(len(embeddings)), points.rows)
    method = points.method
    if len(others):
        anchors = KNeighborsRegressor(_ANCHORS, weights=lambda away: 1 / np.maximum(np.square(away), 1e-12))
        places[others] = anchors.fit(embeddings[points.rows], points.places).predict(embeddings[others])
        method += f" of {len(points.rows):,} models, the others among their nearest of these"
    places -= (places.min(axis=0) + places.max(axis=0)) / 2
    extent = np.abs(places).max()
    return places / extent if extent > 0 else places, method


# --- what is known ---------------------------------------------------------------------------------------------------


def _known(models: pd.DataFrame, chosen: Sequence[str] | None) -> tuple[dict[str, list[Value | None]], int]:
    """Collects the columns to show, and counts those that found no room."""
    known: dict[str, dict[int, Value]] = {}
    for name in map(str, models.columns):
        if name in (_NAME, _EMBEDDING):
            continue
        if name not in _JSON_OBJECTS:
            known[name] = {row: value for row, one in enumerate(models[name]) if (value := _value(one)) is not None}
            continue
        for inner, values in _taken_apart(models[name]).items():
            taken = inner in models or known.get(inner, values) != values
            known[f"{name}.{inner}" if taken else inner] = values
    for name in chosen or ():
        if name not in known:
            raise ZooError(
                f"column {name!r}: not known of these models; choose from {', '.join(list(known)[:MAX_COLUMNS])}"
            )
    filled = [name for name in known if known[name] and name not in _UNSHOWN]
    kept = set(sorted(filled, key=lambda name: -len(known[name]))[:MAX_COLUMNS])
    names = [name for name in filled if name in kept] if chosen is None else chosen
    columns = {name: [known[name].get(row) for row in range(len(models))] for name in names}
    return columns, 0 if chosen is not None else len(filled) - len(kept)


def _taken_apart(objects: pd.Series) -> dict[str, dict[int, Value]]:
    """Turns JSON objects, one a model, into columns: values by row, so that rare keys cost little."""
    columns: dict[str, dict[int, Value]] = {}
    for row, text in enumerate(objects):
        try:
            fields = json.loads(text) if isinstance(text, str) else text
        except (ValueError, RecursionError):
            continue
        for name, one in fields.items() if isinstance(fields, dict) else ():
            value = _value(one)
            if value is not None:
                columns.setdefault(name, {})[row] = value
    return columns


def _value(value: Any) -> Value | None:
    """Makes a number, a truth value, a text or None of a value; lists and objects become text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= 2**53 else str(value)
    if isinstance(value, bool | float):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if isinstance(value, list | tuple | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return None if str(value) in _EMPTY else str(value)


def _text(value: Any) -> str:
    """Escapes what does not print, which could turn the letters around it, and cuts what no card has room for."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    text = text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}\N{HORIZONTAL ELLIPSIS}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _hub_pages(models: pd.DataFrame) -> list[str | None]:
    """Finds the models that are pinned to a commit on the Hub; anything else could be a folder of the same name."""
    pages: list[str | None] = [None] * len(models)
    for column, revision in (("ref", "revision"), ("location", None)):
        if column not in models or (revision and revision not in models):
            continue
        suffixes = [f"@{one}" for one in models[revision]] if revision else [""] * len(models)
        for row, (place, suffix) in enumerate(zip(models[column], suffixes, strict=True)):
            match = _PINNED.match(f"{place}{suffix}")
            if match and is_repo_id(match[1]):
                pages[row] = f"https://huggingface.co/{match[1]}/tree/{match[2]}"
    return pages


# --- page ------------------------------------------------------------------------------------------------------------


def _records(atlas: Atlas) -> dict[str, Any]:
    return {
        "names": list(atlas.names),
        "pages": _coded(atlas.pages) if any(atlas.pages) else None,
        "places": _packed(atlas.places.astype(np.float32)),
        "neighbours": _packed(_smallest(atlas.neighbours)),
        "distances": _packed(atlas.distances.astype(np.float32)),
        "columns": [_column(name, values) for name, values in atlas.columns.items()],
        "shades": [to_hex(plots.SCALE(share)) for share in np.linspace(0, 1, _SHADES)],
    }


def _column(name: str, values: Sequence[Value | None]) -> dict[str, Any]:
    """Writes a column as packed numbers, or as texts with the number of each model's text.

    Texts that something can be coloured by have marks: the first texts have one each, all others share grey.
    """
    label = {"name": _text(name)}
    numbers = [value for value in values if value is not None]
    if numbers and all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        exact = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        with np.errstate(over="ignore"):
            short = exact.astype(np.float32)
        return label | {"numbers": _packed(short if np.array_equal(short, exact, equal_nan=True) else exact)}
    texts = [None if value is None else _text(value) for value in values]
    known = [text for text in texts if text is not None]
    if not 1 < len(set(known)) < len(known):
        return label | _coded(texts) | {"marks": []}
    legend = dataset_legend(known)
    marked = list(legend.marks)[: MAX_DATASETS - 1 if len(legend.marks) > MAX_DATASETS else None]
    marks = [[legend.marks[text].colour, legend.marks[text].hollow] for text in marked]
    return label | _coded(texts, marked) | {"marks": marks}


def _coded(texts: Sequence[str | None], first: Sequence[str] = ()) -> dict[str, Any]:
    """Numbers the texts, those of ``first`` before all others; None has the number after the last."""
    levels = list(dict.fromkeys([*first, *(text for text in texts if text is not None)]))
    numbers: dict[str | None, int] = {text: number for number, text in enumerate(levels)} | {None: len(levels)}
    codes = np.array([numbers[text] for text in texts], dtype=np.int64)
    return {"levels": levels, "codes": _packed(_smallest(codes))}


def _smallest(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.min_scalar_type(int(codes.max(initial=0))))


def _packed(values: np.ndarray) -> dict[str, str]:
    """Writes numbers as the bytes of a typed array, which a browser reads many times faster than digits."""
    little = values.astype(values.dtype.newbyteorder("<"))
    kind = f"{little.dtype.kind}{little.dtype.itemsize}"
    return {"type": kind, "bytes": base64.b64encode(little.tobytes()).decode()}


def _inert_json(value: Any) -> str:
    """Writes JSON in ASCII without a character that could end the element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
