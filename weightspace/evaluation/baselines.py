"""Models that need no generator, which samples have to beat (baselines of Zeng et al., 2025, arXiv 2506.07998)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import SettingsError
from weightspace.networks.alignment import align
from weightspace.networks.families import FamilyConfig, Initialization, initialize
from weightspace.networks.flat import flatten
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo

RESULT = "test_accuracy"


def from_scratch(
    config: FamilyConfig,
    architecture: Architecture,
    count: int,
    generator: torch.Generator,
    scheme: Initialization = "kaiming_uniform",
) -> Float[Tensor, "models params"]:
    """Draws the initial weights of ``count`` models."""
    drawn = initialize(config, [scheme] * count, generator)
    models = [{name: values[number] for name, values in drawn.items()} for number in range(count)]
    return torch.stack([flatten(model, architecture) for model in models])


def noisy_copies(
    flat: Float[Tensor, "models params"], distance: Float[Tensor, " models"], generator: torch.Generator
) -> Float[Tensor, "models params"]:
    """Moves each model by ``distance`` in a direction of its own, uniform over all directions."""
    noise = torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
    return flat + noise * (distance / noise.norm(dim=1)).unsqueeze(1)


def average(
    flat: Float[Tensor, "models params"], architecture: Architecture, *, aligned: bool
) -> Float[Tensor, "one params"]:
    """Averages models, as they are or after all are aligned to the first of them by weight matching."""
    if aligned:
        flat, _ = align(flat, flat[0], architecture)
    return flat.mean(0, keepdim=True)


def best_model(zoo: Zoo, rows: Int[np.ndarray, "models"]) -> int:
    """Returns the row of the model with the highest test accuracy on its own dataset; the first of equal ones.

    Raises:
        SettingsError: none of the rows has a test accuracy.
    """
    accuracies = zoo.index[RESULT].to_numpy(dtype=np.float64)[rows]
    if not np.isfinite(accuracies).any():
        raise SettingsError(f"{zoo.location}: none of {len(rows)} models has a {RESULT}; choose other training rows")
    return int(rows[np.nanargmax(accuracies)])


def closest_in_results(
    zoo: Zoo,
    rows: Int[np.ndarray, "models"],
    requested: Mapping[str, float],
    count: int,
    generator: np.random.Generator,
) -> Int[np.ndarray, "closest"]:
    """Chooses the ``count`` rows whose results are nearest to the requested ones, the nearest first.

    Each result counts in its own standard deviations over ``rows``. Ties, and rows without any request, fall as the
    generator draws; a model that lacks a requested result comes last.

    Raises:
        SettingsError: the zoo has no result of a requested name.
    """
    drawn = generator.permutation(rows)
    distance = np.zeros(len(drawn))
    for name, value in requested.items():
        if name not in zoo.result_names:
            raise SettingsError(
                f"requested result {name!r} is none of the zoo's; choose of {', '.join(zoo.result_names)}"
            )
        known = zoo.index[name].to_numpy(dtype=np.float64)[drawn]
        spread = np.nanstd(known) if np.isfinite(known).any() else 0.0
        distance += np.nan_to_num(((known - value) / (spread or 1.0)) ** 2, nan=np.inf)
    return drawn[np.argsort(distance, kind="stable")[:count]]


def nearest_datasets(
    wanted: Mapping[str, Float[Tensor, " size"]], known: Mapping[str, Float[Tensor, " size"]]
) -> dict[str, str]:
    """Returns for each wanted dataset the known one whose embedding has the highest cosine similarity to its own.

    Raises:
        SettingsError: no dataset is known.
    """
    if not known:
        raise SettingsError("no dataset is known; give the embeddings of the datasets that were trained on")
    ours, theirs = (F.normalize(torch.stack(list(one.values())), dim=1) for one in (wanted, known))
    names = list(known)
    return {dataset: names[int(row.argmax())] for dataset, row in zip(wanted, ours @ theirs.T, strict=True)}
