"""Finite scalar quantisation: latents as codes of a fixed codebook that nothing has to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.errors import TokenError


@dataclass(frozen=True)
class ScalarQuantizer:
    """Rounds every number of a latent to one of a few levels (finite scalar quantisation, Mentzer et al., 2023).

    The interval from -1 to 1 is cut into as many equal parts as there are levels, and a number is rounded to the
    middle of its part. A code is the joint level of neighbouring numbers. There are no codebook vectors that could fall
    out of use, no further losses and no parameters.

    Attributes:
        levels: levels of each of the numbers that one code stands for.
    """

    levels: tuple[int, ...]

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return math.prod(self.levels)

    def round(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch latent"]:
        """Rounds to the nearest level; gradients pass as if nothing were rounded (Bengio et al., 2013)."""
        rounded = self._middles(self.encode(latents)).to(latents.dtype)
        return rounded + (latents - latents.detach())

    @torch.no_grad()
    def encode(self, latents: Float[Tensor, "*batch latent"]) -> Int[Tensor, "*batch codes"]:
        """Numbers the nearest levels; what lies outside of -1 to 1 gets the outermost.

        Args:
            latents: as many numbers as ``levels`` has for each code.
        """
        levels = torch.tensor(self.levels, device=latents.device)
        parts = latents.float().unflatten(-1, (-1, len(self.levels)))
        chosen = ((parts + 1) / 2 * levels).floor().long().clamp(min=0).minimum(levels - 1)
        return (chosen * self._strides(latents.device)).sum(-1)

    def decode(self, codes: Int[Tensor, "*batch codes"]) -> Float[Tensor, "*batch latent"]:
        """Looks up the levels that codes stand for, in float32.

        Raises:
            TokenError: a code is not in the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise TokenError(
                f"codes from {int(codes.min())} to {int(codes.max())} are not all in the codebook; it has "
                f"{self.codebook_size}, counted from 0"
            )
        return self._middles(codes)

    def _middles(self, codes: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=codes.device)
        chosen = codes.unsqueeze(-1) // self._strides(codes.device) % levels
        return ((2 * chosen + 1) / levels - 1).flatten(-2)

    def _strides(self, device: torch.device) -> Int[Tensor, " numbers"]:
        """What a step of one level adds to a code."""
        sizes = [math.prod(self.levels[:place]) for place in range(len(self.levels))]
        return torch.tensor(sizes, device=device)
