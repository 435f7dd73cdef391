from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from weightspace.errors import SettingsError
from weightspace.networks import families
from weightspace.networks.families import (
    Activation,
    Apply,
    CNNConfig,
    FamilyConfig,
    MLPConfig,
    Network,
    family_config,
    initialize,
    register_family,
    run_models,
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


def draw(config: FamilyConfig, models: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: 0.5 * torch.randn(models, *shape, generator=generator) for n, shape in config.shapes().items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 40], ids=["grouped", "matrix"])
def test_a_population_computes_what_its_modules_compute(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, matrices = CONFIGS[name], []
    as_matrix = families._conv_as_matrix
    monkeypatch.setattr(families, "_conv_as_matrix", lambda *a: matrices.append(1) or as_matrix(*a))
    module, parameters = Network(config), draw(config, 3)
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
    module = Network(config)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == config.shapes()
    assert module(torch.rand(2, *config.image_shape)).shape == (2, 4)


class TestRunModels:
    CONFIG = CNNConfig(SHAPE, 4, (3,))
    IMAGES = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("gradients", [True, False])
    def test_steps_change_nothing(self, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        parameters = draw(self.CONFIG, 5)
        whole = stacked_forward(self.CONFIG, parameters, self.IMAGES.expand(5, *self.IMAGES.shape))
        monkeypatch.setattr(families, "_STEP_MODELS", 2)
        monkeypatch.setattr(families, "_STEP_IMAGES", 8)
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(run_models(self.CONFIG, parameters, self.IMAGES), whole)
            own = self.IMAGES.expand(5, *self.IMAGES.shape)
            torch.testing.assert_close(run_models(self.CONFIG, parameters, own), whole)

    def test_every_model_sees_the_images_of_its_rows(self) -> None:
        parameters, rows = draw(self.CONFIG, 3), torch.tensor([[0, 1], [8, 8], [2, 0]])
        whole = run_models(self.CONFIG, parameters, self.IMAGES)
        found = run_models(self.CONFIG, parameters, self.IMAGES, rows)
        torch.testing.assert_close(found, torch.stack([whole[m, own] for m, own in enumerate(rows)]))

    def test_no_models_have_no_logits(self) -> None:
        parameters = {name: value[:0] for name, value in draw(MLPConfig(SHAPE, 4), 1).items()}
        assert run_models(MLPConfig(SHAPE, 4), parameters, self.IMAGES).shape == (0, 9, 4)


def test_a_family_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", {})

    @register_family
    @dataclass(frozen=True)
    class ResidualConfig(FamilyConfig):
        family: ClassVar[str] = "residual"
        width: int = 6
        activation: Activation = "relu"

        def layers(self) -> dict[str, nn.Module]:
            stem = nn.Conv2d(self.image_shape[0], self.width, 3, padding=1, bias=False)
            block = nn.Conv2d(self.width, self.width, 3, padding=1, groups=2)
            return {"stem": stem, "block": block, "norm": nn.GroupNorm(2, self.width), "head": nn.Linear(self.width, 4)}

        def forward(self, images: torch.Tensor, apply: Apply) -> torch.Tensor:
            x = apply("stem", images, torch.relu)
            return apply("head", (x + apply("block", apply("norm", x))).mean((-2, -1)))

    config = family_config({"family": "residual", "image_shape": SHAPE, "classes": 4})
    assert isinstance(config, ResidualConfig)
    module, parameters = Network(config), draw(config, 3)
    images = torch.rand(3, 5, *SHAPE, generator=torch.Generator().manual_seed(1))
    for number, logits in enumerate(stacked_forward(config, parameters, images)):
        module.load_state_dict({key: value[number] for key, value in parameters.items()})
        torch.testing.assert_close(logits, module(images[number]), atol=1e-5, rtol=1e-4)
    with pytest.raises(SettingsError, match="width 0"):
        ResidualConfig(SHAPE, 4, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name: str) -> None:
    assert family_config(CONFIGS[name].to_dict()) == CONFIGS[name]


def test_configs_of_others_are_none_of_ours() -> None:
    for config in ({}, {"family": "transformer"}, {"family": 3}, {"model_type": "bert"}):
        assert family_config(config) is None


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
