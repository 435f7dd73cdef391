"""The families of small networks that zoos are made of, each defined by one config class.

A family is a frozen config with two methods: ``layers`` builds the layers, ``forward`` says how images pass through
them. The module, the shapes, the initial weights and the *stacked* forward, which runs many models of one config at
once, are derived. A family of your own needs nothing but its config class::

    @register_family
    @dataclass(frozen=True)
    class MyConfig(FamilyConfig): ...
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from weightspace.errors import SettingsError, first_line
from weightspace.networks.flat import unflatten
from weightspace.schema import Architecture, ImageDataset
from weightspace.settings import settings_from_mapping

Activation = Literal["relu", "gelu", "tanh", "silu"]
Initialization = Literal["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]
Parameters = Mapping[str, Tensor]
"""Parameter name -> tensor with a leading model axis, ``(models, *shape)``."""

Function: TypeAlias = Callable[[Tensor], Tensor]

Apply: TypeAlias = Callable[..., Tensor]
"""``apply(name, x, then)`` runs the layer called ``name`` on ``x`` and, if given, a function of single entries."""

ACTIVATIONS: dict[str, Function] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
}
# A config may be a stranger's: beyond these nothing is built, not even layers without memory for their weights.
_LARGEST_SIZE, _MOST_SIZES = 2**24, 1024
# Models and images of one chunk: bounds the memory of their activations, whatever the zoo and the dataset.
_STEP_MODELS, _STEP_IMAGES = 64, 2**16


@dataclass(frozen=True)
class FamilyConfig(ABC):
    """Config of one family of networks; all its sizes are at least 1, and bounded.

    Attributes:
        image_shape: channels, height, width of one input image.
        classes: number of outputs.
    """

    family: ClassVar[str]
    image_shape: tuple[int, int, int]
    classes: int

    if TYPE_CHECKING:  # a field of every family, behind its own sizes

        @property
        def activation(self) -> Activation:
            """Nonlinearity between the layers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            sizes = [size for size in (value if isinstance(value, tuple) else (value,)) if isinstance(size, int)]
            if len(sizes) > _MOST_SIZES:
                raise SettingsError(f"{self.family} config: {field.name}: {len(sizes)} sizes, above {_MOST_SIZES}")
            if min(sizes, default=1) < 1:
                raise SettingsError(f"{self.family} config: {field.name} {value}: every size must be at least 1")
            if max(sizes, default=1) > _LARGEST_SIZE or math.prod(self.image_shape) > _LARGEST_SIZE:
                raise SettingsError(f"{self.family} config: {field.name} {value}: sizes above {_LARGEST_SIZE}")

    @abstractmethod
    def layers(self) -> dict[str, nn.Module]:
        """Builds the layers by name, in forward order; they hold parameters and no buffers."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "*models batch c h w"], apply: Apply) -> Tensor:
        """Computes the logits ``(*models, batch, classes)``; axes are counted from the last, models may come first."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in forward order.

        Raises:
            SettingsError: the layers cannot be built.
        """
        return {name: tuple(value.shape) for name, value in template(self).named_parameters()}

    def fits(self, images: ImageDataset) -> bool:
        """Whether the networks take the images of a dataset and have an output for each of its classes."""
        return self.image_shape == tuple(images.test_images.shape[1:]) and self.classes == images.classes

    def ensure_fits(self, images: ImageDataset) -> None:
        """Refuses a dataset that the networks cannot be run on.

        Raises:
            SettingsError: they do not fit.
        """
        if not self.fits(images):
            raise SettingsError(
                f"{images.id}: images of shape {tuple(images.test_images.shape[1:])} in {images.classes} classes do "
                f"not fit the architecture (classes: {self.classes}, image_shape: {self.image_shape}); choose another "
                "dataset or architecture"
            )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `family_config`, ready for JSON."""
        return {"family": self.family, **asdict(self)}


FAMILIES: dict[str, type[FamilyConfig]] = {}
"""Config class by the name of its family."""

_Config = TypeVar("_Config", bound=type[FamilyConfig])


def register_family(config: _Config) -> _Config:
    """Registers a config class under its ``family``; a class decorator."""
    FAMILIES[config.family] = config
    return config


@register_family
@dataclass(frozen=True)
class MLPConfig(FamilyConfig):
    """Multi-layer perceptron on flattened images.

    Attributes:
        image_shape: see `FamilyConfig`.
        classes: see `FamilyConfig`.
        hidden: width of each hidden layer.
        activation: applied after each hidden layer.
    """

    family: ClassVar[str] = "mlp"
    hidden: tuple[int, ...] = (16,)
    activation: Activation = "relu"

    def layers(self) -> dict[str, nn.Module]:
        """``hidden.0``, ``hidden.1``, ..., ``head``."""
        widths = (math.prod(self.image_shape), *self.hidden)
        hidden = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        return {"hidden": hidden, "head": nn.Linear(widths[-1], self.classes)}

    def forward(self, images: Float[Tensor, "*models batch c h w"], apply: Apply) -> Tensor:
        """See `FamilyConfig.forward`."""
        x = images.flatten(-3)
        for i in range(len(self.hidden)):
            x = apply(f"hidden.{i}", x, ACTIVATIONS[self.activation])
        return apply("head", x)


