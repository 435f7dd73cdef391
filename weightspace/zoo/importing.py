"""A folder of a user's own models becomes a zoo.

The folder is any tree of safetensors files (or folders that hold one checkpoint, sharded or an adapter) with a
``metadata.jsonl``: one JSON object a line whose ``file`` is a path inside the folder. Further keys, all optional:

- ``test_accuracy train_accuracy generalization_gap test_loss train_loss epoch step train_size``: numbers or null;
- ``results``: an object of further results;
- ``run`` or ``run_id``: groups the checkpoints of one training run; by default each model is its own run;
- ``model_id``, ``dataset``, ``task``, ``licence`` (or ``license``), ``base_model``: texts; ``lineage`` and
  ``datasets``: lists of texts;
- ``metrics``: a list of objects with name, value, and if known dataset, split and verified;
- ``ref``: where the model came from, by default the file;
- ``hyperparameters``: an object. Every other key is kept as a hyper-parameter too.

A ``config.json`` (or ``adapter_config.json``) beside the weights is kept as the model's config. A dataset that is a
folder is given relative to ``metadata.jsonl``.

Nothing outside of the folder is read: a model any of whose files is a link that leaves it is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tqdm.auto import tqdm

from weightspace.errors import UNFORESEEN, WeightspaceError, ZooError
from weightspace.io.checkpoint import ADAPTER_CONFIG, open_checkpoint
from weightspace.io.header import load_json_object, parse_header, shown
from weightspace.io.locations import parse_ref
from weightspace.schema import ModelRef, ReportedMetric, ZooEntry
from weightspace.zoo.storage import MAX_BLOB_BYTES, RESULTS, check_entry, check_finite, weights_schema
from weightspace.zoo.writer import Candidate, Skip, ZooSummary, ZooWriter, cut_shards

METADATA = "metadata.jsonl"

MAX_ROW_BYTES = 2**24
"""Longest row of an import folder's metadata."""

_BESIDE = ("config.json", ADAPTER_CONFIG)
_INDEXES = "*.index*.json"
_SOURCES = ("*.safetensors", _INDEXES, *_BESIDE)
_KEYS = {
    *("file", "model_id", "run_id", "run", "dataset", "licence", "license", "base_model", "lineage", "ref"),
    *("task", "datasets", "metrics"),
    *("results", "hyperparameters", *RESULTS),
}


def import_folder(
    folder: str | Path, output: str | Path, *, on_problem: Literal["skip", "error"] = "skip"
) -> ZooSummary:
    """Imports a folder of models into a new zoo, or continues an import that was killed.

    Refused are rows that cannot be read or have values of wrong types, rows without a file, files without a row, files
    named twice, paths and links that lead out of the folder, whatever is no regular file or no valid safetensors,
    models that no encoder can be given, and NaN or infinite weights.

    Args:
        folder: holds the models and ``metadata.jsonl``.
        output: folder of the zoo.
        on_problem: ``"skip"`` leaves out what is refused and lists it in the summary and in the zoo's ``skips.jsonl``;
            a broken row is named by its line. ``"error"`` checks everything first and raises before anything is
            written.

    Raises:
        ZooError: there is no ``metadata.jsonl`` or no model left, the output holds something else, the disk is full,
            or anything is refused under ``"error"``.
    """
    folder = Path(folder).expanduser().resolve()
    if not str(folder).isprintable():
        raise ZooError(f"{shown(str(folder))}: not a plain name of a folder; rename it")
    rows, problems = _read_metadata(folder)
    if on_problem == "error":
        for file, reason in (*problems, *(loaded for row in rows if isinstance(loaded := _load(folder, row), Skip))):
            raise ZooError(f"{folder}: {file}: {reason}; nothing was written")
    if not rows:
        first = "; ".join(f"{file}: {reason}" for file, reason in problems[:1]) or "it is empty"
        raise ZooError(f"{folder}/{METADATA}: names no model that can be imported ({first})")
    extra = {name for row in rows for name in row.entry.results} - set(RESULTS)
    writer = ZooWriter(output, settings=_settings(folder), results=(*RESULTS, *sorted(extra)))
    shards = cut_shards(rows, lambda row: row.size)
    with tqdm(total=len(rows), desc="import", unit="model", disable=None) as progress:
        load = partial(_load, folder)
        return writer.write_all(shards, lambda _, part: map(load, part), skipped=problems, progress=progress)


@dataclass(frozen=True)
class _Row:
    """A valid row whose file exists; its weights were not read yet."""

    file: str
    path: Path
    size: int
    entry: ZooEntry


