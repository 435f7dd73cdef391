"""The permutation symmetries of a module, from its own forward pass.

The module is exported to an fx graph of ATen operations (`torch.export`). Every axis of every tensor in it starts as
channels of its own; each operation says which axes must carry the same channels (the input axis of a weight and the
axis it reads, both sides of a residual sum) and which cannot move (inputs, outputs, kernel axes, anything that is not
understood). What is still free in the end is a permutation group.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node
from torch.utils import _pytree as pytree

from weightspace.errors import ArchitectureError
from weightspace.networks.permutation import reorder
from weightspace.schema import GroupAxis, PermutationGroup

Axis: TypeAlias = tuple[int, int]
"""``(space, block)``: entry i of the axis belongs to channel ``i // block`` of that space."""

Axes: TypeAlias = list[Axis]

_TOLERANCE = 1e-9
"""Largest difference of two float64 forward passes that counts as rounding, relative to the outputs."""


@dataclass
class _Spaces:
    """Union-find over spaces of channels; joining a coarse and a fine space makes blocks of the fine one."""

    parent: list[int] = field(default_factory=list)
    factor: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)

    def new(self, size: int, *, frozen: bool = False) -> Axis:
        self.parent.append(len(self.parent))
        self.factor.append(1)
        self.size.append(size)
        self.frozen.append(frozen)
        return len(self.parent) - 1, 1

    def fresh(self, shape: Iterable[int], *, frozen: bool) -> Axes:
        return [self.new(size, frozen=frozen) for size in shape]

    def find(self, axis: Axis) -> Axis:
        space, block = axis
        while self.parent[space] != space:
            block *= self.factor[space]
            space = self.parent[space]
        return space, block

    def length(self, axis: Axis) -> int:
        return self.size[axis[0]] * axis[1]

    def freeze(self, *axes: Axis) -> None:
        for axis in axes:
            self.frozen[self.find(axis)[0]] = True

    def join(self, first: Axis, *others: Axis) -> Axis:
        """Makes axes of one length carry the same channels; freezes them where their blocks do not nest."""
        for other in others:
            (a, p), (b, q) = sorted((self.find(first), self.find(other)), key=lambda item: -item[1])
            if a == b or p % q:
                if p != q:
                    self.freeze((a, p), (b, q))
                continue
            self.parent[b], self.factor[b] = a, p // q
            self.frozen[a] = self.frozen[a] or self.frozen[b]
        return first


@dataclass
class _Operation:
    """What a rule reads: an operation's arguments by name, the axes of the tensors so far, the shape of the result."""

    spaces: _Spaces
    arguments: dict[str, Any]
    known: dict[Node, Axes]
    shape: tuple[int, ...]

    def axes(self, value: object) -> Axes:
        """The axes of a tensor; none for anything else."""
        return self.known.get(value, []) if isinstance(value, Node) else []

    def __getitem__(self, name: str) -> Axes:
        return self.axes(self.arguments.get(name))


Rule: TypeAlias = Callable[[_Operation], Axes]
"""An operation -> axes of its result."""


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
    spaces = _Spaces()
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
        raise ArchitectureError(f"{type(module).__name__} does not run in float64 ({_first_line(error)})") from error
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
        raise ArchitectureError(f"{type(module).__name__} cannot be traced ({_first_line(error)})") from error
    signature = program.graph_signature
    first = ties(module)
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return program.graph, {node: first[name] for node, name in targets.items() if name in first}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _apply(spaces: _Spaces, known: dict[Node, Axes], node: Node) -> None:
    value, operation = node.meta.get("val"), node.target
    # Torch has no public way to the names of arguments; without them, everything keeps its order.
    schema = getattr(operation, "_schema", None)
    rule = None if schema is None else _rule(schema.name.removeprefix("aten::"))
    if schema is not None and rule is not None and isinstance(value, Tensor):
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= {**dict(zip(arguments, node.args, strict=False)), **node.kwargs}
        # A rule that meets arguments or axes it does not expect leaves the operation as one that is not understood.
        with suppress(IndexError, KeyError, TypeError, ValueError):
            axes = rule(_Operation(spaces, arguments, known, tuple(value.shape)))
            if [spaces.length(axis) for axis in axes] == list(value.shape):
                known[node] = axes
                return
    # Also the output node: what leaves the network keeps its order.
    for source in node.all_input_nodes:
        spaces.freeze(*known.get(source, []))
    if isinstance(value, Tensor):
        known[node] = spaces.fresh(value.shape, frozen=True)


