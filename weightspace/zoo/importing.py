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
from collections.abc import Iterator, Mapping, Sequence
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
from weightspace.zoo.content import check_finite
from weightspace.zoo.storage import MAX_BLOB_BYTES, RESULTS, weights_schema
from weightspace.zoo.writer import ZooWriter

METADATA = "metadata.jsonl"

_SHARD_MODELS, _SHARD_BYTES = 1024, 256 * 2**20
_SOURCES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
_KEYS = {
    *("file", "model_id", "run_id", "run", "dataset", "licence", "license", "base_model", "lineage", "ref"),
    *("task", "datasets", "metrics"),
    *("results", "hyperparameters", *RESULTS),
}


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

    Attributes:
        models: models in the zoo.
        skipped: ``(file, reason)`` of everything that is not; a broken row is named by its line.
    """

    models: int
    skipped: tuple[tuple[str, str], ...]


def import_folder(
    folder: str | Path, output: str | Path, *, on_problem: Literal["skip", "error"] = "skip"
) -> ImportSummary:
    """Imports a folder of models into a new zoo, or goes on with an import that was killed.

    Refused are rows that cannot be read or have values of wrong types, rows without a file, files without a row, files
    named twice, paths that lead out of the folder, files that are no valid safetensors, and NaN or infinite weights.

    Args:
        folder: holds the models and ``metadata.jsonl``.
        output: folder of the zoo.
        on_problem: ``"skip"`` leaves out what is refused and lists it in the summary and in the zoo's ``skips.jsonl``;
            ``"error"`` checks everything first and raises before anything is written.

    Raises:
        ZooError: there is no ``metadata.jsonl`` or no model left, the output holds something else, the disk is full,
            or anything is refused under ``"error"``.
    """
    folder = Path(folder).expanduser().resolve()
    candidates, problems = _read_metadata(folder)
    if on_problem == "error":
        _refuse_all(folder, candidates, problems)
    if not candidates:
        first = "; ".join(f"{file}: {reason}" for file, reason in problems[:1]) or "it is empty"
        raise ZooError(f"{folder}/{METADATA}: names no model that can be imported ({first})")
    extra = {name for candidate in candidates for name in candidate.entry.results} - set(RESULTS)
    writer = ZooWriter(output, settings=_settings(folder), results=(*RESULTS, *sorted(extra)))
    with tqdm(total=len(candidates), desc="import", unit="model", disable=None) as progress:
        for number, part in enumerate(_shards(candidates)):
            if not writer.has_shard(name := f"{number:05d}"):
                # What is wrong with the folder as a whole is recorded with the first shard.
                _import_shard(writer, name, part, problems if number == 0 else [])
            progress.update(len(part))
    writer.finish()
    return ImportSummary(writer.models, writer.skipped)


@dataclass(frozen=True)
class _Candidate:
    """A row whose values are right and whose file exists; its weights were not read yet."""

    file: str
    path: Path
    size: int
    entry: ZooEntry


def _refuse_all(folder: Path, candidates: Sequence[_Candidate], problems: Sequence[tuple[str, str]]) -> None:
    for file, reason in problems:
        raise ZooError(f"{folder}: {file}: {reason}; nothing was written")
    for candidate in candidates:
        try:
            _load(candidate)
        except WeightspaceError as error:
            raise ZooError(f"{folder}: {candidate.file}: {error}; nothing was written") from error


def _import_shard(
    writer: ZooWriter, name: str, candidates: Sequence[_Candidate], problems: Sequence[tuple[str, str]]
) -> None:
    entries, blobs, skipped = [], [], list(problems)
    for candidate in candidates:
        try:
            entry, blob = _load(candidate)
        except WeightspaceError as error:
            skipped.append((candidate.file, str(error)))
        else:
            entries.append(entry)
            blobs.append(blob)
    writer.write_shard(name, entries, blobs, skipped=skipped)


def _shards(candidates: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
    part: list[_Candidate] = []
    size = 0
    for candidate in candidates:
        if part and (len(part) == _SHARD_MODELS or size + candidate.size > _SHARD_BYTES):
            yield part
            part, size = [], 0
        part.append(candidate)
        size += candidate.size
    yield part


def _settings(folder: Path) -> dict[str, Any]:
    """What the zoo follows from: a folder that changed is another zoo."""
    digest = hashlib.sha256((folder / METADATA).read_bytes())
    for path in sorted(path for pattern in _SOURCES for path in folder.rglob(pattern)):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return {"imported_from": folder.name, "content": digest.hexdigest()[:16]}


def _read_metadata(folder: Path) -> tuple[list[_Candidate], list[tuple[str, str]]]:
    """Reads all rows, and names every row and file that is refused before its weights are looked at."""
    try:
        lines = (folder / METADATA).read_bytes().splitlines()
    except OSError as error:
        raise ZooError(
            f"{folder}: cannot read {METADATA} ({error.strerror}); an import folder needs one, a JSON object a line"
        ) from error
    candidates: list[_Candidate] = []
    problems: list[tuple[str, str]] = []
    named: set[Path] = set()
    files: dict[PurePosixPath, int] = {}
    model_ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{METADATA}:{number}"
        try:
            row = load_json_object(line, where="the row")
            file = _text(row, "file")
            if file is None:
                raise ZooError("the row has no 'file'")
            first = files.setdefault(PurePosixPath(file), number)
            if first != number:
                raise ZooError(f"{shown(file)} stands in line {first} already")
            name = file
            path = _path_inside(folder, file)
            named.update(_files(path))
            candidate = _candidate(row, file, path)
            first = model_ids.setdefault(candidate.entry.model_id, number)
            if first != number:
                raise ZooError(f"model_id {shown(candidate.entry.model_id)} stands in line {first} already")
        except WeightspaceError as error:
            problems.append((name, str(error)))
        else:
            candidates.append(candidate)
    for path in sorted(folder.rglob("*.safetensors")):
        if path.resolve() not in named:
            problems.append((path.relative_to(folder).as_posix(), f"no row of {METADATA} names it"))
    return candidates, problems


def _files(path: Path) -> list[Path]:
    """The safetensors files that a row speaks for when it names ``path``: all in its folder for an index."""
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


def _candidate(row: Mapping[str, Any], file: str, path: Path) -> _Candidate:
    model_id = _text(row, "model_id") or str(PurePosixPath(file)).removesuffix(".safetensors")
    results = {**{name: row.get(name) for name in RESULTS}, **_object(row, "results")}
    if taken := results.keys() & set(weights_schema(()).names):
        raise ZooError(f"{min(taken)!r} cannot be a result, the zoo format uses it; rename it")
    entry = ZooEntry(
        model_id=model_id,
        run_id=_text(row, "run_id", "run") or model_id,
        ref=_ref(row.get("ref"), path),
        dataset=_text(row, "dataset"),
        results={name: _number(name, value) for name, value in results.items() if value is not None},
        hyperparameters={
            **{key: value for key, value in row.items() if key not in _KEYS},
            **_object(row, "hyperparameters"),
        },
        licence=_text(row, "licence", "license"),
        base_model=_text(row, "base_model"),
        lineage=_texts(row, "lineage"),
        task=_text(row, "task"),
        datasets=_texts(row, "datasets"),
        metrics=_metrics(row),
    )
    return _Candidate(file, path, sum(part.stat().st_size for part in _files(path)), entry)


def _text(row: Mapping[str, Any], *keys: str) -> str | None:
    """The value of the first key that has one; a whole number is taken as a name too."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise ZooError(f"{key} must be a text, got {shown(value)}")
        return value
    return None


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) and value.isprintable() for value in values):
        raise ZooError(f"{key} must be a list of texts, got {shown(values)}")
    return tuple(values)


