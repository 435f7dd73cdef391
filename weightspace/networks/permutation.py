"""Neuron permutations on batches of flat weight vectors.

Reordering the hidden channels of a layer, and the same channels wherever they are read, leaves the function of a
network unchanged (Hecht-Nielsen, 1990). A permutation ``p`` acts by gathering: channel ``i`` of the result is channel
``p[i]`` of the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from weightspace.errors import ArchitectureError
from weightspace.networks.flat import unflatten
from weightspace.schema import Architecture

Permutations: TypeAlias = tuple[Int[Tensor, "_rows _size"], ...]

# Bounds the copies and indices of one step to some 10 MiB: they stay in the processor's cache, however many models.
_STEP_ENTRIES = 2**21


@lru_cache(maxsize=256)
def permuted_axes(architecture: Architecture) -> dict[str, dict[int, tuple[int, int]]]:
    """Lists what the groups of ``architecture`` act on: tensor name -> axis -> (group number, block).

    Raises:
        ArchitectureError: a group names an unknown tensor or axis, does not fit the axis, or two act on one axis.
    """
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
    return axes


def identity_permutations(
    architecture: Architecture, models: int, device: torch.device | str | None = None
) -> Permutations:
    """Builds the permutations that change nothing, for ``models`` models."""
    return tuple(torch.arange(g.size, device=device).repeat(models, 1) for g in architecture.groups)


def random_permutations(architecture: Architecture, models: int, generator: torch.Generator) -> Permutations:
    """Draws an independent uniform permutation for every model and every group, on the device of ``generator``."""
    # float64 makes ties between draws, which would favour some permutations, practically impossible
    options: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    return tuple(torch.rand(models, group.size, **options).argsort(dim=1) for group in architecture.groups)


def compose(first: Permutations, second: Permutations) -> Permutations:
    """Merges two steps into one: permuting by the result is permuting by ``first`` and then by ``second``."""
    return tuple(p.gather(1, q) for p, q in zip(first, second, strict=True))


def permute(
    flat: Float[Tensor, "models params"], permutations: Permutations, architecture: Architecture
) -> Float[Tensor, "views_models params"]:
    """Reorders the hidden channels of many models at once.

    Args:
        flat: flat weights, one row a model.
        permutations: one ``(views * models, size)`` tensor for each group of ``architecture``: the first view of all
            models, then the second, and so on. Several views in one call cost less than as many calls.
        architecture: shared by all rows.

    Returns:
        New weights, bit-exact copies of the entries of ``flat`` in their new places, view by view.

    Raises:
        ArchitectureError: ``flat`` or ``permutations`` do not fit ``architecture``.
    """
    views = max(1, len(permutations[0]) // max(1, len(flat))) if permutations else 1
    expected = [(views * len(flat), group.size) for group in architecture.groups]
    if [tuple(p.shape) for p in permutations] != expected:
        raise ArchitectureError(
            f"permutations of shapes {[tuple(p.shape) for p in permutations]} do not fit the groups {expected}; "
            "draw them for this architecture and number of models"
        )
    if not permutations or not len(flat):
        return flat.clone()
    permutations = tuple(p.to(flat.device).unflatten(0, (views, len(flat))) for p in permutations)
    step = max(1, _STEP_ENTRIES // (views * architecture.numel))
    parts = [
        _permuted(flat[i : i + step], tuple(p[:, i : i + step].flatten(0, 1) for p in permutations), architecture)
        for i in range(0, len(flat), step)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1).flatten(0, 1)


def _permuted(flat: Tensor, permutations: Permutations, architecture: Architecture) -> Tensor:
    tensors = unflatten(flat, architecture)
    for name, axes in permuted_axes(architecture).items():
        orders = {axis: (permutations[number], block) for axis, (number, block) in axes.items()}
        tensors[name] = reorder(tensors[name], orders)
    rows = len(permutations[0])
    columns = [values.flatten(1) for values in tensors.values()]
    # What no group acts on is the same in every view.
    return torch.cat([c if len(c) == rows else c.repeat(rows // len(c), 1) for c in columns], dim=1)


def reorder(
    values: Shaped[Tensor, "models *shape"], orders: Mapping[int, tuple[Int[Tensor, "views_models _size"], int]]
) -> Shaped[Tensor, "views_models *shape"]:
    """Reorders the channels along some axes of one tensor, by an order of its own for each model.

    Args:
        values: the same tensor of many models.
        orders: axis of the tensor (not counting the one of the models) -> order and block: channel i of the result is
            channel ``order[m, i]`` of model m, and a channel is ``block`` consecutive entries. Orders of several views
            follow each other, each with one row a model.
    """
    models, *shape = values.shape
    last = max(orders)
    rows = len(orders[last][0])
    # What lies behind the last of these axes moves in one piece: an index of pieces is short and they copy fast.
    block = orders[last][1]
    index = torch.arange(models, device=values.device).repeat(rows // max(1, models)).view(-1, *(1,) * (last + 1))
    for axis, size in enumerate(shape[: last + 1]):
        if axis == last:
            source, size = orders[axis][0], size // block
        elif axis in orders:
            permutation, width = orders[axis]
            source = (permutation.unsqueeze(-1) * width + torch.arange(width, device=values.device)).flatten(1)
        else:
            source = torch.arange(size, device=values.device)
        index = index * size + source.view(-1, *(1,) * axis, size, *(1,) * (last - axis))
    count = math.prod(shape[:last]) * (shape[last] // block)
    pieces = values.reshape(models * count, block * math.prod(shape[last + 1 :]))
    return pieces.index_select(0, index.flatten()).view(rows, *shape)
