"""Writes sampled models as safetensors, with what is needed to load, import and push them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from weightspace.cards import ModelFacts, ModelsFacts, SamplingFacts, write_card
from weightspace.errors import SettingsError, ZooError
from weightspace.io.header import shown
from weightspace.io.locations import is_repo_id
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.flat import restore
from weightspace.sampling.conditions import Blueprint
from weightspace.zoo.facts import architecture_name
from weightspace.zoo.importing import METADATA
from weightspace.zoo.storage import is_partial, replacing, write_text

_LISTED = 50


@dataclass(frozen=True)
class WrittenModel:
    """A model that was written.

    Attributes:
        model_id: names it wherever it is imported: it differs for other weights.
        file: its weights, relative to the folder.
        results: as obtained; empty where it was not evaluated.
    """

    model_id: str
    file: str
    results: Mapping[str, float]


def ensure_empty(folder: str | Path) -> Path:
    """Returns the absolute path of a folder that models can be written into.

    Raises:
        ZooError: it holds something, or is no folder.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder}: is no folder; write models into a new or an empty folder")
    strangers = [path.name for path in folder.iterdir() if not is_partial(path)] if folder.is_dir() else []
    if strangers:
        raise ZooError(f"{folder}: holds {shown(min(strangers))}; write models into a new or an empty folder")
    return folder


def write_models(
    folder: str | Path,
    flat: Float[Tensor, "models params"],
    blueprint: Blueprint,
    sampling: SamplingFacts,
    results: Sequence[Mapping[str, float]] = (),
    statistics: Sequence[Mapping[str, Tensor]] = (),
) -> list[WrittenModel]:
    """Writes sampled models into a folder that `weightspace.zoo.importing.import_folder` and a push take.

    Each model has a folder of its own with ``model.safetensors`` and, where it is known, ``config.json``; what was
    asked for stands in the card and in ``metadata.jsonl``. That comes last, and after an error nothing is left.

    Args:
        folder: a new or an empty folder.
        flat: the models.
        blueprint: what they are.
        sampling: how they were sampled.
        results: of each model, by name; nothing if they were not evaluated.
        statistics: running statistics of each model that take the place of sampled ones, by tensor name.

    Raises:
        ZooError: the folder is not empty or cannot be written.
        SettingsError: a weight is NaN or infinite.
    """
    folder = ensure_empty(folder)
    broken = int((~flat.isfinite()).any(1).sum())
    if broken:
        raise SettingsError(
            f"{broken} of {len(flat)} sampled models have weights that are not finite; follow the condition less "
            "(guidance) or use another seed"
        )
    there = folder.is_dir()
    try:
        nothing: list[Mapping[str, Any]] = [{}] * len(flat)
        return _written(folder, flat, blueprint, sampling, results or nothing, statistics or nothing)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir(exist_ok=True)
        raise


def _written(
    folder: Path,
    flat: Float[Tensor, "models params"],
    blueprint: Blueprint,
    sampling: SamplingFacts,
    results: Sequence[Mapping[str, float]],
    statistics: Sequence[Mapping[str, Tensor]],
) -> list[WrittenModel]:
    config = blueprint.config
    written = []
    for number, (weights, obtained, estimated) in enumerate(zip(flat, results, statistics, strict=True)):
        name = f"sample-{number:04d}"
        counters = {name: estimated[name] for name in blueprint.counters}
        blob = checkpoint_bytes({**restore(weights, blueprint.architecture, counters), **estimated})
        with replacing(folder / name / "model.safetensors") as partial:
            partial.write_bytes(blob)
        if config is not None:
            write_text(folder / name / "config.json", json.dumps(config, indent=1) + "\n")
        digest = hashlib.sha256(blob).hexdigest()[:12]
        written.append(WrittenModel(f"{name}-{digest}", f"{name}/model.safetensors", dict(obtained)))
    write_card(folder, _facts(folder, written, blueprint, sampling))
    lines = [json.dumps(_row(model, sampling, number)) for number, model in enumerate(written)]
    write_text(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return written


def _facts(folder: Path, written: Sequence[WrittenModel], blueprint: Blueprint, sampling: SamplingFacts) -> ModelsFacts:
    dtypes: dict[str, int] = {}
    for spec in blueprint.architecture.tensors:
        dtypes[spec.dtype] = dtypes.get(spec.dtype, 0) + spec.numel
    name = architecture_name(blueprint.config or {})
    models = tuple(
        ModelFacts(one.file, name, blueprint.architecture.numel, dtypes, sampling.dataset, one.results)
        for one in written[:_LISTED]
    )
    config = dict(blueprint.config or {}) if len(written) == 1 else {}
    return ModelsFacts(
        folder.name,
        base_model=_base_model(sampling),
        models=models,
        others=len(written) - len(models),
        config=config,
        sampling=sampling,
    )


def _row(model: WrittenModel, sampling: SamplingFacts, number: int) -> dict[str, Any]:
    origin = {"sampler": sampling.sampler, "requested": sampling.result, "seed": sampling.seed, "number": number}
    sources = {role.replace(" ", "_"): name for role, name in sampling.sources.items()}
    return {
        "file": model.file,
        "model_id": model.model_id,
        "dataset": sampling.dataset,
        **model.results,
        "base_model": _base_model(sampling),
        "hyperparameters": {**origin, "edited": sampling.edited, **sources, **sampling.settings},
    }


def _base_model(sampling: SamplingFacts) -> str | None:
    """The edited model if it lies on the Hub, where it can be linked."""
    location, _, revision = (sampling.edited or "").partition("@")
    return location if revision and is_repo_id(location) else None
