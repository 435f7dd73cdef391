"""Serves requests for sampled models: drawn for a dataset and a result, or edited towards them, and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.cards.facts import SamplingFacts
from weightspace.data.features import balanced_sample
from weightspace.data.images import load_images
from weightspace.encoder import Encoder
from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import ModelSet, accuracies
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import HubOptions
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.running_statistics import preprocessed, running_statistics
from weightspace.sampling.base import Condition, sample
from weightspace.sampling.factory import OpenedSampler
from weightspace.sampling.flow import FlowSampler
from weightspace.search.queries import dataset_for, parse_results
from weightspace.settings import PositiveInt, Settings
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
