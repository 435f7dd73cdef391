"""How new and how different models are: by their weights up to the order of neurons, and by what they get wrong.

The measures are those of Zeng et al. (2025, arXiv 2506.07998), who found that most generators of weights return their
training checkpoints. Each of them needs a reference, for models that were trained independently overlap too: they all
fail on the hard images, and the more so the more they get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightspace.networks.alignment import align
from weightspace.networks.flat import unflatten
from weightspace.networks.permutation import permuted_axes
from weightspace.schema import Architecture

_SHORTLIST = 8  # known models that each of two ways proposes for a model


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest known model of each model.

    Attributes:
        place: its place among the known models.
        distance: L2 distance to it after alignment.
        relative: this distance as a share of the model's own norm.
        aligned: the known model in the channel order that comes nearest.
    """

    place: Int[Tensor, " models"]
    distance: Float[Tensor, " models"]
    relative: Float[Tensor, " models"]
    aligned: Float[Tensor, "models params"]


class KnownModels:
    """Models to which others are compared, whatever the order of their hidden channels."""

    def __init__(self, flat: Float[Tensor, "known params"], architecture: Architecture) -> None:
        """Prepares the comparison.

        Args:
            flat: the known models, at least one.
            architecture: shared by all of them.

        Raises:
            ArchitectureError: the weights do not fit ``architecture``.
            TokenError: a weight is NaN or infinite.
        """
        self._flat, self._architecture = flat, architecture
        self._sorted = sorted_weights(flat, architecture)
        self._centre = align(flat, flat[0], architecture)[0].mean(0)
        self._aligned, _ = align(flat, self._centre, architecture)

    def nearest(self, flat: Float[Tensor, "models params"], shortlist: int = _SHORTLIST) -> Nearest:
        """Finds the nearest known model of each model.

        Each model is aligned with a shortlist by weight matching, and the nearest one is taken: the known models whose
        sorted weights (see `sorted_weights`) are nearest, and those that are nearest after alignment of all models to
        the mean of the known ones. The first find every permuted copy; where models resemble each other only faintly
        the second come close to a search through all, of which the distance is an upper bound.

        Args:
            flat: the models.
            shortlist: known models that each of the two ways proposes.

        Raises:
            ArchitectureError: the weights do not fit the architecture.
            TokenError: a weight is NaN or infinite.
        """
        count = min(shortlist, len(self._flat))
        aligned, _ = align(flat, self._centre, self._architecture)
        proposed = [
            torch.cdist(ours, theirs).topk(count, largest=False).indices
            for ours, theirs in (
                (sorted_weights(flat, self._architecture), self._sorted),
                (aligned, self._aligned),
            )
        ]
        places, moved = torch.empty(len(flat), dtype=torch.int64), torch.empty_like(flat)
        for number, candidates in enumerate(torch.cat(proposed, dim=1)):
            candidates = candidates.unique()
            towards, _ = align(self._flat[candidates], flat[number], self._architecture)
            best = (towards - flat[number]).norm(dim=1).argmin()
            places[number], moved[number] = candidates[best], towards[best]
        distance = (moved - flat).norm(dim=1)
        return Nearest(places, distance, distance / flat.norm(dim=1).clamp_min(1e-12), moved)


def sorted_weights(flat: Float[Tensor, "models params"], architecture: Architecture) -> Float[Tensor, "models params"]:
    """Sorts every tensor's entries along the axes that permutations of hidden channels act on.

    No order of the channels brings two models closer than their sorted weights are (rearrangement inequality): a
    distance of zero is a necessary sign of a permuted copy.
    """
    tensors = unflatten(flat, architecture)
    for name, axes in permuted_axes(architecture).items():
        values = tensors[name]
        # From the last axis on: cutting and moving an axis leaves those before it in place.
        for axis in sorted(axes, reverse=True):
            values = values.unflatten(axis + 1, (-1, axes[axis][1])).movedim(axis + 1, -1)
        # On short axes NumPy sorts several times faster than torch.
        ordered = np.sort(values.flatten(-len(axes)).detach().cpu().numpy(), axis=-1)
        tensors[name] = torch.from_numpy(ordered).to(flat.device)
    return torch.cat([values.flatten(1) for values in tensors.values()], dim=1)


def error_overlap(
    wrong: Bool[Tensor, "models images"], known: Bool[Tensor, "known images"]
) -> Float[Tensor, "models known"]:
    """Computes the intersection over union of the images that two models get wrong; 1 where neither errs."""
    ours, theirs = wrong.float(), known.float()
    both = ours @ theirs.T
    either = ours.sum(1, keepdim=True) + theirs.sum(1) - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def disagreement(
    predicted: Int[Tensor, "models images"], other: Int[Tensor, "others images"]
) -> Float[Tensor, "models others"]:
    """Computes the share of images for which two models predict different classes."""
    # Sums of products of indicators: no table of models, others and images is made.
    agreed = torch.zeros(len(predicted), len(other))
    for label in predicted.unique():
        agreed += (predicted == label).float() @ (other == label).float().T
    return 1 - agreed / predicted.shape[1]


def partners(
    errors: Int[Tensor, " models"], reference: Int[Tensor, " references"], share: float = 0.1, least: int = 2
) -> Float[Tensor, "models references"]:
    """Weighs, for each model, the reference models that make about as many errors; rows add up to 1 or are 0.

    Overlap and disagreement follow from the number of errors to a large part: only models with as many can be compared.

    Args:
        errors: number of test images that each model gets wrong.
        reference: the same of the reference models.
        share: by which share of a model's errors its partners' number may differ.
        least: by how many errors it may differ in any case.
    """
    apart = (errors.unsqueeze(1) - reference).abs()
    near = (apart <= (errors * share).clamp_min(least).unsqueeze(1)).float()
    return near / near.sum(1, keepdim=True).clamp_min(1)


def of_partners(
    weights: Float[Tensor, "models references"], values: Float[Tensor, " references"]
) -> Float[Tensor, " models"]:
    """Averages a number of the reference models over each model's partners; NaN for a model without any."""
    return torch.where(weights.sum(1) > 0, weights @ values, torch.nan)


def of_partner_pairs(
    weights: Float[Tensor, "models references"],
    values: Float[Tensor, "references references"],
    runs: Int[Tensor, " references"],
) -> Float[Tensor, "models models"]:
    """Averages a number of pairs of reference models over the partners of each pair of models.

    Two reference models are a pair if they come from different training runs. NaN where there is no such pair.
    """
    independent = (runs.unsqueeze(1) != runs).float()
    weight = weights @ independent @ weights.T
    total = weights @ (independent * values) @ weights.T
    return torch.where(weight > 0, total / weight.clamp_min(1e-12), torch.nan)
