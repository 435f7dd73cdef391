"""Samples around zoo models that are likely to be good for a condition: a weighted kernel density over latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Dirichlet
from torch.nn import functional as F

from weightspace.encoder import Encoder, load_encoder
from weightspace.errors import SettingsError
from weightspace.models.codec import LatentCodec
from weightspace.networks.alignment import align
from weightspace.networks.families import FamilyConfig
from weightspace.sampling.base import Condition, Sources, public_name, training_rows
from weightspace.sampling.priors import sampler_of_prior
from weightspace.schema import Architecture
from weightspace.search.queries import joint_query
from weightspace.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from weightspace.zoo.dataset import Zoo

_Layout = tuple[tuple[str, tuple[int, ...]], ...]
_ELSE = "choose one of the zoo's, or use the flow sampler, which needs no models of the architecture"


@dataclass(frozen=True)
class KdeSettings(Settings):
    """How samples are placed around anchors, which are models of the zoo.

    Measured on small networks on digits, 9 conditions with the best results asked for, mean test accuracy of 8 samples
    each: .909 with 1 anchor, .931 with 4 or 8; .926 at temperature 1, .931 at .5, .924 at .25; .925 at bandwidth .5 and
    .893 at 1, where samples are less like the zoo's models. The zoo's own models of these conditions have .982.

    Attributes:
        temperature: what the scores of the joint model, in nats, are divided by: 1 takes them at their word, less
            prefers the best anchors.
        anchors: how many are averaged for one sample.
        concentration: of the Dirichlet distribution that their shares come from; 1 makes all shares equally likely,
            more brings them closer to equal shares.
        bandwidth: of the kernel, in Scott's rule for one dimension: in standard deviations of each number of the
            latents over the anchors, times the effective number of anchors to the power of -1/5.
    """

    temperature: PositiveFloat = 0.5
    anchors: PositiveInt = 4
    concentration: PositiveFloat = 1.0
    bandwidth: NonNegativeFloat = 0.2


@dataclass(frozen=True, eq=False)
class Anchors:
    """Models of one architecture that samples are placed around.

    Attributes:
        architecture: as their weights are laid out.
        families: their configs; None where the library cannot run them.
        flat: their weights, aligned to a common reference.
        latents: of the aligned weights.
        embeddings: their places in the joint space, at length 1.
    """

    architecture: Architecture
    families: tuple[FamilyConfig | None, ...]
    flat: Float[Tensor, "anchors params"]
    latents: Float[Tensor, "anchors n latent"]
    embeddings: Float[Tensor, "anchors size"]


class KdeSampler:
    """P(W | D, R) as a kernel density over the latents of zoo models.

    The joint model's score of an anchor w estimates log p(w | D, R) / p(w) (`weightspace.search.joint_query`), so that
    models drawn from p(w), which the zoo is, and weighted by its exponential stand for p(w | D, R).
    """

    settings_class: ClassVar = KdeSettings

    def __init__(
        self,
        zoo: Zoo,
        rows: Int[np.ndarray, "rows"],
        codec: LatentCodec,
        joint: Encoder,
        settings: KdeSettings | None = None,
    ) -> None:
        """Takes the models to sample around; their weights are read when an architecture is first sampled.

        Args:
            zoo: the zoo of the models.
            rows: their rows, e.g. those that the codec and the joint model were trained on.
            codec: whose latents are sampled.
            joint: the joint model that chooses among them.
            settings: see `KdeSettings`.
        """
        self.codec = codec
        self.settings = settings or KdeSettings()
        self._zoo, self._rows, self._joint = zoo, np.unique(rows), joint
        self._anchors: dict[_Layout, Anchors] = {}

    @classmethod
    def from_sources(cls, name: str, sources: Sources, settings: KdeSettings) -> tuple[KdeSampler, dict[str, str]]:
        """Samples around the training models of a zoo; see `weightspace.sampling.factory.SAMPLERS`."""
        zoo = sources.zoo
        if zoo is None:
            raise SettingsError(f"sampler {name}: needs a zoo of models to sample around; give one")
        if sources.encoder is not None:
            encoder = load_encoder(sources.encoder, sources.options)
            codec, used = encoder.codec, {"autoencoder": public_name(encoder.name, encoder.path)}
        elif sources.priors:
            prior, used = sampler_of_prior(sources.priors[0], sources.options).from_sources(name, sources, None)
            codec = prior.codec
        else:
            raise SettingsError(
                f"sampler {name}: needs a trained autoencoder (weightspace train autoencoder) or a prior, which comes "
                "with one; give either (--encoder, --prior)"
            )
        named = zoo.location if zoo.repo else f"{zoo.path.resolve().name} ({zoo.digest})"
        return cls(zoo, training_rows(zoo, sources.joint), codec, sources.joint, settings), {"zoo": named, **used}

    def latents(self, condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "count n latent"]:
        """Samples latents; see `weightspace.sampling.base.Sampler`.

        Raises:
            SettingsError: no model of the zoo has this architecture and config.
        """
        anchors, probabilities = self.anchors(condition.architecture), self.probabilities(condition)
        places, shares = picked(probabilities, count, self.settings, generator)
        centres = torch.stack([self._centre(anchors, *one) for one in zip(places, shares, strict=True)])
        return centres + noise(anchors.latents, probabilities, count, self.settings, generator)

    def anchors(self, architecture: Architecture) -> Anchors:
        """Returns all models with the tensors of an architecture, whatever their config.

        Raises:
            SettingsError: there is none.
        """
        layout = _layout(architecture)
        if layout not in self._anchors:
            headers = [header for header, own in self._zoo.architectures.items() if _layout(own) == layout]
            rows = self._rows[self._zoo.index["header"].iloc[self._rows].isin(headers)]
            if not len(rows):
                raise SettingsError(
                    f"{self._zoo.location}: none of {len(self._rows):,} models to sample around has the architecture "
                    f"({len(layout)} tensors, {architecture.numel:,} weights); {_ELSE}"
                )
            self._anchors[layout] = self._read(rows, architecture)
        return self._anchors[layout]

    def probabilities(self, condition: Condition) -> Float[Tensor, " anchors"]:
        """Returns the probability of each of the `anchors`; 0 for those that are known to have another config.

        Raises:
            SettingsError: all of them have another config, or the condition does not fit the joint model.
        """
        anchors, family = self.anchors(condition.architecture), condition.family
        fitting = torch.tensor([family is None or own in (None, family) for own in anchors.families])
        if family is not None and not fitting.any():
            raise SettingsError(
                f"{self._zoo.location}: none of {len(fitting):,} models with these tensors has the config "
                f"{family.to_dict()}; {_ELSE}"
            )
        scores = torch.zeros(len(fitting))
        if condition.dataset is not None or condition.results:
            query = torch.from_numpy(joint_query(self._joint, condition.dataset, condition.results))
            scores = anchors.embeddings @ query
        return (scores / self.settings.temperature).masked_fill(~fitting, -torch.inf).softmax(0)

    def _centre(
        self, anchors: Anchors, places: Int[Tensor, " k"], shares: Float[Tensor, " k"]
    ) -> Float[Tensor, "n latent"]:
        """Mean of anchors that are aligned to the one with the largest share, which pairs channels best."""
        if len(places) == 1:
            return anchors.latents[places[0]]
        aligned, _ = align(anchors.flat[places], anchors.flat[places[shares.argmax()]], anchors.architecture)
        return torch.einsum("k,knl->nl", shares, self.codec.encode(aligned, anchors.architecture))

    def _read(self, rows: Int[np.ndarray, "rows"], architecture: Architecture) -> Anchors:
        batches = list(self._zoo.batches(rows))
        flat = torch.cat([batch.flat.float() for batch in batches])
        families = tuple(self._zoo.families[row] for batch in batches for row in batch.rows)
        reference = align(flat, flat[0], architecture)[0].mean(0)
        aligned, _ = align(flat, reference, architecture)
        embeddings = F.normalize(self._joint.embed(flat, architecture), dim=1)
        return Anchors(architecture, families, aligned, self.codec.encode(aligned, architecture), embeddings)


def picked(
    probabilities: Float[Tensor, " anchors"], count: int, settings: KdeSettings, generator: torch.Generator
) -> tuple[Int[Tensor, "count k"], Float[Tensor, "count k"]]:
    """Draws for each sample its own anchors, by their probabilities, and the shares that they have in it."""
    size = (count, settings.anchors)
    places = torch.multinomial(probabilities, count * settings.anchors, replacement=True, generator=generator)
    with torch.random.fork_rng(devices=[]):  # the distribution draws from the global generator
        torch.set_rng_state(generator.get_state())
        shares = Dirichlet(torch.full(size, settings.concentration)).sample()
        generator.set_state(torch.get_rng_state())
    return places.view(size), shares


def noise(
    latents: Float[Tensor, "anchors n latent"],
    probabilities: Float[Tensor, " anchors"],
    count: int,
    settings: KdeSettings,
    generator: torch.Generator,
) -> Float[Tensor, "count n latent"]:
    """Draws each sample's own deviation from its centre: Gaussian, as wide as `KdeSettings` says."""
    weights = probabilities.view(-1, 1, 1)
    mean = (weights * latents).sum(0)
    spread = (weights * (latents - mean).square()).sum(0).sqrt()
    effective = 1 / probabilities.square().sum()
    width = settings.bandwidth * effective ** (-1 / 5) * spread
    return width * torch.randn((count, *spread.shape), generator=generator)


def _layout(architecture: Architecture) -> _Layout:
    """What two models must share for their flat vectors to mean the same, whatever they are stored as."""
    return tuple((tensor.name, tensor.shape) for tensor in architecture.tensors)
