"""What a checkpoint is, from its header alone: layers, symmetries, token counts, and what would be left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from weightspace.errors import CheckpointError, WeightspaceError
from weightspace.io.adapters import find_pairs, is_untrained, read_adapter
from weightspace.io.checkpoint import Checkpoint, find_checkpoints, open_in
from weightspace.io.hub import HubOptions
from weightspace.io.quantization import Quantization
from weightspace.schema import Architecture
from weightspace.tokenizers import TOKENIZERS, get_tokenizer

TOKEN_SIZE = 64
"""Entries a token that counts are given for by default."""

_CHECKED_ENTRIES = 1 << 22


@dataclass(frozen=True)
class AdapterFacts:
    """What a checkpoint holds of a LoRA adapter.

    Attributes:
        base_model: the model that it was trained on, or None if nothing names it.
        modules: number of modules with a pair of factors.
        ranks: the ranks that occur, ascending.
        scalings: what the products of the factors are multiplied with, the different values, ascending.
        namings: how the tensors are named: ``"peft"``, ``"diffusers"``, ``"kohya"`` or ``"cloneofsimo"``.
        saved: tensors of modules that were trained whole beside it.
        problems: where config and tensors do not fit each other, or why this is no LoRA adapter.
        notes: what could not be known.
        untrained: whether no module has an update; None if the values were not read.
    """

    base_model: str | None
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    namings: tuple[str, ...]
    saved: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    untrained: bool | None = None


@dataclass(frozen=True)
class Inspection:
    """What is known of one checkpoint.

    Attributes:
        location: the file, or the index of a sharded checkpoint: its path, or repository, commit and path.
        architecture: layers, permutation groups, and what would be left out.
        left_out: number of entries of the excluded tensors by name.
        token_counts: tokens by tokenizer name, at ``token_size`` entries a token.
        not_finite: number of NaN and infinite entries by tensor name, tensors without any left out; None if the values
            were not read.
        quantization: how the stored numbers are quantised, so that they are not the weights; None if they are.
        adapter: what is known of it as an adapter; None if it is none.
        notes: what was wrong with its index or the files beside it.
    """

    location: str
    architecture: Architecture
    left_out: Mapping[str, int]
    token_size: int
    token_counts: Mapping[str, int]
    not_finite: Mapping[str, int] | None = None
    quantization: Quantization | None = None
    adapter: AdapterFacts | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Entries that become tokens."""
        return self.architecture.numel

    @property
    def dtypes(self) -> dict[str, int]:
        """Entries that become tokens by stored dtype."""
        counts: dict[str, int] = {}
        for tensor in self.architecture.tensors:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
        return counts

    def to_record(self) -> dict[str, Any]:
        """Builds a JSON-ready mapping of everything."""
        architecture = self.architecture
        return {
            "location": self.location,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "token_size": self.token_size,
            "tokens": dict(self.token_counts),
            "ordered": architecture.ordered,
            "layers": [
                {**asdict(layer), "rows": layer.rows, "width": layer.width, "parameters": layer.numel}
                for layer in architecture.layers
            ],
            "permutation_groups": [asdict(group) for group in architecture.groups],
            "left_out": [
                {**asdict(exclusion), "entries": self.left_out[exclusion.tensor]}
                for exclusion in architecture.exclusions
            ],
            "aliases": dict(architecture.aliases),
            "notes": [*self.notes, *architecture.notes],
            "not_finite": None if self.not_finite is None else dict(self.not_finite),
            "quantization": None if self.quantization is None else asdict(self.quantization),
            "adapter": None if self.adapter is None else asdict(self.adapter),
        }


@dataclass(frozen=True)
class Survey:
    """Everything that was found at a location: ``unreadable`` holds ``(path, reason)`` of files that cannot be used."""

    inspections: tuple[Inspection, ...]
    unreadable: tuple[tuple[str, str], ...] = ()


