"""A part of a zoo as a zoo of its own, ready to leave this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from weightspace.schema import ModelRef
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

_SHARD_MODELS, _SHARD_BYTES = 1024, 256 * 2**20


def copy_zoo(zoo: Zoo, rows: Sequence[int] | np.ndarray, output: Path, *, settings: Mapping[str, Any]) -> Zoo:
    """Writes chosen models, with the same bytes, as a new zoo.

    References to files keep the file and its folder, and no more of where they lie on this machine.

    Args:
        zoo: a zoo that has its weights.
        rows: rows of the zoo, ascending.
        output: a new folder.
        settings: what the content of the copy follows from.

    Raises:
        ZooError: there is no row, or the folder cannot be written.
    """
    writer = ZooWriter(output, settings=settings, results=zoo.result_names)
    for number, part in enumerate(_parts(np.asarray(rows, dtype=np.int64), zoo.index["size"].to_numpy())):
        entries = [zoo.entry(row) for row in part]
        writer.write_shard(
            f"{number:05d}",
            [replace(entry, ref=without_folders(entry.ref)) for entry in entries],
            [zoo.blob(row) for row in part],
            skipped=_skips(zoo) if number == 0 else (),
        )
    writer.finish()
    return load_zoo(output)


def without_folders(ref: ModelRef) -> ModelRef:
    """Shortens an absolute path to ``./folder/file``; everything else stays."""
    path = PurePath(ref.location)
    if not path.is_absolute() and not ref.location.startswith("~"):
        return ref
    return replace(ref, location="./" + "/".join(path.parts[1:][-2:]))


def _parts(rows: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts rows into shards of bounded models and bytes."""
    start, held = 0, 0
    for place, row in enumerate(rows):
        if place > start and (place - start == _SHARD_MODELS or held + sizes[row] > _SHARD_BYTES):
            yield rows[start:place]
            start, held = place, 0
        held += sizes[row]
    if len(rows):
        yield rows[start:]


def _skips(zoo: Zoo) -> list[tuple[str, str]]:
    path = zoo.path / "skips.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(str(values["file"]), str(values["reason"])) for values in map(json.loads, lines)]
