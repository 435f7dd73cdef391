"""A zoo becomes a folder of safetensors files that anything can read, and that imports again as the same zoo."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from weightspace.errors import ZooError
from weightspace.schema import ZooEntry
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.importing import METADATA
from weightspace.zoo.storage import RESULTS, is_partial, replacing, write_text


def export_folder(zoo: Zoo, folder: str | Path, rows: Sequence[int] | np.ndarray | None = None) -> int:
    """Writes models of a zoo as an import folder.

    Each model gets a folder of its own with ``model.safetensors`` (the very bytes of the zoo) and, where its config is
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
    strangers = [path.name for path in folder.iterdir() if not is_partial(path)] if folder.is_dir() else []
    if strangers:
        raise ZooError(f"{folder}: holds {min(strangers)!r}; export into a new or an empty folder")
    chosen = range(len(zoo)) if rows is None else [int(row) for row in rows]
    if not len(chosen):
        raise ZooError(f"{folder}: no row was chosen to export; choose some of the {len(zoo)} models")
    lines = []
    for row in tqdm(chosen, desc="export", unit="model", disable=None):
        entry = zoo.entry(row)
        name = f"{row:06d}-{re.sub('[^A-Za-z0-9._-]+', '-', entry.model_id)[:80]}"
        with replacing(folder / name / "model.safetensors") as partial:
            partial.write_bytes(zoo.blob(row))
        if entry.config is not None:
            write_text(folder / name / "config.json", json.dumps(entry.config, indent=1) + "\n")
        lines.append(json.dumps({"file": f"{name}/model.safetensors", **_metadata(entry)}))
    write_text(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _metadata(entry: ZooEntry) -> dict[str, Any]:
    return {
        "model_id": entry.model_id,
        "run_id": entry.run_id,
        "dataset": entry.dataset,
        **{name: value for name, value in entry.results.items() if name in RESULTS},
        "results": {name: value for name, value in entry.results.items() if name not in RESULTS},
        "licence": entry.licence,
        "base_model": entry.base_model,
        "lineage": list(entry.lineage),
        "task": entry.task,
        "datasets": list(entry.datasets),
        "metrics": [asdict(metric) for metric in entry.metrics],
        "ref": asdict(entry.ref),
        "hyperparameters": dict(entry.hyperparameters),
    }