def _rule(name: str) -> Rule | None:
    name = name.removesuffix("_")
    if match := re.fullmatch(r"(?:(?:adaptive_)?(?:avg|max)_pool|upsample_[a-z]+)([123])d", name):
        return partial(_pool, spatial=int(match[1]))
    return _RULES.get(name)


def _elementwise(op: _Operation) -> Axes:
    tensors = [op.axes(leaf) for leaf in pytree.tree_leaves(list(op.arguments.values()))]
    return _broadcast(op.spaces, tensors, op.shape)


def _broadcast(spaces: _Spaces, tensors: Sequence[Axes], shape: Sequence[int]) -> Axes:
    result = []
    for place, size in enumerate(reversed(shape), start=1):
        alike = [axes[-place] for axes in tensors if len(axes) >= place and spaces.length(axes[-place]) == size]
        result.append(spaces.join(*alike) if alike else spaces.new(size, frozen=True))
    return result[::-1]


def _linear(op: _Operation) -> Axes:
    x, weight = op["input"], op["weight"]
    op.spaces.join(x[-1], weight[1])
    return [*x[:-1], op.spaces.join(weight[0], *op["bias"])]


def _matmul(op: _Operation) -> Axes:
    adds = "mat1" in op.arguments
    x, y = op["mat1" if adds else "self"], op["mat2" if "mat2" in op.arguments else "other"]
    op.spaces.join(x[-1], y[-2] if len(y) > 1 else y[0])
    batch = _broadcast(op.spaces, [x[:-2], y[:-2]], op.shape[: max(len(x), len(y)) - 2])
    result = [*batch, *x[-2:-1], *(y[-1:] if len(y) > 1 else [])]
    if adds:
        _broadcast(op.spaces, [op["self"], result], op.shape)
    return result


