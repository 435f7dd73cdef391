"""The forward order and the symmetries of plain feed-forward networks, from names and shapes alone.

A safetensors header lists names alphabetically and says nothing of the forward pass. Where layers form one chain (or
several side by side, as actor and critic) in only one way, the hidden channels between neighbours can be permuted.
Wherever names or shapes leave a doubt, nothing is claimed: the reason becomes a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from weightspace.networks.layers import natural_key
from weightspace.schema import Architecture, GroupAxis, LayerSpec, PermutationGroup

_BRANCHING = re.compile(
    r"(^|[._])(shortcut|downsample|skip|res(idual|net)?|attn|attention|self_attn|cross_attn|branch|experts?|gate|lora)"
    r"([._0-9]|$)",
    re.IGNORECASE,
)
_LAST = re.compile(
    r"^(head|classifier|output|out|logits?|action_net|value_net|mu)([_.]?(layer|linear|fc|proj))?$", re.IGNORECASE
)
_GROUPED_NORM = re.compile(r"group|(^|[._])gn\d*$", re.IGNORECASE)
# Reinforcement-learning policies: networks that stand side by side, told apart by these names.
_LANES = (
    (re.compile(r"^(mlp_extractor\.policy_net|action_net|log_std)(\.|$)"), "policy"),
    (re.compile(r"^(mlp_extractor\.value_net|value_net)(\.|$)"), "value"),
    (re.compile(r"^(?P<lane>(actor|critic|q_net|quantile_net)(_target)?(\.qf\d+)?)\."), None),
)
# Beyond these the shapes fit in too many ways to tell, or the network is no plain chain.
_SEARCH_STEPS = 20_000
_SEARCH_LAYERS = 200
_NAME_PARTS = 32
# Filters of one input channel: up to this many may as well be a depthwise convolution of a colour image.
_IMAGE_CHANNELS = 4


class _DoubtError(Exception):
    """Why layers are not taken for a chain."""


def find_chains(layers: Sequence[LayerSpec]) -> Architecture:
    """Finds the forward order and the permutation groups of one chain, or of several side by side.

    Shapes decide the order where they can; numbers in names of one pattern (``fc1``, ``fc2``, ``fc10``) count upwards.
    Each norm layer stands behind what it normalises, lone vectors stand last. The inputs of the first and the outputs
    of the last layer never move. A linear layer that reads a flattened ``(C, H, W)`` map moves in blocks of ``H * W``;
    a depthwise convolution belongs to the group that it passes through.

    Chains side by side are looked for only under names that say so (actor, critic, policy, value); a lane that is in
    doubt keeps its layers in natural order and gets no groups.
    """
    try:
        lanes = _lanes(layers)
    except _DoubtError as doubt:
        return Architecture(tuple(layers), notes=(f"Permutation groups are left out: {doubt}.",))
    ordered: list[LayerSpec] = []
    groups: list[PermutationGroup] = []
    notes: list[str] = []
    known, skippable = True, False
    for name, members in lanes.items():
        where = f"In {name}: " if name else ""
        vectors = [layer for layer in members if layer.kind == "vector"]
        try:
            chain, norms = _order(members)
        except _DoubtError as doubt:
            ordered.extend(members)
            known = False
            notes.append(f"{where}Permutation groups are left out: {doubt}.")
            continue
        behind = (layer for number, first in enumerate(chain) for layer in (first, *norms.get(number, ())))
        ordered += [*norms.get(-1, ()), *behind, *vectors]
        found, left_out = _groups(chain, norms, vectors)
        groups.extend(found)
        notes.extend(f"{where}{note}" for note in left_out)
        skippable = skippable or len({group.size for group in found}) < len(found)
    if skippable:
        notes.append("Symmetries come from names and shapes: a skip connection between equal widths would not be seen.")
    return Architecture(tuple(ordered), tuple(groups), notes=tuple(notes), ordered=known)


def _lanes(layers: Sequence[LayerSpec]) -> dict[str, list[LayerSpec]]:
    lanes: dict[str, list[LayerSpec]] = {}
    outside: list[LayerSpec] = []
    for layer in layers:
        lane = _lane(layer.name)
        (outside if lane is None else lanes.setdefault(lane, [])).append(layer)
    if len(lanes) <= 1:
        return {"": list(layers)}
    if outside:
        raise _DoubtError(f"{' and '.join(lanes)} may share {outside[0].name}")
    return lanes


def _lane(name: str) -> str | None:
    for pattern, lane in _LANES:
        if match := pattern.match(name):
            return lane or match["lane"]
    return None


def _order(layers: Sequence[LayerSpec]) -> tuple[list[LayerSpec], dict[int, tuple[LayerSpec]]]:
    """The linear layers and convolutions in forward order, and the norm layer behind each, by its number."""
    weights = [layer for layer in layers if layer.kind in ("linear", "conv")]
    if not weights:
        raise _DoubtError("there is no linear layer and no convolution")
    if strange := [layer for layer in layers if layer.kind in ("embedding", "other")]:
        raise _DoubtError(f"the part of {strange[0].name} in the forward pass is unknown")
    _refuse_branches(layers, weights)
    chain = _search(weights)
    placed: dict[int, tuple[LayerSpec]] = {}
    for norm in (layer for layer in layers if layer.kind == "norm"):
        place = _norm_place(norm, chain)
        if place in placed:
            raise _DoubtError(f"{norm.name} and {placed[place][0].name} seem to normalise the same layer")
        placed[place] = (norm,)
    return chain, placed


def _refuse_branches(layers: Iterable[LayerSpec], weights: Sequence[LayerSpec]) -> None:
    for layer in layers:
        if match := _BRANCHING.search(layer.name):
            raise _DoubtError(f"{layer.name} speaks of a branch ({match[2]})")
    # Several layers inside a numbered container, and more outside of it: blocks, which may have skip connections.
    shared = _common_container([layer.name for layer in weights])
    inside: dict[str, int] = {}
    for layer in weights:
        parts = layer.name.split(".")
        if len(parts) > _NAME_PARTS:
            raise _DoubtError(f"a layer lies {len(parts)} modules deep")
        for depth in range(shared + 1, len(parts)):
            if parts[depth - 1][-1:].isdigit():
                container = ".".join(parts[:depth])
                inside[container] = inside.get(container, 0) + 1
    for container, count in inside.items():
        if 1 < count < len(weights):
            raise _DoubtError(f"the {count} layers in {container} look like a block, which may have a skip connection")


def _common_container(names: Sequence[str]) -> int:
    paths = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(path) > depth for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth


def _search(weights: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Finds the only order in which every layer can read the one before and numbers in names count upwards."""
    if len(weights) > _SEARCH_LAYERS:
        raise _DoubtError(f"{len(weights)} layers are too many for a plain chain")
    patterns: dict[str, list[LayerSpec]] = {}
    for layer in sorted(weights, key=lambda layer: natural_key(layer.name)):
        patterns.setdefault(_pattern(layer), []).append(layer)
    start = _common_container([layer.name for layer in weights])
    is_last = {
        pattern: bool(_LAST.match(".".join(re.sub(r"[.]?#", "", pattern).split(".")[start:]))) for pattern in patterns
    }
    budget = iter(range(_SEARCH_STEPS))

    def continuations(taken: dict[str, int], previous: LayerSpec | None) -> Iterator[list[LayerSpec]]:
        if next(budget, None) is None:
            raise _DoubtError("the layers fit together in too many ways")
        left = [pattern for pattern, members in patterns.items() if taken[pattern] < len(members)]
        if not left:
            yield []
        if any(not is_last[pattern] for pattern in left):
            left = [pattern for pattern in left if not is_last[pattern]]
        for pattern in left:
            layer = patterns[pattern][taken[pattern]]
            if previous is None or _block(previous, layer):
                for rest in continuations({**taken, pattern: taken[pattern] + 1}, layer):
                    yield [layer, *rest]

    orders = continuations(dict.fromkeys(patterns, 0), None)
    first = next(orders, None)
    if first is None:
        raise _DoubtError("the layers do not form a chain: no order lets each one read the outputs of the one before")
    if next(orders, None) is not None:
        raise _DoubtError("the layers fit together in more than one order and their names do not decide")
    _refuse_heads(first, {pattern for pattern, last in is_last.items() if last})
    return first


