"""Writes sampled models as safetensors, with what is needed to load, import and push them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightspace.cards.facts import ModelFacts, ModelsFacts, SamplingFacts
from weightspace.cards.record import write_card
from weightspace.errors import SettingsError, ZooError
from weightspace.io.header import shown
from weightspace.io.locations import is_repo_id
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.flat import restore
from weightspace.sampling.request import SampledModels
from weightspace.zoo.facts import architecture_name
from weightspace.zoo.importing import METADATA
from weightspace.zoo.storage import is_partial, replacing, write_text

_LISTED = 50


@dataclass(frozen=True)
class WrittenModel:
    """A model that was written.

    Attributes:
        model_id: its id wherever it is imported; other weights have another one.
        file: its weights, relative to the folder.
        results: obtained results; empty where it was not evaluated.
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
    present = [path.name for path in folder.iterdir() if not is_partial(path)] if folder.is_dir() else []
    if present:
        raise ZooError(f"{folder}: holds {shown(min(present))}; write models into a new or an empty folder")
    return folder


def write_models(folder: str | Path, models: SampledModels) -> list[WrittenModel]:
    """Writes sampled models into a folder that `weightspace.zoo.importing.import_folder` and a push take.

    Each model has a folder of its own with ``model.safetensors`` and, where it is known, ``config.json``; the request
    stands in the card and in ``metadata.jsonl``. That comes last, and after an error nothing is left.

    Args:
        folder: a new or an empty folder.
        models: the models. Their running statistics take the place of sampled ones.

    Raises:
        ZooError: the folder is not empty or cannot be written.
        SettingsError: a weight is NaN or infinite.
    """
    folder = ensure_empty(folder)
    broken = int((~models.flat.isfinite()).any(1).sum())
    if broken:
        raise SettingsError(
            f"{broken} of {len(models.flat)} sampled models have weights that are not finite; follow the condition "
            "less (guidance) or use another seed"
        )
    existed = folder.is_dir()
    try:
        return _written(folder, models)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        raise


def _written(folder: Path, models: SampledModels) -> list[WrittenModel]:
    condition, facts = models.condition, models.facts
    written = []
    for number, weights in enumerate(models.flat):
        name = f"sample-{number:04d}"
        estimated = models.statistics[number] if models.statistics else {}
        counters = {counter: estimated[counter] for counter in condition.counters}
        blob = checkpoint_bytes({**restore(weights, condition.architecture, counters), **estimated})
        with replacing(folder / name / "model.safetensors") as partial:
            partial.write_bytes(blob)
        if condition.config is not None:
            write_text(folder / name / "config.json", json.dumps(condition.config, indent=1) + "\n")
        digest = hashlib.sha256(blob).hexdigest()[:12]
        results = {} if models.accuracies is None else {"test_accuracy": float(models.accuracies[number])}
        written.append(WrittenModel(f"{name}-{digest}", f"{name}/model.safetensors", results))
    write_card(folder, _card(folder, written, models))
    lines = [json.dumps(_row(model, facts, number)) for number, model in enumerate(written)]
    write_text(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return written


def _card(folder: Path, written: Sequence[WrittenModel], models: SampledModels) -> ModelsFacts:
    architecture, config = models.condition.architecture, dict(models.condition.config or {})
    dtypes: dict[str, int] = {}
    for spec in architecture.tensors:
        dtypes[spec.dtype] = dtypes.get(spec.dtype, 0) + spec.numel
    name = architecture_name(config)
    listed = tuple(
        ModelFacts(one.file, name, architecture.numel, dtypes, models.facts.dataset, one.results)
        for one in written[:_LISTED]
    )
    return ModelsFacts(
        folder.name,
        base_model=_base_model(models.facts),
        models=listed,
        others=len(written) - len(listed),
        config=config if len(written) == 1 else {},
        sampling=models.facts,
    )


def _row(model: WrittenModel, facts: SamplingFacts, number: int) -> dict[str, Any]:
    origin = {"sampler": facts.sampler, "requested": facts.result, "seed": facts.seed, "number": number}
    sources = {role.replace(" ", "_"): name for role, name in facts.sources.items()}
    return {
        "file": model.file,
        "model_id": model.model_id,
        "dataset": facts.dataset,
        **model.results,
        "base_model": _base_model(facts),
        "hyperparameters": {**origin, "edited": facts.edited, **sources, **facts.settings},
    }


def _base_model(facts: SamplingFacts) -> str | None:
    """The edited model if it lies on the Hub, where it can be linked."""
    location, _, revision = (facts.edited or "").partition("@")
    return location if revision and is_repo_id(location) else None