@register_family
@dataclass(frozen=True)
class CNNConfig(FamilyConfig):
    """Strided convolutions, each followed by the activation, and one linear layer on the last map.

    Attributes:
        image_shape: see `FamilyConfig`.
        classes: see `FamilyConfig`.
        channels: output channels of each convolution.
        kernel_size: side of the square kernels, odd; the padding keeps the map's size before the stride.
        stride: stride of each convolution.
        pooling: ``"mean"`` averages the last map over its positions, ``"none"`` flattens it for the linear layer.
        activation: applied after each convolution.
    """

    family: ClassVar[str] = "cnn"
    channels: tuple[int, ...] = (10, 16)
    kernel_size: int = 3
    stride: int = 2
    pooling: Literal["mean", "none"] = "mean"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise SettingsError(f"cnn config: kernel_size {self.kernel_size} must be odd")

    def layers(self) -> dict[str, nn.Module]:
        """``convs.0``, ``convs.1``, ..., ``head``."""
        widths = (self.image_shape[0], *self.channels)
        convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, self.kernel_size, self.stride, padding=self.kernel_size // 2)
            for fan_in, fan_out in pairwise(widths)
        )
        positions = 1
        if self.pooling == "none":
            positions = math.prod(math.ceil(side / self.stride ** len(convs)) for side in self.image_shape[1:])
        return {"convs": convs, "head": nn.Linear(widths[-1] * positions, self.classes)}

    def forward(self, images: Float[Tensor, "*models batch c h w"], apply: Apply) -> Tensor:
        """See `FamilyConfig.forward`."""
        x = images
        for i in range(len(self.channels)):
            x = apply(f"convs.{i}", x, ACTIVATIONS[self.activation])
        return apply("head", x.mean((-2, -1)) if self.pooling == "mean" else x.flatten(-3))


class Network(nn.Module):
    """One network of a family, as a module."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.config = config
        for name, layer in config.layers().items():
            self.add_module(name, layer)

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Class logits."""
        return self.config.forward(images, lambda name, x, then=_identity: then(self.get_submodule(name)(x)))