def _pattern(layer: LayerSpec) -> str:
    return re.sub(r"[0-9]+", "#", layer.name)


def _refuse_heads(chain: Sequence[LayerSpec], last: set[str]) -> None:
    """Refuses an order that fits by chance: heads side by side whose width is that of the network's input."""
    runs = [_pattern(layer) for n, layer in enumerate(chain) if n == 0 or _pattern(layer) != _pattern(chain[n - 1])]
    if len(set(runs)) < len(runs):
        raise _DoubtError(f"the layers {next(run for run in runs if runs.count(run) > 1)} do not follow each other")
    for layer in chain:
        readers = [
            other.name
            for other in chain
            if other is not layer
            and _block(layer, other)
            and "#" not in _pattern(other)
            and _pattern(other) not in last
        ]
        if len(readers) > 1:
            raise _DoubtError(f"{readers[0]} and {readers[1]} can both read {layer.name}")


def _is_depthwise(layer: LayerSpec, channels: int) -> bool:
    shape = layer.tensors[0].shape
    return layer.kind == "conv" and shape[1] == 1 and shape[0] == channels > 1


def _block(previous: LayerSpec, layer: LayerSpec) -> int:
    """Entries of the input axis of ``layer`` for each output channel of ``previous``; 0 if it cannot read them."""
    channels, inputs = previous.tensors[0].shape[0], layer.tensors[0].shape[1]
    same_axes = len(previous.tensors[0].shape) == len(layer.tensors[0].shape)
    if same_axes and (inputs == channels or _is_depthwise(layer, channels)):
        return 1
    if previous.kind == "conv" and layer.kind == "linear" and inputs % channels == 0:
        return inputs // channels
    return 0