def inspect_location(
    location: str | Path,
    *,
    token_size: int = TOKEN_SIZE,
    check_values: bool = False,
    options: HubOptions | None = None,
    allow_pickle: bool = False,
) -> Survey:
    """Inspects a safetensors file, every checkpoint in a tree of folders, or a repository on the Hub.

    Only headers are read unless ``check_values`` is set. Hidden folders of a tree are passed over.

    Args:
        location: path of a file or folder, or ``org/name[@revision][:path]`` on the Hub.
        token_size: entries a token, for the token counts.
        check_values: also reads all weights and counts NaN and infinite entries.
        options: how the Hub is reached.
        allow_pickle: also read plain tensors from pickled checkpoints.

    Raises:
        WeightspaceError: the only checkpoint there is cannot be read, or there is none. In a tree of several, those
            that cannot be read are listed with the reason instead.
    """
    tokenizers = [get_tokenizer(name, token_size) for name in TOKENIZERS]
    inferred: dict[object, Architecture] = {}

    def inspect(name: str) -> Inspection:
        checkpoint = open_in(folder, name, allow_pickle=allow_pickle)
        # Models of a tree mostly share a few headers, and architectures are the slow part.
        key = (tuple(checkpoint.specs.values()), checkpoint.aliases, json.dumps(checkpoint.config, sort_keys=True))
        if key not in inferred:
            inferred[key] = checkpoint.architecture
        architecture = inferred[key]
        return Inspection(
            checkpoint.where,
            architecture,
            {exclusion.tensor: checkpoint.specs[exclusion.tensor].numel for exclusion in architecture.exclusions},
            token_size,
            {
                tokenizer.name: tokenizer.token_count(architecture)
                for tokenizer in tokenizers
                if tokenizer.applies_to(architecture)
            },
            _not_finite(checkpoint, architecture) if check_values else None,
            checkpoint.quantization,
            _adapter_facts(checkpoint, check_values),
            checkpoint.notes,
        )

    if (Path(location) / "zoo.json").is_file():
        raise CheckpointError(f"{location}: this is a zoo; use `weightspace zoo info`")
    folder, names = find_checkpoints(location, options=options, allow_pickle=allow_pickle)
    if len(names) == 1:
        return Survey((inspect(names[0]),))
    inspections, unreadable = [], []
    for name in tqdm(names, desc="inspect", unit="file", disable=None):
        try:
            inspections.append(inspect(name))
        except WeightspaceError as error:
            unreadable.append((folder.title(name), str(error)))
    return Survey(tuple(inspections), tuple(unreadable))


def _adapter_facts(checkpoint: Checkpoint, check_values: bool) -> AdapterFacts | None:
    config = checkpoint.adapter_config
    pairs, problems = find_pairs(checkpoint.specs.values())
    merged = config is None or (config.get("peft_type") == "LORA" and checkpoint.specs)
    if merged and not pairs and not problems:
        return None  # a config beside a model that an adapter was merged into makes no adapter of it
    try:
        adapter = read_adapter(checkpoint, checkpoint.adapter_config)
    except CheckpointError as error:  # one of the many other kinds of adapter, or a config that makes no sense
        return AdapterFacts(None, 0, (), (), (), (), (str(error),), ())
    return AdapterFacts(
        base_model=adapter.base_model,
        modules=len(adapter.pairs),
        ranks=tuple(sorted({pair.rank for pair in adapter.pairs})),
        scalings=tuple(sorted({scaling for scaling in adapter.scaling.values() if math.isfinite(scaling)})),
        namings=adapter.namings,
        saved=adapter.saved,
        problems=adapter.mismatches,
        notes=adapter.notes,
        untrained=is_untrained(adapter, checkpoint) if check_values else None,
    )


def _not_finite(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, int]:
    counts = {}
    for spec in architecture.tensors:
        parts = checkpoint.tensor(spec.name).flatten().split(_CHECKED_ENTRIES)
        # torch.isfinite does not know the one-byte floats.
        counts[spec.name] = sum(
            int((~torch.isfinite(part.float() if part.itemsize == 1 else part)).sum()) for part in parts
        )
    return {name: count for name, count in counts.items() if count}
