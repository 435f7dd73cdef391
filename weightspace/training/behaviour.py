"""The behaviour loss: decoded models compared with their originals by what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.data.images import load_images
from weightspace.errors import ZooError
from weightspace.losses import behaviour_loss
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.settings import FractionBelowOne, PositiveInt, Settings
from weightspace.training.batches import BatchPart
from weightspace.training.joint_data import opened_datasets
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True)
class BehaviourSettings(Settings):
    """The behaviour loss, for models whose function the library can run.

    Attributes:
        weight: share of the behaviour loss; the model's own loss weighs ``1 - weight``. 0 turns it off.
        images: query images a model and step, drawn from the training split of the model's own dataset.
    """

    weight: FractionBelowOne = 0.75
    images: PositiveInt = 32


class BehaviourLoss:
    """Compares models restored from tokens with their originals, on training images of their own datasets."""

    def __init__(self, zoo: Zoo, extractor: WeightFeatureExtractor, settings: BehaviourSettings, seed: int) -> None:
        self._extractor, self._images, self._seed = extractor, settings.images, seed
        queries = QueryImages(zoo) if settings.weight else None
        self._queries = queries if queries is not None and queries.runnable else None
        self.weight = 0.0 if self._queries is None else settings.weight
        """Share of the behaviour loss; 0 if no model of the zoo can be run."""

    def __call__(
        self, tokens: Float[Tensor, "batch n d"], parts: Sequence[BatchPart], number: int
    ) -> tuple[list[Float[Tensor, ""]], int]:
        """Computes the losses of the models that can be run.

        Args:
            tokens: decoded tokens of a batch.
            parts: its models, by architecture.
            number: running number of the batch; draws the images.

        Returns:
            Sums of losses, and the number of models that they add up to.
        """
        losses: list[Tensor] = []
        if self._queries is None:
            return losses, 0
        count, generator = 0, torch.Generator().manual_seed(self._seed + number)
        for part in parts:
            length = self._extractor.token_count(part.architecture)
            decoded = self._extractor.restore(tokens[part.places.to(tokens.device), :length], part.architecture)
            for config, inside in self._queries.functions(part.rows).items():
                images = self._queries.draw(part.rows[inside], self._images, generator).to(decoded.device)
                original = run_flat(config, part.architecture, part.flat[inside].to(decoded), images)
                imitated = run_flat(config, part.architecture, decoded[inside], images)
                losses.append(behaviour_loss(imitated, original) * len(inside))
                count += len(inside)
        return losses, count


class QueryImages:
    """Training images of the datasets that a zoo's models were trained on, where function and dataset are known."""

    def __init__(self, zoo: Zoo) -> None:
        self._configs, self._datasets = zoo.families, zoo.index["dataset"].to_numpy()
        named = {name for name, config in zip(self._datasets, self._configs, strict=True) if config is not None}
        opened, left_out = opened_datasets(named, lambda name: load_images(name).train_images)
        if left_out and not opened:
            reason = next(iter(left_out.values()))
            raise ZooError(f"{zoo.location}: no dataset can be opened ({reason}); train with behaviour: weight: 0")
        self._ranges: dict[str, tuple[int, int]] = {}
        parts: dict[tuple[int, ...], list[Tensor]] = {}
        for name, images in opened.items():
            others = parts.setdefault(tuple(images.shape[1:]), [])
            self._ranges[name] = (sum(map(len, others)), len(images))
            others.append(images)
        self._images = {shape: torch.cat(images) for shape, images in parts.items()}
        self._shapes = {name: tuple(images.shape[1:]) for name, images in opened.items()}

    @property
    def runnable(self) -> bool:
        """Whether any model of the zoo can be run."""
        return bool(self._ranges)

    def functions(self, rows: Int[np.ndarray, "models"]) -> dict[FamilyConfig, list[int]]:
        """Groups the places of those rows whose models can be run on their datasets by their config."""
        groups: dict[FamilyConfig, list[int]] = {}
        for place, row in enumerate(rows):
            config = self._configs[row]
            if config is not None and self._shapes.get(self._datasets[row]) == config.image_shape:
                groups.setdefault(config, []).append(place)
        return groups

    def draw(
        self, rows: Int[np.ndarray, "models"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "models count c h w"]:
        """Draws ``count`` training images of each model's own dataset, all of one shape, with replacement."""
        starts, sizes = torch.tensor([self._ranges[self._datasets[row]] for row in rows]).unsqueeze(-1).unbind(1)
        chosen = (torch.rand(len(rows), count, generator=generator) * sizes).long() + starts
        return self._images[self._shapes[self._datasets[rows[0]]]][chosen]
