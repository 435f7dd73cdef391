"""Numbers that describe weights and do not change when hidden neurons are reordered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.networks.flat import unflatten
from weightspace.schema import Architecture

PERCENTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_NORM_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SPECTRUM = 16
# Matrices whose smaller side is longer would take minutes a model.
_LARGEST_SPECTRUM = 1024
# Weights that are described at once: 32 MiB in float64.
CHUNK_ENTRIES = 2**22


def weight_statistics(
    flat: Float[Tensor, "models params"], architecture: Architecture
) -> Float[Tensor, "models stats"]:
    """Computes s(W): mean, variance and percentiles 1, 25, 50, 75, 99 of each tensor (Unterthiner et al., 2020).

    Seven numbers a tensor in the order of ``architecture.tensors``, so 14 for a layer of kernel and bias. They are
    computed in float64 from sorted weights: permuting neurons does not change a single bit of them.

    Raises:
        ArchitectureError: ``flat`` does not fit ``architecture``.
    """
    return _by_chunk(flat, architecture, _statistics)


def weight_invariants(
    flat: Float[Tensor, "models params"], architecture: Architecture
) -> Float[Tensor, "models stats"]:
    """Computes further numbers that neuron permutations leave alone, beside s(W).

    For each tensor skewness and excess kurtosis. For each tensor of two or more axes, read as a matrix (output
    channels, rest): its singular values, quantiles of the norms of its output and of its input channels, and for
    convolution kernels the roughness along each spatial axis (mean squared difference of neighbours over mean square).
    For each hidden permutation group: the singular values of the product of the layer that writes its channels and
    each layer that reads them. More than 16 singular values are read off at 16 evenly spaced ranks, the largest and
    the smallest among them; where the smaller side of a matrix is over 1,024 its spectrum is left out.

    Raises:
        ArchitectureError: ``flat`` does not fit ``architecture``.
    """
    return _by_chunk(flat, architecture, _invariants)


def _by_chunk(
    flat: Tensor, architecture: Architecture, describe: Callable[[dict[str, Tensor], Architecture], Iterator[Tensor]]
) -> Tensor:
    chunks = flat.detach().split(max(1, CHUNK_ENTRIES // max(1, architecture.numel)))
    described = [torch.cat(list(describe(unflatten(c.double(), architecture), architecture)), dim=1) for c in chunks]
    # Diverged models stay finite: the variance of weights of 1e20 has no float32.
    return torch.cat(described).clamp(-FLOAT32_MAX, FLOAT32_MAX).float()


def _statistics(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    for spec in architecture.tensors:
        ordered = tensors[spec.name].reshape(-1, spec.numel).sort(dim=1).values
        mean = ordered.mean(dim=1, keepdim=True)
        yield mean
        yield (ordered - mean).square().mean(dim=1, keepdim=True)
        yield _quantiles(ordered, PERCENTILES)


def _invariants(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    blocks = {(axis.tensor, axis.axis): axis.block for group in architecture.groups for axis in group.axes}
    for spec in architecture.tensors:
        weight = tensors[spec.name]
        yield _shape_of_distribution(weight.reshape(-1, spec.numel))
        if len(spec.shape) < 2:
            continue
        if min(spec.shape[0], spec.numel // spec.shape[0]) <= _LARGEST_SPECTRUM:
            yield _singular_values(weight.flatten(2))
        for axis in (0, 1):
            norms = _channels(weight, axis, blocks.get((spec.name, axis), 1)).norm(dim=2)
            yield _quantiles(norms.sort(dim=1).values, _NORM_QUANTILES)
        for axis in range(2, len(spec.shape)):
            if spec.shape[axis] > 1:
                rough = weight.diff(dim=axis + 1).square().flatten(1).mean(dim=1, keepdim=True)
                yield _ratio(rough, weight.square().flatten(1).mean(dim=1, keepdim=True))
    yield from _products(tensors, architecture)


def _products(tensors: dict[str, Tensor], architecture: Architecture) -> Iterator[Tensor]:
    place = {spec.name: number for number, spec in enumerate(architecture.tensors) if len(spec.shape) >= 2}
    for group in architecture.groups:
        if group.size > _LARGEST_SPECTRUM:
            continue
        writers = [axis for axis in group.axes if axis.axis == 0 and axis.tensor in place]
        for reader in (axis for axis in group.axes if axis.axis == 1 and axis.tensor in place):
            before = [axis for axis in writers if place[axis.tensor] < place[reader.tensor]]
            if not before:
                continue
            writer = max(before, key=lambda axis: place[axis.tensor])
            written = _channels(tensors[writer.tensor], 0, writer.block)
            read = _channels(tensors[reader.tensor], 1, reader.block)
            # The product is read^T written; its squared singular values are the eigenvalues of R^1/2 W R^1/2 with the
            # Gram matrices of both, which are only as large as the group.
            values, vectors = torch.linalg.eigh(read @ read.mT)
            root = vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT
            squared = torch.linalg.eigvalsh(root @ (written @ written.mT) @ root)
            yield _spectrum(squared, min(group.size, written.shape[2], read.shape[2]))


def _channels(weight: Tensor, axis: int, block: int) -> Float[Tensor, "models channels entries"]:
    """Moves an axis of the tensors to the front; ``block`` consecutive entries are one channel."""
    front = weight.movedim(axis + 1, 1)
    return front.reshape(len(front), front.shape[1] // block, -1)


def _singular_values(matrix: Float[Tensor, "models rows width"]) -> Float[Tensor, "models values"]:
    small = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
    return _spectrum(torch.linalg.eigvalsh(small @ small.mT), small.shape[1])


def _spectrum(ascending_squares: Float[Tensor, "models all"], rank: int) -> Float[Tensor, "models values"]:
    values = ascending_squares[:, -rank:].clamp(min=0).sqrt()
    return values if rank <= _SPECTRUM else _quantiles(values, np.linspace(0, 1, _SPECTRUM))


def _quantiles(ordered: Float[Tensor, "models entries"], points: Sequence[float] | np.ndarray) -> Tensor:
    # torch.quantile sorts again and refuses more than 16M entries.
    last = ordered.shape[1] - 1
    place = torch.as_tensor(np.asarray(points) * last)
    low = place.floor().long().clamp(max=last)
    return torch.lerp(ordered[:, low], ordered[:, (low + 1).clamp(max=last)], place - low)


def _shape_of_distribution(values: Float[Tensor, "models entries"]) -> Float[Tensor, "models 2"]:
    centred = values - values.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=1, keepdim=True).sqrt()
    unit = _ratio(centred, scale)
    kurtosis = unit.pow(4).mean(dim=1) - 3
    return torch.stack([unit.pow(3).mean(dim=1), torch.where(scale[:, 0] > 0, kurtosis, 0.0)], dim=1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
