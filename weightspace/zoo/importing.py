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

A ``config.json`` (or ``adapter_config.json``) beside the weights is kept as the model's config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tqdm.auto import tqdm

from weightspace.errors import WeightspaceError, ZooError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import load_json_object, parse_header, shown
from weightspace.io.locations import parse_ref
from weightspace.schema import ModelRef, ReportedMetric, ZooEntry
from weightspace.zoo.storage import MAX_BLOB_BYTES, RESULTS, check_finite, weights_schema
from weightspace.zoo.writer import Candidate, Skip, ZooSummary, ZooWriter, cut_shards

METADATA = "metadata.jsonl"

_SOURCES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
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
    named twice, paths that lead out of the folder, files that are no valid safetensors, and NaN or infinite weights.

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
    rows, problems = _read_metadata(folder)
    if on_problem == "error":
        for file, reason in (*problems, *(loaded for row in rows if isinstance(loaded := _load(row), Skip))):
            raise ZooError(f"{folder}: {file}: {reason}; nothing was written")
    if not rows:
        first = "; ".join(f"{file}: {reason}" for file, reason in problems[:1]) or "it is empty"
        raise ZooError(f"{folder}/{METADATA}: names no model that can be imported ({first})")
    extra = {name for row in rows for name in row.entry.results} - set(RESULTS)
    writer = ZooWriter(output, settings=_settings(folder), results=(*RESULTS, *sorted(extra)))
    shards = cut_shards(rows, lambda row: row.size)
    with tqdm(total=len(rows), desc="import", unit="model", disable=None) as progress:
        return writer.write_all(shards, lambda _, part: map(_load, part), skipped=problems, progress=progress)


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
    for path in sorted({folder / METADATA, *(path for pattern in _SOURCES for path in folder.rglob(pattern))}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode())
    return {"imported_from": folder.name, "content": digest.hexdigest()[:16]}


def _read_metadata(folder: Path) -> tuple[list[_Row], list[Skip]]:
    """Reads all rows; also returns the rows and files that are refused before their weights are read."""
    try:
        lines = (folder / METADATA).read_bytes().splitlines()
    except OSError as error:
        raise ZooError(
            f"{folder}: cannot read {METADATA} ({error.strerror}); an import folder needs one, a JSON object a line"
        ) from error
    rows: list[_Row] = []
    problems: list[Skip] = []
    named: set[Path] = set()
    files: dict[PurePosixPath, int] = {}
    model_ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{METADATA}:{number}"
        try:
            values = load_json_object(line, where="the row")
            file = _text(values, "file")
            if file is None:
                raise ZooError("the row has no 'file'")
            first = files.setdefault(PurePosixPath(file), number)
            if first != number:
                raise ZooError(f"{shown(file)} stands in line {first} already")
            name = file
            path = _path_inside(folder, file)
            named.update(_files(path))
            entry = _entry(values, file, path)
            first = model_ids.setdefault(entry.model_id, number)
            if first != number:
                raise ZooError(f"model_id {shown(entry.model_id)} stands in line {first} already")
        except WeightspaceError as error:
            problems.append(Skip(name, str(error)))
        else:
            rows.append(_Row(file, path, sum(part.stat().st_size for part in _files(path)), entry))
    for path in sorted(folder.rglob("*.safetensors")):
        if path.resolve() not in named:
            problems.append(Skip(path.relative_to(folder).as_posix(), f"no row of {METADATA} names it"))
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
    try:
        path = (folder / pure).resolve()
        exists = path.exists()
    except OSError as error:
        raise ZooError(f"{shown(file)} cannot be read ({error.strerror})") from error
    if not path.is_relative_to(folder):
        raise ZooError(f"{shown(file)} is a link out of the folder; copy the file into it")
    if not exists:
        raise ZooError("there is no such file; fetch it or take out its row")
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise ZooError("it is no safetensors file; convert it or take out its row")
    return path


def _entry(row: Mapping[str, Any], file: str, path: Path) -> ZooEntry:
    model_id = _text(row, "model_id") or str(PurePosixPath(file)).removesuffix(".safetensors")
    results = {**{name: row.get(name) for name in RESULTS}, **_object(row, "results")}
    if taken := results.keys() & set(weights_schema(()).names):
        raise ZooError(f"{min(taken)!r} cannot be a result, the zoo format uses it; rename it")
    others = {key: value for key, value in row.items() if key not in _KEYS}
    return ZooEntry(
        model_id=model_id,
        run_id=_text(row, "run_id", "run") or model_id,
        ref=_ref(row.get("ref"), path),
        dataset=_text(row, "dataset"),
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


def _load(row: _Row) -> Candidate:
    """Reads and checks the weights of one model."""
    try:
        if row.size > MAX_BLOB_BYTES:
            raise ZooError(f"{row.size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")
        source = open_checkpoint(row.path)
        weights = Path(source.where)
        blob = source.to_bytes() if len(source.sources) > 1 else weights.read_bytes()
        adapter = weights.with_name("adapter_config.json")
        config = source.config
        if config is None and weights.name.startswith("adapter_model") and adapter.is_file():
            config = load_json_object(adapter.read_bytes(), where=adapter.name)
        check_finite(blob, parse_header(blob, file_size=len(blob), where=row.file))
    except OSError as error:
        return Skip(row.file, f"cannot be read ({error.strerror}); fetch it again")
    except WeightspaceError as error:
        return Skip(row.file, str(error))
    return replace(row.entry, config=config), blob
