from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightspace.errors import ArchitectureError, WeightspaceError
from weightspace.networks.families import FAMILIES, Activation, Apply, FamilyConfig, Network, family_config
from weightspace.networks.infer import infer_architecture
from weightspace.networks.layers import natural_key
from weightspace.schema import Architecture, TensorSpec

# Real checkpoints are too large for the repository: these tests run where this variable names a folder of them.
REAL_MODELS = Path(os.environ["WEIGHTSPACE_DATA"]) if "WEIGHTSPACE_DATA" in os.environ else None


def specs(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> list[TensorSpec]:
    return [TensorSpec(name, shapes[name], dtype) for name in sorted(shapes)]


def layers(architecture: Architecture) -> dict[str, tuple[str, str, list[str]]]:
    return {layer.name: (layer.kind, layer.layout, [t.name for t in layer.tensors]) for layer in architecture.layers}


def test_layers_take_their_tensors_by_name_and_shape() -> None:
    found = infer_architecture(
        specs(
            {
                "conv.weight": (4, 3, 3, 3),
                "conv.bias": (4,),
                "bn.weight": (4,),
                "bn.bias": (4,),
                "bn.running_mean": (4,),
                "bn.running_var": (4,),
                "plain_bn.running_mean": (5,),
                "plain_bn.running_var": (5,),
                "old.LayerNorm.gamma": (6,),
                "old.LayerNorm.beta": (6,),
                "rms_norm.weight": (7,),
                "embeddings.word.weight": (9, 6),
                "fc.weight": (5, 4),
                "lone.bias": (5,),
                "weight": (2, 2),
            }
        )
    )
    assert layers(found) == {
        "conv": ("conv", "channels", ["conv.weight", "conv.bias"]),
        "bn": ("norm", "vectors", ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]),
        "plain_bn": ("norm", "vectors", ["plain_bn.running_mean", "plain_bn.running_var"]),
        "old.LayerNorm": ("norm", "vectors", ["old.LayerNorm.gamma", "old.LayerNorm.beta"]),
        "rms_norm": ("norm", "vectors", ["rms_norm.weight"]),
        "embeddings.word": ("embedding", "channels", ["embeddings.word.weight"]),
        "fc": ("linear", "channels", ["fc.weight"]),
        "lone.bias": ("vector", "vectors", ["lone.bias"]),
        "weight": ("linear", "channels", ["weight"]),
    }


def test_parameters_whose_names_lack_weight_become_layers() -> None:
    found = infer_architecture(
        specs(
            {
                "cls_token": (1, 1, 8),
                "pos_embed": (1, 5, 8),
                "q_bias": (8,),
                "blocks.0.gamma_1": (8,),
                "layer_scale.gamma": (8,),
                "logit_scale": (),
                "attn.in_proj_weight": (24, 8),
                "attn.in_proj_bias": (24,),
                "rnn.weight_ih_l0": (12, 8),
                "rnn.bias_ih_l0": (12,),
                "rnn.weight_hh_l0": (12, 3),
                "rnn.bias_hh_l0": (12,),
            }
        )
    )
    assert layers(found) == {
        "cls_token": ("other", "channels", ["cls_token"]),
        "pos_embed": ("other", "channels", ["pos_embed"]),
        "q_bias": ("vector", "vectors", ["q_bias"]),
        "blocks.0.gamma_1": ("vector", "vectors", ["blocks.0.gamma_1"]),
        "layer_scale.gamma": ("vector", "vectors", ["layer_scale.gamma"]),
        "logit_scale": ("vector", "vectors", ["logit_scale"]),
        "attn.in_proj_weight": ("other", "channels", ["attn.in_proj_weight", "attn.in_proj_bias"]),
        "rnn.weight_ih_l0": ("other", "channels", ["rnn.weight_ih_l0", "rnn.bias_ih_l0"]),
        "rnn.weight_hh_l0": ("other", "channels", ["rnn.weight_hh_l0", "rnn.bias_hh_l0"]),
    }
    assert not found.groups
    assert found.notes


def test_natural_order_counts() -> None:
    ordered = ["", "a", "a0", "a01", "a1", "a2b9", "a2b10a", "a10", "a.b", "b", "b" + "9" * 5000]
    for seed in range(5):
        shuffled = [ordered[i] for i in torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))]
        assert sorted(shuffled, key=natural_key) == ordered


def test_a_bias_of_another_size_stands_alone() -> None:
    found = infer_architecture(specs({"up.weight": (6, 3, 2, 2), "up.bias": (3,), "n.weight": (4,), "n.bias": (5,)}))
    assert set(layers(found)) == {"up", "up.bias", "n", "n.bias"}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ"])
