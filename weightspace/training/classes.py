"""Other orders of a dataset's classes: labels renumbered, and the outputs of its models with them.

An order is a permutation ``(classes,)``: class i becomes what was class ``order[i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.networks.permutation import identity_permutations, permute
from weightspace.schema import Architecture, GroupAxis, PermutationGroup
from weightspace.training.batches import seeded_generator
from weightspace.zoo.dataset import Zoo


def output_group(architecture: Architecture) -> PermutationGroup | None:
    """Finds the outputs of a network, whose order is that of its classes; None where they are not known."""
    if not architecture.ordered or not architecture.layers or architecture.layers[-1].layout != "channels":
        return None
    last = architecture.layers[-1]
    axes = tuple(GroupAxis(tensor.name, 0) for tensor in last.tensors)
    permuted = {(axis.tensor, axis.axis) for group in architecture.groups for axis in group.axes}
    known = not any((axis.tensor, axis.axis) in permuted for axis in axes)
    return PermutationGroup(last.rows, axes) if known else None


def output_count(architecture: Architecture) -> int:
    """Counts the outputs of a network; 0 where they are not known."""
    group = output_group(architecture)
    return 0 if group is None else group.size


def reordered(orders: Int[Tensor, "models classes"]) -> Int[Tensor, " reordered"]:
    """Finds the models whose order is not the ascending one."""
    return (orders != torch.arange(orders.shape[1])).any(1).nonzero().flatten()


def reordered_outputs(
    flat: Float[Tensor, "models params"], architecture: Architecture, orders: Int[Tensor, "models classes"]
) -> Float[Tensor, "models params"]:
    """Renumbers the classes of classifiers: output i becomes what was output ``orders[m, i]`` of model m.

    The result is what training on the same images with their classes numbered in this order could have given.

    Args:
        flat: flat weights, one row a model.
        architecture: shared by all of them, with known outputs (`output_group`) where an order is not ascending.
        orders: a permutation a model; entries from the number of outputs on are ascending.
    """
    moved = reordered(orders)
    group = output_group(architecture)
    if not len(moved) or group is None:
        return flat
    extended = replace(architecture, groups=(*architecture.groups, group))
    permutations = (*identity_permutations(architecture, len(moved)), orders[moved, : group.size])
    return flat.index_copy(0, moved, permute(flat[moved], permutations, extended))


def renumbered_labels(
    labels: Int[Tensor, "batch images"], orders: Int[Tensor, "batch classes"]
) -> Int[Tensor, "batch images"]:
    """Renumbers the labels of datasets as `reordered_outputs` does the outputs of their models."""
    return orders.argsort(1).gather(1, labels)


def orders_of_models(
    counts: Int[Tensor, " models"],
    outputs: Int[Tensor, " models"],
    classes: int,
    share: float,
    generator: torch.Generator,
) -> Int[Tensor, "models classes"]:
    """Draws for a share of models in which order the classes of their datasets come.

    The others keep theirs, and so do models that have not as many outputs as there are classes.

    Args:
        counts: classes of each model's dataset.
        outputs: outputs of each model.
        classes: length of the orders, the largest of all counts.
        share: share of the models whose order is drawn.
        generator: draws.
    """
    ascending = torch.arange(classes)
    absent = ascending >= counts.unsqueeze(1)
    drawn = (torch.rand(absent.shape, generator=generator) + absent * (1 + ascending)).argsort(1)
    chosen = (torch.rand(len(counts), generator=generator) < share) & (counts == outputs)
    return torch.where(chosen.unsqueeze(1), drawn, ascending)


class StepOrders:
    """In which order the classes of each dataset come in a step; the same on all processes."""

    def __init__(
        self, zoo: Zoo, numbers: Int[np.ndarray, "models"], counts: Sequence[int], share: float, seed: int
    ) -> None:
        """Finds the datasets that can be renumbered: those all of whose models can.

        Args:
            zoo: the models.
            numbers: number of each model's dataset, -1 for none.
            counts: classes of each dataset.
            share: share of the steps in which a dataset is renumbered.
            seed: draws.
        """
        self._numbers, self._counts, self._share, self._seed = numbers, counts, share, seed
        outputs = {header: output_count(one) for header, one in zoo.architectures.items()}
        headers = zoo.index["header"].to_numpy()
        self._renumbered = {
            number
            for number, count in enumerate(counts)
            if share and {outputs[header] for header in headers[numbers == number]} <= {count}
        }

    def order(self, step: int, number: int) -> Int[Tensor, " classes"]:
        """Draws the order of a dataset in a step; as long as that of the dataset with most classes."""
        ascending = torch.arange(max(self._counts, default=0))
        if (
            number not in self._renumbered
            or float(torch.rand((), generator=seeded_generator(self._seed, step))) >= self._share
        ):
            return ascending
        drawn = torch.randperm(self._counts[number], generator=seeded_generator(self._seed, step, number))
        return torch.cat([drawn, ascending[len(drawn) :]])

    def renumbered(
        self,
        flat: Float[Tensor, "models params"],
        architecture: Architecture,
        rows: Int[np.ndarray, "models"],
        step: int,
    ) -> Float[Tensor, "models params"]:
        """Puts the outputs of models in the order of a step."""
        orders = torch.stack([self.order(step, int(number)) for number in self._numbers[rows]])
        return reordered_outputs(flat, architecture, orders)
