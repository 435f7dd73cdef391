"""Bringing models of one architecture into comparable neuron orders.

Both ways are invariant: two models that differ by a permutation of hidden channels come out as the same vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightspace.errors import ArchitectureError, TokenError
from weightspace.networks.permutation import (
    Permutations,
    PermutedTensor,
    check_flat,
    compose,
    identity_permutations,
    permute,
    permuted_tensors,
    reorder,
)
from weightspace.schema import Architecture

# Bounds the weights and the similarity matrices of one step to 256 MiB each in float64.
_STEP_ENTRIES = 2**25
# An assignment must gain this share of |w| |reference| to count: ties between equal channels would swap for ever.
_GAIN = 1e-6


_View: TypeAlias = Callable[[Tensor, PermutedTensor, int, int], Tensor]


@dataclass(frozen=True)
class _Group:
    """One group's number, its size and ``(tensor, axis, block)`` of each axis that it acts on."""

    number: int
    size: int
    axes: tuple[tuple[PermutedTensor, int, int], ...]


def align(
    flat: Float[Tensor, "models params"],
    reference: Float[Tensor, " entries"],
    architecture: Architecture,
    sweeps: int = 20,
) -> tuple[Float[Tensor, "models params"], Permutations]:
    """Permutes each model's hidden channels towards those of a reference model.

    Weight matching (Ainsworth et al., 2022, "Git Re-Basin", algorithm 1): group by group the permutation that maximises
    the inner product with the reference while all other groups stand still, a linear assignment, until nothing changes.
    The groups take their turns in their own order. The start is the assignment between descriptors that no other group
    can change (entries sorted along every other permuted axis), so that the result does not depend on the channel order
    that a model comes in, and a permuted copy of the reference finds its way back.

    Args:
        flat: flat weights, one row a model.
        reference: the flat weights to move towards.
        architecture: shared by all rows and the reference.
        sweeps: upper bound on the rounds over all groups.

    Returns:
        The permuted weights and the permutations that give them: ``permute(flat, permutations, architecture)``.

    Raises:
        ArchitectureError: the weights do not fit ``architecture``.
        TokenError: a weight is NaN or infinite.
    """
    check_flat(flat, architecture)
    if reference.shape != (architecture.numel,):
        raise ArchitectureError(
            f"reference has shape {tuple(reference.shape)}, the architecture needs ({architecture.numel},); "
            "flatten it with this architecture"
        )
    for name, values in (("flat weights", flat), ("reference", reference)):
        if not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            raise TokenError(f"{name}: {count} entries are NaN or infinite; leave such models out before aligning")
    if not architecture.groups or not len(flat):
        return flat.clone(), identity_permutations(architecture, len(flat), flat.device)
    largest = max(architecture.numel, *(group.size**2 for group in architecture.groups))
    step = max(1, _STEP_ENTRIES // largest)
    parts = [_match(flat[i : i + step], reference, architecture, sweeps) for i in range(0, len(flat), step)]
    permutations = tuple(torch.cat(group) for group in zip(*parts, strict=True))
    return permute(flat, permutations, architecture), permutations


def canonical_order(
    flat: Float[Tensor, "models params"], architecture: Architecture
) -> tuple[Float[Tensor, "models params"], Permutations]:
    """Sorts the channels of every group by the norm of the rows that produce them, largest first.

    No reference is needed. Equal norms fall back on the norm of the columns that read the channel. The keys do not
    depend on the order of any channel to the last bit, so a permuted model gives exactly the same result; only
    channels that share both norms and still differ keep the order they come in.

    Returns:
        The sorted weights and the permutations that give them: ``permute(flat, permutations, architecture)``.

    Raises:
        ArchitectureError: the weights do not fit ``architecture``.
    """
    check_flat(flat, architecture)
    permutations = []
    for group in _groups(architecture):
        produced = [item for item in group.axes if item[1] == 0] or list(group.axes)
        read = [item for item in group.axes if item[1] != 0] or produced
        order = torch.arange(group.size, device=flat.device).repeat(len(flat), 1)
        for axes in (read, produced):
            key = _energy(flat, group.size, axes).gather(1, order)
            order = order.gather(1, key.argsort(dim=1, descending=True, stable=True))
        permutations.append(order)
    return permute(flat, tuple(permutations), architecture), tuple(permutations)


def _groups(architecture: Architecture) -> list[_Group]:
    tensors = {tensor.name: tensor for tensor in permuted_tensors(architecture)}
    return [
        _Group(number, group.size, tuple((tensors[a.tensor], a.axis, a.block) for a in group.axes))
        for number, group in enumerate(architecture.groups)
    ]


def _neighbours(group: _Group, groups: Sequence[_Group]) -> list[int]:
    """Numbers of the groups whose assignment may change when ``group`` moves."""
    names = [tensor.name for tensor, _, _ in group.axes]
    others = [o.number for o in groups if o is not group and any(tensor.name in names for tensor, _, _ in o.axes)]
    return [*others, group.number] if _acts_twice(group) else others


def _acts_twice(group: _Group) -> bool:
    """True if a tensor has two axes in the group: an assignment then approximates, and only the product tells."""
    return len({tensor.name for tensor, _, _ in group.axes}) < len(group.axes)


def _match(flat: Tensor, reference: Tensor, architecture: Architecture, sweeps: int) -> Permutations:
    groups = _groups(architecture)
    current = _tensors(flat, architecture)
    goal = _tensors(reference.to(flat).unsqueeze(0), architecture)
    threshold = _GAIN * (flat.double().norm(dim=1) * reference.double().norm()).clamp_min(1e-300)

    start = tuple(_assign(_similarity(current, goal, group, _descriptor)) for group in groups)
    current = _tensors(permute(flat, start, architecture), architecture)

    moved = identity_permutations(architecture, len(flat), flat.device)
    # A group is looked at again only for models in which a group that shares a tensor with it has moved since.
    stale = torch.ones(len(groups), len(flat), dtype=torch.bool, device=flat.device)
    for _ in range(sweeps):
        for group in groups:
            rows = stale[group.number].nonzero().flatten()
            if not len(rows):
                continue
            part = {tensor.name: current[tensor.name][rows] for tensor, _, _ in group.axes}
            similarity = _similarity(part, goal, group, _rows)
            proposal = _assign(similarity)
            better = _gain(similarity, proposal, part, goal, group) > threshold[rows]
            stale[group.number] = False
            rows, proposal = rows[better], proposal[better]
            for name, values in _reordered({n: v[better] for n, v in part.items()}, group, proposal).items():
                current[name][rows] = values
            moved[group.number][rows] = moved[group.number][rows].gather(1, proposal)
            for other in _neighbours(group, groups):
                stale[other, rows] = True
        if not stale.any():
            break
    return compose(start, moved)


def _tensors(flat: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    return {t.name: flat[:, t.span].unflatten(1, t.shape) for t in permuted_tensors(architecture)}


def _rows(values: Tensor, tensor: PermutedTensor, axis: int, block: int) -> Float[Tensor, "models size rest"]:
    size = tensor.shape[axis] // block
    return values.movedim(axis + 1, 1).reshape(len(values), size, -1)


def _descriptor(values: Tensor, tensor: PermutedTensor, axis: int, block: int) -> Float[Tensor, "models size rest"]:
    for other, (_, width) in tensor.axes.items():
        if other != axis:
            channels = values.unflatten(other + 1, (-1, width))
            # On short axes NumPy sorts several times faster than torch.
            ordered = torch.from_numpy(np.sort(channels.detach().cpu().numpy(), axis=other + 1)).to(values.device)
            values = ordered.flatten(other + 1, other + 2)
    return _rows(values, tensor, axis, block)


def _similarity(
    current: Mapping[str, Tensor], goal: Mapping[str, Tensor], group: _Group, view: _View
) -> Float[Tensor, "models size size"]:
    """Entry (i, j): inner product of what channel i of the reference and channel j of the model are made of."""
    total = next(iter(current.values())).new_zeros(1, 1, 1)
    for tensor, axis, block in group.axes:
        wanted = view(goal[tensor.name], tensor, axis, block)[0]
        present = view(current[tensor.name], tensor, axis, block)
        total = total + (present @ wanted.T).mT
    return total


def _assign(similarity: Float[Tensor, "models size size"]) -> Int[Tensor, "models size"]:
    matrices = similarity.double().cpu().numpy()
    columns = np.empty(matrices.shape[:2], dtype=np.int64)
    for number, matrix in enumerate(matrices):
        columns[number] = linear_sum_assignment(matrix, maximize=True)[1]
    return torch.from_numpy(columns).to(similarity.device)


def _gain(
    similarity: Tensor,
    proposal: Int[Tensor, "models size"],
    current: Mapping[str, Tensor],
    goal: Mapping[str, Tensor],
    group: _Group,
) -> Float[Tensor, " models"]:
    """By how much the inner product with the reference grows if ``group`` is reordered."""
    if not _acts_twice(group):
        pairs = similarity.double()
        return (pairs.gather(2, proposal.unsqueeze(2)).squeeze(2) - pairs.diagonal(dim1=1, dim2=2)).sum(1)
    candidate = _reordered(current, group, proposal)
    products = [
        ((values - current[name]).double() * goal[name].double()).flatten(1).sum(1)
        for name, values in candidate.items()
    ]
    return torch.stack(products).sum(0)


def _reordered(
    current: Mapping[str, Tensor], group: _Group, permutation: Int[Tensor, "models size"]
) -> dict[str, Tensor]:
    """The tensors that ``group`` acts on, with its channels in another order."""
    orders: dict[str, dict[int, tuple[Tensor, int]]] = {}
    for tensor, axis, block in group.axes:
        orders.setdefault(tensor.name, {})[axis] = permutation, block
    return {name: reorder(current[name], order) for name, order in orders.items()}


def _energy(flat: Tensor, size: int, axes: Sequence[tuple[PermutedTensor, int, int]]) -> Float[Tensor, "models size"]:
    # Squares of float32 are exact in float64, and sorted terms add up to the same bits in any original order.
    squares = [
        _rows(flat[:, tensor.span].unflatten(1, tensor.shape).double().square(), tensor, axis, block)
        for tensor, axis, block in axes
    ]
    return torch.cat(squares, dim=2).sort(dim=2).values.sum(dim=2)
