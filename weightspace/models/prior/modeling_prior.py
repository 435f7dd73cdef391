"""The prior of weights: samples an autoencoder's latents given datasets and results, by flow matching."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.layers import PositionEmbedding, TokenLayer, additive_mask, in_windows, start_at, token_mask
from weightspace.models.pretrained import WeightspaceModel
from weightspace.models.prior.configuration_prior import ConditionedPriorConfig, WeightPriorConfig
from weightspace.models.shapes import EntryMask, Hidden, Latents, Positions, TokenMask

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
    """The condition of each row of a batch; every part may be absent, for a row or for all.

    Attributes:
        class_features: what a joint model sees of the images of each class (`JointModel.get_dataset_features`), class c
            for output c of the networks. Zeros where there is no class; zeros alone for no dataset.
        result_embeds: embeddings of results in the joint space, of length 1; a row of zeros for none.
        activation: 1 + index of a network's activation in the config's list; 0 for any other, or none.
        ordered: whether the channels of a network's last layer are known to be its outputs; true for all if left out.
            Classes enter at no token of the others.
    """

    class_features: Float[Tensor, "batch classes features"]
    result_embeds: Float[Tensor, "batch size"]
    activation: Int[Tensor, " batch"]
    ordered: Bool[Tensor, " batch"] | None = None

    def without(self, *, dataset: bool = False, result: bool = False) -> "PriorCondition":
        """Returns the same condition with a part left out."""
        parts = {"class_features": dataset, "result_embeds": result}
        return replace(self, **{name: torch.zeros_like(getattr(self, name)) for name, left in parts.items() if left})


@dataclass(frozen=True)
class Guidance:
    """Scales of classifier-free guidance; 1 samples the model as it is, 0 drops the condition, more than 1 stresses it.

    Attributes:
        dataset: of the dataset.
        result: of the result, given the dataset.
    """

    dataset: float = 1.0
    result: float = 1.0


class ConditionedPrior(WeightspaceModel):
    """What priors of weights share: a frozen autoencoder, and conditioning on datasets, results and activations.

    The classes of a dataset enter at the outputs that stand for them, and their mean at all tokens: with the classes in
    another order, networks with their outputs in that order are sampled.
    """

    autoencoder: WeightAutoencoderModel
    mask_in: nn.Linear
    positions: PositionEmbedding
    main_input_name = "latents"
    causal = False
    loss_name: str
    """What training calls the loss."""
    supports_gradient_checkpointing = False

    def _add_conditioned_layers(self, config: ConditionedPriorConfig) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.class_in = nn.Sequential(nn.LayerNorm(config.class_size, eps=eps), nn.Linear(config.class_size, width))
        self.result_in = nn.Linear(config.result_size, width, bias=False)
        self.absent = nn.Embedding(2, width)
        self.activation = nn.Embedding(1 + len(config.activations), width)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.layers = nn.ModuleList(TokenLayer(config, conditioned=True) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=eps)

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        return replace(super().card_facts(), samples=True)

    def activation_number(self, activation: str | None) -> int:
        """Number of an activation in a `PriorCondition`; 0 for one that the model does not know."""
        known = self.config.activations
        return 1 + known.index(activation) if activation in known else 0

    def _modulation(
        self,
        condition: PriorCondition,
        position_ids: Positions,
        tokens: TokenMask,
        time: Float[Tensor, "batch width"] | None = None,
    ) -> tuple[Float[Tensor, "batch width"], Hidden]:
        """Returns what modulates the layers of each row, and what is added at the tokens of the outputs."""
        features, result = condition.class_features, condition.result_embeds
        present = features.any(-1)
        classes = self.class_in(features.to(self.result_in.weight.dtype)) * present.unsqueeze(-1)
        count = present.sum(1, keepdim=True)
        # Entries of embeddings of length 1 are small: at this scale the layer starts with outputs of variance 1.
        scaled = result.to(classes.dtype) * result.shape[-1] ** 0.5
        parts = (classes.sum(1) / count.clamp(min=1), self.result_in(scaled))
        total = self.activation(condition.activation)
        total = total if time is None else time + total
        for number, (part, known) in enumerate(zip(parts, (count > 0, result.any(-1, keepdim=True)), strict=True)):
            total = total + torch.where(known, part, self.absent.weight[number])
        return self.mix(total), _at_outputs(classes, position_ids, tokens, condition.ordered)

    def _entered(self, entered: Hidden, weight_mask: Tensor, position_ids: Tensor) -> Hidden:
        """Adds to what enters at each token its position and its shape."""
        return entered + self.positions(position_ids) + self.mask_in(weight_mask.to(entered.dtype))

    def _states(self, hidden: Tensor, tokens: Tensor, modulation: Tensor) -> Hidden:
        """Runs the layers on the windows of the autoencoder."""
        return self.norm(in_windows(self._run_layers, self.autoencoder.config.window, hidden, tokens, modulation))

    def _run_layers(self, hidden: Tensor, tokens: Tensor, modulation: Tensor) -> Tensor:
        additive = additive_mask(tokens, hidden.dtype, causal=self.causal)
        for layer in self.layers:
            hidden = layer(hidden, additive, modulation)
        return hidden


class WeightPriorModel(ConditionedPrior):
    r"""p(W | D, R) by conditional flow matching (Lipman et al., 2023) over the latents of a weight autoencoder.

    A transformer learns the velocity :math:`v(z_t, t, D, R)` that carries noise :math:`z_0` on straight lines to
    latents :math:`z_1`, by the mean squared error to :math:`z_1 - z_0` at :math:`z_t = (1 - t) z_0 + t z_1`. Datasets
    and results come as a joint model sees them, and each is dropped in a share of the training rows, so that one model
    gives P(W | D, R), P(W | D), P(W | R) and P(W), and each can be guided by itself (Ho and Salimans, 2022; two
    conditions as in Brooks et al., 2023, eq. 3):

    .. math:: v = v(\cdot) + g_D (v(D) - v(\cdot)) + g_R (v(D, R) - v(D))

    The autoencoder is a frozen part of the model. Tokens are sampled with their positions, so that any architecture can
    be sampled whose tokens the autoencoder can decode.
    """

    config: WeightPriorConfig
    base_model_prefix = "prior"
    loss_name = "flow"
    _keep_in_fp32_modules_strict = ["scaler"]  # noqa: RUF012

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
        self.velocity_out = start_at(0.0, nn.Linear(width, latent))  # the first guess is no motion
        self.post_init()
        self.autoencoder.requires_grad_(False)

    def velocity(
        self,
        noisy: Latents,
        times: Float[Tensor, " batch"],
        condition: PriorCondition,
        weight_mask: EntryMask,
        position_ids: Positions,
        attention_mask: TokenMask,
    ) -> Latents:
        """Returns the velocity of standardised latents with noise, at times from 0 (noise) to 1 (latents)."""
        kind = self.latent_in.weight.dtype
        time = self.time_in(_waves(times, self.config.time_size).to(kind))
        modulation, at_outputs = self._modulation(condition, position_ids, attention_mask, time)
        hidden = self._entered(self.latent_in(noisy.to(kind)), weight_mask, position_ids) + at_outputs
        velocity: Tensor = self.velocity_out(self._states(hidden, attention_mask, modulation))
        return velocity * attention_mask.unsqueeze(-1)

    def forward(
        self,
        latents: Latents,
        weight_mask: EntryMask,
        position_ids: Positions,
        class_features: Float[Tensor, "batch classes features"],
        result_embeds: Float[Tensor, "batch size"],
        activation: Int[Tensor, " batch"],
        noise: Latents,
        times: Float[Tensor, " batch"],
        attention_mask: TokenMask | None = None,
        ordered: Bool[Tensor, " batch"] | None = None,
        decode: bool = False,
        return_loss: bool = True,
    ) -> WeightPriorOutput:
        """Scores the velocity at given times and standard normal noise.

        The parts of the condition are those of `PriorCondition`. With ``decode`` the denoised latents are decoded, too.
        """
        tokens = token_mask(position_ids, attention_mask)
        goal, share = self.scaler(latents.float()), times.view(-1, 1, 1)
        noisy = (1 - share) * noise + share * goal
        condition = PriorCondition(class_features, result_embeds, activation, ordered)
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
        weight_mask: EntryMask,
        position_ids: Positions,
        generator: torch.Generator,
        attention_mask: TokenMask | None = None,
        guidance: Guidance | None = None,
        steps: int = 20,
        solver: str = "heun",
        latents: Latents | None = None,
        begin: float = 0.0,
    ) -> Latents:
        """Carries noise to latents of the autoencoder.

        Args:
            condition: one row a sample.
            weight_mask: of the tokens to sample.
            position_ids: of the tokens to sample.
            generator: draws the noise, on the CPU; the same one gives the same samples.
            attention_mask: of the tokens to sample.
            guidance: see `Guidance`; none by default.
            steps: of the solver.
            solver: ``"euler"``, or ``"heun"``, which evaluates the velocity twice a step.
            latents: of models to start from; noise alone by default.
            begin: time to start at, 0 (noise alone) to 1 (the latents as they are).

        Raises:
            ValueError: the solver is unknown or there are no steps.
        """
        if solver not in ("euler", "heun") or steps < 1:
            raise ValueError(f"solver {solver!r} with {steps} steps: choose euler or heun, with 1 step or more")
        tokens = token_mask(position_ids, attention_mask)
        shape = (*position_ids.shape[:2], self.autoencoder.config.latent_size)
        noise = torch.randn(shape, generator=generator).to(self.device) * tokens.unsqueeze(-1)
        state = noise if latents is None else (1 - begin) * noise + begin * self.scaler(latents.float())
        layout = (weight_mask, position_ids, tokens)
        guidance = Guidance() if guidance is None else guidance
        times = torch.linspace(begin, 1, steps + 1).tolist()
        for time, after in pairwise(times):
            step = after - time
            velocity = self._guided(state, time, condition, guidance, layout)
            if solver == "heun" and after < times[-1]:
                later = self._guided(state + step * velocity, after, condition, guidance, layout)
                velocity = (velocity + later) / 2
            state = state + step * velocity
        return self.scaler.inverse(state)

    def _guided(
        self,
        state: Tensor,
        time: float,
        condition: PriorCondition,
        guidance: Guidance,
        layout: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        times = torch.full((len(state),), time, device=state.device)
        both = self.velocity(state, times, condition, *layout).float()
        if guidance == Guidance():
            return both
        dataset = self.velocity(state, times, condition.without(result=True), *layout).float()
        neither = self.velocity(state, times, condition.without(dataset=True, result=True), *layout).float()
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


def _at_outputs(
    classes: Float[Tensor, "batch classes width"],
    position_ids: Positions,
    tokens: TokenMask,
    ordered: Bool[Tensor, " batch"] | None = None,
) -> Hidden:
    """Puts each class at the output that stands for it: the channel of the last layer with its number.

    Models whose order of layers is not known have no such outputs.
    """
    _, layers, channels = position_ids.masked_fill(~tokens.unsqueeze(-1), -1).unbind(-1)
    outputs = (layers == layers.amax(1, keepdim=True)) & (channels >= 0) & (channels < classes.shape[1])
    outputs = outputs if ordered is None else outputs & ordered.unsqueeze(1)
    index = torch.where(outputs, channels, 0).unsqueeze(-1).expand(-1, -1, classes.shape[-1])
    return classes.gather(1, index) * outputs.unsqueeze(-1)


def _waves(times: Float[Tensor, " batch"], size: int) -> Float[Tensor, "batch size"]:
    speeds = torch.exp(torch.linspace(0, math.log(_FASTEST), size // 2, device=times.device))
    angles = times.float().unsqueeze(-1) * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
