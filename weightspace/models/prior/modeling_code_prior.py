"""The prior of codes: samples the codes of a quantised autoencoder one after the other."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.layers import PositionEmbedding, token_mask
from weightspace.models.prior.configuration_prior import WeightCodePriorConfig
from weightspace.models.prior.modeling_prior import ConditionedPrior, Guidance, PriorCondition
from weightspace.models.shapes import EntryMask, Hidden, Latents, Positions, TokenMask


@dataclass
class WeightCodePriorOutput(ModelOutput):
    """What [`WeightCodePriorModel`] returns.

    Attributes:
        loss: cross-entropy in nats, the mean over the numbers that codes stand for.
        logits: `(batch, n, latent_size, levels)` of every number's level given what comes before it.
        expected: `(batch, n, latent_size)` latents, each number at its mean under these logits.
        reconstruction: `(batch, n, token_size)` what the autoencoder decodes the expected latents to.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    expected: Tensor | None = None
    reconstruction: Tensor | None = None


class WeightCodePriorModel(ConditionedPrior):
    r"""p(W | D, R) as an autoregressive model of the codes of a quantised weight autoencoder.

    A causal transformer reads the tokens of a model in order. At each token it knows the tokens before it in the
    autoencoder's window, and the place and shape of the token itself. A code is the joint level of a few numbers of the
    token's latent; a masked network on top of the transformer's state (Germain et al., 2015) predicts the level of one
    number after the other, so that no codebook is too large:

    .. math:: p(c \mid D, R) = \prod_t \prod_j p(c_{tj} \mid c_{<t}, c_{t,<j}, D, R)

    Conditions enter, are dropped in training and guided as in [`WeightPriorModel`]; the logits are guided. In training,
    codes of some tokens may be hidden: the model then has to predict from the condition alone, as it must for the first
    tokens of a sample.
    """

    config: WeightCodePriorConfig
    base_model_prefix = "code_prior"
    loss_name = "codes"
    causal = True

    def __init__(self, config: WeightCodePriorConfig) -> None:
        super().__init__(config)
        assert config.autoencoder_config is not None
        self.autoencoder = WeightAutoencoderModel._from_config(config.autoencoder_config)
        self.levels = tuple(self.autoencoder.config.code_levels or ()) * self.autoencoder.codes_per_token
        latent, width = len(self.levels), config.hidden_size
        self.latent_in = nn.Linear(latent, width)
        self.unknown = nn.Embedding(1, width)
        self.mask_in = nn.Linear(self.autoencoder.config.token_size, width, bias=False)
        self.positions = PositionEmbedding(config)
        self._add_conditioned_layers(config)
        self.number_from_state = nn.Linear(width, latent * config.number_size)
        self.number_from_numbers = nn.Linear(latent, latent * config.number_size, bias=False)
        self.level_out = nn.Linear(config.number_size, max(self.levels))
        self.post_init()
        self.autoencoder.requires_grad_(False)

    def forward(
        self,
        latents: Latents,
        weight_mask: EntryMask,
        position_ids: Positions,
        class_features: Float[Tensor, "batch classes features"],
        result_embeds: Float[Tensor, "batch size"],
        activation: Int[Tensor, " batch"],
        known: TokenMask | None = None,
        attention_mask: TokenMask | None = None,
        ordered: Bool[Tensor, " batch"] | None = None,
        decode: bool = False,
        return_loss: bool = True,
    ) -> WeightCodePriorOutput:
        """Scores the codes of models.

        Latents are rounded to codes here. The parts of the condition are those of `PriorCondition`. Later tokens, and
        later numbers of the same token, see the codes of the ``known`` tokens, by default all. With ``decode`` the
        expected latents are decoded, too.
        """
        tokens = token_mask(position_ids, attention_mask)
        known = torch.ones_like(tokens) if known is None else known
        numbers = self.autoencoder.from_codes(self.autoencoder.to_codes(latents))
        condition = PriorCondition(class_features, result_embeds, activation, ordered)
        modulation, at_outputs = self._modulation(condition, position_ids, tokens)
        hidden = self._entered(self._before(numbers, known), weight_mask, position_ids) + at_outputs
        states = self._states(hidden, tokens, modulation)
        logits = self._possible(self._logits(states, numbers * known.unsqueeze(-1)).float())
        output = WeightCodePriorOutput(logits=logits, expected=self._expected(logits))
        if decode:
            output["reconstruction"] = self.autoencoder.decode(output["expected"], weight_mask, position_ids, tokens)
        if return_loss:
            output["loss"] = F.cross_entropy(logits[tokens].flatten(0, 1), self._levels_of(numbers[tokens]).flatten())
        return output

    @torch.no_grad()
    def sample(
        self,
        condition: PriorCondition,
        weight_mask: EntryMask,
        position_ids: Positions,
        generator: torch.Generator,
        attention_mask: TokenMask | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
    ) -> Int[Tensor, "batch n codes"]:
        """Draws the codes of whole models, token by token and number by number.

        Args:
            condition: one row a sample.
            weight_mask: of the tokens to sample.
            position_ids: of the tokens to sample.
            generator: draws, on the CPU; the same one gives the same samples.
            attention_mask: of the tokens to sample; all padding is at the end.
            guidance: see `Guidance`; none by default.
            temperature: share that is kept of the difference between a draw and the expected number: 1 samples the
                model as it is, 0 takes what is expected. (Most of a model is noise of its initialisation, so that the
                mode of many levels means little, while levels are in order and have a mean.)

        Raises:
            ValueError: the temperature is negative.
        """
        if temperature < 0:
            raise ValueError(f"temperature {temperature} is negative; give 0 or more")
        tokens = token_mask(position_ids, attention_mask)
        parts = [
            (share, *self._modulation(part, position_ids, tokens))
            for share, part in _guided_parts(condition, guidance or Guidance())
        ]
        kind = self.latent_in.weight.dtype
        numbers = torch.zeros(*tokens.shape, len(self.levels), dtype=kind, device=self.device)
        for index in range(tokens.shape[1]):
            window = slice(index - index % self.autoencoder.config.window, index + 1)
            hidden = self._entered(self._before(numbers, torch.ones_like(tokens)), weight_mask, position_ids)
            states = [
                (share, self._states((hidden + at_outputs)[:, window], tokens[:, window], modulation)[:, -1:])
                for share, modulation, at_outputs in parts
            ]
            for number, middles in enumerate(self._middles()):
                given = numbers[:, index : index + 1]
                logits = torch.stack([share * self._logits(state, given)[:, 0].float() for share, state in states])
                chances = self._possible(logits.sum(0))[:, number].softmax(-1)
                numbers[:, index, number] = _drawn(chances, middles, temperature, generator).to(kind)
        return self.autoencoder.to_codes(numbers)

    def _before(self, numbers: Tensor, known: Tensor) -> Hidden:
        """What each token sees of the token before it."""
        numbers, known = F.pad(numbers[:, :-1], (0, 0, 1, 0)), F.pad(known[:, :-1], (1, 0))
        return torch.where(known.unsqueeze(-1), self.latent_in(numbers), self.unknown.weight)

    def _logits(self, states: Hidden, numbers: Latents) -> Float[Tensor, "batch n latent levels"]:
        """Scores the levels of every number of tokens given the numbers before it."""
        count = len(self.levels)
        before = torch.ones(count, count, device=numbers.device).tril(-1)
        weight = self.number_from_numbers.weight * before.repeat_interleave(self.config.number_size, 0)
        inner = F.gelu(self.number_from_state(states) + F.linear(numbers, weight.to(numbers.dtype)))
        logits: Tensor = self.level_out(inner.unflatten(-1, (count, -1)))
        return logits

    def _possible(self, logits: Float[Tensor, "*batch latent levels"]) -> Float[Tensor, "*batch latent levels"]:
        """Rules out levels that a number does not have."""
        return logits.masked_fill(self._middles().isnan(), torch.finfo(logits.dtype).min)

    def _expected(self, logits: Float[Tensor, "batch n latent levels"]) -> Latents:
        return (logits.softmax(-1) * self._middles().nan_to_num()).sum(-1)

    def _levels_of(self, numbers: Float[Tensor, "*batch latent"]) -> Int[Tensor, "*batch latent"]:
        return _nearest(numbers.float().unsqueeze(-1), self._middles())

    def _middles(self) -> Float[Tensor, "latent levels"]:
        """The number that each level stands for; NaN where a number has fewer levels than the longest."""
        counts = torch.tensor(self.levels, device=self.device).unsqueeze(-1)
        levels = torch.arange(max(self.levels), device=self.device)
        return ((2 * levels + 1) / counts - 1).masked_fill(levels >= counts, torch.nan)


def _guided_parts(condition: PriorCondition, guidance: Guidance) -> list[tuple[float, PriorCondition]]:
    """Conditions whose logits, each times its share, add up to the guided logits; see `WeightPriorModel`."""
    parts = [
        (guidance.result, condition),
        (guidance.dataset - guidance.result, condition.without(result=True)),
        (1 - guidance.dataset, condition.without(dataset=True, result=True)),
    ]
    return [(share, part) for share, part in parts if share]


def _drawn(
    chances: Float[Tensor, "batch levels"],
    middles: Float[Tensor, " levels"],
    temperature: float,
    generator: torch.Generator,
) -> Float[Tensor, " batch"]:
    """Draws levels, moves them towards their mean, and returns the numbers that the nearest levels stand for."""
    chosen = torch.multinomial(chances.cpu(), 1, generator=generator).to(middles.device)
    expected = (chances * middles.nan_to_num()).sum(-1, keepdim=True)
    moved = expected + temperature * (middles[chosen] - expected)
    return middles[_nearest(moved, middles)]


def _nearest(numbers: Tensor, middles: Tensor) -> Tensor:
    """Returns which of the middles along the last axis is nearest."""
    return (numbers - middles).abs().nan_to_num(nan=torch.inf).argmin(-1)