def _metrics(row: Mapping[str, Any]) -> tuple[ReportedMetric, ...]:
    values = row.get("metrics")
    if values is None:
        return ()
    try:
        metrics = tuple(ReportedMetric(**value) for value in values)
    except TypeError as error:
        raise ZooError(f"metrics must be a list of objects with name and value, got {shown(values)}") from error
    for metric in metrics:
        texts = (metric.name, metric.dataset or "", metric.split or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(metric.value, str | float | int):
            raise ZooError(f"metrics must have texts and a number or a text as value, got {shown(values)}")
    return metrics


def _object(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ZooError(f"{key} must be an object, got {shown(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if not name or not name.isprintable():
        raise ZooError(f"{shown(name)} cannot be the name of a result")
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise ZooError(f"{name} must be a number or null, got {shown(value)}")


def _ref(value: Any, path: Path) -> ModelRef:
    if value is None:
        return ModelRef(str(path))
    if isinstance(value, str):
        return parse_ref(value)
    parts = _object({"ref": value}, "ref")
    location = _text(parts, "location")
    if location is None or parts.keys() - {"location", "revision", "subfolder"}:
        raise ZooError(f"ref must have location, revision and subfolder, got {shown(value)}")
    return ModelRef(location, _text(parts, "revision"), _text(parts, "subfolder"))


def _load(candidate: _Candidate) -> tuple[ZooEntry, bytes]:
    """Reads and checks the weights of one model."""
    if candidate.size > MAX_BLOB_BYTES:
        raise ZooError(f"{candidate.size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")
    source = open_checkpoint(candidate.path)
    weights = Path(source.where)
    try:
        sharded = weights.suffix == ".json"
        blob = source.to_bytes() if sharded else weights.read_bytes()
        adapter = weights.with_name("adapter_config.json")
        config = source.config
        if config is None and weights.name.startswith("adapter_model") and adapter.is_file():
            config = load_json_object(adapter.read_bytes(), where=adapter.name)
    except OSError as error:
        raise ZooError(f"cannot be read ({error.strerror}); fetch it again") from error
    check_finite(blob, parse_header(blob, file_size=len(blob), where=candidate.file))
    return replace(candidate.entry, config=config), blob
