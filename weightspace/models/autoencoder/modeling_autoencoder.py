"""The weight autoencoder: weight tokens to latents, latents back to weight tokens, and one embedding a model."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.errors import SettingsError, TokenError
from weightspace.losses import masked_mse, nt_xent
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.layers import PositionEmbedding, TokenTransformer, in_windows, token_mask
from weightspace.models.pooling import STATISTICS, depth_weights, entry_statistics, relative_depths, state_moments
from weightspace.models.pretrained import WeightspaceModel
from weightspace.models.shapes import Depths, Entries, EntryMask, Latents, Positions, TokenMask


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


@dataclass
class WeightAutoencoderOutput(ModelOutput):
    """What [`WeightAutoencoderModel`] returns.

    Attributes:
        loss: `beta * reconstruction_loss + (1 - beta) * contrastive_loss`.
        reconstruction_loss: masked mean squared error in units of the targets' variance.
        contrastive_loss: NT-Xent between the two views; None for a single view.
        reconstruction: `(batch, n, token_size)` decoded tokens, zero in the padding.
        latents: `(batch, n, latent_size)`.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    latents: Tensor | None = None


class WeightAutoencoderModel(WeightspaceModel):
    """Transformer autoencoder on weight tokens in the manner of SANE (Schürholt et al., 2024).

    Every token is compressed to `latent_size` numbers while it sees the other tokens of its window. The embedding of a
    model holds, for each of `depth_bins` parts of the network, moments of the latents and statistics of the weights
    themselves; see [`state_moments`] and [`entry_statistics`]. The contrastive loss acts on the moments of the latents.

    With `code_levels` in its config the decoder sees latents rounded to codes, see [`to_codes`]; embeddings and the
    contrastive loss see them as they are.
    """

    config: WeightAutoencoderConfig
    base_model_prefix = "weight_autoencoder"
    main_input_name = "weight_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: WeightAutoencoderConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.token_in = nn.Linear(2 * config.token_size, width)
        self.encoder_positions = PositionEmbedding(config)
        self.encoder = TokenTransformer(config, config.num_encoder_layers)
        self.to_latent = nn.Linear(width, config.latent_size)
        self.quantizer = None if config.code_levels is None else ScalarQuantizer(tuple(config.code_levels))
        self.from_latent = nn.Linear(config.latent_size, width)
        self.mask_in = nn.Linear(config.token_size, width, bias=False)
        self.decoder_positions = PositionEmbedding(config)
        self.decoder = TokenTransformer(config, config.num_decoder_layers)
        self.token_out = nn.Linear(width, config.token_size)
        features = 2 * config.depth_bins * config.latent_size
        self.projection = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, config.projection_size)
        )
        self.post_init()

    @property
    def embedding_size(self) -> int:
        """Length of the embedding of one model."""
        return int(self.config.depth_bins * (2 * self.config.latent_size + STATISTICS))

    @property
    def decoding_modules(self) -> list[nn.Module]:
        """The parts that `decode` needs and `encode` does not."""
        return [self.from_latent, self.mask_in, self.decoder_positions, self.decoder, self.token_out]

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        facts = super().card_facts()
        if self.quantizer is not None:
            codes = {"codes_per_token": self.codes_per_token, "codebook_size": self.quantizer.codebook_size}
            facts = replace(facts, config={**facts.config, **codes})
        return replace(facts, embedding_size=self.embedding_size)

    def encode(
        self,
        weight_values: Entries,
        weight_mask: EntryMask,
        position_ids: Positions,
        attention_mask: TokenMask | None = None,
    ) -> Latents:
        """Compresses tokens to latents; see `weightspace.models.shapes` for the tensors."""
        values = weight_values.to(self.token_in.weight.dtype)
        hidden = self.token_in(torch.cat([values, weight_mask.to(values.dtype)], dim=-1))
        hidden = hidden + self.encoder_positions(position_ids)
        mask = token_mask(position_ids, attention_mask)
        latents = self.to_latent(in_windows(self.encoder, self.config.window, hidden, mask))
        return latents if self.quantizer is None else latents.tanh()

    def decode(
        self, latents: Latents, weight_mask: EntryMask, position_ids: Positions, attention_mask: TokenMask | None = None
    ) -> Entries:
        """Expands latents to normalised tokens; ``weight_mask`` says which entries exist, all others are zero.

        Latents are rounded to codes first if the model has them; gradients pass through.
        """
        entries = weight_mask.to(latents.dtype)
        latents = latents if self.quantizer is None else self.quantizer.round(latents)
        hidden = self.from_latent(latents) + self.mask_in(entries) + self.decoder_positions(position_ids)
        hidden = in_windows(self.decoder, self.config.window, hidden, token_mask(position_ids, attention_mask))
        return self.token_out(hidden) * entries

    @property
    def codes_per_token(self) -> int:
        """Number of codes that the latent of one token is rounded to.

        Raises:
            SettingsError: the model has no codes.
        """
        return int(self.config.latent_size // len(self._codes().levels))

    def to_codes(self, latents: Latents) -> Int[Tensor, "batch n codes"]:
        """Rounds latents to codes, those of padding to any; raises like `codes_per_token`."""
        return self._codes().encode(latents)

    def from_codes(self, codes: Int[Tensor, "batch n codes"]) -> Latents:
        """Looks up the latents that codes stand for, the inverse of `to_codes`; raises like it.

        Raises:
            TokenError: a code is not in the codebook.
        """
        return self._codes().decode(codes).to(self.from_latent.weight.dtype)

    def _codes(self) -> ScalarQuantizer:
        if self.quantizer is None:
            raise SettingsError("code_levels: this autoencoder has none; train one with `code_levels` set")
        return self.quantizer

    def get_weight_features(
        self,
        weight_values: Entries,
        weight_mask: EntryMask,
        position_ids: Positions,
        attention_mask: TokenMask | None = None,
        depths: Depths | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeds whole models: latents as ``last_hidden_state``, one embedding a model as ``pooler_output``."""
        latents = self.encode(weight_values, weight_mask, position_ids, attention_mask)
        parts = self._parts(position_ids, attention_mask, depths)
        moments = state_moments(latents.float(), parts)
        statistics = entry_statistics(weight_values.float(), weight_mask, parts)
        return BaseModelOutputWithPooling(
            last_hidden_state=latents, pooler_output=torch.cat([moments, statistics], dim=-1)
        )

    def forward(
        self,
        weight_values: Entries,
        weight_mask: EntryMask,
        position_ids: Positions,
        attention_mask: TokenMask | None = None,
        depths: Depths | None = None,
        labels: Entries | None = None,
        views: int = 1,
        return_loss: bool = True,
    ) -> WeightAutoencoderOutput:
        """Encodes, decodes and scores tokens.

        The target is ``labels`` if ``weight_values`` are erased or noisy. With ``views`` of 2, the second half of the
        batch holds other views of the models of the first half, in the same order, for the contrastive loss.
        """
        latents = self.encode(weight_values, weight_mask, position_ids, attention_mask)
        reconstruction = self.decode(latents, weight_mask, position_ids, attention_mask)
        output = WeightAutoencoderOutput(reconstruction=reconstruction, latents=latents)
        if return_loss:
            target = weight_values if labels is None else labels
            output["reconstruction_loss"] = masked_mse(reconstruction.float(), target.float(), weight_mask)
            output["loss"] = self.config.beta * output["reconstruction_loss"]
            if views == 2:
                moments = state_moments(latents.float(), self._parts(position_ids, attention_mask, depths))
                first, second = self.projection(moments).float().chunk(2)
                output["contrastive_loss"] = nt_xent(first, second, float(self.config.temperature))
                output["loss"] = output["loss"] + (1 - self.config.beta) * output["contrastive_loss"]
        return output

    def _parts(
        self, position_ids: Tensor, attention_mask: Tensor | None, depths: Tensor | None
    ) -> Float[Tensor, "batch bins n"]:
        mask = token_mask(position_ids, attention_mask)
        depths = relative_depths(position_ids, mask) if depths is None else depths.float()
        return depth_weights(depths, mask, self.config.depth_bins)
