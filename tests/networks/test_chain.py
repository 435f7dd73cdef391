from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightspace.networks.chain import find_chains
from weightspace.networks.layers import group_layers
from weightspace.networks.tracing import verify_groups
from weightspace.schema import LayerSpec, PermutationGroup, TensorSpec


def layers_of(source: nn.Module | dict[str, tuple[int, ...]]) -> tuple[LayerSpec, ...]:
    """Layers as a header gives them: alphabetical names, floats only."""
    if isinstance(source, nn.Module):
        source = {n: tuple(t.shape) for n, t in source.state_dict().items() if t.is_floating_point()}
    return group_layers(TensorSpec(name, source[name], "F32") for name in sorted(source))


def dense(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {
        **{f"{name}.weight": shape for name, shape in named.items()},
        **{f"{name}.bias": shape[:1] for name, shape in named.items()},
    }


def names(layers: tuple[LayerSpec, ...] | None) -> list[str] | None:
    return None if layers is None else [layer.name for layer in layers]


def axes_of(groups: tuple[PermutationGroup, ...]) -> list[set[tuple[str, int, int]]]:
    return [{(a.tensor, a.axis, a.block) for a in group.axes} for group in groups]


def sequential(**parts: nn.Module) -> nn.Sequential:
    module = nn.Sequential()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


MODULES = {
    "alphabetical order is not forward order": (
        sequential(
            conv1=nn.Conv2d(1, 5, 3),
            conv2=nn.Conv2d(5, 5, 3),
            flat=nn.Flatten(),
            fc1=nn.Linear(80, 6),
            fc2=nn.Linear(6, 6),
            fc10=nn.Linear(6, 3),
        ),
        ["conv1", "conv2", "fc1", "fc2", "fc10"],
    ),
    "ten comes after two": (
        nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(4, 4), nn.ReLU()))),
        ["0", "2", "4", "6", "8", "10"],
    ),
    "classifier before features": (
        sequential(
            features=nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3)),
            flat=nn.Flatten(),
            classifier=nn.Sequential(nn.Linear(7 * 16, 9), nn.ReLU(), nn.Linear(9, 3)),
        ),
        ["features.0", "features.1", "features.3", "classifier.0", "classifier.2"],
    ),
    "norms by number": (
        sequential(
            conv1=nn.Conv2d(1, 6, 3, bias=False),
            bn1=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(6, 6, 3, bias=False),
            bn2=nn.BatchNorm2d(6),
            flat=nn.Flatten(),
            fc=nn.Linear(96, 3),
        ),
        ["conv1", "bn1", "conv2", "bn2", "fc"],
    ),
    "norms before layers": (
        sequential(
            body=nn.Sequential(
                nn.BatchNorm2d(1), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
            ),
            flat=nn.Flatten(),
            head=nn.Linear(96, 6),
        ),
        ["body.0", "body.1", "body.2", "body.3", "body.4", "head"],
    ),
    "depthwise in between": (
        sequential(
            c1=nn.Conv2d(1, 8, 3), c2=nn.Conv2d(8, 8, 3, groups=8), c3=nn.Conv2d(8, 5, 1), c4=nn.Conv2d(5, 2, 1)
        ),
        ["c1", "c2", "c3", "c4"],
    ),
    "layer norms of an MLP": (
        sequential(flat=nn.Flatten(), l1=nn.Linear(64, 6), ln1=nn.LayerNorm(6), l2=nn.Linear(6, 6), l3=nn.Linear(6, 2)),
        ["l1", "ln1", "l2", "l3"],
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_chains_are_put_in_order_and_their_groups_hold(case: str) -> None:
    module, expected = MODULES[case]
    found = find_chains(layers_of(module))
    assert found.ordered
    ordered, groups = found.layers, found.groups
    assert names(ordered) == expected
    hidden = [layer for layer in ordered if layer.kind != "norm"][:-1]
    assert len(groups) == len(hidden) - case.startswith("depthwise")
    example = torch.randn(2, 4) if case.startswith("ten") else torch.randn(2, 1, 8, 8)
    assert verify_groups(module, groups, example, torch.Generator().manual_seed(0)) == groups
    for norm in (layer for layer in ordered if layer.kind == "norm" and layer.rows > 2 and layer.name != "body.0"):
        assert any({(t.name, 0, 1) for t in norm.tensors} <= axes for axes in axes_of(groups))


def test_groups_of_a_flattened_map() -> None:
    found = find_chains(layers_of(dense(a=(8, 3, 3, 3), b=(10, 8 * 16), c=(2, 10))))
    assert axes_of(found.groups) == [
        {("a.weight", 0, 1), ("a.bias", 0, 1), ("b.weight", 1, 16)},
        {("b.weight", 0, 1), ("b.bias", 0, 1), ("c.weight", 1, 1)},
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=3, max_size=14), st.booleans())
def test_numbered_layers_are_never_out_of_order(widths: list[int], shift: bool) -> None:
    numbers = [3 * i + shift for i in range(len(widths) - 1)]
    shapes = {f"net.{n}": (out, given) for n, (given, out) in zip(numbers, pairwise(widths), strict=True)}
    found = find_chains(layers_of(dense(**shapes)))
    assert names(found.layers) == [f"net.{n}" for n in numbers]
    assert found.ordered
    assert [group.size for group in found.groups] == widths[1:-1]
    for group, before, after in zip(found.groups, *zip(*pairwise(numbers), strict=True), strict=True):
        expected = {(f"net.{before}.weight", 0, 1), (f"net.{before}.bias", 0, 1), (f"net.{after}.weight", 1, 1)}
        assert {(a.tensor, a.axis, a.block) for a in group.axes} == expected


