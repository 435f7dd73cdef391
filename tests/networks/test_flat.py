from __future__ import annotations

import pytest
import torch

from weightspace.dtypes import DTYPES
from weightspace.errors import ArchitectureError
from weightspace.networks.flat import (
    TOKENIZED_DTYPES,
    flat_dtype,
    flatten,
    restore,
    split_off,
    unflatten,
)
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


def test_unflatten_gives_views_of_many_models() -> None:
    architecture = small()
    flat = torch.zeros(2, 5, architecture.numel)
    views = unflatten(flat, architecture)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "fc.weight": (2, 5, 3, 2),
        "fc.bias": (2, 5, 3),
        "scale": (2, 5),
    }
    views["scale"].fill_(7)
    assert torch.equal(flat[..., 9], torch.full((2, 5), 7.0))


def test_unflatten_refuses_another_length() -> None:
    with pytest.raises(ArchitectureError, match=r"expected 10 entries a model, found 9"):
        unflatten(torch.zeros(4, 9), small())


def test_restore_gives_stored_dtypes_exclusions_and_aliases() -> None:
    architecture = small("F16")
    tensors = model(architecture)
    restored = restore(flatten(tensors, architecture), architecture, split_off(tensors, architecture))
    assert restored.keys() == tensors.keys() | {"head.bias"}
    assert restored["head.bias"] is restored["fc.bias"]
    for name, tensor in tensors.items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(restored[name], tensor)


def test_restore_refuses_to_lose_an_excluded_tensor() -> None:
    architecture = small()
    with pytest.raises(ArchitectureError, match=r"steps: not among the tokens \(integers\)"):
        restore(torch.zeros(architecture.numel), architecture)


@pytest.mark.parametrize("dtype", sorted(TOKENIZED_DTYPES))
def test_every_finite_bit_pattern_survives(dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    if width == 1:
        bits = torch.arange(256).to(torch.uint8)
    elif width == 2:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    else:
        signed = torch.int32 if width == 4 else torch.int64
        info = torch.iinfo(signed)
        random = torch.randint(info.min, info.max, (10_000,), generator=torch.Generator().manual_seed(0))
        # 0.0, the smallest subnormal, -0.0 and its neighbour.
        bits = torch.cat([random, torch.tensor([0, 1, info.min, info.min + 1])]).to(signed)
    values = bits.view(DTYPES[dtype])
    values = values[values.double().isfinite()] if width > 1 else _without_nonfinite(values)
    architecture = Architecture(
        (LayerSpec("v", "vector", (TensorSpec("v", tuple(values.shape), dtype),), "vectors"),),
    )
    restored = restore(flatten({"v": values}, architecture), architecture)["v"]
    assert restored.dtype == values.dtype
    assert torch.equal(restored.view(bits.dtype), values.view(bits.dtype))


def _without_nonfinite(values: torch.Tensor) -> torch.Tensor:
    # Torch does not index eight-bit floats by a mask.
    return values.view(torch.uint8)[values.float().isfinite()].view(values.dtype)


def test_one_f64_tensor_makes_the_vector_float64() -> None:
    assert flat_dtype(small()) == torch.float32
    architecture = small("F64")
    tensors = model(architecture)
    tensors["fc.weight"] += 1e-12
    flat = flatten(tensors, architecture)
    assert flat.dtype == torch.float64
    restored = restore(flat, architecture, {"steps": torch.tensor(0)})
    assert all(torch.equal(restored[name], tensors[name]) for name in ("fc.weight", "fc.bias", "scale"))


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "C64", "F4", "F6_E2M3"])
def test_dtypes_that_a_flat_vector_cannot_hold_are_refused(dtype: str) -> None:
    architecture = Architecture((LayerSpec("v", "vector", (TensorSpec("v", (2,), dtype),), "vectors"),))
    with pytest.raises(ArchitectureError, match=f"v: {dtype} does not become tokens exactly"):
        flatten({}, architecture)


def test_flatten_reads_any_strides() -> None:
    architecture = small()
    tensors = model(architecture)
    strided = tensors | {"fc.weight": tensors["fc.weight"].t().contiguous().t(), "fc.bias": tensors["fc.bias"].flip(0)}
    strided["fc.bias"] = torch.stack([tensors["fc.bias"]] * 2, dim=1)[:, 0]
    assert not strided["fc.weight"].is_contiguous() and not strided["fc.bias"].is_contiguous()
    assert torch.equal(flatten(strided, architecture), flatten(tensors, architecture))


def test_gradients_pass_both_ways() -> None:
    architecture = small()
    tensors = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in model(architecture).items()}
    views = unflatten(flatten(tensors, architecture), architecture)
    (2 * views["fc.weight"].sum() + views["scale"]).backward()
    assert torch.equal(tensors["fc.weight"].grad, torch.full((3, 2), 2.0))
    assert tensors["scale"].grad == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, r"fc\.weight: missing; expected a tensor of shape \(3, 2\) and dtype F32"),
        ({"fc.weight": torch.zeros(2, 3)}, r"fc\.weight: expected shape \(3, 2\).*found \(2, 3\)"),
        ({"fc.weight": torch.zeros(3, 2).half()}, r"fc\.weight: expected .* dtype F32, found \(3, 2\) and F16"),
        ({"scale": torch.zeros(1).bfloat16()}, r"scale: expected shape \(\) .*found \(1,\)"),
    ],
)
def test_flatten_names_what_does_not_fit(change: dict[str, torch.Tensor | None], message: str) -> None:
    architecture = small()
    tensors = {name: tensor for name, tensor in (model(architecture) | change).items() if tensor is not None}
    with pytest.raises(ArchitectureError, match=message):
        flatten(tensors, architecture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "extra: unknown to the architecture"),
        ({"steps": None}, "steps: missing"),
        ({"head.bias": torch.zeros(3)}, r"head\.bias: tied to fc\.bias but holds other values"),
    ],
)
def test_nothing_is_left_aside_in_silence(change: dict[str, torch.Tensor | None], message: str) -> None:
    architecture = small()
    tensors = {name: tensor for name, tensor in (model(architecture) | change).items() if tensor is not None}
    with pytest.raises(ArchitectureError, match=message):
        split_off(tensors, architecture)


def test_an_alias_may_be_given_twice_with_the_same_bits() -> None:
    architecture = small()
    tensors = model(architecture)
    assert split_off(tensors | {"head.bias": tensors["fc.bias"].clone()}, architecture).keys() == {"steps"}
    zeros = {"fc.bias": torch.zeros(3), "head.bias": -torch.zeros(3)}
    with pytest.raises(ArchitectureError, match="tied"):
        split_off(tensors | zeros, architecture)
