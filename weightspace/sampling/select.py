"""Keeps the best of many samples, by a few training images (Schuerholt et al., 2024, "SANE")."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.models.codec import LatentCodec
from weightspace.sampling.base import Condition, SamplerStep
from weightspace.sampling.kde import KdeSampler, KdeSettings, noise, picked
from weightspace.sampling.objective import Objective, ranking
from weightspace.settings import PositiveFraction, PositiveInt, Settings


@dataclass(frozen=True)
class SelectionSettings(Settings):
    """How the best are found.

    Measured as in `weightspace.sampling.kde.KdeSettings`: the mean accuracy goes from .931 to .954, and to .958 with
    bootstrapping, whose samples are much alike however (they disagree on less than 1 % of the test images).

    Attributes:
        candidates: samples to choose among, for each one that is kept.
        images: training images that they are scored on, the same for all.
        rounds: of bootstrapping: number of times that the density is fitted again to the best.
        share: of the candidates, the best, that it is fitted to.
    """

    candidates: PositiveInt = 8
    images: PositiveInt = 128
    rounds: PositiveInt = 3
    share: PositiveFraction = 0.25


@dataclass(frozen=True, eq=False)
class SelectedSampler(SamplerStep):
    """The best samples of another sampler.

    The best have the lowest cross-entropy, or, if a test accuracy is wanted, the accuracy that is nearest to it.

    Attributes:
        sampler: gives the candidates.
        settings: see `SelectionSettings`; nothing is fitted again.
    """

    settings_class = SelectionSettings
    settings: SelectionSettings = field(default_factory=SelectionSettings)

    def latents(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        """Samples latents, the best first; see `weightspace.sampling.base.Sampler`.

        Raises:
            SettingsError: there is no dataset or no network that runs on it, or the other sampler cannot sample for
                this condition.
        """
        objective = Objective.of(condition)
        images = objective.draw(1, self.settings.images, generator)
        found = self.sampler.latents(condition, count * self.settings.candidates, generator)
        return best(found, count, objective, images, self.codec)


@dataclass(frozen=True, eq=False)
class BootstrappedSampler(SelectedSampler):
    """The best samples of a kernel density that is fitted to the best again and again.

    Each round draws as many candidates as the one before; the best of a round stay in the running.

    Attributes:
        sampler: the density to start from.
        settings: see `SelectionSettings`.
    """

    sampler: KdeSampler

    def latents(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        """Samples latents, the best first; see `SelectedSampler.latents`."""
        settings, objective = self.settings, Objective.of(condition)
        images = objective.draw(1, settings.images, generator)
        candidates = count * settings.candidates
        kept = max(count, round(candidates * settings.share))
        found = self.sampler.latents(condition, candidates, generator)
        for _ in range(settings.rounds):
            elite = best(found, kept, objective, images, self.codec)
            found = torch.cat([elite, refitted(elite, candidates, self.sampler.settings, generator)])
        return best(found, count, objective, images, self.codec)


def best(
    latents: Float[Tensor, "candidates n latent"],
    count: int,
    objective: Objective,
    images: Int[Tensor, "one images"],
    codec: LatentCodec,
) -> Float[Tensor, "count n latent"]:
    """Returns the latents of the best models, the best first."""
    with torch.no_grad():
        flat = codec.decode(latents, objective.architecture)
    return latents[ranking(objective.score(flat, images.expand(len(flat), -1)))[:count]]


def refitted(
    elite: Float[Tensor, "anchors n latent"], count: int, settings: KdeSettings, generator: torch.Generator
) -> Float[Tensor, "count n latent"]:
    """Samples from a kernel density around equally likely latents.

    They are not aligned again: all descend from anchors that are aligned to a common reference.
    """
    probabilities = torch.full((len(elite),), 1 / len(elite))
    places, shares = picked(probabilities, count, settings, generator)
    centres = torch.einsum("ck,cknl->cnl", shares, elite[places])
    return centres + noise(elite, probabilities, count, settings, generator)
