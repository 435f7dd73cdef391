"""The header of a safetensors file, parsed as untrusted input.

Layout of the format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length n, n bytes of JSON
``{"__metadata__": {str: str}, name: {"dtype": ..., "shape": [...], "data_offsets": [start, stop]}, ...}``, then the
data, which the offsets (counted from its first byte) cover without holes or overlaps.

Everything the safetensors library refuses is refused here too. Beyond it: duplicate names, unprintable names, more than
`MAX_TENSORS` tensors, more than `MAX_AXES` axes and headers above `MAX_HEADER_BYTES`, before any of it is believed.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightspace.dtypes import DTYPES
from weightspace.errors import CheckpointError
from weightspace.io.reader import ByteSource, Piece, gather, open_file
from weightspace.schema import TensorSpec

MAX_HEADER_BYTES = 64 * 2**20
"""Longest JSON that is parsed: what `MAX_TENSORS` tensors with names of usual length take."""

MAX_TENSORS = 400_000
"""Most tensors of one checkpoint; the largest mixtures of experts have above 200,000."""

MAX_JSON_VALUES = 10 * MAX_TENSORS
"""Most values in a JSON text, which bounds the memory that it takes once it is parsed."""

MAX_AXES = 64
"""Most axes of one tensor; torch itself goes no further in many operations."""

_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_PREFIX = 8
_LARGEST = 2**63 - 1
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_IMPOSTORS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes pickles; pickles are never executed here"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself; run `git lfs pull`"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        spec: name, shape and dtype as the header states them.
        start: first byte, counted from the start of the file.
        end: byte after the last.
    """

    spec: TensorSpec
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A validated header.

    Attributes:
        tensors: by name, in the order of their bytes in the file.
        metadata: the free text beside the tensors.
        size: bytes before the data, the 8 of the length included.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size: int


