"""Test accuracy of models after a few passes over the training images of a dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from weightspace.evaluation.accuracy import ModelSet, accuracies
from weightspace.networks.families import FamilyConfig
from weightspace.networks.flat import unflatten
from weightspace.networks.population import Recipe, train_population
from weightspace.settings import NonEmpty, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings


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
    recipes = [
        _recipe(models, settings, epochs, len(datasets[models.dataset].train_labels))
        for models in sets
        for _ in models.flat
    ]
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


def _recipe(models: ModelSet, settings: FineTuning, epochs: int, images: int) -> Recipe:
    return Recipe(
        run_id="",
        dataset=models.dataset,
        config=models.config,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        initialization="kaiming_uniform",  # never drawn: the weights are given
        label_noise=0.0,
        train_size=images,
        steps=math.ceil(epochs * images / settings.batch_size),
    )
