"""Checkpoints: named tensors, read lazily from safetensors and written atomically to it."""

from __future__ import annotations

import difflib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.io.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Header,
    StoredTensor,
    byte_count,
    dtype_name,
    header_of,
    load_json_object,
    parse_header,
    shown,
    torch_shape,
)
from weightspace.io.reader import ByteSource, MemorySource, open_file
from weightspace.schema import TensorSpec

MAX_SHARDS = 4096
"""Most files of one checkpoint."""

_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_REFUSAL = (
    "pickles can run any code and are never opened; load it where you trust it and write it with "
    "safetensors.torch.save_model"
)
_STORAGE_ORDER = {name: rank for rank, name in enumerate(DTYPES)}


class Checkpoint:
    """Named tensors of one model, read when they are asked for.

    Tensors lie over the source's memory where its alignment allows, so that opening a large file costs nothing and
    reading copies nothing. They may be written to: the file never changes, but later reads from the same object see it.

    Attributes:
        where: path or other name, used in errors.
        specs: stored tensors by name, in the order of their bytes in the file (files of a sharded checkpoint by name).
        metadata: free text of the header.
        aliases: ``(alias, kept name)`` of tied tensors that are stored once, as ``safetensors.torch.save_model`` writes
            them into the metadata.
        config: content of the ``config.json`` beside the weights, or None.
    """

    def __init__(
        self, where: str, files: Sequence[tuple[ByteSource, Header]], config: Mapping[str, Any] | None = None
    ) -> None:
        """Joins the files of one checkpoint; use `open_checkpoint` for files on disk.

        Raises:
            CheckpointError: two files store a tensor of the same name, or there are too many tensors.
        """
        self.where = where
        self.config = config
        self._stored: dict[str, tuple[ByteSource, StoredTensor]] = {}
        metadata: dict[str, str] = {}
        for source, header in files:
            for name, stored in header.tensors.items():
                if name in self._stored:
                    other = self._stored[name][0].where
                    raise CheckpointError(f"{where}: tensor {shown(name)} stands in both {other} and {source.where}")
                self._stored[name] = (source, stored)
            metadata |= header.metadata
        if len(self._stored) > MAX_TENSORS:
            raise CheckpointError(f"{where}: {len(self._stored)} tensors are above the limit of {MAX_TENSORS}")
        self.specs: Mapping[str, TensorSpec] = {name: stored.spec for name, (_, stored) in self._stored.items()}
        self.metadata: Mapping[str, str] = metadata
        self._kept = {
            alias: kept
            for alias, kept in metadata.items()
            if kept in self._stored and alias not in self._stored and alias.isprintable()
        }
        self.aliases: tuple[tuple[str, str], ...] = tuple(sorted(self._kept.items()))

    def __repr__(self) -> str:
        """Returns where it is and how many tensors it has."""
        return f"Checkpoint({self.where!r}, {len(self.specs)} tensors)"

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, or the tensor that an alias stands for: these bytes and no others.

        The shape is that of its spec, except ``F4``, which torch packs in twos along the last axis.

        Raises:
            CheckpointError: there is no such tensor, or torch has no dtype for it.
        """
        source, stored = self._find(name)
        return _tensor_over(source, stored.spec, stored.start, stored.end)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads ``tensor(name)[start:stop]`` along the first stored axis: these bytes and no others.

        Raises:
            CheckpointError: there is no such tensor, it has no axis, the rows are not all in it, or rows of a tensor
                with less than 8 bits an entry do not begin and end at a byte.
        """
        source, stored = self._find(name)
        spec, where = stored.spec, f"{self.where}: tensor {shown(name)}"
        if not spec.shape:
            raise CheckpointError(f"{where}: a 0-d tensor has no rows; read it whole")
        if not 0 <= start <= stop <= spec.shape[0]:
            raise CheckpointError(f"{where}: rows {start} to {stop} are not within its {spec.shape[0]} rows")
        before, inside = (TensorSpec(spec.name, (rows, *spec.shape[1:]), spec.dtype) for rows in (start, stop - start))
        first = stored.start + byte_count(before, self.where)
        return _tensor_over(source, inside, first, first + byte_count(inside, self.where))

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Reads several tensors; by default all that are stored, then all aliases.

        Names that stand for the same bytes get the same tensor object.

        Raises:
            CheckpointError: as `tensor`.
        """
        names = [*self.specs, *self._kept] if names is None else list(names)
        read = {kept: self.tensor(kept) for kept in dict.fromkeys(self._kept.get(name, name) for name in names)}
        return {name: read[self._kept.get(name, name)] for name in names}

    def _find(self, name: str) -> tuple[ByteSource, StoredTensor]:
        found = self._stored.get(self._kept.get(name, name))
        if found is None:
            close = difflib.get_close_matches(name, self.specs, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"it has {len(self.specs)} tensors of other names"
            raise CheckpointError(f"{self.where}: no tensor {shown(name)}; {mend}")
        return found


def open_checkpoint(location: str | Path) -> Checkpoint:
    """Opens a local checkpoint without reading its weights.

    Args:
        location: a safetensors file, a ``.safetensors.index.json``, or a folder that holds ``model.safetensors``, an
            index with its shards, or one safetensors file of any name. A ``config.json`` beside the weights is read.

    Raises:
        CheckpointError: whatever is missing, malformed, ambiguous or not safetensors, in one line.
    """
    path = Path(location)
    try:
        if path.is_dir():
            path = _weights_in(path)
        elif not path.exists():
            raise CheckpointError(f"{location}: no such file or folder; check the path")
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(f"{path}: {_PICKLE_REFUSAL}")
        config = _config_beside(path)
        if path.name.endswith(_INDEX):
            return Checkpoint(str(path), _shards(path), config)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown(str(location))}: cannot be read ({error}); check the path and its permissions"
        ) from error
    source = open_file(path)
    return Checkpoint(str(path), [(source, header_of(source))], config)


def open_checkpoint_bytes(
    blob: bytes | bytearray | memoryview, *, where: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Opens the complete bytes of a safetensors file.

    Tensors over ``bytes`` and other read-only memory are copies; tensors over writable memory share it.

    Args:
        blob: the file's content.
        where: what the bytes are called in errors.
        config: content of the ``config.json`` that belongs to them.

    Raises:
        CheckpointError: the bytes are no valid safetensors file.
    """
    source = MemorySource(blob, where=where)
    return Checkpoint(where, [(source, header_of(source))], config)


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
    partial = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        try:
            with partial.open("xb") as file:
                file.write(header)
                for tensor in stored:
                    file.write(_bytes_of(tensor))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
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


