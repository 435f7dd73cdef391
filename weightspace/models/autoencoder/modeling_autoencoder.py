"""The weight autoencoder: weight tokens to latents, latents back to weight tokens, and one embedding a model."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.errors import SettingsError
from weightspace.losses import masked_mse, nt_xent
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.quantization_autoencoder import ScalarQuantizer
from weightspace.models.card import PushedWithCard
from weightspace.models.layers import PositionEmbedding, TokenTransformer, initialize_linear
from weightspace.models.pooling import STATISTICS, depth_weights, entry_statistics, relative_depths, state_moments

_WINDOWS_AT_ONCE = 512


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


class WeightAutoencoderModel(PushedWithCard):
    """Transformer autoencoder on weight tokens in the manner of SANE (Schürholt et al., 2024).

    Every token is compressed to `latent_size` numbers while it sees the other tokens of its window. The embedding of a
    model holds, for each of `depth_bins` parts of the network, moments of the latents and statistics of the weights
    themselves; see [`state_moments`] and [`entry_statistics`]. The contrastive loss acts on the moments of the latents.

    With `code_levels` in its config the decoder sees latents rounded to codes, which [`to_codes`] tells; embeddings and
    the contrastive loss see them as they are.
    """

    config: WeightAutoencoderConfig
    base_model_prefix = "weight_autoencoder"
    main_input_name = "weight_values"
    input_modalities = "weight"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Variance 1 / fan_in keeps signals of weight tokens, which carry no vocabulary-sized embedding, at unit scale.
        if isinstance(module, nn.Linear):
            initialize_linear(module, scale=getattr(module, "initial_scale", 1.0))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

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
        latents = self.to_latent(self._in_windows(self.encoder, hidden, attention_mask))
        return latents if self.quantizer is None else self.quantizer.bound(latents)

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
        mask = weight_mask.to(latents.dtype)
        latents = latents if self.quantizer is None else self.quantizer.round(latents)
        hidden = self.from_latent(latents) + self.mask_in(mask) + self.decoder_positions(position_ids)
        hidden = self._in_windows(self.decoder, hidden, attention_mask)
        return self.token_out(hidden) * mask

    @property
    def codes_per_token(self) -> int:
        """Number of codes that the latent of one token is rounded to.

        Raises:
            SettingsError: the model has no codes.
        """
        return int(self.config.latent_size // len(self._codes().levels))

    def to_codes(self, latents: Float[Tensor, "batch n latent"]) -> Int[Tensor, "batch n codes"]:
        """Rounds latents to codes; those of padding mean nothing.

        Raises:
            SettingsError: the model has no codes.
        """
        return self._codes().encode(latents)

    def from_codes(self, codes: Int[Tensor, "batch n codes"]) -> Float[Tensor, "batch n latent"]:
        """Looks up the latents that codes stand for. `to_codes` gives the same codes back, `decode` the weights.

        Raises:
            SettingsError: the model has no codes.
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

        Args:
            weight_values: as in `encode`.
            weight_mask: as in `encode`.
            position_ids: as in `encode`.
            attention_mask: as in `encode`.
            depths: relative depth of each token's layer, 0 to 1; derived from ``position_ids`` if left out, which is
                right for sequences that hold a whole model.

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

        Args:
            weight_values: as in `encode`; possibly erased or noisy.
            weight_mask: as in `encode`.
            position_ids: as in `encode`.
            attention_mask: as in `encode`.
            depths: as in `get_weight_features`.
            labels: tokens to reconstruct; ``weight_values`` if left out.
            views: 2 if the second half of the batch holds other views of the models of the first half, in the same
                order; the contrastive loss needs them.
            return_loss: leave out the losses if false.
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
        mask = (
            torch.ones_like(position_ids[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        depths = relative_depths(position_ids, mask) if depths is None else depths.float()
        return depth_weights(depths, mask, self.config.depth_bins)

    def _in_windows(self, stack: TokenTransformer, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Runs ``stack`` on windows of the sequence, so that cost grows with its length and not with the square."""
        batch, length, width = hidden.shape
        mask = hidden.new_ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        window = self.config.window
        if length <= window:
            return stack(hidden, mask)
        missing = -length % window
        hidden = nn.functional.pad(hidden, (0, 0, 0, missing)).view(-1, window, width)
        mask = nn.functional.pad(mask, (0, missing)).view(-1, window)
        # What a layer holds at once would otherwise grow with the model that is embedded.
        parts = zip(hidden.split(_WINDOWS_AT_ONCE), mask.split(_WINDOWS_AT_ONCE), strict=True)
        return torch.cat([stack(*part) for part in parts]).view(batch, -1, width)[:, :length]


__all__ = ["WeightAutoencoderModel", "WeightAutoencoderOutput"]
