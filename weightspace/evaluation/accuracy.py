"""Test accuracy of models on image datasets, as they are, after fine-tuning, and after reconstruction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.networks.flat import unflatten
from weightspace.networks.population import Recipe, train_population
from weightspace.schema import Architecture, ImageDataset
from weightspace.settings import NonEmpty, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class ModelSet:
    """Models of one config that are evaluated on one dataset.

    Attributes:
        dataset: image dataset id.
        config: of all models.
        architecture: how their weights are laid out.
        flat: one flat weight vector a model.
        requested: results that were requested of them, by name; empty if they were not sampled for any.
        baselines: models to compare these with, by name, besides those that every comparison has.
    """

    dataset: str
    config: FamilyConfig
    architecture: Architecture
    flat: Float[Tensor, "models params"]
    requested: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, ModelSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses weights of another config."""
        shapes = {tensor.name: tensor.shape for tensor in self.architecture.tensors}
        if shapes != self.config.shapes():
            raise SettingsError(
                f"{self.config.to_dict()} has the tensors {self.config.shapes()}, the architecture {shapes}; "
                "give the config that the weights are of"
            )

    @property
    def images(self) -> ImageDataset:
        """The dataset.

        Raises:
            SettingsError: the models cannot be run on it.
        """
        images = load_images(self.dataset)
        self.config.ensure_fits(images)
        return images


def predictions(models: ModelSet) -> Int[Tensor, "models images"]:
    """Returns the class that each model predicts for each test image.

    Raises:
        SettingsError: the images do not fit the models.
    """
    return _predicted(models.config, models.architecture, models.flat.float(), models.images)


def accuracies(models: ModelSet) -> Float[np.ndarray, "models"]:
    """Returns the test accuracy of each model.

    Raises:
        SettingsError: the images do not fit the models.
    """
    images = models.images
    predicted = _predicted(models.config, models.architecture, models.flat.float(), images)
    found: np.ndarray = (predicted == images.test_labels).double().mean(1).numpy()
    return found


@dataclass(frozen=True, eq=False)
class FunctionComparison:
    """Original and reconstructed models on the test images of their own datasets, one entry a model.

    Attributes:
        rows: zoo rows of the models whose function can be run.
        original: test accuracy of the original.
        decoded: test accuracy of the reconstruction.
        agreement: share of test images on which both predict the same class.
        chance: accuracy of the most frequent class.
    """

    rows: Int[np.ndarray, "models"]
    original: Float[np.ndarray, "models"]
    decoded: Float[np.ndarray, "models"]
    agreement: Float[np.ndarray, "models"]
    chance: Float[np.ndarray, "models"]

    @property
    def learned(self) -> np.ndarray:
        """True for models whose original is better than chance."""
        return self.original > self.chance


def compare_functions(
    zoo: Zoo,
    rows: Int[np.ndarray, "models"],
    original: Float[Tensor, "models params"],
    decoded: Float[Tensor, "models params"],
    architecture: Architecture,
) -> FunctionComparison:
    """Runs models and their reconstructions on the test split of each model's own dataset.

    Models without a known function (no config of this library's families, or no dataset) are left out.

    Args:
        zoo: the zoo that the models are from.
        rows: their rows.
        original: their weights.
        decoded: reconstructed weights, in the same order.
        architecture: shared by all of them.
    """
    rows, datasets = np.asarray(rows), zoo.index["dataset"].to_numpy()
    groups: dict[tuple[FamilyConfig, str], list[int]] = {}
    for number, row in enumerate(rows):
        config = zoo.families[row]
        if config is not None and isinstance(datasets[row], str):
            groups.setdefault((config, datasets[row]), []).append(number)
    found = np.full((4, len(rows)), np.nan)
    for (config, name), members in groups.items():
        images = load_images(name)
        labels = images.test_labels
        before, after = (_predicted(config, architecture, flat[members], images) for flat in (original, decoded))
        for column, matches in zip(found, (before == labels, after == labels, before == after), strict=False):
            column[members] = matches.float().mean(1).numpy()
        found[3, members] = float(labels.bincount().max()) / len(labels)
    known = np.flatnonzero(~np.isnan(found[3]))
    known = known[np.argsort(rows[known], kind="stable")]
    original_accuracy, decoded_accuracy, agreement = found[:3, known].astype(np.float32)
    return FunctionComparison(rows[known], original_accuracy, decoded_accuracy, agreement, found[3, known])


@torch.no_grad()
def _predicted(
    config: FamilyConfig, architecture: Architecture, flat: Float[Tensor, "models params"], images: ImageDataset
) -> Int[Tensor, "models images"]:
    return run_flat(config, architecture, flat, images.test_images).argmax(-1)


@dataclass(frozen=True)
class FineTuning(Settings):
    """Training with AdamW on cross-entropy; every batch is a part of a pass over the training images.

    Each budget is a training of its own, whose learning rate falls to zero by a half cosine within it.

    Attributes:
        epochs: the budgets, in passes over the training split; 0 evaluates the weights as they are.
        learning_rate: peak learning rate; the default favours training from scratch on the digits of the demo.
        weight_decay: decoupled.
        batch_size: images a step.
    """

    epochs: NonEmpty[NonNegativeInt] = (0, 1, 10)
    learning_rate: PositiveFloat = 3e-2
    weight_decay: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 32


def fine_tune(
    sets: Sequence[ModelSet], settings: FineTuning, *, seed: int, device: torch.device | str = "cpu"
) -> list[Float[np.ndarray, "budgets models"]]:
    """Measures the test accuracy of the models of every set after each budget of ``settings``.

    Models of one config train together, whatever their datasets. The labels are those of the dataset, in its order;
    the last layer is trained with the rest.

    Args:
        sets: the models.
        settings: the budgets, and how the models are trained.
        seed: draws the order of the images.
        device: where to train.

    Raises:
        SettingsError: a dataset's images or classes do not fit the models.
    """
    groups: dict[FamilyConfig, list[int]] = {}
    for number, models in enumerate(sets):
        groups.setdefault(models.config, []).append(number)
    found = [np.empty((len(settings.epochs), len(models.flat))) for models in sets]
    for members in groups.values():
        own = [sets[number] for number in members]
        for budget, epochs in enumerate(settings.epochs):
            tuned = _trained(own, settings, epochs, seed, device) if epochs else [accuracies(models) for models in own]
            for number, values in zip(members, tuned, strict=True):
                found[number][budget] = values
    return found


def _trained(
    sets: Sequence[ModelSet], settings: FineTuning, epochs: int, seed: int, device: torch.device | str
) -> list[Float[np.ndarray, "models"]]:
    """Test accuracies of sets of one config after training all of them together."""
    datasets = {models.dataset: models.images for models in sets}
    recipes = []
    for models in sets:
        images = len(datasets[models.dataset].train_labels)
        steps = math.ceil(epochs * images / settings.batch_size)
        recipe = Recipe(models.dataset, models.config, settings.learning_rate, settings.weight_decay, images, steps)
        recipes += [recipe] * len(models.flat)
    ends = np.cumsum([len(models.flat) for models in sets])
    reached = np.empty(len(recipes))
    if not recipes:
        return [reached] * len(sets)
    parts = [unflatten(models.flat.float(), models.architecture) for models in sets]
    for snapshot in train_population(
        recipes,
        datasets,
        checkpoints=(1.0,),
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
        initial={name: torch.cat([part[name] for part in parts]) for name in sets[0].config.shapes()},
        in_passes=True,
    ):
        reached[snapshot.members] = snapshot.results["test_accuracy"].double().numpy()
    return np.split(reached, ends[:-1])
