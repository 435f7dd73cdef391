"""The dtypes of safetensors files and their torch dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightspace.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Stored dtypes that torch has, in the order in which safetensors sorts tensors of a file (last first).

``F4`` packs two entries into one element of ``torch.float4_e2m1fn_x2``: a stored shape ``(..., 2k)`` is ``(..., k)`` in
torch. The two six-bit floats of the format are valid in a header but have no torch dtype.
"""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the safetensors name of a torch dtype, e.g. ``"BF16"``.

    Raises:
        CheckpointError: safetensors cannot store it.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"{dtype} has no safetensors name; convert the tensor to one of {', '.join(DTYPES)}")
    return _NAMES[dtype]
