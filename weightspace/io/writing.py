"""Safetensors files as they are written: `save_checkpoint` and the bytes that it writes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.dtypes import DTYPES, dtype_name
from weightspace.errors import CheckpointError
from weightspace.files import atomic_file
from weightspace.io.header import byte_count, parse_header, shown
from weightspace.schema import TensorSpec

_STORAGE_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


def save_checkpoint(
    tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; an existing file is replaced at the last moment.

    Tensors may be of any strides and on any device. Tensors that are one and the same memory are stored once, and the
    others' names go into the metadata as aliases; views that merely overlap are stored in full. The bytes are those of
    ``safetensors.torch.save``, with the metadata sorted by key.

    Raises:
        CheckpointError: a name, dtype, layout or metadata entry cannot be stored, or the file cannot be written.
    """
    path = Path(path)
    header, stored = _layout(tensors, metadata or {}, where=str(path))
    try:
        with atomic_file(path) as partial, partial.open("xb") as file:
            file.write(header)
            for tensor in stored:
                file.write(_bytes_of(tensor))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); check that its folder exists, is writable and has room"
        ) from error


def checkpoint_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns what `save_checkpoint` writes.

    Raises:
        CheckpointError: a name, dtype, layout or metadata entry cannot be stored.
    """
    header, stored = _layout(tensors, metadata or {}, where="checkpoint")
    return b"".join([header, *map(_bytes_of, stored)])


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str) -> tuple[bytes, list[Tensor]]:
    """Builds the header and the tensors in the order of their bytes."""
    aliases = _aliases(tensors, metadata, where)
    specs = [_spec_of(name, tensor) for name, tensor in tensors.items() if name not in aliases]
    header, names = header_bytes(specs, {**metadata, **aliases}, where=where)
    return header, [tensors[name] for name in names]


def header_bytes(specs: Iterable[TensorSpec], metadata: Mapping[str, str], *, where: str) -> tuple[bytes, list[str]]:
    """Returns the bytes before the data of a file of these tensors, and their names in the order of their bytes.

    Raises:
        CheckpointError: a name, size or metadata entry cannot be stored.
    """
    # Widest dtypes first keeps every tensor aligned; names then make equal models equal headers.
    specs = sorted(specs, key=lambda spec: (-_STORAGE_ORDER[spec.dtype], spec.name.encode(errors="replace")))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + byte_count(spec, where)
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a tensor name or metadata text is not valid Unicode ({error})") from error
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    parse_header(header, file_size=len(header) + end, where=where)  # whatever is written can be opened again
    return header, [spec.name for spec in specs]


def _spec_of(name: str, tensor: Tensor) -> TensorSpec:
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise CheckpointError(
                f"tensor {shown(name)}: a 0-d F4 tensor has no last axis to unpack; reshape it to (1,)"
            )
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorSpec(name, shape, dtype)


def _aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> dict[str, str]:
    """Finds names of memory that another name stores; a name that the metadata uses otherwise is stored in full."""
    sharing: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        _check_storable(name, tensor, where)
        # Equal addresses alone are not equal tensors: a conjugated or negated view keeps its base's address.
        if tensor.numel():
            view = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
            sharing[(tensor.device, tensor.data_ptr(), *view)].append(name)
    aliases: dict[str, str] = {}
    for names in sharing.values():
        kept = min(names, key=lambda name: (metadata.get(name) in names, name))
        aliases |= {name: kept for name in names if name != kept and metadata.get(name, kept) == kept}
    return aliases


def _check_storable(name: str, tensor: Tensor, where: str) -> None:
    if name == "__metadata__":
        raise CheckpointError(f"{where}: {name} is safetensors' own key; rename the tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "without data" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"{where}: tensor {shown(name)} is {kind}; make it a dense tensor first")
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{where}: tensor {shown(name)}: {tensor.dtype} cannot be stored as safetensors; convert it"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data
