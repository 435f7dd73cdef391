"""The prior of weights: samples an autoencoder's latents given datasets and results, by flow matching."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.card import PushedWithCard
from weightspace.models.layers import PositionEmbedding, TokenAttention, TokenConfig, initialize_linear
from weightspace.models.prior.configuration_prior import ConditionedPriorConfig, WeightPriorConfig

_FASTEST = 100.0


@dataclass
class WeightPriorOutput(ModelOutput):
    """What [`WeightPriorModel`] returns.

    Attributes:
        loss: mean squared error of the velocity.
        velocity: `(batch, n, latent_size)` that the model gives the noisy latents.
        denoised: `(batch, n, latent_size)` latents that this velocity leads to, in the autoencoder's own units.
        reconstruction: `(batch, n, token_size)` what the autoencoder decodes them to.
        times: `(batch,)` of the noisy latents, 0 (noise) to 1 (latents).
    """

    loss: Tensor | None = None
    velocity: Tensor | None = None
    denoised: Tensor | None = None
    reconstruction: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PriorCondition:
    """What is asked of a sample; every part may be absent, for a row or for all.

    Attributes:
        dataset: what a joint model sees of the images of each class (see `JointModel.get_dataset_features`), class c
            for output c of the networks. Zeros where there is no class; zeros alone ask for no dataset.
        result: embeddings of results in the joint space, of length 1; a row of zeros asks for none.
        activation: 1 + place of a model's activation in the config's list; 0 for any other, or none.
    """

    dataset: Float[Tensor, "batch classes features"]
    result: Float[Tensor, "batch size"]
    activation: Int[Tensor, " batch"]

    def without(self, *, dataset: bool = False, result: bool = False) -> "PriorCondition":
        """Returns the same condition with a part left out."""
        return PriorCondition(
            torch.zeros_like(self.dataset) if dataset else self.dataset,
            torch.zeros_like(self.result) if result else self.result,
            self.activation,
        )


@dataclass(frozen=True)
class Guidance:
    """How much more than the model says a condition counts; 1 takes the model as it is, 0 leaves the condition out.

    Attributes:
        dataset: of the dataset.
        result: of the result, given the dataset.
    """

    dataset: float = 1.0
    result: float = 1.0


class ConditionedPrior(PushedWithCard):
    """What priors of weights share: a frozen autoencoder, and what datasets, results and activations are told as.

    A dataset is told as its classes, each at the output that stands for it, and their mean to all tokens: with classes
    in another order, outputs in that order are asked for.
    """

    autoencoder: WeightAutoencoderModel
    causal = False

    def _add_conditioned_layers(self, config: ConditionedPriorConfig) -> None:
        """Makes what conditions go through, and the layers that they modulate."""
        width, eps = config.hidden_size, config.layer_norm_eps
        self.class_in = nn.Sequential(nn.LayerNorm(config.class_size, eps=eps), nn.Linear(config.class_size, width))
        self.result_in = nn.Linear(config.result_size, width, bias=False)
        self.absent = nn.Embedding(2, width)
        self.activation = nn.Embedding(1 + len(config.activations), width)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.layers = nn.ModuleList(ConditionedLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=eps)

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        return replace(super().card_facts(), samples=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            initialize_linear(module, scale=getattr(module, "initial_scale", 1.0))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def activation_number(self, activation: str | None) -> int:
        """Number of an activation in a `PriorCondition`; 0 for one that the model does not know."""
        known = self.config.activations
        return 1 + known.index(activation) if activation in known else 0

    def _asked(
        self, condition: PriorCondition, classes: Float[Tensor, "batch classes width"], besides: Tensor | None = None
    ) -> Float[Tensor, "batch width"]:
        """Mixes the parts of a condition, and what else is told of each row, to what the layers are modulated by."""
        count, result = condition.dataset.any(-1).sum(1, keepdim=True), condition.result
        # Entries of embeddings of length 1 are small: at this scale the layer starts with outputs of variance 1.
        scaled = result.to(classes.dtype) * result.shape[-1] ** 0.5
        told = (classes.sum(1) / count.clamp(min=1), self.result_in(scaled))
        asked = self.activation(condition.activation)
        asked = asked if besides is None else besides + asked
        for number, (part, known) in enumerate(zip(told, (count > 0, result.any(-1, keepdim=True)), strict=True)):
            asked = asked + torch.where(known, part, self.absent.weight[number])
        mixed: Tensor = self.mix(asked)
        return mixed

    def _classes(self, condition: PriorCondition) -> Float[Tensor, "batch classes width"]:
        """What is told of each class; zeros where there is none."""
        told: Tensor = self.class_in(condition.dataset.to(self.result_in.weight.dtype))
        return told * condition.dataset.any(-1, keepdim=True)

    def _at_outputs(
        self,
        classes: Float[Tensor, "batch classes width"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"],
    ) -> Float[Tensor, "batch n width"]:
        """Puts what is told of each class where the output is that stands for it, a channel of the last layer."""
        _, layers, channels = position_ids.masked_fill(~attention_mask.unsqueeze(-1), -1).unbind(-1)
        outputs = (layers == layers.amax(1, keepdim=True)) & (channels >= 0) & (channels < classes.shape[1])
        places = torch.where(outputs, channels, 0).unsqueeze(-1).expand(-1, -1, classes.shape[-1])
        return classes.gather(1, places) * outputs.unsqueeze(-1)

    def _in_windows(self, hidden: Tensor, asked: Tensor, attention_mask: Tensor) -> Tensor:
        """Runs the layers on the windows that the autoencoder sees, so that cost grows with the sequence's length."""
        batch, length, width = hidden.shape
        window = min(length, self.autoencoder.config.window)
        missing = -length % window
        hidden = F.pad(hidden, (0, 0, 0, missing)).view(-1, window, width)
        blocked = ~F.pad(attention_mask, (0, missing)).view(-1, 1, 1, window)
        if self.causal:
            blocked = blocked | torch.ones(window, window, dtype=torch.bool, device=blocked.device).triu(1)
        additive = torch.zeros_like(blocked, dtype=hidden.dtype).masked_fill(blocked, torch.finfo(hidden.dtype).min)
        asked = asked.repeat_interleave(len(hidden) // batch, 0)
        for layer in self.layers:
            hidden = layer(hidden, asked, additive)
        return hidden.view(batch, -1, width)[:, :length]


class WeightPriorModel(ConditionedPrior):
    r"""p(W | D, R) by conditional flow matching (Lipman et al., 2023) over the latents of a weight autoencoder.

    A transformer learns the velocity :math:`v(z_t, t, D, R)` that carries noise :math:`z_0` on straight lines to
    latents :math:`z_1`, by the mean squared error to :math:`z_1 - z_0` at :math:`z_t = (1 - t) z_0 + t z_1`. Datasets
    and results come as a joint model sees them, and each is dropped in a share of the training rows, so that one model
    gives P(W | D, R), P(W | D), P(W | R) and P(W), and each can be guided by itself (Ho and Salimans, 2022; two
    conditions as in Brooks et al., 2023, eq. 3):

    .. math:: v = v(\cdot) + g_D (v(D) - v(\cdot)) + g_R (v(D, R) - v(D))

    The autoencoder is a part of the model, frozen. Models are sampled token by token with their positions, so that any
    architecture can be asked for whose tokens the autoencoder can decode.
    """

    config: WeightPriorConfig
    base_model_prefix = "prior"
    main_input_name = "latents"
    input_modalities = "weight"
    supports_gradient_checkpointing = False
    _no_split_modules = ["ConditionedLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["scaler"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: WeightPriorConfig) -> None:
        super().__init__(config)
        assert config.autoencoder_config is not None
        self.autoencoder = WeightAutoencoderModel._from_config(config.autoencoder_config)
        latent, width = self.autoencoder.config.latent_size, config.hidden_size
        self.scaler = LatentScaler(latent)
        self.latent_in = nn.Linear(latent, width)
        self.mask_in = nn.Linear(self.autoencoder.config.token_size, width, bias=False)
        self.positions = PositionEmbedding(config)
        self.time_in = nn.Linear(config.time_size, width)
        self._add_conditioned_layers(config)
        self.velocity_out = nn.Linear(width, latent)
        _start_at_zero(self.velocity_out)  # the first guess is no motion
        self.post_init()
        self.autoencoder.requires_grad_(False)

    def velocity(
        self,
        noisy: Float[Tensor, "batch n latent"],
        times: Float[Tensor, " batch"],
        condition: PriorCondition,
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        attention_mask: Bool[Tensor, "batch n"],
    ) -> Float[Tensor, "batch n latent"]:
        """Says where noisy latents move to at a time.

        Args:
            noisy: standardised latents with noise.
            times: 0 (noise) to 1 (latents).
            condition: see `PriorCondition`.
            weight_mask: true where an entry of a token is a weight.
            position_ids: columns token, layer, channel.
            attention_mask: true where there is a token.
        """
        kind, classes = self.latent_in.weight.dtype, self._classes(condition)
        asked = self._asked(condition, classes, self.time_in(_waves(times, self.config.time_size).to(kind)))
        hidden = self.latent_in(noisy.to(kind)) + self.positions(position_ids) + self.mask_in(weight_mask.to(kind))
        hidden = hidden + self._at_outputs(classes, position_ids, attention_mask)
        hidden = self._in_windows(hidden, asked, attention_mask)
        velocity: Tensor = self.velocity_out(self.norm(hidden))
        return velocity * attention_mask.unsqueeze(-1)

    def forward(
        self,
        latents: Float[Tensor, "batch n latent"],
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        class_features: Float[Tensor, "batch classes features"],
        result_embeds: Float[Tensor, "batch size"],
        activation: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch n latent"],
        times: Float[Tensor, " batch"],
        attention_mask: Bool[Tensor, "batch n"] | None = None,
        decode: bool = False,
        return_loss: bool = True,
    ) -> WeightPriorOutput:
        """Scores the velocity at given noise and times.

        Args:
            latents: of the autoencoder, in its own units.
            weight_mask: as in `velocity`.
            position_ids: as in `velocity`.
            class_features: as `PriorCondition.dataset`.
            result_embeds: as in `PriorCondition`.
            activation: as in `PriorCondition`.
            noise: standard normal.
            times: 0 to 1.
            attention_mask: true where there is a token; all true if left out.
            decode: also decode the latents that are guessed.
            return_loss: leave out the loss if false.
        """
        tokens = torch.ones_like(position_ids[..., 0], dtype=torch.bool)
        tokens = tokens if attention_mask is None else attention_mask.bool()
        goal, share = self.scaler(latents.float()), times.view(-1, 1, 1)
        noisy = (1 - share) * noise + share * goal
        condition = PriorCondition(class_features, result_embeds, activation)
        velocity = self.velocity(noisy, times, condition, weight_mask, position_ids, tokens).float()
        output = WeightPriorOutput(velocity=velocity, times=times)
        output["denoised"] = self.scaler.inverse(noisy + (1 - share) * velocity)
        if decode:
            output["reconstruction"] = self.autoencoder.decode(output["denoised"], weight_mask, position_ids, tokens)
        if return_loss:
            error = (velocity - (goal - noise)).square().mean(-1) * tokens
            output["loss"] = error.sum() / tokens.sum().clamp(min=1)
        return output

    @torch.no_grad()
    def sample(
        self,
        condition: PriorCondition,
        weight_mask: Bool[Tensor, "batch n d"],
        position_ids: Int[Tensor, "batch n 3"],
        generator: torch.Generator,
        attention_mask: Bool[Tensor, "batch n"] | None = None,
        guidance: Guidance | None = None,
        steps: int = 20,
        solver: str = "heun",
        latents: Float[Tensor, "batch n latent"] | None = None,
        begin: float = 0.0,
    ) -> Float[Tensor, "batch n latent"]:
        """Carries noise to latents of the autoencoder.

        Args:
            condition: what is asked for, a row a sample.
            weight_mask: as in `velocity`.
            position_ids: as in `velocity`.
            generator: draws the noise, on the CPU; the same one gives the same samples.
            attention_mask: true where there is a token; all true if left out.
            guidance: see `Guidance`; 1 and 1 if left out.
            steps: of the solver.
            solver: ``"euler"``, or ``"heun"``, which looks twice a step.
            latents: of models to start from; noise alone if left out.
            begin: time to start at, 0 (noise alone) to 1 (the latents as they are).

        Raises:
            ValueError: the solver is unknown or there are no steps.
        """
        if solver not in ("euler", "heun") or steps < 1:
            raise ValueError(f"solver {solver!r} with {steps} steps: choose euler or heun, with 1 step or more")
        tokens = torch.ones_like(position_ids[..., 0], dtype=torch.bool)
        tokens = tokens if attention_mask is None else attention_mask.bool()
        shape = (*position_ids.shape[:2], self.autoencoder.config.latent_size)
        noise = torch.randn(shape, generator=generator).to(self.device) * tokens.unsqueeze(-1)
        state = noise if latents is None else (1 - begin) * noise + begin * self.scaler(latents.float())
        where = (weight_mask, position_ids, tokens)
        guidance = Guidance() if guidance is None else guidance
        times = torch.linspace(begin, 1, steps + 1).tolist()
        for time, after in pairwise(times):
            step = after - time
            velocity = self._guided(state, time, condition, guidance, where)
            if solver == "heun" and after < times[-1]:
                later = self._guided(state + step * velocity, after, condition, guidance, where)
                velocity = (velocity + later) / 2
            state = state + step * velocity
        return self.scaler.inverse(state)

    def _guided(
        self,
        state: Tensor,
        time: float,
        condition: PriorCondition,
        guidance: Guidance,
        where: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        times = torch.full((len(state),), time, device=state.device)
        both = self.velocity(state, times, condition, *where).float()
        if guidance == Guidance():
            return both
        dataset = self.velocity(state, times, condition.without(result=True), *where).float()
        neither = self.velocity(state, times, condition.without(dataset=True, result=True), *where).float()
        return neither + guidance.dataset * (dataset - neither) + guidance.result * (both - dataset)


class LatentScaler(nn.Module):
    """Brings each number of the latents to mean 0 and standard deviation 1 over the training models, and back."""

    centre: Tensor
    scale: Tensor

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(latent_size))
        self.register_buffer("scale", torch.ones(latent_size))

    @torch.no_grad()
    def fit(self, latents: Float[Tensor, "rows latent"]) -> None:
        """Takes mean and standard deviation over the rows."""
        deviation, mean = torch.std_mean(latents.double(), dim=0, correction=0)
        self.centre.copy_(mean)
        self.scale.copy_(deviation.clamp(min=1e-6))

    def forward(self, latents: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Standardises latents."""
        return (latents - self.centre) / self.scale

    def inverse(self, values: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows latent"]:
        """Takes standardised latents back."""
        return values * self.scale + self.centre


class ConditionedLayer(nn.Module):
    """Transformer layer whose norms are scaled and shifted by the condition (adaLN-Zero, Peebles and Xie, 2023)."""

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attention = TokenAttention(config)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.feed_forward_in = nn.Linear(width, config.intermediate_size)
        self.feed_forward_out = nn.Linear(config.intermediate_size, width)
        self.modulation = nn.Linear(width, 6 * width)
        _start_at_zero(self.modulation)  # every layer starts as the identity

    def forward(
        self, hidden: Float[Tensor, "batch n width"], asked: Float[Tensor, "batch width"], attention_mask: Tensor
    ) -> Float[Tensor, "batch n width"]:
        """Attention, then a feed-forward network, each gated by the condition and added to its input."""
        scale, shift, gate, inner_scale, inner_shift, inner_gate = self.modulation(asked).unsqueeze(1).chunk(6, -1)
        seen = self.attention_norm(hidden) * (1 + scale) + shift
        hidden = hidden + gate * self.attention(seen, attention_mask)
        seen = self.feed_forward_norm(hidden) * (1 + inner_scale) + inner_shift
        return hidden + inner_gate * self.feed_forward_out(F.gelu(self.feed_forward_in(seen)))


def _start_at_zero(*layers: nn.Module) -> None:
    for layer in layers:
        layer.initial_scale = 0.0  # type: ignore[assignment]  # read by `_init_weights`


def _waves(times: Float[Tensor, " batch"], size: int) -> Float[Tensor, "batch size"]:
    speeds = torch.exp(torch.linspace(0, math.log(_FASTEST), size // 2, device=times.device))
    angles = times.float().unsqueeze(-1) * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


__all__ = ["ConditionedPrior", "Guidance", "PriorCondition", "WeightPriorModel", "WeightPriorOutput"]
