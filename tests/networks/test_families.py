from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from weightspace.errors import SettingsError
from weightspace.networks import families
from weightspace.networks.families import (
    CNNConfig,
    FamilyConfig,
    MLPConfig,
    build_module,
    config_mapping,
    example_input,
    family_config,
    initialize,
    stacked_forward,
)

SHAPE = (2, 6, 5)
CONFIGS: dict[str, FamilyConfig] = {
    "mlp": MLPConfig(SHAPE, 4, (7,), "gelu"),
    "deep mlp": MLPConfig(SHAPE, 4, (7, 3, 5), "tanh"),
    "linear mlp": MLPConfig(SHAPE, 4, ()),
    **{
        f"cnn k{kernel} s{stride} {pooling}": CNNConfig(SHAPE, 4, (3, 5), kernel, stride, pooling, "silu")
        for kernel in (1, 3, 5)
        for stride in (1, 2, 3)
        for pooling in ("mean", "none")
    },
}


def module_of(config: FamilyConfig) -> nn.Module:
    module = build_module(config_mapping(config))
    assert module is not None
    return module


def draw(config: FamilyConfig, models: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: 0.5 * torch.randn(models, *shape, generator=generator) for n, shape in config.shapes().items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 40], ids=["grouped", "matrix"])
def test_a_population_computes_what_its_modules_compute(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, matrices = CONFIGS[name], []
    as_matrix = families._conv_as_matrix
    monkeypatch.setattr(families, "_conv_as_matrix", lambda *a: matrices.append(1) or as_matrix(*a))
    module, parameters = module_of(config), draw(config, 3)
    images = torch.rand(3, batch, *SHAPE, generator=torch.Generator().manual_seed(1))
    stacked = stacked_forward(config, parameters, images)
    for number in range(3):
        module.load_state_dict({key: value[number] for key, value in parameters.items()})
        torch.testing.assert_close(stacked[number], module(images[number]), atol=1e-5, rtol=1e-4)
    if isinstance(config, CNNConfig) and config.kernel_size > 1 and config.stride == 1:
        assert len(matrices) == (2 if batch == 40 else 0)  # both ways of a convolution are tried


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_module(name: str) -> None:
    config = CONFIGS[name]
    module = module_of(config)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == config.shapes()
    assert module(example_input(config_mapping(config))).shape == (2, 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name: str) -> None:
    assert family_config(config_mapping(CONFIGS[name])) == CONFIGS[name]


def test_configs_of_others_are_none_of_ours() -> None:
    for config in ({}, {"family": "transformer"}, {"family": 3}, {"model_type": "bert"}):
        assert family_config(config) is None
        assert build_module(config) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kernel_size": 2}, "kernel_size 2"),
        ({"stride": 0}, "stride 0"),
        ({"channels": [4, 0]}, "channels"),
        ({"classes": 0}, "classes"),
        ({"image_shape": [1, 0, 8]}, "image_shape"),
        ({"pooling": "max"}, "pooling"),
        ({"activation": "sine"}, "activation"),
        ({"chanels": [4]}, "did you mean 'channels'"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        family_config({"family": "cnn", "image_shape": [1, 8, 8], "classes": 3, **change})


@pytest.mark.parametrize("scheme", ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"])
def test_initial_weights_have_the_spread_of_torchs_schemes(scheme: Any) -> None:
    config = CNNConfig((3, 8, 8), 4, (40, 30), pooling="none")
    found = initialize(config, ["xavier_normal", scheme], torch.Generator().manual_seed(0))
    for name, value in found.items():
        if name.endswith(".bias"):
            assert not value.any()
            continue
        expected = torch.empty(value.shape[1:])
        torch.manual_seed(0)
        options = {"nonlinearity": "relu"} if scheme.startswith("kaiming") else {}
        getattr(nn.init, f"{scheme}_")(expected, **options)
        assert float(value[1].std()) == pytest.approx(float(expected.std()), rel=0.1)
        largest = float(value[1].abs().max()) / float(value[1].std())
        assert (largest < math.sqrt(3) * 1.1) == scheme.endswith("uniform")
