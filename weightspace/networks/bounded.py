"""Networks of transformers from the configs of strangers, bounded by the weights that come with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weightspace.errors import SettingsError

FREE_NUMBERS = 2**18
"""Numbers of a network's config may be as large without being sizes of its weights: classes, tokens, lengths."""

LARGEST_PICTURE = 1024
"""Largest number of an image processor's config, which resizes pictures to as many pixels a side."""


def check_numbers(config: Mapping[str, Any], largest: int) -> None:
    """Refuses a config with a number that would allocate more than there is reason for.

    Args:
        config: content of a JSON file, which nothing has read yet.
        largest: size of the largest allowed number; for a network the number of its weights and `FREE_NUMBERS`.

    Raises:
        SettingsError: naming the number.
    """
    pending: list[tuple[str, Any]] = [("value", config)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(key, item) for item in value]
        elif isinstance(value, int | float) and abs(value) > largest:
            raise SettingsError(f"config: {key} {value:.6g} is above {largest:,}; give the config of these weights")


def build_on_meta(build: Callable[[], nn.Module], tensors: int, entries: int) -> nn.Module:
    """Builds a network without memory for its weights, and stops where it outgrows the weights that there are.

    Args:
        build: builds it.
        tensors: number of weights and biases, at most.
        entries: of all of them and the network's buffers, at most.

    Raises:
        SettingsError: it has more.
    """
    built = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        built += parameter is not None
        if built > tensors:
            raise SettingsError(f"config: a network of more than {tensors} tensors; give the config of the weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            module = build()
    finally:
        hook.remove()
    needed = sum(tensor.numel() for tensor in chain(module.parameters(), module.buffers()))
    if needed > entries:
        raise SettingsError(
            f"config: a network of {needed:,} numbers, the weights have {entries:,}; give the config of the weights"
        )
    return module