def test_floats_of_every_width_are_tokenized(dtype: str) -> None:
    found = infer_architecture(specs({"a.weight": (2, 3), "s": ()}, dtype))
    assert {t.name: t.dtype for t in found.tensors} == {"a.weight": dtype, "s": dtype}
    assert not found.exclusions


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("I64", "integers"),
        ("U8", "integers"),
        ("BOOL", "booleans"),
        ("C64", "complex"),
        ("F4", "whole bytes"),
        ("F6_E2M3", "whole bytes"),
    ],
)
def test_everything_else_is_excluded_with_a_reason(dtype: str, reason: str) -> None:
    found = infer_architecture([TensorSpec("odd", (2, 2), dtype), *specs({"a.weight": (2, 3), "a.bias": (2,)})])
    assert [e.tensor for e in found.exclusions] == ["odd"]
    assert reason in found.exclusions[0].reason
    assert [t.name for t in found.tensors] == ["a.weight", "a.bias"]


def test_empty_tensors_are_excluded() -> None:
    found = infer_architecture(specs({"empty.weight": (0, 4), "empty.bias": (0,), "a.weight": (2, 3)}))
    assert {e.tensor for e in found.exclusions} == {"empty.weight", "empty.bias"}
    assert all("empty" in e.reason for e in found.exclusions)


