"""The small networks of trained zoos, as modules and as populations.

Each family is a frozen config, a ``torch.nn.Module`` and a *stacked* forward: N models of one config whose parameters
carry a leading model axis run as one batched matrix product. A convolution becomes one too: on tiny maps by writing it
out as a matrix, on larger ones as one grouped convolution.

Add a family by adding a config class, its module and its stacked forward, and naming it in ``_FAMILIES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import SettingsError
from weightspace.networks.flat import unflatten
from weightspace.schema import Architecture
from weightspace.settings import settings_from_mapping

Activation = Literal["relu", "gelu", "tanh", "silu"]
Initialization = Literal["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]
Parameters = Mapping[str, Tensor]
"""Parameter name -> tensor with a leading model axis, ``(models, *shape)``."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
}


@dataclass(frozen=True)
class MLPConfig:
    """Multi-layer perceptron on flattened images.

    Attributes:
        image_shape: channels, height, width of one input image.
        classes: number of outputs.
        hidden: width of each hidden layer.
        activation: applied after each hidden layer.
    """

    family: ClassVar[str] = "mlp"
    image_shape: tuple[int, int, int]
    classes: int
    hidden: tuple[int, ...] = (16,)
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        _check_positive(self.family, image_shape=self.image_shape, classes=(self.classes,), hidden=self.hidden)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in forward order."""
        widths = (math.prod(self.image_shape), *self.hidden)
        shapes = {f"hidden.{i}": (fan_out, fan_in) for i, (fan_in, fan_out) in enumerate(pairwise(widths))}
        return _with_biases({**shapes, "head": (self.classes, widths[-1])})


@dataclass(frozen=True)
class CNNConfig:
    """Strided convolutions, each followed by the activation, and one linear layer on the last map.

    Attributes:
        image_shape: channels, height, width of one input image.
        classes: number of outputs.
        channels: output channels of each convolution.
        kernel_size: side of the square kernels, odd; the padding keeps the map's size before the stride.
        stride: stride of each convolution.
        pooling: ``"mean"`` averages the last map over its positions, ``"none"`` flattens it for the linear layer.
        activation: applied after each convolution.
    """

    family: ClassVar[str] = "cnn"
    image_shape: tuple[int, int, int]
    classes: int
    channels: tuple[int, ...] = (10, 16)
    kernel_size: int = 3
    stride: int = 2
    pooling: Literal["mean", "none"] = "mean"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        _check_positive(self.family, image_shape=self.image_shape, classes=(self.classes,), channels=self.channels)
        if self.kernel_size % 2 == 0 or self.kernel_size < 1 or self.stride < 1:
            raise SettingsError(
                f"cnn: kernel_size {self.kernel_size} must be odd and positive, stride {self.stride} at least 1"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in forward order."""
        widths = (self.image_shape[0], *self.channels)
        side = self.kernel_size
        shapes: dict[str, tuple[int, ...]] = {
            f"convs.{i}": (fan_out, fan_in, side, side) for i, (fan_in, fan_out) in enumerate(pairwise(widths))
        }
        height, width = self.image_shape[1:]
        for _ in self.channels:
            height, width = -(-height // self.stride), -(-width // self.stride)
        positions = height * width if self.pooling == "none" else 1
        return _with_biases({**shapes, "head": (self.classes, widths[-1] * positions)})


FamilyConfig = MLPConfig | CNNConfig


class MLP(nn.Module):
    """One multi-layer perceptron; see `MLPConfig`."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        shapes = config.shapes()
        self.hidden = nn.ModuleList(_linear(shapes[f"hidden.{i}.weight"]) for i in range(len(config.hidden)))
        self.head = _linear(shapes["head.weight"])

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Class logits."""
        x = images.flatten(1)
        for layer in self.hidden:
            x = _ACTIVATIONS[self.config.activation](layer(x))
        return self.head(x)


class CNN(nn.Module):
    """One convolutional network; see `CNNConfig`."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.image_shape[0], *config.channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, config.kernel_size, config.stride, padding=config.kernel_size // 2)
            for fan_in, fan_out in pairwise(widths)
        )
        self.head = _linear(config.shapes()["head.weight"])

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Class logits."""
        x = images
        for layer in self.convs:
            x = _ACTIVATIONS[self.config.activation](layer(x))
        return self.head(x.mean((2, 3)) if self.config.pooling == "mean" else x.flatten(1))


_FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {"mlp": (MLPConfig, MLP), "cnn": (CNNConfig, CNN)}


def family_config(config: Mapping[str, Any]) -> FamilyConfig | None:
    """Reads a config mapping (the content of ``config.json``); None if it names no family of this library.

    Raises:
        SettingsError: it names a family but has an unknown key or a wrong value.
    """
    family = config.get("family")
    if not isinstance(family, str) or family not in _FAMILIES:
        return None
    values = {key: value for key, value in config.items() if key != "family"}
    return settings_from_mapping(_FAMILIES[family][0], values, where=f"{family} config")


def config_mapping(config: FamilyConfig) -> dict[str, Any]:
    """The inverse of `family_config`, ready for JSON."""
    return {"family": config.family, **asdict(config)}


def build_module(config: Mapping[str, Any]) -> nn.Module | None:
    """Builds the module that a config mapping describes, or None if it names no family of this library."""
    parsed = family_config(config)
    return None if parsed is None else _FAMILIES[parsed.family][1](parsed)


def example_input(config: Mapping[str, Any]) -> Float[Tensor, "batch c h w"]:
    """Two random images of the shape that the config asks for: an input to trace the module with."""
    return torch.rand(2, *config["image_shape"], generator=torch.Generator().manual_seed(0))


def initialize(
    config: FamilyConfig, schemes: list[Initialization], generator: torch.Generator
) -> dict[str, Float[Tensor, "models ..."]]:
    """Draws the parameters of ``len(schemes)`` models, each by its own scheme; biases start at zero.

    The variances are those of `torch.nn.init`: 2 / fan_in (kaiming) or 2 / (fan_in + fan_out) (xavier).
    """
    parameters = {}
    for name, shape in config.shapes().items():
        if name.endswith(".bias"):
            parameters[name] = torch.zeros(len(schemes), *shape)
            continue
        fan_in, receptive = math.prod(shape[1:]), math.prod(shape[2:])
        variance = {"kaiming": 2.0 / fan_in, "xavier": 2.0 / (fan_in + shape[0] * receptive)}
        draws = []
        for scheme in schemes:
            kind, distribution = scheme.split("_")
            std = math.sqrt(variance[kind])
            if distribution == "normal":
                draws.append(torch.randn(shape, generator=generator) * std)
            else:
                draws.append((torch.rand(shape, generator=generator) * 2 - 1) * (std * math.sqrt(3.0)))
        parameters[name] = torch.stack(draws)
    return parameters


def stacked_forward(
    config: FamilyConfig, parameters: Parameters, images: Float[Tensor, "models batch c h w"]
) -> Float[Tensor, "models batch classes"]:
    """Runs every model of a population on its own batch of images, as batched matrix products.

    Args:
        config: the config that all models share.
        parameters: stacked parameters, ``(models, *shape)`` each.
        images: ``images[m]`` is the batch of model m; expand a shared batch along the first axis.
    """
    activation = _ACTIVATIONS[config.activation]
    if isinstance(config, MLPConfig):
        x = images.flatten(2).mT
        for i in range(len(config.hidden)):
            x = activation(_stacked_linear(x, parameters, f"hidden.{i}"))
        return _stacked_linear(x, parameters, "head").mT
    x = images
    for i in range(len(config.channels)):
        x = activation(_stacked_conv(x, parameters, f"convs.{i}", config.kernel_size, config.stride))
    x = x.mean((3, 4)) if config.pooling == "mean" else x.flatten(2)
    return _stacked_linear(x.mT, parameters, "head").mT


def run_flat(
    config: FamilyConfig,
    architecture: Architecture,
    flat: Float[Tensor, "models params"],
    images: Float[Tensor, "models batch c h w"],
) -> Float[Tensor, "models batch classes"]:
    """Runs models that are given as flat weight vectors; see `stacked_forward`."""
    return stacked_forward(config, unflatten(flat, architecture), images)


def _linear(shape: tuple[int, ...]) -> nn.Linear:
    fan_out, fan_in = shape
    return nn.Linear(fan_in, fan_out)


def _stacked_linear(x: Float[Tensor, "models fan_in batch"], parameters: Parameters, name: str) -> Tensor:
    # With the batch last, the gradient of a weight comes out in the weight's own layout and needs no copy.
    return torch.baddbmm(parameters[f"{name}.bias"].unsqueeze(2), parameters[f"{name}.weight"], x)


def _stacked_conv(x: Tensor, parameters: Parameters, name: str, kernel_size: int, stride: int) -> Tensor:
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    batch, _, height, width = x.shape[1:]
    fan_out = weight.shape[1]
    out_height, out_width = -(-height // stride), -(-width // stride)
    # On tiny maps the whole matrix of the convolution is about as small as the unfolded batch, and one product beats
    # many small convolutions; its size grows with the square of the map, so that larger maps are convolved in groups.
    if fan_out * height * width <= 3 * batch * kernel_size**2:
        out = _conv_as_matrix(x, weight, bias, stride, out_height * out_width)
        return out.unflatten(3, (out_height, out_width))
    grouped = F.conv2d(
        x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1), bias.flatten(), stride, kernel_size // 2, groups=len(x)
    )
    return grouped.unflatten(1, (len(x), fan_out)).transpose(0, 1)


def _conv_as_matrix(x: Tensor, weight: Tensor, bias: Tensor, stride: int, positions: int) -> Tensor:
    taps = _taps(x.shape[3], x.shape[4], weight.shape[-1], stride).to(weight)
    models, fan_out, fan_in = weight.shape[:3]
    matrix = (weight.flatten(3) @ taps.flatten(1)).unflatten(3, taps.shape[1:])
    matrix = matrix.permute(0, 2, 4, 1, 3).reshape(models, fan_in * taps.shape[2], fan_out * positions)
    out = torch.baddbmm(bias.repeat_interleave(positions, dim=1).unsqueeze(1), x.flatten(2), matrix)
    return out.unflatten(2, (fan_out, positions))


@lru_cache(maxsize=32)
def _taps(height: int, width: int, kernel_size: int, stride: int) -> Float[Tensor, "taps outputs inputs"]:
    """1 where kernel tap t of output position p reads input position q, else 0."""
    identity = torch.eye(height * width).reshape(-1, 1, height, width)
    columns = F.unfold(identity, kernel_size, padding=kernel_size // 2, stride=stride)
    return columns.permute(1, 2, 0).contiguous()


def _with_biases(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _check_positive(family: str, **sizes: tuple[int, ...]) -> None:
    for name, values in sizes.items():
        if any(value < 1 for value in values):
            raise SettingsError(f"{family} config: {name} is {values}, every size must be at least 1")
