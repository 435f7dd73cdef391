"""Neuron permutations on batches of flat weight vectors.

Reordering the hidden channels of a layer, and the same channels wherever they are read, leaves the function of a
network unchanged (Hecht-Nielsen, 1990). A permutation ``p`` acts by gathering: channel ``i`` of the result is channel
``p[i]`` of the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from weightspace.architectures.flat import offsets
from weightspace.errors import ArchitectureError
from weightspace.schema import Architecture, PermutationGroup

Permutations: TypeAlias = tuple[Int[Tensor, "models _size"], ...]

# Bounds the copies and indices of one step to some 10 MiB: they stay in the processor's cache, however many models.
_STEP_ENTRIES = 2**21


@dataclass(frozen=True)
class PermutedTensor:
    """A tensor of the flat vector that at least one group acts on.

    Attributes:
        name: tensor name.
        shape: its shape.
        offset: where it starts in the flat vector.
        axes: ``{axis: (group number, block)}``.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    axes: dict[int, tuple[int, int]]

    @property
    def span(self) -> slice:
        """The tensor's place in the flat vector."""
        return slice(self.offset, self.offset + math.prod(self.shape))


@lru_cache(maxsize=256)
def permuted_tensors(architecture: Architecture) -> tuple[PermutedTensor, ...]:
    """Lists the tensors that the groups of ``architecture`` act on, in flat order.

    Raises:
        ArchitectureError: a group names an unknown tensor or axis, does not fit the axis, or two act on one axis.
    """
    start = offsets(architecture)
    shapes = {tensor.name: tensor.shape for tensor in architecture.tensors}
    axes: dict[str, dict[int, tuple[int, int]]] = {}
    for number, group in enumerate(architecture.groups):
        for item in group.axes:
            shape = shapes.get(item.tensor)
            if shape is None or not 0 <= item.axis < len(shape) or shape[item.axis] != group.size * item.block:
                raise ArchitectureError(
                    f"permutation group {number}: {group.size} channels of {item.block} do not fit axis {item.axis} of "
                    f"{item.tensor!r} with shape {shape}; infer the architecture from these tensors"
                )
            if item.axis in axes.setdefault(item.tensor, {}):
                raise ArchitectureError(
                    f"permutation group {number}: axis {item.axis} of {item.tensor!r} is permuted twice; "
                    "keep one group an axis"
                )
            axes[item.tensor][item.axis] = (number, item.block)
    return tuple(
        PermutedTensor(tensor.name, tensor.shape, start[tensor.name], axes[tensor.name])
        for tensor in architecture.tensors
        if tensor.name in axes
    )


def identity_permutations(
    architecture: Architecture, models: int, device: torch.device | str | None = None
) -> Permutations:
    """Builds the permutations that change nothing, for ``models`` models."""
    return tuple(torch.arange(g.size, device=device).repeat(models, 1) for g in architecture.groups)


def random_permutations(architecture: Architecture, models: int, generator: torch.Generator) -> Permutations:
    """Draws an independent uniform permutation for every model and every group, on the device of ``generator``."""

    def draw(group: PermutationGroup) -> Tensor:
        # float64 makes ties between draws, which would favour some permutations, practically impossible
        keys = torch.rand(models, group.size, generator=generator, device=generator.device, dtype=torch.float64)
        return keys.argsort(dim=1)

    return tuple(draw(group) for group in architecture.groups)


def inverse(permutations: Permutations) -> Permutations:
    """Builds the permutations that undo: after ``permute`` by p, ``permute`` by their inverse gives the original."""
    return tuple(p.argsort(dim=1) for p in permutations)


def compose(first: Permutations, second: Permutations) -> Permutations:
    """Merges two steps into one: permuting by the result is permuting by ``first`` and then by ``second``."""
    return tuple(p.gather(1, q) for p, q in zip(first, second, strict=True))


def permute(
    flat: Float[Tensor, "models params"], permutations: Permutations, architecture: Architecture
) -> Float[Tensor, "models params"]:
    """Reorders the hidden channels of many models at once.

    Args:
        flat: flat weights, one row a model.
        permutations: one ``(models, size)`` tensor for each group of ``architecture``.
        architecture: shared by all rows.

    Returns:
        New weights, bit-exact copies of the entries of ``flat`` in their new places.

    Raises:
        ArchitectureError: ``flat`` or ``permutations`` do not fit ``architecture``.
    """
    check_flat(flat, architecture)
    expected = [(len(flat), group.size) for group in architecture.groups]
    if [tuple(p.shape) for p in permutations] != expected:
        raise ArchitectureError(
            f"permutations of shapes {[tuple(p.shape) for p in permutations]} do not fit the groups {expected}; "
            "draw them for this architecture and number of models"
        )
    permuted = flat.clone()
    permutations = tuple(p.to(flat.device) for p in permutations)
    step = max(1, _STEP_ENTRIES // max(1, architecture.numel))
    for tensor in permuted_tensors(architecture):
        for i in range(0, len(flat), step):
            values = flat[i : i + step, tensor.span].unflatten(1, tensor.shape)
            for axis, (number, block) in tensor.axes.items():
                values = reorder(values, axis, permutations[number][i : i + step], block)
            permuted[i : i + step, tensor.span] = values.flatten(1)
    return permuted


def check_flat(flat: Tensor, architecture: Architecture) -> None:
    """Checks that ``flat`` is ``(models, params)`` of ``architecture``.

    Raises:
        ArchitectureError: it is not.
    """
    if flat.ndim != 2 or flat.shape[1] != architecture.numel:
        raise ArchitectureError(
            f"flat weights have shape {tuple(flat.shape)}, the architecture needs (models, {architecture.numel}); "
            "flatten the tensors with this architecture"
        )


def reorder(
    values: Shaped[Tensor, "models *shape"], axis: int, permutation: Int[Tensor, "models size"], block: int = 1
) -> Shaped[Tensor, "models *shape"]:
    """Reorders the channels along one axis of a tensor, by an order of its own for each model.

    Args:
        values: the same tensor of many models.
        axis: axis of the tensor, not counting the one of the models.
        permutation: channel i of the result is channel ``permutation[m, i]`` of model m.
        block: consecutive entries that are one channel.
    """
    models, size = permutation.shape
    before = math.prod(values.shape[1 : axis + 1])
    # What lies behind a channel moves in one piece: an index of pieces is short, and pieces are copied fast.
    pieces = values.reshape(models * before * size, block * math.prod(values.shape[axis + 2 :]))
    starts = torch.arange(0, len(pieces), size, device=values.device).view(models, before, 1)
    index = (starts + permutation.unsqueeze(1)).flatten()
    return pieces.index_select(0, index).view(values.shape)
