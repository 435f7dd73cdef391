"""The interface of samplers, and what is done with the latents that they give."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.models.codec import LatentCodec
from weightspace.sampling.conditions import Blueprint, Condition


@runtime_checkable
class Sampler(Protocol):
    """From a condition to latents that its codec decodes."""

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder whose latents are sampled."""

    def latents(
        self, condition: Condition, blueprint: Blueprint, count: int, generator: torch.Generator
    ) -> Float[Tensor, "count n latent"]:
        """Samples models, each by itself.

        Args:
            condition: what they are to be good for.
            blueprint: the architecture.
            count: how many.
            generator: draws everything random, on the CPU; the same one gives the same samples.

        Raises:
            SettingsError: the sampler cannot do what is asked for.
        """


@torch.no_grad()
def sample(
    sampler: Sampler, condition: Condition, blueprint: Blueprint, count: int, generator: torch.Generator
) -> Float[Tensor, "count params"]:
    """Samples flat weight vectors; see `Sampler.latents`."""
    return sampler.codec.decode(sampler.latents(condition, blueprint, count, generator), blueprint.architecture)
