"""Many stored models of one header as a batch of flat weight vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.dtypes import DTYPES
from weightspace.errors import ArchitectureError, CheckpointError
from weightspace.io.header import Header
from weightspace.networks.flat import flat_dtype, unflatten
from weightspace.schema import Architecture


def flat_from_bytes(
    blobs: Sequence[bytes | memoryview], header: Header, architecture: Architecture
) -> Float[Tensor, "models params"]:
    """Reads many models that are stored with the same safetensors header, without a loop over tensors and models.

    Args:
        blobs: complete safetensors files as bytes.
        header: the header that all of them start with.
        architecture: inferred from that header.

    Raises:
        CheckpointError: a blob has another header or length; it is named by its place in ``blobs``.
        ArchitectureError: the header and the architecture do not fit.
    """
    end = max((stored.end for stored in header.tensors.values()), default=header.size)
    start_bytes = bytes(blobs[0][: header.size]) if blobs else b""
    for number, blob in enumerate(blobs):
        if len(blob) != end:
            raise CheckpointError(
                f"blob {number}: expected {end} bytes, found {len(blob)}; group blobs by equal headers"
            )
        if blob[: header.size] != start_bytes:
            raise CheckpointError(f"blob {number}: another header than blob 0; group blobs by equal headers")
    raw = torch.frombuffer(bytearray().join(blobs), dtype=torch.uint8).view(len(blobs), end) if blobs else None
    flat = torch.empty(len(blobs), architecture.numel, dtype=flat_dtype(architecture))
    for spec, target in zip(architecture.tensors, unflatten(flat, architecture).values(), strict=True):
        stored = header.tensors.get(spec.name)
        if stored is None or stored.spec != spec:
            found = "nothing" if stored is None else f"{stored.spec.shape} and {stored.spec.dtype}"
            raise ArchitectureError(
                f"{spec.name}: expected shape {spec.shape} and dtype {spec.dtype}, found {found} in the header; "
                "infer the architecture from this header"
            )
        if raw is not None:
            # The clone aligns the bytes, which a safetensors file need not.
            column = raw[:, stored.start : stored.end].clone(memory_format=torch.contiguous_format)
            target.copy_(column.view(DTYPES[spec.dtype]).view(target.shape))
    return flat
