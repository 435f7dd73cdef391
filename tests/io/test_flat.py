from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightspace.dtypes import DTYPES
from weightspace.errors import ArchitectureError, CheckpointError
from weightspace.io.flat import flat_from_bytes
from weightspace.io.header import Header, parse_header
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.flat import flat_dtype, flatten
from weightspace.schema import Architecture, Exclusion, LayerSpec, TensorSpec


def small(dtype: str = "F32") -> Architecture:
    linear = (TensorSpec("fc.weight", (3, 2), dtype), TensorSpec("fc.bias", (3,), "F32"))
    return Architecture(
        layers=(
            LayerSpec("fc", "linear", linear, "channels"),
            LayerSpec("scale", "vector", (TensorSpec("scale", (), "BF16"),), "vectors"),
        ),
        exclusions=(Exclusion("steps", "integers"),),
        aliases=(("head.bias", "fc.bias"),),
    )


def model(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {s.name: torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype]) for s in architecture.tensors}
    return tensors | {exclusion.tensor: torch.tensor(seed) for exclusion in architecture.exclusions}


def header_of(blob: bytes) -> Header:
    return parse_header(blob, file_size=len(blob), where="blob")


@given(models=st.integers(1, 5), dtype=st.sampled_from(["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"]))
def test_blobs_of_equal_headers_are_read_at_once(models: int, dtype: str) -> None:
    architecture = small(dtype)
    stored = [model(architecture, seed) for seed in range(models)]
    blobs = [checkpoint_bytes(tensors) for tensors in stored]
    flat = flat_from_bytes(blobs, header_of(blobs[0]), architecture)
    assert flat.dtype == flat_dtype(architecture)
    assert torch.equal(flat, torch.stack([flatten(tensors, architecture) for tensors in stored]))


def test_no_blobs_give_no_rows() -> None:
    architecture = small()
    blob = checkpoint_bytes(model(architecture))
    assert flat_from_bytes([], header_of(blob), architecture).shape == (0, architecture.numel)


def test_blobs_that_differ_are_named() -> None:
    architecture = small()
    blob = checkpoint_bytes(model(architecture))
    header = header_of(blob)
    with pytest.raises(CheckpointError, match=rf"blob 1: expected {len(blob)} bytes, found {len(blob) - 1}"):
        flat_from_bytes([blob, blob[:-1]], header, architecture)
    renamed = blob.replace(b"fc.bias", b"fc.bios")
    with pytest.raises(CheckpointError, match="blob 1: another header than blob 0"):
        flat_from_bytes([blob, renamed], header, architecture)


def test_a_header_that_does_not_fit_the_architecture_is_named() -> None:
    architecture = small()
    blob = checkpoint_bytes(model(architecture))
    with pytest.raises(
        ArchitectureError, match=r"fc\.weight: expected shape \(3, 2\) and dtype F16, found \(3, 2\) and F32"
    ):
        flat_from_bytes([blob], header_of(blob), small("F16"))
    longer = dataclasses.replace(
        architecture,
        layers=(*architecture.layers, LayerSpec("new", "vector", (TensorSpec("new", (1,), "F32"),), "vectors")),
    )
    with pytest.raises(ArchitectureError, match=r"new: expected .* found nothing"):
        flat_from_bytes([blob], header_of(blob), longer)
