"""Serves requests for sampled models: drawn or edited, evaluated, and written as a folder to load, import and push."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.cards.facts import ModelFacts, ModelsFacts, SamplingFacts
from weightspace.cards.record import write_card
from weightspace.data.features import balanced_sample
from weightspace.data.images import load_images
from weightspace.encoder import Encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.evaluation.accuracy import ModelSet, accuracies
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.io.locations import is_repo_id
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.flat import flatten, restore, unflatten
from weightspace.networks.running_statistics import preprocessed, running_statistics
from weightspace.sampling.base import Condition, sample
from weightspace.sampling.factory import OpenedSampler
from weightspace.sampling.priors import FlowSampler
from weightspace.search.queries import dataset_for, parse_results
from weightspace.settings import PositiveInt, Settings
from weightspace.zoo.facts import architecture_name
from weightspace.zoo.importing import METADATA
from weightspace.zoo.storage import is_partial, replacing, write_text
from weightspace.zoo.transfer import without_folders

_STATISTICS_IMAGES, _STATISTICS_BATCH = 512, 128


@dataclass(frozen=True)
class SampleRequest(Settings):
    """A request for sampled models.

    Attributes:
        dataset: folder or id; see `weightspace.data.images.load_images`. None requests none.
        result: see `weightspace.search.queries.parse_results`. None requests none.
        architecture: see `Condition.open`; left out where a model is edited.
        edited: model to move towards the dataset and the result: a path or ``org/name[@revision][:path]``.
        strength: how far it is moved; see `FlowSampler.edit`.
        count: number of models.
        seed: draws everything random.
    """

    dataset: str | None = None
    result: str | None = None
    architecture: str | None = None
    edited: str | None = None
    strength: float = 0.5
    count: PositiveInt = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses requests without an architecture, or with two."""
        super().__post_init__()
        if (self.architecture is None) == (self.edited is None):
            given = f"architecture {self.architecture!a}, model {self.edited!a}"
            raise SettingsError(f"{given}: give either an architecture to sample or a model to edit, which has its own")

    def open(self, options: HubOptions | None = None) -> Condition:
        """Opens the requested architecture and results, before any large model is loaded.

        Returns:
            The condition without its dataset, which needs the joint model.

        Raises:
            WeightspaceError: the architecture or dataset cannot be opened, they do not fit each other, or the result
                cannot be parsed.
        """
        results = () if self.result is None else parse_results(self.result)
        location = self.architecture or self.edited
        assert location is not None
        condition = replace(Condition.open(location, options), results=results)
        if condition.counters and (self.dataset is None or condition.config is None):
            missing = "a dataset" if self.dataset is None else "a config.json beside it"
            raise SettingsError(
                f"{location}: its normalisation layers have running statistics, which are no weights but estimated on "
                f"images; give {missing}"
            )
        if self.dataset is not None:
            images = load_images(self.dataset)
            if condition.family is not None:
                condition.family.ensure_fits(images)
        return condition


@dataclass(frozen=True, eq=False)
class SampledModels:
    """Models that were sampled for a request.

    Attributes:
        condition: what they were sampled for.
        flat: their weights.
        facts: where they come from.
        statistics: running statistics of each model's normalisation layers, from images of the dataset; empty where the
            architecture has none.
        accuracies: on the test images of the dataset; None where they were not evaluated.
        not_evaluated: why they were not; None if they were.
        chance: accuracy of guessing; None where they were not evaluated.
        before: accuracy of the edited model; None if none was.
    """

    condition: Condition
    flat: Float[Tensor, "models params"]
    facts: SamplingFacts
    statistics: tuple[Mapping[str, Tensor], ...] = ()
    accuracies: Float[np.ndarray, "models"] | None = None
    not_evaluated: str | None = None
    chance: float | None = None
    before: float | None = None


@torch.no_grad()
def sample_models(
    request: SampleRequest,
    condition: Condition,
    opened: OpenedSampler,
    joint: Encoder,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> SampledModels:
    """Samples models and runs them on the test images of the dataset, where the library can.

    Args:
        request: the request.
        condition: see `SampleRequest.open`.
        opened: the sampler.
        joint: the joint model that it was built with.
        options: how the Hub is reached.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Raises:
        WeightspaceError: the sampler cannot sample for this request.
    """
    if request.dataset is not None:
        features = dataset_for(joint, request.dataset, options, allow_pickle=allow_pickle)
        condition = replace(condition, dataset=features)
    generator = torch.Generator().manual_seed(request.seed)
    settings, original, name = dict(opened.settings), None, None
    if request.edited is None:
        flat = sample(opened.sampler, condition, request.count, generator)
    else:
        checkpoint = open_checkpoint(request.edited, options=options)
        original = flatten(checkpoint.tensors(), condition.architecture).float().unsqueeze(0)
        name = request.edited if checkpoint.ref is None else str(without_folders(checkpoint.ref))
        sampler, settings["strength"] = opened.sampler, request.strength
        if not isinstance(sampler, FlowSampler):
            raise SettingsError(f"sampler {opened.name}: cannot edit a model; edit with the sampler flow")
        latents = sampler.edit(original.expand(request.count, -1), condition, request.strength, generator)
        flat = sampler.codec.decode(latents, condition.architecture)
    facts = SamplingFacts(opened.name, opened.sources, request.dataset, request.result, name, request.seed, settings)
    models = SampledModels(condition, flat, facts, _statistics(flat, condition, request.dataset))
    return _evaluated(models, original)


def _statistics(
    flat: Float[Tensor, "models params"], condition: Condition, dataset: str | None
) -> tuple[Mapping[str, Tensor], ...]:
    if not condition.counters:
        return ()
    assert dataset is not None and condition.config is not None
    images, _ = balanced_sample(load_images(dataset), _STATISTICS_IMAGES, seed=0, split="train")
    expected = condition.config.get("num_channels", images.shape[1])
    if expected != images.shape[1]:
        raise SettingsError(
            f"{dataset}: images have {images.shape[1]} channels, the architecture expects {expected}; choose another "
            "dataset or architecture"
        )
    # Mixed: a batch of one class would lack the variance between classes.
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    parts = images.split(_STATISTICS_BATCH)
    if condition.preprocessor is not None:
        parts = tuple(preprocessed(condition.preprocessor, part) for part in parts)
    return tuple(running_statistics(condition.config, unflatten(one, condition.architecture), parts) for one in flat)


def _evaluated(models: SampledModels, original: Float[Tensor, "one params"] | None) -> SampledModels:
    dataset, condition = models.facts.dataset, models.condition
    if dataset is None:
        return replace(models, not_evaluated="no dataset was given")
    if condition.family is None:
        return replace(models, not_evaluated="the library cannot run models of this architecture (it runs mlp and cnn)")
    sets = ModelSet(dataset, condition.family, condition.architecture, models.flat)
    return replace(
        models,
        accuracies=accuracies(sets),
        chance=1 / sets.images.classes,
        before=None if original is None else float(accuracies(replace(sets, flat=original))[0]),
    )


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