def _norm_place(norm: LayerSpec, chain: Sequence[LayerSpec]) -> int:
    """Number of the layer whose outputs ``norm`` normalises, or -1 for the network's inputs."""
    size = norm.tensors[0].numel
    places = [number for number, layer in enumerate(chain) if layer.tensors[0].shape[0] == size]
    if chain[0].tensors[0].shape[1] == size:
        places.insert(0, -1)
    if len(places) == 1:
        return places[0]
    named = [place for place in places if place in _named_places(norm.name, chain)]
    if len(named) != 1:
        raise _DoubtError(f"it is unknown which layer {norm.name} ({size} channels) normalises")
    return named[0]


def _named_places(name: str, chain: Sequence[LayerSpec]) -> set[int]:
    container, _, leaf = name.rpartition(".")
    numbers = re.findall(r"[0-9]+", name)
    siblings = {n: layer.name.rpartition(".") for n, layer in enumerate(chain)}
    # nn.Sequential: the norm stands behind the layer with the next smaller number, and these count upwards in a chain
    running = {
        n: natural_key(own)
        for n, (parent, _, own) in siblings.items()
        if parent == container and re.fullmatch("[0-9]+", own) and re.fullmatch("[0-9]+", leaf)
    }
    if running:
        return {max((n for n, key in running.items() if key < natural_key(leaf)), default=min(running) - 1)}
    # conv1 and bn1, convs.0 and norms.0, layers.0.conv and layers.0.bn: the same numbers
    return {n for n, layer in enumerate(chain) if numbers and re.findall(r"[0-9]+", layer.name) == numbers}


def _groups(
    chain: Sequence[LayerSpec], norms: Mapping[int, tuple[LayerSpec]], vectors: Sequence[LayerSpec]
) -> tuple[list[PermutationGroup], list[str]]:
    groups: list[PermutationGroup] = []
    notes: list[str] = []
    axes: list[GroupAxis] = []
    doubts: list[str] = []
    for number, (layer, follower) in enumerate(pairwise(chain)):
        size, own = layer.tensors[0].shape[0], norms.get(number, ())
        axes += [GroupAxis(tensor.name, 0) for part in (layer, *own) for tensor in part.tensors]
        doubts += _doubts(layer, own, vectors, first=number == 0)
        if _is_depthwise(follower, size):
            continue
        axes.append(GroupAxis(follower.tensors[0].name, 1, _block(layer, follower)))
        if doubts:
            notes.append(f"The channels of {layer.name} are left out of the permutation groups: {doubts[0]}.")
        elif size > 1:
            groups.append(PermutationGroup(size, tuple(axes)))
        axes, doubts = [], []
    return groups, notes


def _doubts(
    layer: LayerSpec, norms: Sequence[LayerSpec], vectors: Sequence[LayerSpec], *, first: bool
) -> Iterator[str]:
    shape = layer.tensors[0].shape
    if first and layer.kind == "conv" and shape[1] == 1 < shape[0] <= _IMAGE_CHANNELS:
        yield f"{layer.name} may be a depthwise convolution of the input"
    for norm in norms:
        has_statistics = any(tensor.name.endswith("running_mean") for tensor in norm.tensors)
        if not has_statistics and (layer.kind == "conv" or _GROUPED_NORM.search(norm.name)):
            yield f"{norm.name} may normalise channels in groups"
    for vector in vectors:
        if vector.numel > 1 and vector.numel % shape[0] == 0:
            yield f"{vector.tensors[0].name} may belong to them"
