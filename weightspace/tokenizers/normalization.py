"""Standardisation of token entries with statistics of the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weightspace.errors import TokenError


@dataclass(frozen=True)
class TokenNormalizer:
    """Mean and standard deviation of token entries, fitted once, on the training split, without padding.

    Attributes:
        mean: of the valid entries.
        std: population standard deviation of the valid entries; positive.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        """Refuses statistics that would not normalise.

        Raises:
            TokenError: ``mean`` is not finite, or ``std`` is not finite and positive.
        """
        if not math.isfinite(self.mean) or not (math.isfinite(self.std) and self.std > 0):
            raise TokenError(
                f"token statistics: mean {self.mean}, std {self.std}; fit on finite weights that are not all equal"
            )

    @classmethod
    def fit(cls, chunks: Iterable[tuple[Float[Tensor, "*models n d"], Bool[Tensor, "n d"]]]) -> TokenNormalizer:
        """Accumulates the statistics of a training split that need not fit into memory.

        Chunks are merged in float64 with the pairwise update of Chan, Golub and LeVeque (1979), which stays accurate
        where a running sum of squares cancels.

        Args:
            chunks: tokens with the mask of their architecture; pass the training split only.

        Raises:
            TokenError: no valid entry, or entries that are not finite or all equal.
        """
        count, mean, squares = 0, 0.0, 0.0
        for tokens, mask in chunks:
            values = tokens.masked_select(mask).double()
            if not values.numel():
                continue
            variance, chunk_mean = (float(value) for value in torch.var_mean(values, correction=0))
            added, delta = values.numel(), chunk_mean - mean
            total = count + added
            mean += delta * added / total
            squares += variance * added + delta**2 * count * added / total
            count = total
        if not count:
            raise TokenError("token statistics: no valid entry to fit on; pass the tokens of the training split")
        return cls(mean=mean, std=math.sqrt(squares / count))

    def normalize(
        self, tokens: Float[Tensor, "*models n d"], mask: Bool[Tensor, "n d"]
    ) -> Float[Tensor, "*models n d"]:
        """Returns ``(tokens - mean) / std`` where ``mask`` is true, and zero in the padding."""
        return ((tokens - self.mean) / self.std).masked_fill(~mask, 0.0)

    def denormalize(
        self, tokens: Float[Tensor, "*models n d"], mask: Bool[Tensor, "n d"]
    ) -> Float[Tensor, "*models n d"]:
        """Returns ``tokens * std + mean`` where ``mask`` is true, and zero in the padding."""
        return (tokens * self.std + self.mean).masked_fill(~mask, 0.0)
