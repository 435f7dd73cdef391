"""How ATen operations move channels: which axes must carry the same channels, and which cannot move."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch.fx import Node
from torch.utils import _pytree as pytree

Axis: TypeAlias = tuple[int, int]
"""``(space, block)``: entry i of the axis belongs to channel ``i // block`` of that space."""

Axes: TypeAlias = list[Axis]


@dataclass
class Spaces:
    """Union-find over spaces of channels; joining a coarse and a fine space makes blocks of the fine one."""

    parent: list[int] = field(default_factory=list)
    factor: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)

    def new(self, size: int, *, frozen: bool = False) -> Axis:
        """Makes an axis of channels of its own."""
        self.parent.append(len(self.parent))
        self.factor.append(1)
        self.size.append(size)
        self.frozen.append(frozen)
        return len(self.parent) - 1, 1

    def fresh(self, shape: Iterable[int], *, frozen: bool) -> Axes:
        """Makes axes of channels of their own."""
        return [self.new(size, frozen=frozen) for size in shape]

    def find(self, axis: Axis) -> Axis:
        """Returns the axis in the space that its own was joined with."""
        space, block = axis
        while self.parent[space] != space:
            block *= self.factor[space]
            space = self.parent[space]
        return space, block

    def length(self, axis: Axis) -> int:
        """Returns how many entries an axis has."""
        return self.size[axis[0]] * axis[1]

    def freeze(self, *axes: Axis) -> None:
        """Lets the channels of these axes keep their order."""
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
class Operation:
    """What a rule reads: an operation's arguments by name, the axes of the tensors so far, the shape of the result."""

    spaces: Spaces
    arguments: dict[str, Any]
    known: dict[Node, Axes]
    shape: tuple[int, ...]

    def axes(self, value: object) -> Axes:
        """The axes of a tensor; none for anything else."""
        return self.known.get(value, []) if isinstance(value, Node) else []

    def __getitem__(self, name: str) -> Axes:
        return self.axes(self.arguments.get(name))


Rule: TypeAlias = Callable[[Operation], Axes]
"""An operation -> axes of its result."""


def rule_of(name: str) -> Rule | None:
    """Returns the rule of an operation by its name in ATen; None if it is not understood."""
    name = name.removesuffix("_")
    if match := re.fullmatch(r"(?:(?:adaptive_)?(?:avg|max)_pool|upsample_[a-z]+)([123])d", name):
        return partial(_pool, spatial=int(match[1]))
    return _RULES.get(name)


def _elementwise(op: Operation) -> Axes:
    tensors = [op.axes(leaf) for leaf in pytree.tree_leaves(list(op.arguments.values()))]
    return _broadcast(op.spaces, tensors, op.shape)


def _broadcast(spaces: Spaces, tensors: Sequence[Axes], shape: Sequence[int]) -> Axes:
    result = []
    for place, size in enumerate(reversed(shape), start=1):
        alike = [axes[-place] for axes in tensors if len(axes) >= place and spaces.length(axes[-place]) == size]
        result.append(spaces.join(*alike) if alike else spaces.new(size, frozen=True))
    return result[::-1]


def _linear(op: Operation) -> Axes:
    x, weight = op["input"], op["weight"]
    op.spaces.join(x[-1], weight[1])
    return [*x[:-1], op.spaces.join(weight[0], *op["bias"])]


def _matmul(op: Operation) -> Axes:
    adds = "mat1" in op.arguments
    x, y = op["mat1" if adds else "self"], op["mat2" if "mat2" in op.arguments else "other"]
    op.spaces.join(x[-1], y[-2] if len(y) > 1 else y[0])
    batch = _broadcast(op.spaces, [x[:-2], y[:-2]], op.shape[: max(len(x), len(y)) - 2])
    result = [*batch, *x[-2:-1], *(y[-1:] if len(y) > 1 else [])]
    if adds:
        _broadcast(op.spaces, [op["self"], result], op.shape)
    return result


def _conv(op: Operation, *, transposed: bool = False) -> Axes:
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


def _norm(op: Operation, *, channel: bool) -> Axes:
    """Joins scale, shift and statistics with the channels, or with the last axes."""
    x = op["input"]
    if channel and op.arguments.get("num_groups", 1) not in (1, op.shape[1]):
        op.spaces.freeze(x[1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        for axis, own in zip(x[1:2] if channel else x[::-1], op[name][::-1], strict=False):
            op.spaces.join(axis, own)
    return x


def _prelu(op: Operation) -> Axes:
    x, (slope,) = op["self"], op["weight"]
    if len(x) > 1 and op.spaces.length(slope) == op.shape[1]:
        op.spaces.join(x[1], slope)
    return x


def _pool(op: Operation, *, spatial: int) -> Axes:
    x = op["self"] or op["input"]
    op.spaces.freeze(*x[-spatial:])
    return [*x[:-spatial], *op.spaces.fresh(op.shape[-spatial:], frozen=True)]


def _reshape(op: Operation) -> Axes:
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


def _regroup(spaces: Spaces, x: Axes, shape: tuple[int, ...]) -> Axes:
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


def _permute(op: Operation) -> Axes:
    return [op["self"][axis] for axis in op.arguments["dims"]]


def _transpose(op: Operation) -> Axes:
    x = list(op["self"])
    if len(x) > 1:  # torch refuses .T beyond two axes, so that the last two are meant where none are named
        one, two = op.arguments.get("dim0", -2), op.arguments.get("dim1", -1)
        x[one], x[two] = x[two], x[one]
    return x


def _reduce(op: Operation) -> Axes:
    x, dims = op["self"], op.arguments.get("dim")
    dims = list(range(len(x))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {axis % len(x) for axis in dims} if x else set()
    if len(op.shape) == len(x):
        return [op.spaces.new(1, frozen=True) if place in gone else axis for place, axis in enumerate(x)]
    return [axis for place, axis in enumerate(x) if place not in gone]


def _embedding(op: Operation) -> Axes:
    rows, columns = op["weight"]
    op.spaces.freeze(rows)
    return [*op["indices"], columns]


def _concatenate(op: Operation) -> Axes:
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