def _conv(op: _Operation, *, transposed: bool = False) -> Axes:
    x, weight, spaces = op["input"], op["weight"], op.spaces
    channel = len(x) - len(weight) + 1
    spaces.freeze(*x[channel + 1 :], *weight[2:])
    inputs, outputs = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    groups, size = op.arguments["groups"], spaces.length(weight[0])
    if groups == 1:
        spaces.join(x[channel], inputs)
    elif not transposed and groups == spaces.length(x[channel]):
        # Depthwise: each input channel makes size / groups neighbouring output channels
        space, block = x[channel]
        outputs = spaces.join((space, block * (size // groups)), outputs)
    else:
        spaces.freeze(x[channel], inputs, outputs)
        outputs = spaces.new(op.shape[channel], frozen=True)
    spaces.join(outputs, *op["bias"])
    return [*x[:channel], outputs, *spaces.fresh(op.shape[channel + 1 :], frozen=True)]


def _norm(op: _Operation, *, channel: bool) -> Axes:
    """Joins scale, shift and statistics with the channels, or with the last axes."""
    x = op["input"]
    if channel and op.arguments.get("num_groups", 1) not in (1, op.shape[1]):
        op.spaces.freeze(x[1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        for axis, own in zip(x[1:2] if channel else x[::-1], op[name][::-1], strict=False):
            op.spaces.join(axis, own)
    return x


def _prelu(op: _Operation) -> Axes:
    x, (slope,) = op["self"], op["weight"]
    if len(x) > 1 and op.spaces.length(slope) == op.shape[1]:
        op.spaces.join(x[1], slope)
    return x


def _pool(op: _Operation, *, spatial: int) -> Axes:
    x = op["self"] or op["input"]
    op.spaces.freeze(*x[-spatial:])
    return [*x[:-spatial], *op.spaces.fresh(op.shape[-spatial:], frozen=True)]


def _reshape(op: _Operation) -> Axes:
    """Pairs runs of old and new axes that hold equally many entries."""
    x, shape = op.axes(next(iter(op.arguments.values()))), op.shape
    if 0 in shape:
        op.spaces.freeze(*x)
        return op.spaces.fresh(shape, frozen=True)
    old = [op.spaces.length(axis) for axis in x]
    result: Axes = []
    i = j = 0
    while i < len(old) or j < len(shape):
        i_end, j_end = i, j
        left, right = 1, 1
        # Size-one axes go along with the run before them
        while left != right or (i_end == i and j_end == j):
            if (left <= right and i_end < len(old)) or j_end == len(shape):
                left, i_end = left * old[i_end], i_end + 1
            else:
                right, j_end = right * shape[j_end], j_end + 1
        result += _regroup(op.spaces, x[i:i_end], shape[j:j_end])
        i, j = i_end, j_end
    return result


def _regroup(spaces: _Spaces, x: Axes, shape: tuple[int, ...]) -> Axes:
    wide = [axis for axis in x if spaces.length(axis) > 1]
    slots = [place for place, size in enumerate(shape) if size > 1]
    result = spaces.fresh(shape, frozen=True)
    if not wide:
        return result
    space, block = spaces.find(wide[0])
    inner = math.prod(spaces.length(axis) for axis in wide[1:])
    spaces.freeze(*wide[1:])
    if len(slots) == 1:
        result[slots[0]] = (space, block * inner)
    elif len(wide) == 1 and spaces.size[space] == shape[slots[0]]:
        # The reverse of flattening
        result[slots[0]] = (space, 1)
    else:
        spaces.freeze(wide[0])
    return result


def _permute(op: _Operation) -> Axes:
    return [op["self"][axis] for axis in op.arguments["dims"]]


def _transpose(op: _Operation) -> Axes:
    x = list(op["self"])
    if len(x) > 1:  # torch refuses .T beyond two axes, so that the last two are meant where none are named
        one, two = op.arguments.get("dim0", -2), op.arguments.get("dim1", -1)
        x[one], x[two] = x[two], x[one]
    return x


def _reduce(op: _Operation) -> Axes:
    x, dims = op["self"], op.arguments.get("dim")
    dims = list(range(len(x))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {axis % len(x) for axis in dims} if x else set()
    if len(op.shape) == len(x):
        return [op.spaces.new(1, frozen=True) if place in gone else axis for place, axis in enumerate(x)]
    return [axis for place, axis in enumerate(x) if place not in gone]


def _embedding(op: _Operation) -> Axes:
    rows, columns = op["weight"]
    op.spaces.freeze(rows)
    return [*op["indices"], columns]


def _concatenate(op: _Operation) -> Axes:
    tensors = [list(op.axes(tensor)) for tensor in op.arguments["tensors"]]
    place = op.arguments["dim"] % len(op.shape)
    for axes in tensors:
        op.spaces.freeze(axes[place])
        axes[place] = op.spaces.new(op.shape[place], frozen=True)
    return _broadcast(op.spaces, tensors, op.shape)


# fmt: off
_ELEMENTWISE = (
    "abs", "add", "alpha_dropout", "celu", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "cos", "detach",
    "div", "dropout", "elu", "erf", "exp", "expm1", "feature_dropout", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "log", "log1p", "log_sigmoid", "log_softmax", "maximum", "minimum", "mish", "mul", "neg", "pow",
    "reciprocal", "relu", "relu6", "rsqrt", "rsub", "selu", "sigmoid", "sign", "silu", "sin", "softmax", "softplus",
    "sqrt", "square", "sub", "tanh", "threshold", "to", "type_as", "where",
)
# fmt: on
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), partial(_conv, transposed=True)),
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), partial(_norm, channel=True)),
    **dict.fromkeys(("layer_norm", "rms_norm"), partial(_norm, channel=False)),
    **dict.fromkeys(("addmm", "bmm", "matmul", "mm"), _matmul),
    **dict.fromkeys(("flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"), _reshape),
    **dict.fromkeys(("mT", "numpy_T", "t", "transpose"), _transpose),
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean", "sum", "std", "var"), _reduce),
    "linear": _linear,
    "permute": _permute,
    "prelu": _prelu,
    "embedding": _embedding,
    "cat": _concatenate,
}
