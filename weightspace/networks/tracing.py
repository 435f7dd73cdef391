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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node
from torch.utils import _pytree as pytree

from weightspace.dtypes import dtype_name
from weightspace.errors import ArchitectureError
from weightspace.networks.layers import exclusion_reason, group_layers
from weightspace.schema import Architecture, Exclusion, GroupAxis, PermutationGroup, TensorSpec

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
class _Trace:
    """What the rules work on: the spaces, and the axes of every tensor seen so far."""

    spaces: _Spaces = field(default_factory=_Spaces)
    axes: dict[Node, Axes] = field(default_factory=dict)

    def known(self, value: object) -> Axes:
        return self.axes[value] if isinstance(value, Node) and value in self.axes else []

    def fresh(self, shape: Iterable[int], *, frozen: bool) -> Axes:
        return [self.spaces.new(size, frozen=frozen) for size in shape]


Rule: TypeAlias = Callable[[_Trace, dict[str, Any], tuple[int, ...]], Axes]
"""(trace, the operation's arguments by name, shape of the result) -> axes of the result."""


def trace_groups(module: nn.Module, example: Tensor) -> tuple[PermutationGroup, ...]:
    """Derives the permutation groups of ``module`` from its operations on ``example``, in evaluation mode.

    Understood: linear layers, matrix products, convolutions (transposed and depthwise too), batch, group, instance,
    layer and RMS norms, embeddings, elementwise functions with broadcasting, softmax, pooling, reductions, reshapes
    (flattening in blocks), transpositions and residual sums. Channels that meet anything else stay where they are.

    Args:
        module: any module that `torch.export` can export; it is not changed.
        example: an input that the module accepts.

    Returns:
        One group for each set of channels, in forward order. Names are those of ``module.state_dict()``; a tied tensor
        goes by its first name.

    Raises:
        ArchitectureError: the module cannot be exported.
    """
    return _groups_and_order(module, example)[0]


def architecture_of(module: nn.Module, example: Tensor) -> Architecture:
    """Reads the architecture of a module: its tensors in forward order and its groups, traced and verified.

    Where the module cannot be traced, the layers keep the natural order of their names and a note says why.
    """
    state = module.state_dict()
    kept, aliases = _ties(module)
    specs = [TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in state.items() if n in kept]
    reasons = {spec.name: exclusion_reason(spec) for spec in specs}
    exclusions = tuple(Exclusion(name, reason) for name, reason in reasons.items() if reason is not None)
    layers = group_layers(spec for spec in specs if reasons[spec.name] is None)
    architecture = Architecture(layers, (), exclusions, aliases)
    try:
        groups, order = _groups_and_order(module, example)
    except ArchitectureError as error:
        return replace(architecture, notes=(f"Permutation groups are left out: {error}.",))
    tokenized = {name for name, reason in reasons.items() if reason is None}
    groups = tuple(group for group in groups if all(axis.tensor in tokenized for axis in group.axes))
    # A fixed seed: the draw only has to be generic, and the same module should always read the same.
    held = verify_groups(module, groups, example, torch.Generator().manual_seed(0))
    notes = [] if held == groups else [f"{len(groups) - len(held)} traced permutation groups changed the function."]
    place = {name: number for number, name in enumerate(order)}
    if unused := [layer.name for layer in layers if not any(t.name in place for t in layer.tensors)]:
        notes.append(f"The forward pass does not use {', '.join(unused)}.")
    layers = tuple(sorted(layers, key=lambda layer: min(place.get(t.name, len(place)) for t in layer.tensors)))
    return replace(architecture, layers=layers, groups=held, notes=tuple(notes), ordered=True)


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
    """
    twin = copy.deepcopy(module).eval().to(torch.float64)
    kept, _ = _ties(module)
    state = {name: tensor for name, tensor in twin.state_dict().items() if name in kept}
    state = {name: _generic(tensor, generator) for name, tensor in state.items()}
    if example.is_floating_point():
        example = torch.randn(example.shape, generator=generator, dtype=torch.float64)

    def outputs(weights: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            leaves = pytree.tree_leaves(functional_call(twin, weights, (example,)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    before = outputs(state)
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
        index = (permutation[:, None] * item.block + torch.arange(item.block)).flatten()
        moved[item.tensor] = tensor.index_select(item.axis, index)
    return moved


def _agree(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    if not before.is_floating_point():
        return torch.equal(before, after)
    return bool((before - after).abs().max() <= _TOLERANCE * before.abs().max()) if before.numel() else True


def _ties(module: nn.Module) -> tuple[set[str], tuple[tuple[str, str], ...]]:
    """First names of all state tensors, and ``(alias, first name)`` of tied ones."""
    first: dict[int, str] = {}
    aliases = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            aliases.append((name, kept))
    return set(first.values()), tuple(aliases)


def _groups_and_order(module: nn.Module, example: Tensor) -> tuple[tuple[PermutationGroup, ...], tuple[str, ...]]:
    graph, names = _export(module, example)
    trace = _Trace()
    parameters: dict[str, Axes] = {}
    order: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            order.update(dict.fromkeys(names[source.name] for source in node.all_input_nodes if source.name in names))
            _apply(trace, node)
        elif isinstance(node.meta.get("val"), Tensor):
            name = names.get(node.name)
            shape = node.meta["val"].shape
            # Inputs, constants and buffers outside of the state keep their order; tied parameters share their axes.
            if name is None:
                trace.axes[node] = trace.fresh(shape, frozen=True)
            else:
                trace.axes[node] = parameters.setdefault(name, trace.fresh(shape, frozen=False))

    axes: dict[int, list[GroupAxis]] = {}
    for name in order:
        for number, axis in enumerate(parameters[name]):
            space, block = trace.spaces.find(axis)
            axes.setdefault(space, []).append(GroupAxis(name, number, block))
    groups = tuple(
        PermutationGroup(trace.spaces.size[space], tuple(members))
        for space, members in axes.items()
        if not trace.spaces.frozen[space] and trace.spaces.size[space] > 1
    )
    return groups, tuple(order)


def _export(module: nn.Module, example: Tensor) -> tuple[torch.fx.Graph, dict[str, str]]:
    """The graph and, for each placeholder that is a stored tensor, that tensor's first name."""
    twin = copy.deepcopy(module).eval()
    try:
        program = torch.export.export(twin, (example,), strict=False)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArchitectureError(f"{type(module).__name__} cannot be traced ({line})") from error
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    _, aliases = _ties(module)
    first = dict(aliases)
    stored = module.state_dict()
    names = {node: first.get(name, name) for node, name in targets.items() if name in stored}
    return program.graph, names


