"""The permutation symmetries of a module, from its own forward pass.

The module is exported to an fx graph of ATen operations (`torch.export`). Every axis of every tensor in it starts as
channels of its own; each operation says which axes must carry the same channels (the input axis of a weight and the
axis it reads, both sides of a residual sum) and which cannot move (inputs, outputs, kernel axes, anything that is not
understood). What is still free in the end is a permutation group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node
from torch.utils import _pytree as pytree

from weightspace.errors import ArchitectureError, first_line
from weightspace.networks.operations import Axes, Operation, Spaces, rule_of
from weightspace.networks.permutation import reorder
from weightspace.schema import GroupAxis, PermutationGroup

_TOLERANCE = 1e-9
"""Largest difference of two float64 forward passes that counts as rounding, relative to the outputs."""


def trace(module: nn.Module, example: Tensor) -> tuple[tuple[PermutationGroup, ...], tuple[str, ...], int]:
    """Derives the permutation groups of ``module`` from its operations on ``example``, in evaluation mode.

    Understood: linear layers, matrix products, convolutions (transposed and depthwise too), batch, group, instance,
    layer and RMS norms, embeddings, elementwise functions with broadcasting, softmax, pooling, reductions, reshapes
    (flattening in blocks), transpositions and residual sums. Channels that meet anything else stay where they are.

    Args:
        module: any module that `torch.export` can export; it is not changed. It may lie on "meta".
        example: an input that the module accepts.

    Returns:
        One group for each set of channels, in forward order; the names of the tensors in the order of their first use;
        and the number of entries of all tensors of the forward pass. Names are those of ``module.state_dict()``; a tied
        tensor goes by its first name.

    Raises:
        ArchitectureError: the module cannot be exported.
    """
    graph, names = _export(module, example)
    spaces = Spaces()
    known: dict[Node, Axes] = {}
    parameters: dict[str, Axes] = {}
    order: dict[str, None] = {}
    entries = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        entries += value.numel() if isinstance(value, Tensor) else 0
        if node.op != "placeholder":
            order.update(dict.fromkeys(names[source.name] for source in node.all_input_nodes if source.name in names))
            _apply(spaces, known, node)
        elif isinstance(value, Tensor):
            # Inputs, constants and buffers outside of the state keep their order; tied parameters share their axes.
            name = names.get(node.name)
            known[node] = spaces.fresh(value.shape, frozen=name is None)
            if name is not None:
                known[node] = parameters.setdefault(name, known[node])

    axes: dict[int, list[GroupAxis]] = {}
    for name in order:
        for number, axis in enumerate(parameters[name]):
            space, block = spaces.find(axis)
            axes.setdefault(space, []).append(GroupAxis(name, number, block))
    groups = tuple(
        PermutationGroup(spaces.size[space], tuple(members))
        for space, members in axes.items()
        if not spaces.frozen[space] and spaces.size[space] > 1
    )
    return groups, tuple(order), entries


def verify_groups(
    module: nn.Module, groups: Sequence[PermutationGroup], example: Tensor, generator: torch.Generator
) -> tuple[PermutationGroup, ...]:
    """Keeps the groups that leave the function of ``module`` unchanged, tried in float64.

    All parameters and running statistics are drawn anew, since freshly initialised ones (zero biases, unit scales)
    would hide a tensor that is missing from a group; so is the input, unless it holds integers. Each group is then
    tried on its own with a random permutation that moves every channel.

    Args:
        module: it is not changed.
        groups: candidates, by names of ``module.state_dict()``.
        example: an input that the module accepts.
        generator: source of the weights, the inputs and the permutations.

    Returns:
        The groups under which the outputs agree to within rounding, in the order given.

    Raises:
        ArchitectureError: the module does not run in float64.
    """
    twin = copy.deepcopy(module).eval().to(torch.float64)
    kept = set(ties(module).values())
    state = {name: _generic(tensor, generator) for name, tensor in twin.state_dict().items() if name in kept}
    if example.is_floating_point():
        example = torch.randn(example.shape, generator=generator, dtype=torch.float64)

    def outputs(weights: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            leaves = pytree.tree_leaves(functional_call(twin, weights, (example,)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        before = outputs(state)
    except Exception as error:  # the code of any module
        raise ArchitectureError(
            f"{type(module).__name__} does not run in float64 ({first_line(error)[:200]})"
        ) from error
    held = []
    for group in groups:
        moved = _moved(state, group, generator)
        if moved is not None and all(_agree(*pair) for pair in zip(before, outputs(moved), strict=True)):
            held.append(group)
    return tuple(held)


def _generic(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.ndim <= 1:
        # Positive: scales, running variances
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    fan_in = max(1, tensor[0].numel()) if len(tensor) else 1
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)


def _moved(state: dict[str, Tensor], group: PermutationGroup, generator: torch.Generator) -> dict[str, Tensor] | None:
    # One cycle through all channels in random order leaves none in place
    cycle = torch.randperm(group.size, generator=generator)
    permutation = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))
    moved = dict(state)
    for item in group.axes:
        tensor = moved.get(item.tensor)
        if tensor is None or item.axis >= tensor.ndim or tensor.shape[item.axis] != group.size * item.block:
            return None
        order = {item.axis: (permutation.unsqueeze(0), item.block)}
        moved[item.tensor] = reorder(tensor.unsqueeze(0), order).squeeze(0)
    return moved


def _agree(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.is_floating_point() or not before.numel():
        return torch.equal(before, after)
    return torch.allclose(before, after, rtol=0, atol=_TOLERANCE * float(before.abs().max()))


def ties(module: nn.Module) -> dict[str, str]:
    """Name of each tensor of the state -> the first name of the same tensor, which differs where tensors are tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}


def _export(module: nn.Module, example: Tensor) -> tuple[torch.fx.Graph, dict[str, str]]:
    """The graph and, for each placeholder that is a stored tensor, that tensor's first name."""
    twin = copy.deepcopy(module).eval()
    # A language model would also return the keys and values of its tokens, which `torch.export` does not know.
    config: Any = getattr(twin, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    try:
        program = torch.export.export(twin, (example,), strict=False)
    except Exception as error:
        raise ArchitectureError(f"{type(module).__name__} cannot be traced ({first_line(error)[:200]})") from error
    signature = program.graph_signature
    first = ties(module)
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return program.graph, {node: first[name] for node, name in targets.items() if name in first}


def _apply(spaces: Spaces, known: dict[Node, Axes], node: Node) -> None:
    value, operation = node.meta.get("val"), node.target
    # Torch has no public way to the names of arguments; without them, everything keeps its order.
    schema = getattr(operation, "_schema", None)
    rule = None if schema is None else rule_of(schema.name.removeprefix("aten::"))
    if schema is not None and rule is not None and isinstance(value, Tensor):
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= {**dict(zip(arguments, node.args, strict=False)), **node.kwargs}
        # A rule that meets arguments or axes it does not expect leaves the operation as one that is not understood.
        with suppress(IndexError, KeyError, TypeError, ValueError):
            axes = rule(Operation(spaces, arguments, known, tuple(value.shape)))
            if [spaces.length(axis) for axis in axes] == list(value.shape):
                known[node] = axes
                return
    # Also the output node: what leaves the network keeps its order.
    for source in node.all_input_nodes:
        spaces.freeze(*known.get(source, []))
    if isinstance(value, Tensor):
        known[node] = spaces.fresh(value.shape, frozen=True)
