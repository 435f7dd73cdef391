from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import ArchitectureError, TokenError
from weightspace.networks.alignment import align
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture, GroupAxis, LayerSpec, PermutationGroup, TensorSpec


def mlp(*widths: int) -> Architecture:
    layers, groups = [], []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        weight, bias = TensorSpec(f"{i}.weight", (fan_out, fan_in), "F32"), TensorSpec(f"{i}.bias", (fan_out,), "F32")
        layers.append(LayerSpec(str(i), "linear", (weight, bias), "channels"))
        if i + 2 < len(widths):
            axes = (GroupAxis(f"{i}.weight", 0), GroupAxis(f"{i}.bias", 0), GroupAxis(f"{i + 1}.weight", 1))
            groups.append(PermutationGroup(fan_out, axes))
    return Architecture(tuple(layers), tuple(groups), ordered=True)


def residual() -> Architecture:
    """Linear maps x = A i, x = x + B x, y = C x: one group that enters B on both axes."""
    shapes = {"a": (5, 3), "b": (5, 5), "c": (2, 5)}
    layers = tuple(LayerSpec(n, "linear", (TensorSpec(n, s, "F32"),), "channels") for n, s in shapes.items())
    axes = (GroupAxis("a", 0), GroupAxis("b", 0), GroupAxis("b", 1), GroupAxis("c", 1))
    return Architecture(layers, (PermutationGroup(5, axes),))


def flattening() -> Architecture:
    """Conv -> flatten (2 x 2) -> linear without biases."""
    tensors = {"a": (4, 1, 3, 3), "b": (6, 16)}
    layers = tuple(LayerSpec(n, "other", (TensorSpec(n, s, "F32"),), "channels") for n, s in tensors.items())
    return Architecture(layers, (PermutationGroup(4, (GroupAxis("a", 0), GroupAxis("b", 1, 4))),))


ARCHITECTURES = {
    "mlp": mlp(4, 6, 5, 3),
    "deep": mlp(3, 8, 8, 8, 8, 2),
    "residual": residual(),
    "flattening": flattening(),
}


def drawn(architecture: Architecture, models: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the same models with their channels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(models, architecture.numel, generator=generator)
    return flat, permute(flat, random_permutations(architecture, models, generator), architecture)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_permuted_copy_aligns_back_to_the_original(name: str, seed: int) -> None:
    architecture = ARCHITECTURES[name]
    flat, shuffled = drawn(architecture, 1, seed)
    aligned, permutations = align(shuffled, flat[0], architecture)
    assert torch.equal(aligned, flat)
    assert torch.equal(permute(shuffled, permutations, architecture), aligned)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alignment_does_not_depend_on_the_order_a_model_comes_in(name: str) -> None:
    architecture = ARCHITECTURES[name]
    flat, shuffled = drawn(architecture, 6, 3)
    reference = drawn(architecture, 1, 9)[0][0]
    assert torch.equal(align(flat, reference, architecture)[0], align(shuffled, reference, architecture)[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alignment_brings_models_nearer_and_no_single_swap_is_better(name: str) -> None:
    architecture = ARCHITECTURES[name]
    flat, _ = drawn(architecture, 8, 4)
    reference = drawn(architecture, 1, 10)[0][0]
    aligned, permutations = align(flat, reference, architecture)
    assert torch.equal(permute(flat, permutations, architecture), aligned)
    assert ((aligned - reference).norm(dim=1)).mean() < ((flat - reference).norm(dim=1)).mean()
    if name == "residual":
        return  # its assignment problem is quadratic: a swap may still help
    identity = [torch.arange(group.size).repeat(8, 1) for group in architecture.groups]
    for number, group in enumerate(architecture.groups):
        for other in range(1, group.size):
            swapped = [p.clone() for p in identity]
            swapped[number][:, [0, other]] = swapped[number][:, [other, 0]]
            rival = permute(aligned, tuple(swapped), architecture)
            assert ((rival - reference).norm(dim=1) > (aligned - reference).norm(dim=1) - 1e-4).all()


def test_models_are_aligned_independently_of_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["deep"]
    flat, _ = drawn(architecture, 7, 5)
    reference = drawn(architecture, 1, 11)[0][0]
    together, _ = align(flat, reference, architecture)
    alone = torch.cat([align(row.unsqueeze(0), reference, architecture)[0] for row in flat])
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
    monkeypatch.setattr("weightspace.networks.alignment._STEP_ENTRIES", architecture.numel * 3)
    assert torch.equal(align(flat, reference, architecture)[0], together)


def test_dead_channels_do_not_swap_for_ever() -> None:
    architecture = ARCHITECTURES["mlp"]
    flat = torch.zeros(2, architecture.numel)
    aligned, permutations = align(flat, flat[0], architecture, sweeps=3)
    assert torch.equal(aligned, flat)
    assert all(torch.equal(p.sort(dim=1).values, torch.arange(p.shape[1]).repeat(2, 1)) for p in permutations)


def test_nothing_to_do() -> None:
    bare = dataclasses.replace(ARCHITECTURES["mlp"], groups=())
    flat, _ = drawn(bare, 2, 0)
    assert torch.equal(align(flat, flat[1], bare)[0], flat)
    none = flat[:0]
    assert align(none, flat[0], ARCHITECTURES["mlp"])[0].shape == none.shape


def test_refusals_name_the_thing() -> None:
    architecture = ARCHITECTURES["mlp"]
    flat, _ = drawn(architecture, 2, 0)
    with pytest.raises(ArchitectureError, match="reference"):
        align(flat, flat[0, :-1], architecture)
    with pytest.raises(ArchitectureError, match=str(architecture.numel)):
        align(flat[:, :-1], flat[0], architecture)
    flat[1, 3] = float("nan")
    with pytest.raises(TokenError, match="flat weights: 1 entries"):
        align(flat, torch.zeros(architecture.numel), architecture)
