"""The tensors that models take and return: sequences of weight tokens, batch first."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Entries = Float[Tensor, "batch n d"]
"""Normalised entries of the tokens, zero in the padding."""

EntryMask = Bool[Tensor, "batch n d"]
"""True where an entry is a weight."""

Positions = Int[Tensor, "batch n 3"]
"""Columns token, layer, channel."""

TokenMask = Bool[Tensor, "batch n"]
"""True where there is a token; all true where a mask is left out."""

Depths = Float[Tensor, "batch n"]
"""Relative depth of each token's layer, 0 to 1; has to be given for sequences that hold a part of a model."""

Links = Int[Tensor, "batch n d"]
"""Which token each entry reads, counted from 1, and 0 for none; see `token_links`. None are known if left out."""

Hidden = Float[Tensor, "batch n width"]
"""States of the tokens in a transformer."""

Latents = Float[Tensor, "batch n latent"]
"""What an autoencoder compresses the tokens to."""