def torch_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Returns the shape of the torch tensor that holds ``spec``: half the last axis for ``F4``, else ``spec.shape``."""
    return (*spec.shape[:-1], spec.shape[-1] // 2) if spec.dtype == "F4" else spec.shape


def byte_count(spec: TensorSpec, where: str) -> int:
    """Returns the bytes that ``spec`` takes in a file.

    Raises:
        CheckpointError: a 4- or 6-bit tensor does not end at a byte.
    """
    count, rest = divmod(spec.numel * _BITS[spec.dtype], 8)
    if rest:
        raise CheckpointError(
            f"{where}: {shown(spec.name)} of shape {spec.shape} and dtype {spec.dtype} ends inside a byte"
        )
    return count


def header_size(first: bytes | bytearray | memoryview, *, file_size: int, where: str) -> int:
    """Reads how many bytes stand before the data, the 8 of the length included.

    Args:
        first: the file's first 8 bytes or more; with some hundred, errors can say what the file is instead.
        file_size: bytes of the whole file.
        where: the file's name in errors.

    Raises:
        CheckpointError: the length is impossible.
    """
    if file_size < _PREFIX or len(first) < _PREFIX:
        raise CheckpointError(
            f"{where}: {file_size} bytes are too few for a safetensors file{_resemblance(first)}; "
            "fetch or export it again"
        )
    length = int.from_bytes(first[:_PREFIX], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: header length {length} is above the limit of {MAX_HEADER_BYTES} bytes{_resemblance(first)}; "
            "this is no safetensors file or a damaged one"
        )
    if _PREFIX + length > file_size:
        raise CheckpointError(
            f"{where}: truncated: the header needs {_PREFIX + length} bytes, the file has {file_size}"
            f"{_resemblance(first)}; fetch or export it again"
        )
    return _PREFIX + length


def parse_header(raw: bytes | bytearray | memoryview, *, file_size: int, where: str) -> Header:
    """Parses and validates a header; nothing in it is trusted.

    Args:
        raw: the first ``header_size(...)`` bytes of the file, or more.
        file_size: bytes of the whole file; the data must fill it exactly.
        where: the file's name in errors.

    Raises:
        CheckpointError: whatever is wrong, in one line.
    """
    size = header_size(raw[:512], file_size=file_size, where=where)
    if len(raw) < size:
        raise CheckpointError(f"{where}: {len(raw)} of {size} header bytes were read; fetch the file again")
    try:
        content = load_json_object(raw[_PREFIX:size], where=f"{where}: header")
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_resemblance(raw[:512])}") from error
    metadata = _metadata(content.pop("__metadata__", None), where)
    if len(content) > MAX_TENSORS:
        raise CheckpointError(
            f"{where}: {len(content)} tensors are above the limit of {MAX_TENSORS}; read it in several files"
        )
    tensors = [_stored_tensor(name, entry, size, where) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_coverage(tensors, size, file_size, where)
    return Header({tensor.spec.name: tensor for tensor in tensors}, metadata, size)


def header_of(source: ByteSource) -> Header:
    """Reads the header of a file, and nothing behind it but what one request brings along.

    Raises:
        CheckpointError: the file is no valid safetensors file.
    """
    return headers_of([source])[0]


def headers_of(sources: Sequence[ByteSource]) -> list[Header]:
    """Reads the headers of many files at once; see `header_of`."""
    first = gather([Piece(source, 0, min(source.size, source.first_read)) for source in sources])
    sizes = [
        header_size(raw, file_size=source.size, where=source.where) for source, raw in zip(sources, first, strict=True)
    ]
    longer = [place for place, size in enumerate(sizes) if size > len(first[place])]
    rest = gather([Piece(sources[place], len(first[place]), sizes[place]) for place in longer])
    raw = {place: b"".join([first[place], more]) for place, more in zip(longer, rest, strict=True)}
    return [
        parse_header(raw.get(place, first[place]), file_size=source.size, where=source.where)
        for place, source in enumerate(sources)
    ]


def read_header(path: str | Path) -> Header:
    """Reads the header of a local safetensors file.

    Raises:
        CheckpointError: the file is missing, unreadable or no valid safetensors file.
    """
    return header_of(open_file(Path(path)))


def load_json_object(raw: bytes | bytearray | memoryview, *, where: str) -> dict[str, Any]:
    """Parses one JSON object in UTF-8, refusing duplicate keys.

    Raises:
        CheckpointError: it is too long, no JSON, no object, nested too deeply or says a key twice.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: {len(raw)} bytes of JSON are above the limit of {MAX_HEADER_BYTES}")
    # An upper bound: marks in texts count too.
    if (values := sum(bytes(raw).count(mark) for mark in b",[{")) > MAX_JSON_VALUES:
        raise CheckpointError(f"{where}: {values} values of JSON are above the limit of {MAX_JSON_VALUES}")
    try:
        content = json.loads(str(raw, "utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def shown(value: object) -> str:
    """Returns ``repr(value)``, cut in depth and length to what a one-line error can carry."""
    return _SHORT.repr(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {shown(key)} stands twice")
        content[key] = value
    return content


def _resemblance(first: bytes | bytearray | memoryview) -> str:
    # Only used once the file failed as safetensors: any of these bytes may also begin an honest header length.
    head = bytes(first)
    text = head.lstrip().lower()
    for signature, what in _IMPOSTORS:
        if head.startswith(signature):
            return f"; it looks like {what}"
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        return "; it looks like a pickle; pickles are never executed here"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "; it looks like an HTML page, not a download"
    if text.startswith((b"{", b"[")):
        return "; it looks like plain JSON"
    return ""


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: __metadata__ must map text to text, got {shown(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{where}: __metadata__ {shown(key)} must be text, got {shown(text)}")
        # JSON can escape half of a surrogate pair; no later file, parquet column or terminal could take it.
        if not (_encodable(key) and _encodable(text)):
            raise CheckpointError(f"{where}: __metadata__ {shown(key)} is not valid Unicode")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stored_tensor(name: str, entry: Any, data_start: int, where: str) -> StoredTensor:
    if not name.isprintable():
        raise CheckpointError(f"{where}: tensor name {shown(name)} has unprintable characters")
    thing = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{thing}: expected dtype, shape and data_offsets, got {shown(entry)}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise CheckpointError(f"{thing}: {key} is missing")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{thing}: unknown dtype {shown(dtype)}; known are {', '.join(_BITS)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{thing}: shape must be a list of sizes, got {shown(shape)}")
    if len(shape) > MAX_AXES:
        raise CheckpointError(f"{thing}: {len(shape)} axes are above the limit of {MAX_AXES}")
    # An empty tensor has strides too, so its axes may not overflow either.
    if math.prod(size or 1 for size in shape) * _BITS[dtype] > _LARGEST:
        raise CheckpointError(f"{thing}: shape {shown(shape)} overflows 64 bits")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{thing}: data_offsets must be [start, stop], got {shown(offsets)}")
    spec = TensorSpec(name, tuple(shape), dtype)
    start, stop = offsets
    if stop - start != (expected := byte_count(spec, where)):
        raise CheckpointError(
            f"{thing}: {dtype} of shape {spec.shape} takes {expected} bytes, data_offsets span {stop - start}"
        )
    return StoredTensor(spec, data_start + start, data_start + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST for size in value)


def _check_coverage(tensors: list[StoredTensor], data_start: int, file_size: int, where: str) -> None:
    reached = data_start
    for tensor in tensors:
        if tensor.start != reached:
            problem = "overlaps the tensor before it" if tensor.start < reached else "leaves a hole before it"
            raise CheckpointError(f"{where}: tensor {shown(tensor.spec.name)}: data_offsets: {problem}")
        reached = tensor.end
    if reached > file_size:
        raise CheckpointError(
            f"{where}: truncated: the tensors need {reached} bytes, the file has {file_size}; fetch or export it again"
        )
    if reached < file_size:
        raise CheckpointError(
            f"{where}: {file_size - reached} bytes behind the last tensor belong to none; export it again"
        )