@lru_cache(maxsize=256)
def template(config: FamilyConfig) -> Network:
    """Builds the module without memory for its weights: its layers say what to compute.

    Raises:
        SettingsError: the layers cannot be built.
    """
    try:
        with torch.device("meta"):
            return Network(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # sizes may be a stranger's
        raise SettingsError(
            f"{config.family} config: layers cannot be built ({first_line(error)}); correct its sizes"
        ) from error


def family_config(config: Mapping[str, Any]) -> FamilyConfig | None:
    """Reads a config mapping (the content of ``config.json``); None if it names no registered family.

    Raises:
        SettingsError: it names a family but has an unknown key or a wrong value, or its layers cannot be built.
    """
    family = config.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        return None
    values = {key: value for key, value in config.items() if key != "family"}
    found = settings_from_mapping(FAMILIES[family], values, where=f"{family} config")
    template(found)
    return found


def initialize(
    config: FamilyConfig, schemes: list[Initialization], generator: torch.Generator
) -> dict[str, Float[Tensor, "models ..."]]:
    """Draws the parameters of ``len(schemes)`` models, each by its own scheme; biases start at zero.

    The variances are those of `torch.nn.init`: 2 / fan_in (kaiming) or 2 / (fan_in + fan_out) (xavier).
    """
    parameters = {}
    for name, shape in config.shapes().items():
        if len(shape) < 2:
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
    """Runs every model of a population on its own batch of images, all of them at once.

    A linear layer becomes one batched matrix product. So does a convolution on tiny maps, written out as a matrix; on
    larger ones it is one grouped convolution. Layers of other kinds run under `torch.vmap`.

    Args:
        config: the config that all models share.
        parameters: stacked parameters, ``(models, *shape)`` each.
        images: ``images[m]`` is the batch of model m; expand a shared batch along the first axis.
    """
    network = template(config)

    def apply(name: str, x: Tensor, then: Function = _identity) -> Tensor:
        layer = network.get_submodule(name)
        own = {leaf: parameters[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters()}
        if isinstance(layer, nn.Linear) and x.ndim == 3 and "bias" in own:
            # With the batch last, the gradient of a weight comes out in the weight's own layout and needs no copy.
            return then(torch.baddbmm(own["bias"].unsqueeze(2), own["weight"], x.mT)).mT
        if isinstance(layer, nn.Conv2d) and _is_plain(layer) and "bias" in own:
            return then(_stacked_conv(layer, own["weight"], own["bias"], x))
        return then(vmap(lambda weights, batch: functional_call(layer, weights, (batch,)))(own, x))

    return config.forward(images, apply)


def run_models(
    config: FamilyConfig,
    parameters: Parameters,
    images: Float[Tensor, "*models images c h w"],
    rows: Int[Tensor, "models batch"] | None = None,
) -> Float[Tensor, "models batch classes"]:
    """Computes the logits of any number of models on any number of images.

    Runs in chunks of models and images, unless gradients are recorded: they keep everything in memory anyway.

    Args:
        config: the config that all models share.
        parameters: stacked parameters; see `stacked_forward`.
        images: shared by all models, or one batch for each along the first axis.
        rows: indices into shared ``images``, one row for each model; None runs every model on every image.
    """
    count = len(next(iter(parameters.values())))
    seen = rows if rows is not None else images if images.ndim == 5 else images.expand(count, *images.shape)
    models, columns = max(1, count), max(1, seen.shape[1])
    if not torch.is_grad_enabled():
        models = min(models, _STEP_MODELS)
        columns = max(1, _STEP_IMAGES // models)
    logits = []
    for start in range(0, max(1, count), models):
        own = {name: value[start : start + models] for name, value in parameters.items()}
        parts = []
        for batch in seen[start : start + models].split(columns, dim=1):
            # Whole images are copied, where indexing would go entry by entry.
            chosen = batch if rows is None else images.index_select(0, batch.flatten()).unflatten(0, batch.shape)
            parts.append(stacked_forward(config, own, chosen))
        logits.append(_joined(parts, dim=1))
    return _joined(logits, dim=0)


def run_flat(
    config: FamilyConfig,
    architecture: Architecture,
    flat: Float[Tensor, "models params"],
    images: Float[Tensor, "*models images c h w"],
    rows: Int[Tensor, "models batch"] | None = None,
) -> Float[Tensor, "models batch classes"]:
    """Runs models that are given as flat weight vectors; see `run_models`.

    The names of the tensors may begin with those of modules around the network, as of ``torch.compile``.
    """
    parameters, first = unflatten(flat, architecture), next(iter(config.shapes()))
    prefix = min((name.removesuffix(first) for name in parameters if name.endswith(first)), key=len, default="")
    return run_models(config, {name.removeprefix(prefix): own for name, own in parameters.items()}, images, rows)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # without a copy, and gradients keep their layout


def _identity(x: Tensor) -> Tensor:
    return x


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _stacked_conv(layer: nn.Conv2d, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    models, batch, _, height, width = x.shape
    # On tiny maps the whole matrix of the convolution is about as small as the unfolded batch, and one product beats
    # many small convolutions; its size grows with the square of the map, so that larger maps are convolved in groups.
    if layer.out_channels * height * width <= 3 * batch * math.prod(layer.kernel_size):
        return _conv_as_matrix(layer, weight, bias, x)
    grouped = F.conv2d(
        x.transpose(0, 1).flatten(1, 2),
        weight.flatten(0, 1),
        bias.flatten(),
        layer.stride,
        layer.padding,
        layer.dilation,
        groups=models,
    )
    return grouped.unflatten(1, (models, layer.out_channels)).transpose(0, 1)


def _conv_as_matrix(layer: nn.Conv2d, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    taps = _taps(x.shape[3:], layer.kernel_size, layer.dilation, layer.padding, layer.stride).to(weight)
    models, fan_out, fan_in = weight.shape[:3]
    positions = taps.shape[1]
    matrix = (weight.flatten(3) @ taps.flatten(1)).unflatten(3, taps.shape[1:])
    matrix = matrix.permute(0, 2, 4, 1, 3).reshape(models, fan_in * taps.shape[2], fan_out * positions)
    out = torch.baddbmm(bias.repeat_interleave(positions, dim=1).unsqueeze(1), x.flatten(2), matrix)
    height = (
        x.shape[3] + 2 * int(layer.padding[0]) - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1
    ) // layer.stride[0]
    return out.unflatten(2, (fan_out, height + 1, -1))


@lru_cache(maxsize=32)
def _taps(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], padding: Any, stride: Any
) -> Float[Tensor, "taps outputs inputs"]:
    """1 where kernel tap t of output position p reads input position q, else 0."""
    identity = torch.eye(math.prod(size)).reshape(-1, 1, *size)
    return F.unfold(identity, kernel_size, dilation, padding, stride).permute(1, 2, 0).contiguous()
