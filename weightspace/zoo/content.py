"""What weights hold: whether all are finite, and a digest that is equal for equal weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from weightspace.dtypes import DTYPES
from weightspace.errors import ZooError
from weightspace.io.header import Header, StoredTensor, shown

# The 4- and 6-bit floats have neither NaN nor infinity.
_FLOATS = ("F8", "F16", "BF16", "F32", "F64", "C64")


def check_finite(blob: bytes | bytearray, header: Header) -> None:
    """Refuses NaN and infinite weights.

    Args:
        blob: the complete bytes of a safetensors file.
        header: its header.

    Raises:
        ZooError: there are some.
    """
    # Tensors of one dtype lie side by side, so that thousands of small ones are looked at together.
    for dtype, members in groupby(header.tensors.values(), key=lambda stored: stored.spec.dtype):
        if dtype.startswith(_FLOATS) and dtype in DTYPES:
            run = list(members)
            if not all(_finite(values).all() for values in _values(blob, run[0].start, run[-1].end, dtype)):
                raise ZooError(_problem(blob, run))


def content_digest(blob: bytes | bytearray, header: Header) -> str:
    """Returns 64 hex digits that are equal for the same names, dtypes, shapes and bytes of tensors.

    How the tensors lie in the file, and the free text of its header, make no difference.
    """
    view = memoryview(blob)
    digest = hashlib.sha256()
    for name in sorted(header.tensors):
        stored = header.tensors[name]
        digest.update(f"{name}\n{stored.spec.dtype} {stored.spec.shape}\n".encode())
        digest.update(view[stored.start : stored.end])
    return digest.hexdigest()


def _problem(blob: bytes | bytearray, run: list[StoredTensor]) -> str:
    for stored in run:
        spec = stored.spec
        count = sum(int((~_finite(part)).sum()) for part in _values(blob, stored.start, stored.end, spec.dtype))
        if count:
            return f"tensor {shown(spec.name)} has {count} NaN or infinite values of {spec.numel}"
    raise AssertionError("a run that is not finite has a tensor that is not")


def _values(blob: bytes | bytearray, start: int, stop: int, dtype: str) -> Iterator[Tensor]:
    """Yields the entries of a stretch in pieces, copied so that they are aligned and the memory is writable."""
    step = 2**22
    for first in range(start, stop, step):
        yield torch.frombuffer(bytearray(memoryview(blob)[first : min(first + step, stop)]), dtype=DTYPES[dtype])


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(values.float() if values.dtype.itemsize == 1 else values)
