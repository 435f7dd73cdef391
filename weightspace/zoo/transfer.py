"""Zoos that become other zoos or files: part of a zoo as a copy, several zoos as one, and a folder of safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from weightspace.errors import ZooError
from weightspace.io.header import parse_header
from weightspace.schema import ModelRef
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.importing import METADATA
from weightspace.zoo.storage import RESULTS, check_empty, content_digest, read_skips, unwritable, write_text
from weightspace.zoo.writer import Candidate, RemoteWeights, ZooSummary, ZooWriter, cut_shards


def copy_zoo(zoo: Zoo, rows: Sequence[int] | np.ndarray, output: Path, *, settings: Mapping[str, Any]) -> Zoo:
    """Writes some models of a zoo, with the same bytes, as a new zoo that is ready to leave this machine.

    References to local files keep only the file and its folder.

    Args:
        zoo: a zoo that has its weights.
        rows: rows of the zoo, ascending.
        output: a new folder.
        settings: what determines the content of the copy.

    Raises:
        ZooError: there is no row, or the folder cannot be written.
    """

    def load(_: int, part: Sequence[int]) -> Iterator[Candidate]:
        for row in part:
            entry = zoo.entry(row)
            yield replace(entry, ref=without_folders(entry.ref)), zoo.blob(row)

    writer = ZooWriter(output, settings=settings, results=zoo.result_names)
    sizes = zoo.index["size"].to_numpy()
    shards = cut_shards([int(row) for row in rows], lambda row: int(sizes[row]))
    writer.write_all(shards, load, skipped=read_skips(zoo.path))
    return load_zoo(output)


def without_folders(ref: ModelRef) -> ModelRef:
    """Shortens an absolute path to ``./folder/file``; other references stay the same."""
    path = PurePath(ref.location)
    if not path.is_absolute() and not ref.location.startswith("~"):
        return ref
    return replace(ref, location="./" + "/".join(path.parts[1:][-2:]))


def join_zoos(paths: Sequence[str | Path], output: str | Path) -> ZooSummary:
    """Joins several zoos, e.g. crawled on different machines, or continues a join that was killed.

    Rows follow the order of the zoos, and the new zoo has the result columns of all. Of models with the same tensors or
    the same name, the first is kept.

    Args:
        paths: folders of zoos, or ``org/name[@revision]`` of zoos on the Hub; weights are stored in all or in none.
        output: folder of the new zoo.

    Raises:
        ZooError: a zoo cannot be opened, only some of them store their weights, or the folder cannot be written.
    """
    zoos = [load_zoo(path) for path in paths]
    if len({zoo.reference for zoo in zoos}) != 1:
        raise ZooError(f"{output}: some of the zoos store their weights and others do not; join those of one kind")
    reference = zoos[0].reference
    extra = {name for zoo in zoos for name in zoo.result_names} - set(RESULTS)
    sizes = [[int(size) for size in zoo.index["size"]] for zoo in zoos]

    def load(_: int, part: Sequence[tuple[int, int]]) -> Iterator[Candidate]:
        for number, row in part:
            zoo = zoos[number]
            entry = zoo.entry(row)
            if reference:
                yield entry, RemoteWeights(zoo.index["header"].iloc[row], sizes[number][row])
                continue
            blob = zoo.blob(row)
            if entry.content is None:
                header = parse_header(blob, file_size=len(blob), where=entry.model_id)
                entry = replace(entry, content=content_digest(blob, header))
            yield entry, blob

    writer = ZooWriter(
        output,
        settings={"joined": [zoo.digest for zoo in zoos]},
        results=(*RESULTS, *sorted(extra)),
        reference=reference,
    )
    rows = [(number, row) for number, zoo in enumerate(zoos) for row in range(len(zoo))]
    shards = cut_shards(rows, lambda place: 0 if reference else sizes[place[0]][place[1]])
    skipped = [skip for zoo in zoos for skip in read_skips(zoo.path)]
    with tqdm(total=len(rows), desc="join", unit="model", disable=None) as progress:
        return writer.write_all(shards, load, skipped=skipped, distinct=True, progress=progress)


def export_folder(zoo: Zoo, folder: str | Path, rows: Sequence[int] | np.ndarray | None = None) -> int:
    """Writes models of a zoo as safetensors files, in a folder that imports again as the same zoo.

    Each model gets a folder of its own with ``model.safetensors`` (the same bytes as in the zoo) and, if its config is
    known, ``config.json``. ``metadata.jsonl`` comes last, so that an export that was killed cannot be imported.

    Args:
        zoo: the models.
        folder: a new or an empty folder.
        rows: rows of the zoo, all by default.

    Returns:
        The number of models written.

    Raises:
        ZooError: the folder is not empty or cannot be written, or there is no row.
    """
    folder = Path(folder).expanduser()
    check_empty(folder, "; export into a new or an empty folder")
    chosen = range(len(zoo)) if rows is None else [int(row) for row in rows]
    if not len(chosen):
        raise ZooError(f"{folder}: no row was chosen to export; choose some of the {len(zoo)} models")
    lines = []
    for row in tqdm(chosen, desc="export", unit="model", disable=None):
        entry = zoo.entry(row)
        name = f"{row:06d}-{re.sub('[^A-Za-z0-9._-]+', '-', entry.model_id)[:80]}"
        files = {"model.safetensors": zoo.blob(row)}
        if entry.config is not None:
            files["config.json"] = f"{json.dumps(entry.config, indent=1)}\n".encode()
        try:
            (folder / name).mkdir(parents=True)
            for file, content in files.items():
                (folder / name / file).write_bytes(content)
        except OSError as error:
            raise unwritable(folder / name, error) from error
        values = {key: value for key, value in asdict(entry).items() if key not in ("config", "content")}
        known = {key: values["results"].pop(key) for key in RESULTS if key in values["results"]}
        lines.append(json.dumps({"file": f"{name}/model.safetensors", **known, **values}))
    os.sync()  # one wait for the disk, where atomic writes would take one a file
    write_text(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return len(lines)