def _tensor_over(source: ByteSource, spec: TensorSpec, start: int, end: int) -> Tensor:
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{source.where}: tensor {shown(spec.name)}: torch has no dtype for {spec.dtype}; leave it out"
        )
    if spec.dtype == "F4" and (not spec.shape or spec.shape[-1] % 2):
        raise CheckpointError(
            f"{source.where}: tensor {shown(spec.name)}: torch packs F4 in twos along the last axis, but its shape "
            f"is {spec.shape}; leave it out"
        )
    shape = torch_shape(spec)
    if start == end:
        return torch.empty(shape, dtype=dtype)
    view = source.read(start, end)
    if len(view) != end - start:
        raise CheckpointError(f"{source.where}: tensor {shown(spec.name)}: got {len(view)} of {end - start} bytes")
    # torch warns about read-only memory and reads misaligned memory by luck.
    if view.readonly or torch.frombuffer(view, dtype=torch.uint8).data_ptr() % dtype.itemsize:
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=dtype).reshape(shape)


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", f"model{_INDEX}"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    candidates = [path for path in files if path.name.endswith(_INDEX)]
    candidates = candidates or [path for path in files if path.suffix == ".safetensors"]
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates[:3])
        raise CheckpointError(f"{folder}: {len(candidates)} checkpoints ({names}, ...); name one of the files")
    if not candidates:
        pickles = [path.name for path in files if path.suffix.lower() in _PICKLES]
        reason = f"only {pickles[0]}: {_PICKLE_REFUSAL}" if pickles else "name a folder that holds one"
        raise CheckpointError(f"{folder}: no safetensors file; {reason}")
    return candidates[0]


def _config_beside(path: Path) -> dict[str, Any] | None:
    config = path.parent / "config.json"
    return _read_json(config) if config.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {size} bytes of JSON are above the limit of {MAX_HEADER_BYTES}")
    return load_json_object(path.read_bytes(), where=str(path))


def _shards(index: Path) -> list[tuple[ByteSource, Header]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names, got {shown(weight_map)}")
    for name, file in weight_map.items():
        # Shards stand beside their index; any path could lead out of the folder.
        if not (
            isinstance(file, str)
            and file.endswith(".safetensors")
            and file.isprintable()
            and not set(file) & set("/\\:")
        ):
            raise CheckpointError(
                f"{index}: tensor {shown(name)}: {shown(file)} is not the name of a file in this folder"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: {len(names)} files are above the limit of {MAX_SHARDS}")
    headers: dict[str, tuple[ByteSource, Header]] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {shown(name)} is missing; fetch it into the same folder")
        source = open_file(index.parent / name)
        headers[name] = (source, header_of(source))
    holders = {tensor: file for file, (_, header) in headers.items() for tensor in header.tensors}
    for tensor, file in weight_map.items():
        if tensor not in headers[file][1].tensors:
            problem = f"it stands in {shown(holders[tensor])}" if tensor in holders else "no shard has it"
            raise CheckpointError(
                f"{index}: tensor {shown(tensor)} is not in {shown(file)}: {problem}; fetch the shards and index again"
            )
    return list(headers.values())


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str) -> tuple[bytes, list[Tensor]]:
    """Builds the header and the tensors in the order of their bytes."""
    aliases = _aliases(tensors, metadata, where)
    specs = [_spec_of(name, tensor) for name, tensor in tensors.items() if name not in aliases]
    # Widest dtypes first keeps every tensor aligned; names then make equal models equal headers.
    specs.sort(key=lambda spec: (-_STORAGE_ORDER[spec.dtype], spec.name.encode(errors="replace")))
    entries: dict[str, Any] = (
        {"__metadata__": dict(sorted({**metadata, **aliases}.items()))} if metadata or aliases else {}
    )
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
    return header, [tensors[spec.name] for spec in specs]


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
