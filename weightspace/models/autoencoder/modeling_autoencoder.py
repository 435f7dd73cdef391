"""The weight autoencoder: weight tokens to latents, latents back to weight tokens, and one embedding a model."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.errors import SettingsError
from weightspace.losses import masked_mse, nt_xent
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.quantization_autoencoder import ScalarQuantizer
from weightspace.models.layers import PositionEmbedding, TokenTransformer, in_windows, token_mask
from weightspace.models.pooling import STATISTICS, depth_weights, entry_statistics, relative_depths, state_moments
from weightspace.models.pretrained import WeightspaceModel


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
        weight_values: Float[Tensor, "batch n d"],
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch n latent"]:
        """Compresses tokens to latents.

        Args:
            weight_values: normalised token entries, zero in the padding.
            weight_mask: true where an entry is a weight.
            position_ids: columns token, layer, channel.
            attention_mask: true where there is a token; all true if left out.
        """
        values = weight_values.to(self.token_in.weight.dtype)
        hidden = self.token_in(torch.cat([values, weight_mask.to(values.dtype)], dim=-1))
        hidden = hidden + self.encoder_positions(position_ids)
        mask = token_mask(position_ids, attention_mask)
        latents = self.to_latent(in_windows(self.encoder, self.config.window, hidden, mask))
        return latents if self.quantizer is None else latents.tanh()

    def decode(
        self,
        latents: Float[Tensor, "batch n latent"],
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch n d"]:
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

    def to_codes(self, latents: Float[Tensor, "batch n latent"]) -> Int[Tensor, "batch n codes"]:
        """Rounds latents to codes, those of padding to any; raises like `codes_per_token`."""
        return self._codes().encode(latents)

    def from_codes(self, codes: Int[Tensor, "batch n codes"]) -> Float[Tensor, "batch n latent"]:
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
        weight_values: Float[Tensor, "batch n d"],
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"] | None = None,
        depths: Float[Tensor, "batch n"] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeds whole models.

        Arguments are those of `encode`. ``depths``, the relative depth of each token's layer, 0 to 1, has to be given
        for sequences that hold a part of a model; by default it is derived from ``position_ids``.

        Returns:
            Latents as ``last_hidden_state`` and one embedding a model as ``pooler_output``.
        """
        latents = self.encode(weight_values, weight_mask, position_ids, attention_mask)
        parts = self._parts(position_ids, attention_mask, depths)
        moments = state_moments(latents.float(), parts)
        statistics = entry_statistics(weight_values.float(), weight_mask, parts)
        return BaseModelOutputWithPooling(
            last_hidden_state=latents, pooler_output=torch.cat([moments, statistics], dim=-1)
        )

    def forward(
        self,
        weight_values: Float[Tensor, "batch n d"],
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"] | None = None,
        depths: Float[Tensor, "batch n"] | None = None,
        labels: Float[Tensor, "batch n d"] | None = None,
        views: int = 1,
        return_loss: bool = True,
    ) -> WeightAutoencoderOutput:
        """Encodes, decodes and scores tokens.

        Tokens are given as to `get_weight_features`. The target is ``labels`` if ``weight_values`` are erased or noisy.
        With ``views`` of 2, the second half of the batch holds other views of the models of the first half, in the same
        order, for the contrastive loss.
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


__all__ = ["WeightAutoencoderModel", "WeightAutoencoderOutput"]
