"""From a checkpoint's tensor names and shapes to its architecture, without a model class."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.dtypes import dtype_name
from weightspace.errors import ArchitectureError
from weightspace.networks.chain import find_chains
from weightspace.networks.families import FamilyConfig, family_config, template
from weightspace.networks.layers import exclusion_reason, group_layers
from weightspace.schema import Architecture, Exclusion, TensorSpec

# Weights and activations of a network that groups are tried on, at most: 128 MiB in float64.
_LARGEST_RUN = 2**24

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "module")


def infer_architecture(
    specs: Iterable[TensorSpec], *, config: Mapping[str, Any] | None = None, aliases: Sequence[tuple[str, str]] = ()
) -> Architecture:
    """Infers layers, their order and their permutation groups from what a safetensors header says.

    With a ``config`` that this library can build a module from, order and groups come from tracing that module.
    Otherwise they come from names and shapes where these leave no doubt; where they do, the layers stay in the natural
    order of their names, no groups are claimed, and ``notes`` says why.

    Args:
        specs: all tensors of the checkpoint, in any order.
        config: content of ``config.json``, if there is one.
        aliases: ``(alias, kept name)`` of tied tensors that are stored once.

    Returns:
        An architecture in which every tensor is either part of exactly one layer or an exclusion with its reason.

    Raises:
        ArchitectureError: a name appears twice, or ``config`` describes a network with other tensors.
        SettingsError: ``config`` names a family of this library and has wrong values.
    """
    architecture = _unordered(tuple(specs), tuple(aliases))
    if config is not None and (family := family_config(config)) is not None:
        stored = {spec.name: spec.shape for spec in architecture.tensors}
        wrappers = _wrappers(stored)
        prefix = "".join(f"{wrapper}." for wrapper in wrappers)
        described = {prefix + name: shape for name, shape in family.shapes().items()}
        for name in sorted(described.keys() | stored.keys()):
            if described.get(name) != stored.get(name):
                raise ArchitectureError(
                    f"tensor {name!r}: the config describes shape {described.get(name)}, the checkpoint has "
                    f"{stored.get(name)}; put the config.json of this checkpoint beside it, or none"
                )
        return _of_family(architecture, family, tuple(wrappers))
    if aliases:
        alias, kept = aliases[0]
        note = f"Permutation groups are left out: {alias} and {kept} are one tensor, used twice."
        return replace(architecture, notes=(note,))
    return replace(find_chains(architecture.layers), exclusions=architecture.exclusions)


def _wrappers(names: Iterable[str]) -> list[str]:
    """Finds what wrappers of modules, as of torch.compile and DDP, put before all names."""
    found: list[str] = []
    rest = list(names)
    while rest and (wrapper := next((w for w in _WRAPPERS if all(name.startswith(f"{w}.") for name in rest)), None)):
        found.append(wrapper)
        rest = [name.removeprefix(f"{wrapper}.") for name in rest]
    return found


def architecture_of(module: nn.Module, example: Tensor) -> Architecture:
    """Reads the architecture of a module: its tensors in forward order and its groups, traced and verified.

    Where the module cannot be traced, the layers keep the natural order of their names and a note says why.
    """
    from weightspace.networks.tracing import ties

    names = ties(module)
    state = module.state_dict()
    specs = [TensorSpec(n, tuple(state[n].shape), dtype_name(state[n].dtype)) for n, kept in names.items() if n == kept]
    aliases = tuple((name, kept) for name, kept in names.items() if name != kept)
    return _traced(_unordered(specs, aliases), module, example)


def _unordered(specs: Sequence[TensorSpec], aliases: tuple[tuple[str, str], ...]) -> Architecture:
    """Groups tensors into layers, in the natural order of their names."""
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArchitectureError(f"tensor {twice!r} appears twice; every tensor needs a name of its own")
    reasons = {spec.name: exclusion_reason(spec) for spec in specs}
    exclusions = tuple(Exclusion(name, reason) for name, reason in reasons.items() if reason is not None)
    return Architecture(group_layers(spec for spec in specs if reasons[spec.name] is None), (), exclusions, aliases)


@functools.lru_cache(maxsize=256)
def _of_family(architecture: Architecture, family: FamilyConfig, wrappers: tuple[str, ...]) -> Architecture:
    """Traces a network of a zoo: a quarter of a second, which thousands of checkpoints share."""
    # On "meta": nothing is allocated, whatever the config says.
    module: nn.Module = template(family)
    for wrapper in reversed(wrappers):
        module = nn.Sequential(OrderedDict({wrapper: module}))
    return _traced(architecture, module, torch.empty(2, *family.image_shape, device="meta"))


def _traced(architecture: Architecture, module: nn.Module, example: Tensor) -> Architecture:
    # Imported here: most checkpoints have no config of this library, and tracing is slow to import.
    from weightspace.networks.tracing import trace, verify_groups

    try:
        groups, order, entries = trace(module, example)
        tokenized = {tensor.name for tensor in architecture.tensors}
        groups = held = tuple(group for group in groups if all(axis.tensor in tokenized for axis in group.axes))
        if entries <= _LARGEST_RUN:
            # A fixed seed: the draw only has to be generic, and the same module should always read the same.
            held = verify_groups(module, groups, example, torch.Generator().manual_seed(0))
    except ArchitectureError as error:
        return replace(architecture, notes=(f"Permutation groups are left out: {error}.",))
    notes = [] if held == groups else [f"{len(groups) - len(held)} traced permutation groups changed the function."]
    if entries > _LARGEST_RUN:
        notes.append(f"Permutation groups are traced but not tried: a run holds {entries:,} numbers.")
    place = {name: number for number, name in enumerate(order)}
    if unused := [layer.name for layer in architecture.layers if not any(t.name in place for t in layer.tensors)]:
        notes.append(f"The forward pass does not use {', '.join(unused)}.")
    layers = tuple(
        sorted(architecture.layers, key=lambda layer: min(place.get(t.name, len(place)) for t in layer.tensors))
    )
    return replace(architecture, layers=layers, groups=held, notes=tuple(notes), ordered=True)
