"""Adapters as PEFT folders: scalings folded in, names of other trainers turned into PEFT's, and writing."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.dtypes import dtype_name
from weightspace.errors import CheckpointError
from weightspace.files import atomic_write_text
from weightspace.io.adapters import FLAT_COMPONENT, Adapter, LoraPair, describe_adapter, peft_names
from weightspace.io.checkpoint import ADAPTER_CONFIG
from weightspace.io.header import shown
from weightspace.io.writing import save_checkpoint
from weightspace.schema import TensorSpec

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def fold_scaling(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies the scaling into B and its bias, so that adapters with equal updates have equal products ``B A``.

    Tokens are made of tensors alone and see no config: fold before adapters of different alpha are compared. Names,
    shapes and dtypes stay; scalars named ``alpha`` become the rank, which is a scaling of one. `folded_config` gives
    the config that belongs to the result.

    Raises:
        CheckpointError: the scaling of a module is not known.
    """
    _ensure_known(adapter, adapter.pairs)
    folded = dict(tensors)
    for pair in adapter.pairs:
        for name in (pair.b.name, pair.bias):
            if name is not None and adapter.scaling[pair.module] != 1:
                # In double precision, so that nothing but the last rounding to the stored dtype is lost.
                folded[name] = (tensors[name].double() * adapter.scaling[pair.module]).to(tensors[name].dtype)
        if pair.alpha is not None:
            folded[pair.alpha] = torch.full_like(tensors[pair.alpha], pair.rank)
    return folded


def folded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``adapter_config.json`` for tensors of `fold_scaling`: its scaling is one for every module."""
    # Equal patterns in equal order find the same module, which makes alpha the rank everywhere.
    ranks = dict(config.get("rank_pattern") or {})
    return {**config, "lora_alpha": config.get("r", 8), "alpha_pattern": ranks, "use_rslora": False}


def to_peft(
    adapter: Adapter, tensors: Mapping[str, Tensor], *, component: str | None = None, modules: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames an adapter of any naming to PEFT's, for one base model.

    Args:
        adapter: what `read_adapter` found.
        tensors: its tensors by name.
        component: which network of a pipeline, where there are several.
        modules: names of the base model's modules; kohya's names, which have no dots, cannot be split without.

    Returns:
        Tensors and config for `save_adapter`, with the scalings of ``adapter``.

    Raises:
        CheckpointError: the naming does not tell the modules' names, tensors have no place in a PEFT adapter, or a
            scaling is not known.
    """
    where, beside = adapter.where, [*adapter.saved, *adapter.other]
    pairs = _pairs_of(adapter, component)
    if beside and adapter.namings != ("peft",):
        raise CheckpointError(
            f"{where}: {len(beside)} tensors such as {shown(beside[0])} have no place in a PEFT adapter; leave them out"
        )
    paths = dict(zip((pair.module for pair in pairs), _paths(pairs, modules, where), strict=True))
    _ensure_known(adapter, pairs)
    renamed = {name: tensors[name] for name in beside}
    for pair in pairs:
        renamed |= {new: tensors[old] for old, new in peft_names(pair, paths[pair.module]).items()}
    if adapter.config is not None:
        return renamed, dict(adapter.config)
    # Anchored and escaped: PEFT matches the keys of patterns as regular expressions against ends of names.
    ranks = {f"^{re.escape(paths[pair.module])}": pair.rank for pair in pairs}
    # The config has no rslora: alpha over rank is the scaling, whatever the adapter was trained with.
    alphas = {f"^{re.escape(paths[pair.module])}": adapter.scaling[pair.module] * pair.rank for pair in pairs}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return renamed, {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key: value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {key: value for key, value in alphas.items() if value != alpha},
        "target_modules": sorted(paths.values()),
        "use_dora": any(pair.magnitude for pair in pairs),
        "lora_bias": any(pair.bias for pair in pairs),
        "inference_mode": True,
    }


def save_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: str | Path) -> None:
    """Writes a folder that ``PeftModel.from_pretrained`` loads; each of its two files is whole or not there at all.

    ``PeftModel.from_pretrained`` only warns of tensors that it has no use for, so whatever it would not take as it is
    stored is refused here.

    Args:
        tensors: by PEFT's names; `to_peft` gives them for other namings.
        config: content of ``adapter_config.json``.
        folder: made if it is missing.

    Raises:
        CheckpointError: names or config do not fit the tensors, or the folder cannot be written.
    """
    folder = Path(folder)
    specs = {name: TensorSpec(name, tuple(value.shape), dtype_name(value.dtype)) for name, value in tensors.items()}
    adapter = describe_adapter(specs, config, where=str(folder))
    for pair in adapter.pairs:
        for name, expected in peft_names(pair, pair.module).items():
            if name != expected:
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)} is {shown(expected)} for PEFT; rename the tensors with to_peft"
                )
    if adapter.mismatches:
        raise CheckpointError(
            f"{folder}: PEFT would load another adapter: {'; '.join(adapter.mismatches)}; correct the config"
        )
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the config is not JSON ({error}); keep to numbers, texts and lists"
        ) from error
    # Copies: tensors that share memory would be stored once, under a name that PEFT does not look for.
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(copies, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        atomic_write_text(folder / ADAPTER_CONFIG, text)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}); check that it is a writable folder and has room"
        ) from error


def _ensure_known(adapter: Adapter, pairs: Sequence[LoraPair]) -> None:
    unknown = set(adapter.unknown) & {pair.module for pair in pairs}
    if unknown:
        raise CheckpointError(
            f"{adapter.where}: the scaling of {len(unknown)} modules such as {shown(min(unknown))} is unknown; find "
            "out alpha / rank and give it to read_adapter(..., scaling=...)"
        )


def _pairs_of(adapter: Adapter, component: str | None) -> tuple[LoraPair, ...]:
    found = adapter.components
    if component is None and len(found) > 1:
        raise CheckpointError(
            f"{adapter.where}: factors of {', '.join(found)}, but a PEFT adapter has one base model; "
            f"name one of them, e.g. component={found[-1]!r}"
        )
    if component is not None and component not in found:
        raise CheckpointError(f"{adapter.where}: no component {component!r}; take one of {', '.join(map(repr, found))}")
    return tuple(pair for pair in adapter.pairs if component in (None, pair.component))


def _paths(pairs: Sequence[LoraPair], modules: Iterable[str], where: str) -> list[str]:
    """Returns the modules' names in the base model."""
    dotted: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        dotted[name.replace(".", "_")].append(name)
    paths = []
    for pair in pairs:
        if pair.naming == "cloneofsimo":
            raise CheckpointError(
                f"{where}: {shown(pair.module)} numbers its module and does not name it; keep the adapter as it is"
            )
        if pair.naming == "kohya" and (flat := FLAT_COMPONENT.match(pair.module)):
            candidates = dotted[pair.module[flat.end() :]]
            if len(candidates) != 1:
                raise CheckpointError(
                    f"{where}: {shown(pair.module)} could be {len(candidates)} of the base model's modules that were "
                    "given; pass the names of them all"
                )
            paths += candidates
        else:
            paths.append(pair.module.removeprefix(f"{pair.component}."))
    return paths
