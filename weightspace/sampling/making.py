"""Makes models to order: sampled for a dataset and a result, or edited towards them, and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.cards import SamplingFacts
from weightspace.data.images import load_images
from weightspace.encoder import Encoder
from weightspace.errors import SettingsError
from weightspace.evaluation.finetuning import Trial, accuracy, fits, predictions
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import HubOptions
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.running_statistics import running_statistics
from weightspace.sampling.conditions import Blueprint, Condition, open_blueprint
from weightspace.sampling.flow import FlowSampler
from weightspace.sampling.opening import OpenedSampler
from weightspace.sampling.samplers import sample
from weightspace.search.queries import dataset_for, parse_results
from weightspace.zoo.transfer import without_folders

_STATISTICS_IMAGES, _STATISTICS_BATCH = 512, 128


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        dataset: folder or id; see `weightspace.data.images.load_images`. None asks for none.
        result: see `weightspace.search.queries.parse_results`. None asks for none.
        architecture: see `open_blueprint`; left out where a model is edited.
        edited: model that is moved towards the dataset and the result: a path or ``org/name[@revision][:path]``.
        strength: how far it is moved; see `FlowSampler.edit`.
        count: how many models.
        seed: draws everything random.
    """

    dataset: str | None = None
    result: str | None = None
    architecture: str | None = None
    edited: str | None = None
    strength: float = 0.5
    count: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses orders that say nothing or two things."""
        if self.count < 1:
            raise SettingsError(f"count: {self.count} is too few, give 1 or more")
        if (self.architecture is None) == (self.edited is None):
            given = f"architecture {self.architecture!a}, model {self.edited!a}"
            raise SettingsError(f"{given}: give either an architecture to sample or a model to edit, which has its own")


@dataclass(frozen=True, eq=False)
class Made:
    """Models that were made.

    Attributes:
        flat: their weights.
        blueprint: what they are.
        sampling: how they came about.
        accuracies: on the test images of the dataset; None where they were not evaluated.
        unknown: why they were not; empty if they were.
        chance: accuracy of guessing; None where they were not evaluated.
        before: accuracy of the edited model; None if none was.
        statistics: running statistics of each model's normalisation layers, from images of the dataset; empty where the
            architecture has none.
    """

    flat: Float[Tensor, "models params"]
    blueprint: Blueprint
    sampling: SamplingFacts
    accuracies: Float[np.ndarray, "models"] | None = None
    unknown: str = ""
    chance: float | None = None
    before: float | None = None
    statistics: tuple[Mapping[str, Tensor], ...] = ()


def check_order(order: Order, options: HubOptions | None = None) -> Blueprint:
    """Opens what is to be made, before any model is loaded that makes it.

    Raises:
        WeightspaceError: the architecture or dataset cannot be opened, they do not fit each other, or the result says
            nothing.
    """
    if order.result is not None:
        parse_results(order.result)
    location = order.architecture if order.edited is None else order.edited
    assert location is not None
    blueprint = open_blueprint(location, options)
    family = blueprint.family
    if blueprint.counters and (order.dataset is None or blueprint.config is None):
        missing = "a dataset" if order.dataset is None else "a config.json beside it"
        raise SettingsError(
            f"{location}: its normalisation layers have running statistics, which are no weights but estimated on "
            f"images; give {missing}"
        )
    if order.dataset is not None:
        images = load_images(order.dataset)
        if family is not None and not fits(family, images):
            shape = tuple(images.test_images.shape[1:])
            raise SettingsError(
                f"{order.dataset}: images of shape {shape} in {images.classes} classes do not fit {location} (classes: "
                f"{family.classes}, image_shape: {family.image_shape}); choose another dataset or architecture"
            )
    return blueprint


def make_models(
    order: Order,
    blueprint: Blueprint,
    opened: OpenedSampler,
    joint: Encoder,
    options: HubOptions | None = None,
    *,
    allow_pickle: bool = False,
) -> Made:
    """Makes models and runs them on the test images of the dataset, where the library can.

    Args:
        order: what is asked for.
        blueprint: see `check_order`.
        opened: the sampler.
        joint: the joint model that it was made with.
        options: how the Hub is reached.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Raises:
        WeightspaceError: the sampler cannot do it.
    """
    dataset = None
    if order.dataset is not None:
        dataset = dataset_for(joint, order.dataset, options, allow_pickle=allow_pickle)
    condition = Condition(dataset, () if order.result is None else parse_results(order.result))
    generator = torch.Generator().manual_seed(order.seed)
    original, name = None, None
    if order.edited is None:
        flat = sample(opened.sampler, condition, blueprint, order.count, generator)
    else:
        original, name = _opened(order.edited, blueprint, options)
        flat = _edited(order, original, condition, blueprint, opened, generator)
    settings = dict(opened.settings) if name is None else {**opened.settings, "strength": order.strength}
    sampling = SamplingFacts(opened.name, opened.sources, order.dataset, order.result, name, order.seed, settings)
    made = Made(flat, blueprint, sampling, statistics=_statistics(flat, blueprint, order.dataset))
    return _evaluated(made, original)


def _statistics(
    flat: Float[Tensor, "models params"], blueprint: Blueprint, dataset: str | None
) -> tuple[Mapping[str, Tensor], ...]:
    if not blueprint.counters:
        return ()
    assert dataset is not None and blueprint.config is not None
    images = load_images(dataset).train_images[:_STATISTICS_IMAGES]
    expected = blueprint.config.get("num_channels", images.shape[1])
    if expected != images.shape[1]:
        raise SettingsError(
            f"{dataset}: images have {images.shape[1]} channels, the architecture expects {expected}; choose another "
            "dataset or architecture"
        )
    parts = images.split(_STATISTICS_BATCH)
    return tuple(running_statistics(blueprint.config, unflatten(one, blueprint.architecture), parts) for one in flat)


def _opened(location: str, blueprint: Blueprint, options: HubOptions | None) -> tuple[Float[Tensor, "one params"], str]:
    checkpoint = open_checkpoint(location, options=options)
    flat = flatten(checkpoint.tensors(), blueprint.architecture).float().unsqueeze(0)
    return flat, location if checkpoint.ref is None else str(without_folders(checkpoint.ref))


@torch.no_grad()
def _edited(
    order: Order,
    original: Float[Tensor, "one params"],
    condition: Condition,
    blueprint: Blueprint,
    opened: OpenedSampler,
    generator: torch.Generator,
) -> Float[Tensor, "models params"]:
    sampler = opened.sampler
    if not isinstance(sampler, FlowSampler):
        raise SettingsError(f"sampler {opened.name}: cannot edit a model; edit with the sampler flow")
    latents = sampler.edit(original.expand(order.count, -1), condition, blueprint, order.strength, generator)
    return sampler.codec.decode(latents, blueprint.architecture)


def _evaluated(made: Made, original: Float[Tensor, "one params"] | None) -> Made:
    dataset, family = made.sampling.dataset, made.blueprint.family
    if dataset is None:
        return replace(made, unknown="no dataset was given")
    if family is None:
        return replace(made, unknown="the library cannot run models of this architecture (it runs mlp and cnn)")
    images = load_images(dataset)

    def reached(flat: Float[Tensor, "models params"]) -> Float[np.ndarray, "models"]:
        return accuracy(predictions(Trial(dataset, family, made.blueprint.architecture, flat)), images)

    return replace(
        made,
        accuracies=reached(made.flat),
        chance=1 / images.classes,
        before=None if original is None else float(reached(original)[0]),
    )