def _settings(folder: Path) -> dict[str, Any]:
    """Identifies the content of the folder, so that a changed folder gives another zoo."""
    digest = hashlib.sha256()
    for path in sorted(_walk(folder)):
        if path != folder / METADATA and not any(fnmatch(path.name, pattern) for pattern in _SOURCES):
            continue
        content = ""
        with suppress(OSError):  # the model that needs it is refused
            if _obstacle(folder, path) is None:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(os.fsencode(path.relative_to(folder)) + f"\n{content}\n".encode())
    return {"imported_from": folder.name, "content": digest.hexdigest()[:16]}


def _walk(folder: Path) -> Iterator[Path]:
    """Yields what is in the tree of a folder and no folder itself; links to folders are not followed."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _obstacle(folder: Path, path: Path, *, kinds: Collection[int] = (stat.S_IFREG,)) -> str | None:
    """Says why a path must not be opened, or returns None: it lies in the folder and is a regular file."""
    try:
        if not path.resolve(strict=True).is_relative_to(folder):
            return "is a link out of the folder; copy the file into it"
        return None if stat.S_IFMT(path.stat().st_mode) in kinds else "is no regular file; take it out"
    except FileNotFoundError:
        return "is a link to nothing; fetch the file" if path.is_symlink() else "is missing: there is no such file"
    except RuntimeError:  # what resolving raises for links in a circle
        return "is a link in a circle; take it out"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _lines(folder: Path) -> Iterator[bytes]:
    """Yields the lines of the metadata; one that is too long is cut at one byte above the limit."""
    try:
        if os.path.lexists(folder / METADATA) and (obstacle := _obstacle(folder, folder / METADATA)):
            raise ZooError(f"{folder}: {METADATA} {obstacle}")
        with (folder / METADATA).open("rb") as file:
            while line := file.readline(MAX_ROW_BYTES + 1):
                rest = line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_ROW_BYTES + 1)
                yield line
    except OSError as error:
        raise ZooError(
            f"{folder}: cannot read {METADATA} ({error.strerror}); an import folder needs one, a JSON object a line"
        ) from error


def _read_metadata(folder: Path) -> tuple[list[_Row], list[Skip]]:
    """Reads all rows; also returns the rows and files that are refused before their weights are read."""
    rows: list[_Row] = []
    problems: list[Skip] = []
    named: set[Path] = set()
    files: dict[PurePosixPath, int] = {}
    model_ids: dict[str, int] = {}
    for number, line in enumerate(_lines(folder), start=1):
        if not line.strip():
            continue
        name = f"{METADATA}:{number}"
        try:
            if len(line) > MAX_ROW_BYTES:
                raise ZooError(f"the row is longer than {MAX_ROW_BYTES} bytes; shorten it")
            values = load_json_object(line.removeprefix(BOM_UTF8), where="the row")
            file = _text(values, "file")
            if file is None:
                raise ZooError("the row has no 'file'")
            first = files.setdefault(PurePosixPath(file), number)
            if first != number:
                raise ZooError(f"{shown(file)} stands in line {first} already")
            name = file
            named.add(folder / file)
            path = _path_inside(folder, file)
            named.update(_files(path))
            entry = _entry(values, file, path, folder)
            first = model_ids.setdefault(entry.model_id, number)
            if first != number:
                raise ZooError(f"model_id {shown(entry.model_id)} stands in line {first} already")
        except WeightspaceError as error:
            problems.append(Skip(name, str(error)))
        else:
            rows.append(_Row(file, path, sum(part.stat().st_size for part in _files(path) if part.is_file()), entry))
    for path in sorted(_walk(folder)):
        if path.name.endswith(".safetensors") and path not in named:
            if not _obstacle(folder, path) and path.resolve() in named:
                continue
            relative = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
            problems.append(Skip(relative, f"no row of {METADATA} names it"))
    return rows, problems


def _files(path: Path) -> list[Path]:
    """The safetensors files of the model at ``path``: all in its folder for an index."""
    if path.suffix == ".safetensors":
        return [path]
    return list((path if path.is_dir() else path.parent).glob("*.safetensors"))


def _path_inside(folder: Path, file: str) -> Path:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        raise ZooError(f"{shown(file)} leads out of the folder; give a relative path without '..'")
    path = folder / pure
    if obstacle := _obstacle(folder, path, kinds=(stat.S_IFREG, stat.S_IFDIR)):
        raise ZooError(f"{shown(file)} {obstacle}")
    path = path.resolve()
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise ZooError("it is no safetensors file; convert it or take out its row")
    return path


def _entry(row: Mapping[str, Any], file: str, path: Path, folder: Path) -> ZooEntry:
    model_id = _text(row, "model_id") or str(PurePosixPath(file)).removesuffix(".safetensors")
    results = {**{name: row.get(name) for name in RESULTS}, **_object(row, "results")}
    if taken := results.keys() & set(weights_schema(()).names):
        raise ZooError(f"{min(taken)!r} cannot be a result, the zoo format uses it; rename it")
    others = {key: value for key, value in row.items() if key not in _KEYS}
    return ZooEntry(
        model_id=model_id,
        run_id=_text(row, "run_id", "run") or model_id,
        ref=_ref(row.get("ref"), path),
        dataset=_dataset(_text(row, "dataset"), folder),
        results={name: _number(name, value) for name, value in results.items() if value is not None},
        hyperparameters={**others, **_object(row, "hyperparameters")},
        licence=_text(row, "licence", "license"),
        base_model=_text(row, "base_model"),
        lineage=_texts(row, "lineage"),
        task=_text(row, "task"),
        datasets=_texts(row, "datasets"),
        metrics=_metrics(() if row.get("metrics") is None else row["metrics"]),
    )


def _text(row: Mapping[str, Any], *keys: str) -> str | None:
    """The value of the first key that has one; an integer is taken as a name too."""
    key, value = next(((key, row[key]) for key in keys if row.get(key) is not None), (keys[0], None))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and (not isinstance(value, str) or not value or not value.isprintable()):
        raise ZooError(f"{key} must be a text, got {shown(value)}")
    return value


def _dataset(dataset: str | None, folder: Path) -> str | None:
    """Makes the folder in a dataset id absolute: the zoo is used from other folders than this."""
    base, mark, options = (dataset or "").partition("?")
    path = Path(base).expanduser()
    if base == "digits" or not base.strip("./") or path.is_absolute():
        return dataset
    with suppress(OSError, ValueError):
        if (folder / path).is_dir():
            return f"{(folder / path).resolve()}{mark}{options}"
    return dataset


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = [] if row.get(key) is None else row[key]
    if not isinstance(values, list) or not all(isinstance(value, str) and value.isprintable() for value in values):
        raise ZooError(f"{key} must be a list of texts, got {shown(values)}")
    return tuple(values)


def _object(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key)
    if value is not None and not isinstance(value, dict):
        raise ZooError(f"{key} must be an object, got {shown(value)}")
    return value or {}


def _metrics(values: Any) -> tuple[ReportedMetric, ...]:
    try:
        metrics = tuple(ReportedMetric(**value) for value in values)
    except TypeError as error:
        raise ZooError(f"metrics must be a list of objects with name and value, got {shown(values)}") from error
    for metric in metrics:
        texts = (metric.name, metric.dataset or "", metric.split or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(metric.value, str | float | int):
            raise ZooError(f"metrics must have texts and a number or a text as value, got {shown(values)}")
        if isinstance(metric.value, int):
            _number(metric.name, int(metric.value))  # fits a float
    return metrics


def _number(name: str, value: Any) -> float:
    if not name or not name.isprintable():
        raise ZooError(f"{shown(name)} cannot be the name of a result")
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise ZooError(f"{name} must be a number or null, got {shown(value)}")


def _ref(value: Any, path: Path) -> ModelRef:
    if value is None or isinstance(value, str):
        return ModelRef(str(path)) if value is None else parse_ref(value)
    parts = _object({"ref": value}, "ref")
    location = _text(parts, "location")
    if location is None or parts.keys() - {"location", "revision", "subfolder"}:
        raise ZooError(f"ref must have location, revision and subfolder, got {shown(value)}")
    return ModelRef(location, _text(parts, "revision"), _text(parts, "subfolder"))


def _load(folder: Path, row: _Row) -> Candidate:
    """Reads and checks the weights of one model."""
    try:
        if row.size > MAX_BLOB_BYTES:
            raise ZooError(f"{row.size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")
        parent = row.path if row.path.is_dir() else row.path.parent
        beside = [parent / name for name in _BESIDE] + [*parent.glob(_INDEXES)]
        for path in filter(os.path.lexists, [*_files(row.path), *beside]):
            if obstacle := _obstacle(folder, path):
                raise ZooError(f"{path.name} {obstacle}")
        source = open_checkpoint(row.path)
        weights = Path(source.where)
        blob = source.to_bytes() if len(source.sources) > 1 else Path(source.sources[0].where).read_bytes()
        check_entry(source)
        check_finite(blob, parse_header(blob, file_size=len(blob), where=row.file))
    except OSError as error:
        return Skip(row.file, f"cannot be read ({error.strerror}); fetch it again")
    except WeightspaceError as error:
        return Skip(row.file, str(error))
    except UNFORESEEN as error:
        return Skip(row.file, f"{type(error).__name__}: {shown(str(error))}")
    is_adapter = weights.name.startswith("adapter_model") and source.config is None
    return replace(row.entry, config=source.adapter_config if is_adapter else source.config), blob
