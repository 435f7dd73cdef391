from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import ArchitectureError
from weightspace.networks.permutation import (
    compose,
    identity_permutations,
    permute,
    random_permutations,
)
from weightspace.schema import Architecture, GroupAxis, LayerSpec, PermutationGroup, TensorSpec


def layer(name: str, *shape: int) -> LayerSpec:
    tensors = (TensorSpec(f"{name}.weight", shape, "F32"), TensorSpec(f"{name}.bias", shape[:1], "F32"))
    return LayerSpec(name, "conv" if len(shape) > 2 else "linear", tensors, "channels")


def cnn(first: int = 3, second: int = 4, side: int = 2) -> Architecture:
    """Conv -> conv -> flatten -> linear, written by hand."""
    return Architecture(
        layers=(layer("a", first, 2, 3, 3), layer("b", second, first, 3, 3), layer("c", 5, second * side * side)),
        groups=(
            PermutationGroup(first, (GroupAxis("a.weight", 0), GroupAxis("a.bias", 0), GroupAxis("b.weight", 1))),
            PermutationGroup(
                second, (GroupAxis("b.weight", 0), GroupAxis("b.bias", 0), GroupAxis("c.weight", 1, side * side))
            ),
        ),
        ordered=True,
    )


def forward(flat: torch.Tensor, architecture: Architecture, images: torch.Tensor) -> torch.Tensor:
    pieces = flat.split([t.numel for t in architecture.tensors])
    w = {t.name: p.view(t.shape) for t, p in zip(architecture.tensors, pieces, strict=True)}
    x = torch.relu(torch.nn.functional.conv2d(images, w["a.weight"], w["a.bias"], padding=1))
    x = torch.relu(torch.nn.functional.conv2d(x, w["b.weight"], w["b.bias"], padding=1))
    return torch.nn.functional.linear(x.flatten(1), w["c.weight"], w["c.bias"])


def weights(architecture: Architecture, models: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(models, architecture.numel, generator=generator, dtype=torch.float64)


def test_permute_keeps_the_function_and_moves_weights() -> None:
    architecture = cnn()
    flat = weights(architecture, 4)
    drawn = random_permutations(architecture, 4, torch.Generator().manual_seed(1))
    moved = permute(flat, drawn, architecture)
    images = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for before, after in zip(flat, moved, strict=True):
        assert not torch.equal(before, after)
        torch.testing.assert_close(forward(after, architecture, images), forward(before, architecture, images))


def test_permute_gathers_like_index_select_model_by_model() -> None:
    architecture = cnn()
    flat = weights(architecture, 3)
    first, second = random_permutations(architecture, 3, torch.Generator().manual_seed(1))
    moved = permute(flat, (first, second), architecture)
    for m in range(3):
        weight = flat[m].split([t.numel for t in architecture.tensors])[2].view(4, 3, 3, 3)
        expected = weight[second[m]][:, first[m]]
        got = moved[m].split([t.numel for t in architecture.tensors])[2].view(4, 3, 3, 3)
        assert torch.equal(got, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31))
def test_inverse_and_composition(first: int, second: int, side: int, models: int, seed: int) -> None:
    architecture = cnn(first, second, side)
    flat = weights(architecture, models, seed)
    generator = torch.Generator().manual_seed(seed)
    p, q = (random_permutations(architecture, models, generator) for _ in range(2))
    moved = permute(flat, p, architecture)
    assert torch.equal(permute(moved, tuple(order.argsort(dim=1) for order in p), architecture), flat)
    assert torch.equal(permute(flat, compose(p, q), architecture), permute(moved, q, architecture))
    assert torch.equal(permute(flat, identity_permutations(architecture, models), architecture), flat)


def test_one_group_on_both_axes_of_a_tensor() -> None:
    spec = LayerSpec("r", "linear", (TensorSpec("r.weight", (3, 3), "F32"),), "channels")
    group = PermutationGroup(3, (GroupAxis("r.weight", 0), GroupAxis("r.weight", 1)))
    architecture = Architecture((spec,), (group,))
    p = torch.tensor([[2, 0, 1]])
    moved = permute(torch.arange(9.0).unsqueeze(0), (p,), architecture).view(3, 3)
    assert torch.equal(moved, torch.arange(9.0).view(3, 3)[p[0]][:, p[0]])


def test_steps_over_models_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = cnn()
    flat = weights(architecture, 7)
    drawn = random_permutations(architecture, 7, torch.Generator().manual_seed(1))
    whole = permute(flat, drawn, architecture)
    monkeypatch.setattr("weightspace.networks.permutation._STEP_ENTRIES", architecture.numel * 2)
    assert torch.equal(permute(flat, drawn, architecture), whole)


@pytest.mark.parametrize("step_entries", [None, 1])
def test_several_views_in_one_call_are_as_many_calls(step_entries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if step_entries is not None:
        monkeypatch.setattr("weightspace.networks.permutation._STEP_ENTRIES", step_entries)
    architecture = cnn()
    flat = weights(architecture, 3)
    drawn = random_permutations(architecture, 6, torch.Generator().manual_seed(1))
    apart = [permute(flat, tuple(p[i : i + 3] for p in drawn), architecture) for i in (0, 3)]
    assert torch.equal(permute(flat, drawn, architecture), torch.cat(apart))


def test_no_groups_and_no_models() -> None:
    bare = dataclasses.replace(cnn(), groups=())
    flat = weights(bare, 2)
    assert torch.equal(permute(flat, random_permutations(bare, 2, torch.Generator()), bare), flat)
    empty = weights(cnn(), 0)
    assert permute(empty, identity_permutations(cnn(), 0), cnn()).shape == empty.shape


def test_draws_differ_between_models_and_are_reproducible() -> None:
    architecture = cnn(first=8)
    one, again = (random_permutations(architecture, 20, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert len({tuple(row.tolist()) for row in one[0]}) > 10


def test_refusals_name_the_thing() -> None:
    architecture = cnn()
    with pytest.raises(ArchitectureError, match=str(architecture.numel)):
        permute(torch.zeros(2, 7), identity_permutations(architecture, 2), architecture)
    with pytest.raises(ArchitectureError, match=r"\(2, 4\).*\(2, 3\)"):
        permute(weights(architecture, 2), identity_permutations(architecture, 2)[::-1], architecture)
    wrong = dataclasses.replace(architecture, groups=(PermutationGroup(3, (GroupAxis("b.weight", 0),)),))
    with pytest.raises(ArchitectureError, match=r"b\.weight"):
        permute(weights(wrong, 1), identity_permutations(wrong, 1), wrong)
    twice = dataclasses.replace(architecture, groups=architecture.groups[:1] * 2)
    with pytest.raises(ArchitectureError, match=r"a\.weight.*twice"):
        permute(weights(twice, 1), identity_permutations(twice, 1), twice)
