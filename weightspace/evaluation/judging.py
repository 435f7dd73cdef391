"""What models are worth on a few training images of the dataset that they are sampled for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from weightspace.data.images import load_images
from weightspace.errors import SettingsError
from weightspace.evaluation.finetuning import fits
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.schema import Architecture, ImageDataset
from weightspace.search.queries import UNNAMED, WantedResult


@dataclass(frozen=True, eq=False)
class Judgement:
    """What each model is worth; less is better, and the loss decides between equal distances.

    Attributes:
        distance: from the accuracy to the range of test accuracies that is wanted; 0 if none is.
        loss: cross-entropy.
    """

    distance: Float[Tensor, " models"]
    loss: Float[Tensor, " models"]

    def order(self) -> Int[np.ndarray, "models"]:
        """Returns the places of the models, the best first."""
        order: np.ndarray = np.lexsort((self.loss.numpy(), self.distance.numpy()))
        return order

    def better_than(self, other: Judgement) -> Bool[Tensor, " models"]:
        """Tells of each model whether it is better than the one in the same place of ``other``."""
        tied = (self.distance == other.distance) & (self.loss < other.loss)
        return (self.distance < other.distance) | tied

    def replaced(self, other: Judgement, where: Bool[Tensor, " models"]) -> Judgement:
        """Returns this judgement, with that of ``other`` for some models."""
        return Judgement(torch.where(where, other.distance, self.distance), torch.where(where, other.loss, self.loss))


@dataclass(frozen=True, eq=False)
class Task:
    """A dataset, the networks that are run on it, and the test accuracy that is wanted of them.

    Attributes:
        dataset: only its training images are looked at.
        family: config of the networks.
        architecture: how their weights are laid out.
        wanted: range of test accuracies; None if any will do, the higher the better.
    """

    dataset: ImageDataset
    family: FamilyConfig
    architecture: Architecture
    wanted: WantedResult | None

    def draw(self, models: int, images: int, generator: torch.Generator) -> Int[Tensor, "models images"]:
        """Draws training images, without repetition, for each model its own; all of them where there are fewer."""
        order = torch.rand(models, len(self.dataset.train_images), generator=generator).argsort(dim=1)
        return order[:, :images]

    def logits(
        self, flat: Float[Tensor, "models params"], images: Int[Tensor, "models images"]
    ) -> Float[Tensor, "models images classes"]:
        """Runs each model on its images."""
        return run_flat(self.family, self.architecture, flat, self.dataset.train_images, images)

    def loss(
        self, logits: Float[Tensor, "models images classes"], images: Int[Tensor, "models images"]
    ) -> Float[Tensor, " models"]:
        """Computes each model's mean cross-entropy."""
        labels = self.dataset.train_labels[images]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)

    @torch.no_grad()
    def judge(self, flat: Float[Tensor, "models params"], images: Int[Tensor, "models images"]) -> Judgement:
        """Judges each model by its images."""
        logits = self.logits(flat, images)
        accuracy = (logits.argmax(-1) == self.dataset.train_labels[images]).float().mean(1)
        low, high = (0.0, 1.0) if self.wanted is None else (self.wanted.low, self.wanted.high)
        distance = (low - accuracy).clamp_min(0) + (accuracy - high).clamp_min(0)
        return Judgement(distance, self.loss(logits, images).nan_to_num(torch.inf))


def task_of(condition: Condition, blueprint: Blueprint) -> Task:
    """Makes ready to run models on the images of a condition's dataset.

    Raises:
        SettingsError: there is no dataset, the library cannot run the networks, or they do not fit the images.
        ZooError: the dataset cannot be opened.
    """
    if condition.dataset is None:
        raise SettingsError("no dataset to judge samples by; give one, or sample without selecting and refining")
    family = blueprint.family
    if family is None:
        raise SettingsError(
            "samples cannot be judged: the architecture comes with no config of a family that the library can run "
            "(mlp, cnn); give one, or sample without selecting and refining"
        )
    dataset = load_images(condition.dataset.dataset_id)
    if not fits(family, dataset):
        raise SettingsError(
            f"{dataset.id}: images of shape {tuple(dataset.train_images.shape[1:])} in {dataset.classes} classes do "
            f"not fit {family.to_dict()}; choose another dataset or architecture"
        )
    wanted = next((one for one in condition.wanted if one.name == UNNAMED), None)
    return Task(dataset, family, blueprint.architecture, wanted)