PARTS = st.sampled_from(["a", "b", "layer", "weight", "bias", "0", "1", "10", "norm", "gamma", "beta", "running_mean"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = st.sampled_from(["F32", "F16", "F8_E5M2", "I64", "BOOL", "C64", "F4"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=10))
def test_every_tensor_is_carried_once_or_excluded_once(tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
    stored = [TensorSpec(name, *rest) for name, rest in tensors.items()]
    found = infer_architecture(stored)
    places = [t.name for t in found.tensors] + [e.tensor for e in found.exclusions]
    assert sorted(places) == sorted(tensors)
    assert set(found.tensors) <= set(stored)
    for layer in found.layers:
        assert layer.rows * layer.width == layer.numel
    assert len({layer.name for layer in found.layers}) == len(found.layers)
    assert infer_architecture(reversed(stored)).layers == found.layers


def test_a_chain_brings_order_and_groups() -> None:
    shapes = {"fc2.weight": (6, 5), "fc10.weight": (2, 6), "fc1.weight": (5, 3)}
    found = infer_architecture(specs(shapes))
    assert [layer.name for layer in found.layers] == ["fc1", "fc2", "fc10"]
    assert found.ordered
    assert [group.size for group in found.groups] == [5, 6]


def test_tied_tensors_leave_the_symmetries_out() -> None:
    found = infer_architecture(
        specs({"0.weight": (5, 3), "1.weight": (2, 5)}), aliases=[("decoder.weight", "0.weight")]
    )
    assert found.aliases == (("decoder.weight", "0.weight"),)
    assert not found.groups
    assert "decoder.weight" in found.notes[0]


def test_a_name_that_appears_twice_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"'a\.weight' appears twice"):
        infer_architecture(specs({"a.weight": (2, 3)}) * 2)


class Residual(nn.Module):
    """Its names and shapes look like a chain; only the forward pass tells that it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(x))
        return self.fc3(x + torch.relu(self.fc2(x)))


@pytest.fixture
def residual_family(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    @dataclass(frozen=True)
    class ResidualConfig(FamilyConfig):
        family: ClassVar[str] = "residual"
        activation: Activation = "relu"

        def layers(self) -> dict[str, nn.Module]:
            return dict(Residual().named_children())

        def forward(self, images: torch.Tensor, apply: Apply) -> torch.Tensor:
            x = apply("fc1", images.flatten(-3), torch.relu)
            return apply("fc3", x + apply("fc2", x, torch.relu))

    monkeypatch.setitem(FAMILIES, "residual", ResidualConfig)
    return {"family": "residual", "image_shape": [3, 1, 1], "classes": 2}


def test_a_known_config_is_traced(residual_family: dict[str, Any]) -> None:
    stored = [TensorSpec(n, tuple(t.shape), "BF16") for n, t in sorted(Residual().state_dict().items())]
    counter = TensorSpec("fc1.steps", (), "I64")
    found = infer_architecture([*stored, counter], config=residual_family)
    (group,) = found.groups
    assert {(a.tensor, a.axis) for a in group.axes} >= {("fc1.weight", 0), ("fc2.weight", 0), ("fc2.weight", 1)}
    assert {t.dtype for t in found.tensors} == {"BF16"}
    assert [e.tensor for e in found.exclusions] == ["fc1.steps"]
    assert found.ordered
    unknown = infer_architecture(stored, config={"model_type": "bert"})
    assert len(unknown.groups) == 2


def test_a_config_of_another_network_is_refused(residual_family: dict[str, Any]) -> None:
    stored = {n: tuple(t.shape) for n, t in Residual().state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"fc3\.weight.*\(2, 4\).*\(7, 4\)"):
        infer_architecture(specs({**stored, "fc3.weight": (7, 4)}), config=residual_family)
    with pytest.raises(ArchitectureError, match=r"extra"):
        infer_architecture(specs({**stored, "extra": (7,)}), config=residual_family)


def test_families_of_this_library_are_traced() -> None:
    config = {"family": "cnn", "image_shape": [1, 8, 8], "classes": 3, "channels": [4, 5]}
    module = Network(family_config(config))
    stored = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    found = infer_architecture(specs(stored), config=config)
    assert found.ordered
    assert [group.size for group in found.groups] == [4, 5]
    assert found.notes == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden": [8_000_000]}, "put the config.json of this checkpoint beside it"),
        ({"hidden": [2**24, 2**24]}, "put the config.json of this checkpoint beside it"),
        ({"hidden": [2**24 + 1]}, "sizes above 16777216"),
        ({"hidden": [10**30]}, "sizes above 16777216"),
        ({"hidden": [1] * 2000}, "2000 sizes, above 1024"),
        ({"image_shape": [3, 10**5, 10**5]}, "sizes above 16777216"),
        ({"family": "cnn", "channels": [2**24] * 3, "kernel_size": 2**24 - 1}, "config: layers cannot be built"),
    ],
)
def test_a_config_allocates_nothing_before_it_is_compared(values: dict[str, Any], said: str) -> None:
    config = {"family": "mlp", "image_shape": [1, 8, 8], "classes": 5, **values}
    with pytest.raises(WeightspaceError, match=said):
        infer_architecture(specs({"hidden.0.weight": (8, 64), "head.weight": (5, 8)}), config=config)


def test_groups_of_a_network_whose_run_needs_much_memory_are_not_tried() -> None:
    # Its weights are few, and its feature maps have 30 GB.
    config = {"family": "cnn", "image_shape": [1, 4096, 4096], "classes": 2, "channels": [64, 64], "stride": 1}
    shapes = {"convs.0.weight": (64, 1, 3, 3), "convs.1.weight": (64, 64, 3, 3), "head.weight": (2, 64)}
    shapes |= {"convs.0.bias": (64,), "convs.1.bias": (64,), "head.bias": (2,)}
    found = infer_architecture(specs(shapes), config=config)
    assert [group.size for group in found.groups] == [64, 64]
    assert "traced but not tried" in found.notes[0]


def header(path: Path) -> list[TensorSpec]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return [TensorSpec(name, tuple(e["shape"]), e["dtype"]) for name, e in entries.items()]


@pytest.mark.skipif(REAL_MODELS is None, reason="no real models here")
class TestRealModels:
    def infer(self, pattern: str) -> Architecture:
        return infer_architecture(header(next(REAL_MODELS.glob(pattern))))

    def test_residual_networks_are_no_chains(self) -> None:
        found = self.infer("small_models/*resnet20*.safetensors")
        assert not found.groups
        assert not found.ordered
        assert "layer1" in found.notes[0]

    def test_a_convolutional_chain(self) -> None:
        found = self.infer("small_models/outlier-exposure__MNIST*baseline*.safetensors")
        assert [group.size for group in found.groups] == [10, 20, 50]
        assert found.groups[1].axes[-1].block == 16

    def test_policies_are_chains_side_by_side(self) -> None:
        assert [group.size for group in self.infer("rl_agents/a2c__Acrobot*.safetensors").groups] == [64] * 4
        found = self.infer("rl_agents/sac__MountainCar*.safetensors")
        assert {axis.tensor.split(".")[0] for group in found.groups for axis in group.axes} == {
            "critic",
            "critic_target",
        }

    def test_every_tensor_of_every_model_is_accounted_for(self) -> None:
        for path in REAL_MODELS.rglob("*.safetensors"):
            stored = header(path)
            found = infer_architecture(stored)
            assert {t.name for t in found.tensors} | {e.tensor for e in found.exclusions} == {s.name for s in stored}
            assert found.ordered or found.notes
