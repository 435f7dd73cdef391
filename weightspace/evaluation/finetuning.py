"""What sampled weights are worth on a dataset: test accuracy as they come, and after a few passes over its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class FineTuning:
    """How models are trained on: AdamW on cross-entropy, every batch a part of a pass over the training images.

    Each budget is a training of its own, whose learning rate falls to zero by a half cosine within it.

    Attributes:
        epochs: the budgets, in passes over the training split; 0 judges the weights as they are.
        learning_rate: peak learning rate; the default favours training from scratch on the digits of the demo.
        weight_decay: decoupled.
        batch_size: images a step.
    """

    epochs: tuple[int, ...] = (0, 1, 10)
    learning_rate: float = 3e-2
    weight_decay: float = 0.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuses budgets and rates that mean nothing."""
        if not self.epochs or min(self.epochs) < 0:
            raise SettingsError(f"epochs: {self.epochs} is no list of budgets; give whole numbers from 0 on")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.batch_size < 1:
            raise SettingsError("learning_rate and batch_size must be positive and weight_decay at least 0")


@dataclass(frozen=True, eq=False)
class Trial:
    """Models of one config that are tried on one dataset.

    Attributes:
        dataset: image dataset id.
        config: what the models are.
        architecture: how their weights are laid out.
        flat: one flat weight vector a model.
    """

    dataset: str
    config: FamilyConfig
    architecture: Architecture
    flat: Float[Tensor, "models params"]

    def __post_init__(self) -> None:
        """Refuses weights of something other than the config."""
        shapes = {tensor.name: tensor.shape for tensor in self.architecture.tensors}
        if shapes != self.config.shapes():
            raise SettingsError(
                f"{self.config.to_dict()} has the tensors {self.config.shapes()}, the architecture {shapes}; "
                "give the config that the weights are of"
            )


@torch.no_grad()
def predictions(trial: Trial) -> Int[Tensor, "models images"]:
    """Returns the class that each model predicts for each test image.

    Raises:
        SettingsError: the images do not fit the models.
    """
    images = _opened(trial).test_images
    return run_flat(trial.config, trial.architecture, trial.flat.float(), images).argmax(-1)


def fine_tune(
    trials: Sequence[Trial], settings: FineTuning, *, seed: int, device: torch.device | str = "cpu"
) -> list[Float[np.ndarray, "budgets models"]]:
    """Measures the test accuracy of every trial's models after each budget of ``settings``.

    Models of one config train together, whatever their datasets. The labels are those of the dataset, in its order;
    the last layer is trained with the rest.

    Args:
        trials: what is tried.
        settings: the budgets, and how the models are trained.
        seed: draws the order of the images.
        device: where to train.

    Raises:
        SettingsError: a dataset's images or classes do not fit the models.
    """
    groups: dict[FamilyConfig, list[int]] = {}
    for place, trial in enumerate(trials):
        groups.setdefault(trial.config, []).append(place)
    found = [np.empty((len(settings.epochs), len(trial.flat))) for trial in trials]
    for config, places in groups.items():
        own = [trials[place] for place in places]
        starts = np.cumsum([len(trial.flat) for trial in own])[:-1]
        for budget, epochs in enumerate(settings.epochs):
            accuracies = _trained(config, own, settings, epochs, seed, device)
            for place, values in zip(places, np.split(accuracies, starts), strict=True):
                found[place][budget] = values
    return found


def _trained(
    config: FamilyConfig,
    trials: Sequence[Trial],
    settings: FineTuning,
    epochs: int,
    seed: int,
    device: torch.device | str,
) -> Float[np.ndarray, "models"]:
    datasets = {trial.dataset: _opened(trial) for trial in trials}
    if not epochs:
        return np.concatenate([accuracy(predictions(trial), datasets[trial.dataset]) for trial in trials])
    recipes = [_recipe(trial, datasets[trial.dataset], settings, epochs) for trial in trials for _ in trial.flat]
    accuracies = np.empty(len(recipes))
    if not recipes:
        return accuracies
    parts = [unflatten(trial.flat.float(), trial.architecture) for trial in trials]
    initial = {name: torch.cat([part[name] for part in parts]) for name in config.shapes()}
    for snapshot in train_population(
        recipes,
        datasets,
        checkpoints=(1.0,),
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
        initial=initial,
        in_passes=True,
    ):
        accuracies[snapshot.members] = snapshot.results["test_accuracy"].double().numpy()
    return accuracies


def accuracy(predicted: Int[Tensor, "models images"], dataset: ImageDataset) -> Float[np.ndarray, "models"]:
    """Computes each model's share of test images whose class it predicts."""
    found: np.ndarray = (predicted == dataset.test_labels).double().mean(1).numpy()
    return found


def _recipe(trial: Trial, dataset: ImageDataset, settings: FineTuning, epochs: int) -> Recipe:
    images = len(dataset.train_images)
    return Recipe(
        run_id="",
        dataset=trial.dataset,
        config=trial.config,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        initialization="kaiming_uniform",  # never drawn: the weights are given
        label_noise=0.0,
        train_size=images,
        steps=math.ceil(epochs * images / settings.batch_size),
    )


def fits(config: FamilyConfig, dataset: ImageDataset) -> bool:
    """Tells whether models of ``config`` can be run on the dataset's images and name its classes."""
    return config.image_shape == tuple(dataset.test_images.shape[1:]) and config.classes == dataset.classes


def _opened(trial: Trial) -> ImageDataset:
    dataset = load_images(trial.dataset)
    if not fits(trial.config, dataset):
        raise SettingsError(
            f"{trial.dataset}: images of shape {tuple(dataset.test_images.shape[1:])} in {dataset.classes} classes do "
            f"not fit models for {trial.config.image_shape} and {trial.config.classes}; choose another dataset"
        )
    return dataset
