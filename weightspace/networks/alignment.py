"""Aligns the hidden channels of models of one architecture with those of a reference.

Two models that differ by a permutation of hidden channels come out as the same vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightspace.errors import ArchitectureError, TokenError
from weightspace.networks.flat import unflatten
from weightspace.networks.permutation import (
    Permutations,
    compose,
    identity_permutations,
    permute,
    permuted_axes,
    reorder,
)
from weightspace.schema import Architecture, PermutationGroup

# Bounds the weights and the similarity matrices of one step to 256 MiB each in float64.
_STEP_ENTRIES = 2**25
# An assignment must gain this share of |w| |reference| to count: ties between equal channels would swap for ever.
_GAIN = 1e-6


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
    for name, values in (("flat weights", flat), ("reference", reference)):
        if values.shape[-1] != architecture.numel:
            raise ArchitectureError(
                f"{name}: {values.shape[-1]} entries, the architecture has {architecture.numel}; flatten the tensors "
                "with this architecture"
            )
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


def _match(flat: Tensor, reference: Tensor, architecture: Architecture, sweeps: int) -> Permutations:
    groups, axes = architecture.groups, permuted_axes(architecture)
    goal = unflatten(reference.to(flat).unsqueeze(0), architecture)
    threshold = _GAIN * (flat.double().norm(dim=1) * reference.double().norm()).clamp_min(1e-300)

    current = unflatten(flat, architecture)
    start = tuple(_assign(_similarity(current, goal, group, axes)) for group in groups)
    current = unflatten(permute(flat, start, architecture), architecture)

    moved = identity_permutations(architecture, len(flat), flat.device)
    # A group is looked at again only for models in which a group that shares a tensor with it has moved since.
    touched = [{item.tensor for item in group.axes} for group in groups]
    stale = torch.ones(len(groups), len(flat), dtype=torch.bool, device=flat.device)
    for _ in range(sweeps):
        for number, group in enumerate(groups):
            rows = stale[number].nonzero().flatten()
            if not len(rows):
                continue
            part = {name: current[name][rows] for name in touched[number]}
            similarity = _similarity(part, goal, group)
            proposal = _assign(similarity)
            better = _gain(similarity, proposal, part, goal, group) > threshold[rows]
            stale[number] = False
            rows, proposal = rows[better], proposal[better]
            for name, values in _reordered({n: v[better] for n, v in part.items()}, group, proposal).items():
                current[name][rows] = values
            moved[number][rows] = moved[number][rows].gather(1, proposal)
            for other, names in enumerate(touched):
                if names & touched[number] and (other != number or _acts_twice(group)):
                    stale[other, rows] = True
        if not stale.any():
            break
    return compose(start, moved)


def _acts_twice(group: PermutationGroup) -> bool:
    """True if a tensor has two axes in the group: an assignment then approximates, and only the product tells."""
    return len({item.tensor for item in group.axes}) < len(group.axes)


def _similarity(
    current: Mapping[str, Tensor],
    goal: Mapping[str, Tensor],
    group: PermutationGroup,
    sort: Mapping[str, Mapping[int, tuple[int, int]]] | None = None,
) -> Float[Tensor, "models size size"]:
    """Entry (i, j): inner product of the weights of channel i of the reference and of channel j of the model.

    With ``sort``, the permuted axes, a channel's weights are sorted along every such axis but its own.
    """
    total = next(iter(current.values())).new_zeros(1, 1, 1)
    for item in group.axes:
        channels = []
        for values in (goal[item.tensor], current[item.tensor]):
            for axis, (_, block) in (sort[item.tensor] if sort else {}).items():
                if axis != item.axis:
                    values = _sorted(values, axis + 1, block)
            channels.append(values.movedim(item.axis + 1, 1).reshape(len(values), group.size, -1))
        wanted, present = channels
        total = total + (present @ wanted[0].T).mT
    return total


def _sorted(values: Tensor, axis: int, block: int) -> Tensor:
    channels = values.unflatten(axis, (-1, block))
    # On short axes NumPy sorts several times faster than torch.
    ordered = torch.from_numpy(np.sort(channels.detach().cpu().numpy(), axis=axis)).to(values.device)
    return ordered.flatten(axis, axis + 1)


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
    group: PermutationGroup,
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
    current: Mapping[str, Tensor], group: PermutationGroup, permutation: Int[Tensor, "models size"]
) -> dict[str, Tensor]:
    """The tensors that ``group`` acts on, with its channels in another order."""
    orders: dict[str, dict[int, tuple[Tensor, int]]] = {}
    for item in group.axes:
        orders.setdefault(item.tensor, {})[item.axis] = permutation, item.block
    return {name: reorder(current[name], order) for name, order in orders.items()}