def _apply(trace: _Trace, node: Node) -> None:
    value = node.meta.get("val")
    operation = node.target
    schema = operation._schema if isinstance(operation, torch._ops.OpOverload) else None
    rule = None if schema is None else _rule(schema.name.removeprefix("aten::"))
    if schema is None or rule is None or not isinstance(value, Tensor):
        # Also the output node: what leaves the network keeps its order.
        for source in node.all_input_nodes:
            trace.spaces.freeze(*trace.axes.get(source, []))
        if isinstance(value, Tensor):
            trace.axes[node] = trace.fresh(value.shape, frozen=True)
        return
    arguments = {argument.name: argument.default_value for argument in schema.arguments}
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    trace.axes[node] = rule(trace, arguments, tuple(value.shape))


def _rule(name: str) -> Rule | None:
    name = name.removesuffix("_")
    if match := re.fullmatch(r"(?:(?:adaptive_)?(?:avg|max)_pool|upsample_[a-z]+)([123])d", name):
        return partial(_pool, spatial=int(match[1]))
    return _RULES.get(name)


def _elementwise(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    tensors = [trace.known(leaf) for leaf in pytree.tree_leaves(list(arguments.values()))]
    return _broadcast(trace, [axes for axes in tensors if axes], shape)


def _broadcast(trace: _Trace, tensors: Sequence[Axes], shape: Sequence[int]) -> Axes:
    result = []
    for place, size in enumerate(reversed(shape), start=1):
        alike = [axes[-place] for axes in tensors if len(axes) >= place and trace.spaces.length(axes[-place]) == size]
        result.append(trace.spaces.join(*alike) if alike else trace.spaces.new(size, frozen=True))
    return result[::-1]


def _linear(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x, weight, bias = (trace.known(arguments[name]) for name in ("input", "weight", "bias"))
    trace.spaces.join(x[-1], weight[1])
    trace.spaces.join(weight[0], *bias)
    return [*x[:-1], weight[0]]


def _matmul(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    names = ("mat1", "mat2") if "mat1" in arguments else ("self", "mat2" if "mat2" in arguments else "other")
    x, y = (trace.known(arguments[name]) for name in names)
    trace.spaces.join(x[-1], y[-2] if len(y) > 1 else y[0])
    batch = _broadcast(trace, [x[:-2], y[:-2]], shape[: max(len(x), len(y)) - 2])
    result = [*batch, *x[-2:-1], *(y[-1:] if len(y) > 1 else [])]
    if "mat1" in arguments:
        _broadcast(trace, [trace.known(arguments["self"]), result], shape)
    return result


def _conv(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x, weight, bias = (trace.known(arguments[name]) for name in ("input", "weight", "bias"))
    spaces, groups = trace.spaces, arguments["groups"]
    channel = len(x) - len(weight) + 1
    spaces.freeze(*x[channel + 1 :], *weight[2:])
    inputs, outputs = spaces.length(x[channel]), spaces.length(weight[0])
    if groups == 1:
        spaces.join(x[channel], weight[1])
        made = weight[0]
    elif groups == inputs:
        # Depthwise: each input channel makes outputs / inputs neighbouring output channels
        space, block = x[channel]
        made = spaces.join((space, block * (outputs // inputs)), weight[0])
    else:
        spaces.freeze(x[channel], weight[0], weight[1])
        made = weight[0]
    spaces.join(made, *bias)
    return [*x[:channel], made, *trace.fresh(shape[channel + 1 :], frozen=True)]


def _conv_transpose(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x, weight, bias = (trace.known(arguments[name]) for name in ("input", "weight", "bias"))
    channel = len(x) - len(weight) + 1
    trace.spaces.freeze(*x[channel + 1 :], *weight[2:])
    if arguments["groups"] == 1:
        trace.spaces.join(x[channel], weight[0])
        made = trace.spaces.join(weight[1], *bias)
    else:
        trace.spaces.freeze(x[channel], *weight, *bias)
        made = trace.spaces.new(shape[channel], frozen=True)
    return [*x[:channel], made, *trace.fresh(shape[channel + 1 :], frozen=True)]


def _channel_norm(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x = trace.known(arguments["input"])
    if arguments.get("num_groups", 1) not in (1, shape[1]):
        trace.spaces.freeze(x[1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        trace.spaces.join(x[1], *trace.known(arguments.get(name)))
    return x


def _prelu(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x, (slope,) = trace.known(arguments["self"]), trace.known(arguments["weight"])
    if len(x) > 1 and trace.spaces.length(slope) == shape[1]:
        trace.spaces.join(x[1], slope)
    return x


def _layer_norm(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x = trace.known(arguments["input"])
    for name in ("weight", "bias"):
        for axis, own in zip(x[::-1], trace.known(arguments.get(name))[::-1], strict=False):
            trace.spaces.join(axis, own)
    return x


def _pool(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...], *, spatial: int) -> Axes:
    x = trace.known(arguments.get("self", arguments.get("input")))
    trace.spaces.freeze(*x[-spatial:])
    return [*x[:-spatial], *trace.fresh(shape[-spatial:], frozen=True)]


def _reshape(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    """Pairs runs of old and new axes that hold equally many entries."""
    x = trace.known(next(iter(arguments.values())))
    old = [trace.spaces.length(axis) for axis in x]
    if 0 in shape:
        trace.spaces.freeze(*x)
        return trace.fresh(shape, frozen=True)
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
        result += _regroup(trace, x[i:i_end], shape[j:j_end])
        i, j = i_end, j_end
    return result


def _regroup(trace: _Trace, x: Axes, shape: tuple[int, ...]) -> Axes:
    spaces = trace.spaces
    wide = [axis for axis in x if spaces.length(axis) > 1]
    slots = [place for place, size in enumerate(shape) if size > 1]
    result = [spaces.new(size, frozen=True) for size in shape]
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


def _permute(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x = trace.known(arguments["self"])
    return [x[axis] for axis in arguments["dims"]]


def _transpose(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x = list(trace.known(arguments["self"]))
    if len(x) > 1:  # torch refuses .T beyond two axes, so that the last two are meant where none are named
        one, two = arguments.get("dim0", -2), arguments.get("dim1", -1)
        x[one], x[two] = x[two], x[one]
    return x


def _reduce(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    x = trace.known(arguments["self"])
    dims = arguments.get("dim")
    dims = list(range(len(x))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {axis % len(x) for axis in dims} if x else set()
    if len(shape) == len(x):
        return [trace.spaces.new(1, frozen=True) if place in gone else axis for place, axis in enumerate(x)]
    return [axis for place, axis in enumerate(x) if place not in gone]


def _embedding(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    weight = trace.known(arguments["weight"])
    trace.spaces.freeze(weight[0])
    return [*trace.known(arguments["indices"]), weight[1]]


def _concatenate(trace: _Trace, arguments: dict[str, Any], shape: tuple[int, ...]) -> Axes:
    tensors = [list(trace.known(tensor)) for tensor in arguments["tensors"]]
    place = arguments["dim"] % len(shape)
    for axes in tensors:
        trace.spaces.freeze(axes[place])
        axes[place] = trace.spaces.new(shape[place], frozen=True)
    return _broadcast(trace, tensors, shape)


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
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), _channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
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
