"""The three towers of the joint model: from a dataset, a model's weights or its results to one vector."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.joint.configuration_joint import DatasetTowerConfig, ResultTowerConfig, WeightTowerConfig
from weightspace.models.layers import sinusoids, token_mask
from weightspace.models.pooling import STATISTICS, depth_weights, entry_statistics, relative_depths, state_moments
from weightspace.models.shapes import Depths, Entries, EntryMask, Links, Positions, TokenMask

_ROWS_AT_ONCE = 1024
_FARTHEST = 5.0


def linked_paths(values: Entries, links: Links, hops: int) -> Entries:
    """Follows weights back through the layers to what the network reads.

    A row of the first layer is a map of the inputs. What a row of a later layer makes of the inputs is, without biases
    and nonlinearities, the sum of the rows that it reads, each times the weight that it is read with. For the outputs
    of a network this is one template a class, which says far more of the classes than any single layer, and which no
    reordering of neurons changes.

    Args:
        values: normalised token entries, zero in the padding.
        links: as `token_links` gives them; all 0 gives back ``values``.
        hops: layers to go back; what is farther away is left out.
    """
    readers = (links > 0).any(-1, keepdim=True)
    inputs = values.masked_fill(readers, 0.0)
    paths = inputs
    if bool(readers.any()):
        for _ in range(hops):
            paths = inputs + _linked_sum(values.masked_fill(links == 0, 0.0), links, paths)
    return paths


def path_ends(links: Links) -> TokenMask:
    """True for tokens that read others and that none reads: the outputs of a network whose wiring is known."""
    batch, n, _ = links.shape
    read = torch.zeros(batch, n + 1, dtype=torch.bool, device=links.device)
    read.scatter_(1, links.flatten(1), True)
    return (links > 0).any(-1) & ~read[:, 1:]


def _linked_sum(values: Tensor, links: Tensor, states: Tensor) -> Tensor:
    """Sums the states of the tokens that each token reads, weighted by the entries that it reads them with."""
    batch, n, _ = states.shape
    parts = []
    # The weights between tokens as a matrix, some rows at a time: its size is the square of the number of tokens.
    for rows, targets in zip(values.split(_ROWS_AT_ONCE, 1), links.split(_ROWS_AT_ONCE, 1), strict=True):
        read = rows.new_zeros(batch, rows.shape[1], n + 1).scatter_add_(2, targets, rows)
        parts.append(read[..., 1:] @ states)
    return torch.cat(parts, dim=1)


class IndexedPooling(nn.Module):
    """Pools a set of any number of indexed members: the outputs of a network, the classes of a dataset.

    The index of a member is added before two nonlinear layers, so that the pooled vector tells members apart: output k
    of a network stands for class k of its dataset.
    """

    def __init__(self, features: int, config: DatasetTowerConfig | WeightTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.pairs = config.position_size // 2
        self.enter = nn.Linear(features, width)
        self.place = nn.Linear(config.position_size, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.attention = nn.Linear(width, config.pooling_heads)
        self.dropout = nn.Dropout(config.dropout)
        self.size = config.pooling_heads * width

    def forward(
        self, members: Float[Tensor, "batch n features"], indices: Int[Tensor, "batch n"], mask: TokenMask
    ) -> Float[Tensor, "batch pooled"]:
        """Weighted means of the members, one a head; zero for a set without members."""
        # Wavelengths from about 3 to 100: neighbours have to be far apart, for they are different classes.
        waves = sinusoids(2 * indices.float(), self.pairs, 30.0).to(members.dtype)
        states = nn.functional.gelu(self.enter(self.dropout(members)) + self.place(waves))
        states = nn.functional.gelu(self.mix(states))
        scores = self.attention(states).float().masked_fill(~mask.unsqueeze(-1), torch.finfo(torch.float32).min)
        weights = scores.softmax(1) * mask.unsqueeze(-1)
        return (weights.to(states.dtype).mT @ states).flatten(1)


class Standardizer(nn.Module):
    """Centres and scales features by what the training models have, and clips what lies far outside of it."""

    centre: Tensor
    rate: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("rate", torch.ones(features))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "rows features"]) -> None:
        """Takes mean and standard deviation over the rows, NaN left out; a feature that is constant becomes 0."""
        mean = values.double().nanmean(0).nan_to_num()
        deviation = (values.double() - mean).square().nanmean(0).sqrt()
        self.centre.copy_(mean)
        varies = deviation > 1e-6 * mean.abs().clamp(min=1)
        self.rate.copy_(torch.where(varies, 1 / deviation, 0.0))

    def forward(self, values: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        """Returns values of mean 0 and standard deviation 1 over the training models."""
        return ((values - self.centre) * self.rate).clamp(-_FARTHEST, _FARTHEST)


class PrincipalAxes(nn.Module):
    """The directions in which the images of the training datasets differ most, all on one scale.

    A zoo has few datasets and an image encoder many features: a tower that sees them all tells the training datasets
    apart by what means nothing for others.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("axes", torch.eye(features, components))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "rows features"]) -> None:
        """Takes mean and principal axes of the rows; the components have a mean square of 1 together."""
        centred = values.double() - values.double().mean(0)
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(values))
        count = min(self.axes.shape)
        variances, axes = variances.flip(0)[:count].clamp(min=0), axes.flip(1)[:, :count]
        self.centre.copy_(values.double().mean(0))
        self.axes.zero_()
        self.axes[:, :count] = axes / variances.mean().sqrt().clamp(min=1e-12)

    def forward(self, values: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows components"]:
        """Returns the components."""
        return (values - self.centre) @ self.axes


class DatasetTower(nn.Module):
    """A set encoder: order and number of images do not matter, and which class they belong to does."""

    def __init__(self, config: DatasetTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.class_size = 2 * config.hidden_size
        self.principal_axes = PrincipalAxes(config.feature_size, config.components)
        self.image_in = nn.Linear(config.components, config.hidden_size)
        self.pooling = IndexedPooling(self.class_size, config)
        self.out = nn.Sequential(
            nn.LayerNorm(self.pooling.size), nn.Linear(self.pooling.size, 2 * config.hidden_size), nn.GELU()
        )

    def forward(
        self,
        features: Float[Tensor, "datasets images features"],
        labels: Int[Tensor, "datasets images"],
        mask: Bool[Tensor, "datasets images"] | None,
    ) -> BaseModelOutputWithPooling:
        """Moments of the images of each class, then `IndexedPooling` of the classes."""
        shares = torch.ones_like(labels, dtype=torch.float32) if mask is None else mask.float()
        moments = self.class_moments(self.image_states(features), labels, shares)
        classes = torch.arange(moments.shape[1], device=labels.device).expand(len(labels), -1)
        pooled = self.pooling(moments.to(self.image_in.weight.dtype), classes, moments.any(-1))
        return BaseModelOutputWithPooling(last_hidden_state=moments, pooler_output=self.out(pooled))

    def image_states(
        self, features: Float[Tensor, "datasets images features"]
    ) -> Float[Tensor, "datasets images width"]:
        """What the tower sees of each image."""
        components = self.principal_axes(features.float())
        return nn.functional.gelu(self.image_in(components.to(self.image_in.weight.dtype))).float()

    def class_moments(
        self,
        states: Float[Tensor, "datasets images width"],
        labels: Int[Tensor, "datasets images"],
        shares: Float[Tensor, "datasets images"],
    ) -> Float[Tensor, "datasets classes class_size"]:
        """Mean and deviation of the states of each class, an image counting with its share; zeros where none counts."""
        classes = torch.arange(int(labels.max()) + 1, device=labels.device)
        belongs = (labels.unsqueeze(1) == classes.unsqueeze(-1)) * shares.unsqueeze(1)
        # The pooling over parts of a network does for classes, too: both are weighted sets.
        return state_moments(states, belongs).unflatten(1, (len(classes), -1))


class WeightTower(nn.Module):
    """The encoder of a weight autoencoder, and three views of its tokens that do not depend on the order of neurons.

    Weighted means of what leads to the outputs (`linked_paths`, with the latents of the tokens), moments of all
    latents, and statistics of the weights themselves.
    """

    def __init__(self, config: WeightTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = WeightAutoencoderModel._from_config(config.encoder_config)
        self.encoder.projection = nn.Identity()  # contrasts two views of a model, which is not done here
        latent, width = self.encoder.config.latent_size, config.hidden_size
        self.pooling = IndexedPooling(self.encoder.config.token_size + latent, config)
        learned = self.pooling.size + 2 * config.depth_bins * latent
        self.norm = nn.LayerNorm(learned)
        self.standardizer = Standardizer(config.depth_bins * STATISTICS)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(learned + config.depth_bins * STATISTICS, 2 * width)

    def forward(
        self,
        values: Entries,
        mask: EntryMask,
        positions: Positions,
        attention_mask: TokenMask | None = None,
        depths: Depths | None = None,
        links: Links | None = None,
    ) -> BaseModelOutputWithPooling:
        """Latents as ``last_hidden_state``, one vector a model as ``pooler_output``."""
        tokens, parts = self._seen(positions, attention_mask, depths)
        values, mask = values * tokens.unsqueeze(-1), mask & tokens.unsqueeze(-1)
        latents = self.encoder.encode(values, mask, positions, tokens)
        paths, moments = self._paths(values, positions, tokens, latents, links), state_moments(latents.float(), parts)
        statistics = self.standardizer(entry_statistics(values.float(), mask, parts))
        pooled = torch.cat([self.norm(torch.cat([paths, moments.to(paths)], dim=-1)), statistics.to(paths)], dim=-1)
        pooled = nn.functional.gelu(self.out(self.dropout(pooled)))
        return BaseModelOutputWithPooling(last_hidden_state=latents, pooler_output=self.dropout(pooled))

    def statistics(
        self, values: Entries, mask: EntryMask, positions: Positions, attention_mask: TokenMask | None = None
    ) -> Float[Tensor, "batch statistics"]:
        """Returns the statistics of whole models that the standardizer has to be fitted on."""
        tokens, parts = self._seen(positions, attention_mask, None)
        return entry_statistics(values.float() * tokens.unsqueeze(-1), mask & tokens.unsqueeze(-1), parts)

    def _seen(
        self, positions: Tensor, attention_mask: Tensor | None, depths: Tensor | None
    ) -> tuple[TokenMask, Float[Tensor, "batch bins n"]]:
        """Says which tokens are looked at, and to which parts of the network they belong."""
        tokens = token_mask(positions, attention_mask)
        depths = relative_depths(positions, tokens) if depths is None else depths.float()
        if not self.config.last_layer:
            tokens = tokens & (depths < 1)
        return tokens, depth_weights(depths, tokens, self.config.depth_bins)

    def _paths(
        self, values: Tensor, positions: Tensor, tokens: Tensor, latents: Tensor, links: Tensor | None
    ) -> Float[Tensor, "batch pooled"]:
        links = torch.zeros_like(values, dtype=torch.int64) if links is None else links
        paths = linked_paths(values.float(), links, self.config.hops)
        ends = path_ends(links) & tokens
        chosen = torch.where(ends.any(1, keepdim=True), ends, tokens)
        # Outputs have a fixed order; that of hidden channels means nothing.
        indices = (positions[..., 2] + 1) * ends
        # Relative to the model: how large its weights are is in the statistics.
        energy = (paths.square() * chosen.unsqueeze(-1)).sum((1, 2), keepdim=True)
        count = chosen.sum(1).view(-1, 1, 1) * paths.shape[-1]
        paths = paths * (count / energy.clamp(min=1e-12)).sqrt()
        return self.pooling(torch.cat([paths.to(latents.dtype), latents], dim=-1), indices, chosen)


class ResultTower(nn.Module):
    """An embedding table of bins for each result; the embeddings of the results that are stated add up."""

    edges: Tensor

    def __init__(self, config: ResultTowerConfig) -> None:
        super().__init__()
        self.config = config
        count = len(config.results)
        self.register_buffer("edges", torch.linspace(0, 1, config.bins + 1).repeat(count, 1))
        self.table = nn.Embedding(count * config.bins, config.hidden_size)

    @torch.no_grad()
    def fit(self, results: Float[Tensor, "models results"]) -> None:
        """Takes quantiles of the known values as edges; a result that nobody has keeps the edges it has."""
        points = torch.linspace(0, 1, self.config.bins + 1, dtype=torch.float64)
        for edges, values in zip(self.edges, results.double().unbind(1), strict=True):
            known = values[values.isfinite()]
            if len(known):
                edges.copy_(known.quantile(points))

    def bin_positions(self, results: Float[Tensor, "batch results"]) -> Float[Tensor, "batch results"]:
        """Positions of values on the scale of the bins, 0 to ``bins``, whose whole part is the bin; NaN stays."""
        values = results.T.contiguous().to(self.edges.dtype)
        above = torch.searchsorted(self.edges, values.nan_to_num(), right=True).clamp(1, self.config.bins)
        low, high = self.edges.gather(1, above - 1), self.edges.gather(1, above)
        # Equal edges (many models with one result) have nothing between them.
        share = ((values - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        return (above - 1 + share).T

    def agreement(
        self, results: Float[Tensor, "batch results"], stated: Bool[Tensor, "batch results"]
    ) -> Float[Tensor, "batch batch"]:
        """How far model j (column) has the results that row i states: 1 for all of them, 0 if it lacks one.

        Positives are not the diagonal: a row that states an accuracy alone is true of every model of this accuracy.
        """
        positions, width = self.bin_positions(results), self.config.smoothing
        positions = positions if width else positions.clamp(max=self.config.bins - 1e-3).floor()
        apart = positions.unsqueeze(1) - positions.unsqueeze(0)
        agree = torch.exp(-0.5 * (apart / width).square()) if width else (apart == 0).to(positions.dtype)
        agree = torch.where(apart.isnan(), 0.0, agree)
        return torch.where(stated.unsqueeze(1), agree, 1.0).prod(-1)

    def forward(
        self, results: Float[Tensor, "batch results"], stated: Bool[Tensor, "batch results"]
    ) -> BaseModelOutputWithPooling:
        """Adds up what is stated; values that are not known count for nothing."""
        embedded = self._looked_up(results)
        embedded = embedded * (stated & results.isfinite()).unsqueeze(-1)
        return BaseModelOutputWithPooling(last_hidden_state=embedded, pooler_output=embedded.sum(1))

    def _looked_up(self, results: Float[Tensor, "batch results"]) -> Float[Tensor, "batch results size"]:
        bins = self.config.bins
        # Bin b has its own embedding in its middle, at b + 1/2.
        middles = (self.bin_positions(results).nan_to_num() - 0.5).clamp(0, bins - 1)
        low = middles.floor().long().clamp(max=bins - 2)
        share = (middles - low).unsqueeze(-1).to(self.table.weight.dtype)
        first = low + bins * torch.arange(results.shape[1], device=low.device)
        return self.table(first) * (1 - share) + self.table(first + 1) * share
