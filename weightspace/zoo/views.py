"""Augmented views of models: neuron permutation keeps the function, erasing and noise hide part of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weightspace.errors import SettingsError
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture


@dataclass(frozen=True)
class Augmentation:
    """How a view differs from the model it shows.

    Attributes:
        permute: reorder hidden neurons at random wherever the architecture's symmetries are known.
        erase: largest share of a token that is set to zero; the share is drawn for each token, its place too.
        noise: standard deviation of the noise added to each entry, in units of the normalised weights.
    """

    permute: bool = True
    erase: float = 0.1
    noise: float = 0.05

    def __post_init__(self) -> None:
        """Refuses shares and noise that make no sense."""
        if not 0 <= self.erase < 1:
            raise SettingsError(f"augmentation: erase is {self.erase}, give a share from 0 to below 1")
        if not self.noise >= 0:
            raise SettingsError(f"augmentation: noise is {self.noise}, give a standard deviation of 0 or more")


def permuted_views(
    flat: Float[Tensor, "models params"], architecture: Architecture, views: int, generator: torch.Generator
) -> Float[Tensor, "views_models params"]:
    """Draws functionally equal copies of each model, every one with a neuron permutation of its own.

    Args:
        flat: flat weights, one row a model.
        architecture: shared by all of them; without known symmetries the copies are equal.
        views: copies a model.
        generator: draws the permutations.

    Returns:
        The first view of all models, then the second, and so on.
    """
    if not architecture.groups:
        return flat.repeat(views, 1)
    return permute(flat, random_permutations(architecture, views * len(flat), generator), architecture)


def corrupt(
    values: Float[Tensor, "models n d"],
    mask: Bool[Tensor, "models n d"],
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Float[Tensor, "models n d"]:
    """Erases a stretch of each token and adds noise; padding stays zero.

    Args:
        values: normalised tokens.
        mask: true where an entry is a weight.
        augmentation: how much of each.
        generator: draws everything anew for every token of every model.
    """
    if augmentation.noise:
        values = values + augmentation.noise * torch.randn(values.shape, generator=generator)
    if augmentation.erase:
        size = values.shape[-1]
        length = torch.rand(values.shape[:2], generator=generator) * augmentation.erase * size
        start = torch.rand(values.shape[:2], generator=generator) * (size - length)
        place = torch.arange(size) + 0.5  # the middle of each entry, so that the first is as likely as the last
        erased = (place >= start.unsqueeze(-1)) & (place < (start + length).unsqueeze(-1))
        values = values.masked_fill(erased, 0.0)
    return values * mask


def window_starts(lengths: list[int], window: int, generator: torch.Generator) -> list[int]:
    """Draws where each sequence is cut: every sequence has a start of its own, uniform over the possible ones."""
    return [int(torch.randint(max(1, length - window + 1), (), generator=generator)) for length in lengths]