DOUBTS = {
    "two orders of differently named layers": (dense(left=(4, 4), right=(4, 4)), "more than one order"),
    "encoder and decoder read each other": (dense(encoder__0=(3, 9), decoder__0=(9, 3)), "more than one order"),
    "shapes do not chain": (dense(a=(4, 3), b=(5, 6)), "do not form a chain"),
    "two heads": (dense(trunk=(6, 3), mean=(2, 6), scale=(2, 6)), "do not form a chain"),
    "heads as wide as the input": (dense(trunk=(6, 3), policy=(3, 6), aux=(1, 6)), "can both read"),
    "numbered heads as wide as the input": (dense(trunk=(6, 3), tail1=(3, 6), tail2=(1, 6)), "do not follow"),
    "numbers against shapes": (dense(fc1=(2, 6), fc2=(6, 3)), "do not form a chain"),
    "blocks": (dense(stem=(6, 3), blocks__0__a=(9, 6), blocks__0__b=(6, 9), head=(2, 6)), "blocks.0"),
    "a shortcut": ({**dense(fc1=(6, 3), fc2=(6, 6)), "shortcut.weight": (6, 3)}, "shortcut"),
    "an unknown matrix": ({**dense(fc1=(6, 3), fc2=(2, 6)), "mixing": (6, 6)}, "mixing"),
    "an embedding": ({**dense(fc=(2, 6)), "embedding.weight": (9, 6)}, "embedding"),
    "recurrent": ({"rnn.weight_ih_l0": (6, 3), "rnn.weight_hh_l0": (6, 6), **dense(fc=(2, 6))}, "rnn"),
    "a norm that fits nowhere": ({**dense(fc1=(6, 3), fc2=(2, 6)), "bn.weight": (5,), "bn.bias": (5,)}, "bn"),
    "a norm that fits twice": ({**dense(fc1=(6, 3), fc2=(6, 6)), "bn.weight": (6,), "bn.bias": (6,)}, "bn"),
    "two norms of one layer": (
        {**dense(fc=(6, 3), out=(2, 6)), **{f"{n}.{t}": (6,) for n in ("bna", "bnb") for t in ("weight", "bias")}},
        "same layer",
    ),
    "too many layers": (dense(**{f"fc{i}": (2, 2) for i in range(300)}), "300 layers"),
    "too many orders": (dense(**{f"fc{a}{b}": (3, 3) for a in "abcd" for b in "abcd"}), "order"),
    "absurdly nested": (dense(**{"1." * 5000 + "a": (3, 3), "b": (3, 3)}), "modules deep"),
    "nothing to chain": ({"scale": (3,)}, "no linear layer"),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_doubtful_networks_get_no_groups_and_a_note(case: str) -> None:
    shapes, reason = DOUBTS[case]
    layers = layers_of(shapes)
    found = find_chains(layers)
    assert (found.groups, found.ordered, found.layers) == ((), False, layers)
    assert len(found.notes) == 1
    assert reason in found.notes[0]


def test_only_the_doubtful_group_is_left_out() -> None:
    found = find_chains(layers_of({**dense(fc1=(6, 3), fc2=(5, 6), fc3=(2, 5)), "mystery": (12,), "scale": (1,)}))
    assert [group.size for group in found.groups] == [5]
    assert "fc1" in found.notes[0]
    assert "mystery" in found.notes[0]
    found = find_chains(layers_of({**dense(c1=(8, 3, 3, 3), c2=(5, 8, 3, 3)), "n1.weight": (8,), "n1.bias": (8,)}))
    assert found.groups == ()
    assert "n1 may normalise channels in groups" in found.notes[0]


def test_a_first_convolution_that_may_be_depthwise_is_left_out() -> None:
    found = find_chains(layers_of(dense(c1=(3, 1, 3, 3), c2=(16, 3, 1, 1), c3=(4, 16, 1, 1))))
    assert [group.size for group in found.groups] == [16]
    assert "depthwise" in found.notes[0]


def test_equal_widths_come_with_a_note_and_different_ones_without() -> None:
    assert find_chains(layers_of(dense(fc1=(6, 3), fc2=(5, 6), fc3=(2, 5)))).notes == ()
    (note,) = find_chains(layers_of(dense(fc1=(6, 3), fc2=(6, 6), fc3=(2, 6)))).notes
    assert "skip connection" in note


def test_a_head_named_as_such_is_last() -> None:
    # Without the name, out -> fc1 -> fc2 would fit as well: the input is as wide as the output.
    assert names(find_chains(layers_of(dense(fc1=(6, 4), fc2=(6, 6), output_layer=(4, 6)))).layers) == [
        "fc1",
        "fc2",
        "output_layer",
    ]


ACTOR_CRITIC = {
    **{"mlp_extractor.policy_net.0": (8, 4), "mlp_extractor.policy_net.2": (8, 8), "action_net": (4, 8)},
    **{"mlp_extractor.value_net.0": (8, 4), "mlp_extractor.value_net.2": (7, 8), "value_net": (1, 7)},
}


def test_actor_and_critic_are_two_chains() -> None:
    found = find_chains(layers_of({**dense(**ACTOR_CRITIC), "log_std": (4,)}))
    assert found.ordered
    assert [group.size for group in found.groups] == [8, 8, 8, 7]
    for axes in axes_of(found.groups):
        assert len({"value" in tensor for tensor, _, _ in axes}) == 1
    order = names(found.layers)
    assert order.index("mlp_extractor.policy_net.2") < order.index("action_net")


def test_a_lane_in_doubt_does_not_spoil_the_others() -> None:
    # State-dependent exploration: log_std reads the last hidden layer of the policy
    found = find_chains(layers_of({**dense(**ACTOR_CRITIC), "log_std": (8, 4)}))
    assert [group.size for group in found.groups] == [8, 7]
    assert not found.ordered
    assert any("In policy" in note and "log_std" in note for note in found.notes)


def test_lanes_that_may_share_layers_are_left_out() -> None:
    layers = layers_of(dense(features=(8, 4), actor__0=(4, 8), critic__0=(1, 8)))
    found = find_chains(layers)
    assert found.groups == ()
    assert found.layers == layers
    assert "actor and critic may share features" in found.notes[0]


def test_twin_critics_and_targets_stand_side_by_side() -> None:
    parts = ("actor.mu", "critic.qf0", "critic.qf1", "critic_target.qf0", "critic_target.qf1")
    shapes = {f"{part}.{n}": shape for part in parts for n, shape in ((0, (6, 5)), (2, (5, 6)))}
    found = find_chains(layers_of(dense(**shapes)))
    assert len(found.groups) == len(parts)
    for part, axes in zip(parts, axes_of(found.groups), strict=True):
        assert axes == {(f"{part}.0.weight", 0, 1), (f"{part}.0.bias", 0, 1), (f"{part}.2.weight", 1, 1)}
