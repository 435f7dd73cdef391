"""From a checkpoint's tensor names and shapes to its architecture, without a model class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightspace.errors import ArchitectureError
from weightspace.networks.chain import find_chains
from weightspace.networks.layers import exclusion_reason, group_layers
from weightspace.schema import Architecture, Exclusion, TensorSpec


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
    specs = tuple(specs)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArchitectureError(f"tensor {twice!r} appears twice; every tensor needs a name of its own")
    reasons = {spec.name: exclusion_reason(spec) for spec in specs}
    exclusions = tuple(Exclusion(name, reason) for name, reason in reasons.items() if reason is not None)
    tokenized = {spec.name: spec for spec in specs if reasons[spec.name] is None}

    built = None if config is None else _traced(config, tokenized)
    if built is not None:
        return replace(built, exclusions=exclusions, aliases=tuple(aliases))
    layers = group_layers(tokenized.values())
    if aliases:
        alias, kept = aliases[0]
        note = f"Permutation groups are left out: {alias} and {kept} are one tensor, used twice."
        return Architecture(layers, (), exclusions, tuple(aliases), (note,))
    found = find_chains(layers)
    return Architecture(found.layers, found.groups, exclusions, (), found.notes, found.ordered)


def _traced(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> Architecture | None:
    # Imported here: most checkpoints have no config of this library, and tracing is slow to import.
    from weightspace.networks.families import Network, family_config
    from weightspace.networks.tracing import architecture_of

    family = family_config(config)
    if family is None:
        return None
    architecture = architecture_of(Network(family), family.example_input())
    described = {spec.name: spec.shape for spec in architecture.tensors}
    for name in sorted(described.keys() | stored.keys()):
        found = stored[name].shape if name in stored else None
        if described.get(name) != found:
            raise ArchitectureError(
                f"tensor {name!r}: the config describes shape {described.get(name)}, the checkpoint has {found}; "
                "put the config.json of this checkpoint beside it, or none"
            )
    layers = tuple(
        replace(layer, tensors=tuple(stored[spec.name] for spec in layer.tensors)) for layer in architecture.layers
    )
    return replace(architecture, layers=layers)
