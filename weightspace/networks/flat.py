"""Tensors by name and the flat weight vector of one architecture, both ways and for many models at once.

The flat vector holds every tokenized tensor in the order of ``Architecture.tensors``, each in row-major order. It is
float64 where any of them is stored as F64 and float32 otherwise: both hold every narrower float exactly, so the way
back to the stored dtypes gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from weightspace.dtypes import DTYPES, dtype_name
from weightspace.errors import ArchitectureError
from weightspace.schema import Architecture, TensorSpec

TOKENIZED_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.is_floating_point) - {"F4"}
"""Stored dtypes that a flat vector holds exactly. F4 is none: torch neither reads nor converts its packed pairs."""


def flat_dtype(architecture: Architecture) -> torch.dtype:
    """Returns the narrowest of float32 and float64 that holds every tokenized tensor exactly.

    Raises:
        ArchitectureError: a tensor of a layer is none of ``TOKENIZED_DTYPES``.
    """
    for spec in architecture.tensors:
        if spec.dtype not in TOKENIZED_DTYPES:
            raise ArchitectureError(f"{spec.name}: {spec.dtype} does not become tokens exactly; exclude the tensor")
    return torch.float64 if any(spec.dtype == "F64" for spec in architecture.tensors) else torch.float32


def expect(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    """Returns the tensor that ``spec`` describes.

    Raises:
        ArchitectureError: it is missing, or has another shape or dtype.
    """
    tensor = tensors.get(spec.name)
    if tensor is None:
        raise ArchitectureError(
            f"{spec.name}: missing; expected a tensor of shape {spec.shape} and dtype {spec.dtype}; "
            "infer the architecture from the same checkpoint"
        )
    if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
        raise ArchitectureError(
            f"{spec.name}: expected shape {spec.shape} and dtype {spec.dtype}, "
            f"found {tuple(tensor.shape)} and {dtype_name(tensor.dtype)}; "
            "infer the architecture from the same checkpoint"
        )
    return tensor


def split_off(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Returns the excluded tensors, after a check that nothing else stays outside of the flat vector.

    Raises:
        ArchitectureError: an excluded tensor is missing, a tensor is unknown to the architecture, or an alias holds
            other values than the tensor that it is tied to.
    """
    excluded = {exclusion.tensor for exclusion in architecture.exclusions}
    for name in sorted(excluded - tensors.keys()):
        raise ArchitectureError(f"{name}: missing; the architecture carries it unchanged; add it to the tensors")
    known = excluded | {spec.name for spec in architecture.tensors} | {alias for alias, _ in architecture.aliases}
    for name in sorted(tensors.keys() - known):
        raise ArchitectureError(f"{name}: unknown to the architecture; infer the architecture from the same checkpoint")
    for alias, kept in architecture.aliases:
        if alias in tensors and kept in tensors and not _same(tensors[alias], tensors[kept]):
            raise ArchitectureError(f"{alias}: tied to {kept} but holds other values; infer the architecture again")
    return {name: tensor for name, tensor in tensors.items() if name in excluded}


def flatten(tensors: Mapping[str, Tensor], architecture: Architecture) -> Float[Tensor, " params"]:
    """Lays the tokenized tensors of one model end to end.

    Args:
        tensors: the model by name, of any strides; excluded tensors and aliases may be there and are left out.
        architecture: says which tensors, of which shapes and dtypes.

    Raises:
        ArchitectureError: a tensor is missing or has another shape or dtype.
    """
    dtype = flat_dtype(architecture)
    pieces = [expect(tensors, spec).reshape(-1).to(dtype) for spec in architecture.tensors]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)


def unflatten(flat: Shaped[Tensor, "*models params"], architecture: Architecture) -> dict[str, Tensor]:
    """Cuts flat weight vectors into tensors by name: views of shape ``(*models, *shape)``, in the dtype of ``flat``.

    Raises:
        ArchitectureError: the last axis has another length than the architecture.
    """
    if flat.shape[-1] != architecture.numel:
        raise ArchitectureError(
            f"flat weights: expected {architecture.numel} entries a model, found {flat.shape[-1]}; "
            "use the architecture that they were flattened with"
        )
    specs = architecture.tensors
    # One split and not a slice each: its gradient is one concatenation.
    pieces = torch.split(flat, [spec.numel for spec in specs], dim=-1)
    lead = flat.shape[:-1]
    return {spec.name: piece.view((*lead, *spec.shape)) for spec, piece in zip(specs, pieces, strict=True)}


def restore(
    flat: Float[Tensor, " params"], architecture: Architecture, passthrough: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Builds the tensors of one model as they were stored: dtypes, excluded tensors and aliases included.

    Args:
        flat: weight vector of the model.
        architecture: its specs.
        passthrough: excluded tensors by name; all that the architecture excludes.

    Returns:
        Tensors by name. They share memory with ``flat`` where the dtype is the same; an alias is the same object as the
        tensor it is tied to.

    Raises:
        ArchitectureError: ``flat`` has the wrong length, or an excluded tensor is not in ``passthrough``.
    """
    passthrough = passthrough or {}
    for exclusion in architecture.exclusions:
        if exclusion.tensor not in passthrough:
            raise ArchitectureError(
                f"{exclusion.tensor}: not among the tokens ({exclusion.reason}) and not in passthrough; "
                "pass the excluded tensors of the model"
            )
    views = unflatten(flat, architecture)
    tensors = {spec.name: views[spec.name].to(DTYPES[spec.dtype]) for spec in architecture.tensors}
    tensors.update(passthrough)
    tensors.update({alias: tensors[kept] for alias, kept in architecture.aliases})
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    # Bits, so that -0.0 differs from 0.0 and a NaN equals itself.
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))
