"""The loops that `speed.py` measures against: one model at a time, written as one would write them first.

They take and give what the library does and are checked against it before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.schema import Architecture, GroupAxis, PermutationGroup

StateDict = Mapping[str, Tensor]


def layers_of(model: StateDict) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer of a network whose state dict lists them in forward order."""
    for name, weight in model.items():
        if name.endswith(".weight"):
            yield weight, model[name.removesuffix("weight") + "bias"]


def tokenize_by_row(model: StateDict, token_size: int) -> Tensor:
    """Tokens of one model, channel by channel: join weights and bias, pad, cut. Public code does it this way."""
    tokens = []
    for weight, bias in layers_of(model):
        for channel in range(len(weight)):
            row = torch.cat([weight[channel].flatten(), bias[channel : channel + 1]])
            tokens.append(F.pad(row, (0, -len(row) % token_size)).view(-1, token_size))
    return torch.cat(tokens)


def tokenize_by_layer(model: StateDict, token_size: int) -> Tensor:
    """Tokens of one model, with all channels of a layer at once."""
    tokens = []
    for weight, bias in layers_of(model):
        rows = torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)
        tokens.append(F.pad(rows, (0, -rows.shape[1] % token_size)).view(-1, token_size))
    return torch.cat(tokens)


def detokenize_by_row(tokens: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """State dict of one model, channel by channel: join the channel's tokens, drop the padding, split off the bias."""
    model, at = {}, 0
    for name, shape in shapes.items():
        if not name.endswith(".weight"):
            continue
        width = math.prod(shape[1:])
        pieces = math.ceil((width + 1) / tokens.shape[1])
        weight, bias = torch.empty(shape), torch.empty(shape[0])
        for channel in range(shape[0]):
            row = tokens[at : at + pieces].flatten()
            weight[channel] = row[:width].view(shape[1:])
            bias[channel] = row[width]
            at += pieces
        model[name], model[name.removesuffix("weight") + "bias"] = weight, bias
    return model


def draw_permutations(groups: Sequence[PermutationGroup]) -> list[Tensor]:
    """One random order of channels a group."""
    return [torch.randperm(group.size) for group in groups]


def permute(model: StateDict, groups: Sequence[PermutationGroup], permutations: Sequence[Tensor]) -> dict[str, Tensor]:
    """One model with its channels in another order."""
    permuted = dict(model)
    for group, permutation in zip(groups, permutations, strict=True):
        for item in group.axes:
            index = (permutation.unsqueeze(1) * item.block + torch.arange(item.block)).flatten()
            permuted[item.tensor] = permuted[item.tensor].index_select(item.axis, index)
    return permuted


def align(
    model: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], architecture: Architecture, sweeps: int
) -> dict[str, np.ndarray]:
    """One model by weight matching: group after group a cost matrix and a linear assignment, until nothing changes."""
    groups = architecture.groups
    start = [_assignment(model, reference, group, _sorted_rows(groups)) for group in groups]
    current = dict(model)
    for group, order in zip(groups, start, strict=True):
        current |= _reordered(current, group, order)
    norms = [np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in m.values())) for m in (model, reference)]
    threshold = 1e-6 * norms[0] * norms[1]
    for _ in range(sweeps):
        changed = False
        for group in groups:
            moved = _reordered(current, group, _assignment(current, reference, group, _rows))
            gain = sum(np.vdot((moved[n] - current[n]).astype(np.float64), reference[n]) for n in moved)
            if gain > threshold:
                current |= moved
                changed = True
        if not changed:
            break
    return current


def _assignment(model, reference, group, rows) -> np.ndarray:
    similarity = sum(rows(reference[item.tensor], item) @ rows(model[item.tensor], item).T for item in group.axes)
    return linear_sum_assignment(similarity, maximize=True)[1]


def _rows(values: np.ndarray, item: GroupAxis) -> np.ndarray:
    return np.moveaxis(values, item.axis, 0).reshape(values.shape[item.axis] // item.block, -1)


def _sorted_rows(groups: Sequence[PermutationGroup]):
    """Rows whose entries are sorted along every other axis that can be permuted: no other group can change them."""
    acting: dict[str, list[GroupAxis]] = {}
    for group in groups:
        for item in group.axes:
            acting.setdefault(item.tensor, []).append(item)

    def rows(values: np.ndarray, item: GroupAxis) -> np.ndarray:
        for other in acting[item.tensor]:
            if other.axis != item.axis:
                shape = values.shape
                split = (*shape[: other.axis], -1, other.block, *shape[other.axis + 1 :])
                values = np.sort(values.reshape(split), axis=other.axis).reshape(shape)
        return _rows(values, item)

    return rows


def _reordered(model: Mapping[str, np.ndarray], group: PermutationGroup, order: np.ndarray) -> dict[str, np.ndarray]:
    moved: dict[str, np.ndarray] = {}
    for item in group.axes:
        index = (order[:, None] * item.block + np.arange(item.block)).ravel()
        moved[item.tensor] = np.take(moved.get(item.tensor, model[item.tensor]), index, axis=item.axis)
    return moved


def train(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    batches: Tensor,
    learning_rate: float,
    weight_decay: float,
) -> nn.Module:
    """One model with torch.optim.AdamW and a half-cosine schedule; ``batches[step]`` are rows of ``images``."""
    weights = [p for name, p in module.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in module.named_parameters() if not name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}], lr=learning_rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    for rows in batches:
        optimizer.zero_grad()
        F.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return module


@torch.no_grad()
def score(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of one model."""
    logits = module(images)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return float(accuracy), float(F.cross_entropy(logits, labels))
