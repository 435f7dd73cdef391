"""The joint model: datasets, weights and results in one embedding space."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from weightspace.cards.facts import EncoderFacts
from weightspace.errors import SettingsError
from weightspace.losses import gather_rows, masked_mse, pairwise_nt_xent
from weightspace.models.joint.configuration_joint import (
    PAIRS,
    DatasetTowerConfig,
    JointConfig,
    ResultTowerConfig,
    WeightTowerConfig,
)
from weightspace.models.joint.towers import DatasetTower, ResultTower, WeightTower
from weightspace.models.pretrained import WeightspaceModel
from weightspace.models.shapes import Depths, Entries, EntryMask, Links, Positions, TokenMask

_LARGEST_LOGIT_SCALE = 4.6052
"""Logarithm of 100, as in CLIP."""


@dataclass
class JointOutput(ModelOutput):
    """What [`JointModel`] returns; None for what was not given.

    `loss` is the sum of the losses of the pairs of towers and of the weighted `reconstruction_loss`, which is in units
    of the weights' variance. Logits are scaled cosine similarities, a row for each embedding of the first tower and a
    column for each of the second. Embeddings have length 1, and the outputs of the towers are those of
    `get_dataset_features`, `get_weight_features` and `get_result_features`.
    """

    loss: Tensor | None = None
    dataset_weight_loss: Tensor | None = None
    weight_result_loss: Tensor | None = None
    dataset_result_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    logits_dataset_weight: Tensor | None = None
    logits_weight_result: Tensor | None = None
    logits_dataset_result: Tensor | None = None
    dataset_embeds: Tensor | None = None
    weight_embeds: Tensor | None = None
    result_embeds: Tensor | None = None
    dataset_model_output: BaseModelOutputWithPooling | None = None
    weight_model_output: BaseModelOutputWithPooling | None = None
    result_model_output: BaseModelOutputWithPooling | None = None


class JointModel(WeightspaceModel):
    """Three towers in the manner of CLIP (Radford et al., 2021), contrasted pair by pair.

    Row i of a batch is a triplet of a model's weights W, the dataset D it was trained on, and results R it is said to
    reach. Many rows share a dataset or a result, so positives are weights and not the diagonal:

    - D, W: all models that were trained on the same dataset with the same order of classes.
    - W, R: R is a statement, of any subset of the results, and all models of which it is true are its positives; with
      `smoothing`, those of which it nearly is, by so much less.
    - D, R: as often as models that were trained on D have R: the product of the two matrices above. Nothing else
      relates a dataset to a result, and similarities then learn log p(R | D) / p(R).
    """

    config: JointConfig
    base_model_prefix = "joint"
    main_input_name = "weight_values"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["standardizer", "principal_axes", "edges"]  # noqa: RUF012

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        dataset, weight, result = config.dataset_config, config.weight_config, config.result_config
        assert isinstance(dataset, DatasetTowerConfig)
        assert isinstance(weight, WeightTowerConfig)
        assert isinstance(result, ResultTowerConfig)
        self.dataset_model = DatasetTower(dataset)
        self.weight_model = WeightTower(weight)
        self.result_model = ResultTower(result)
        size = config.projection_dim
        self.dataset_projection = nn.Linear(2 * dataset.hidden_size, size, bias=False)
        self.weight_projection = nn.Linear(2 * weight.hidden_size, size, bias=False)
        self.result_projection = nn.Linear(result.hidden_size, size, bias=False)
        self.logit_scale = nn.Parameter(torch.full((len(PAIRS),), float(config.logit_scale_init_value)))
        self.post_init()

    @property
    def embedding_size(self) -> int:
        """Length of every embedding."""
        return int(self.config.projection_dim)

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        decodes = bool(self.config.reconstruction_weight)
        return replace(super().card_facts(), embedding_size=self.embedding_size, decodes=decodes)

    def ensure_image_encoder(self, name: str, digest: str) -> None:
        """Refuses dataset features of another image encoder than the one that the model was trained with.

        Raises:
            SettingsError: the digests differ.
        """
        trained = self.dataset_model.config
        if trained.image_encoder_digest is not None and trained.image_encoder_digest != digest:
            raise SettingsError(
                f"image encoder {name} ({digest[:12]}): the joint model was trained with {trained.image_encoder} "
                f"({trained.image_encoder_digest[:12]}); open that one"
            )

    def get_dataset_features(
        self,
        dataset_features: Float[Tensor, "datasets images features"],
        dataset_labels: Int[Tensor, "datasets images"],
        dataset_mask: Bool[Tensor, "datasets images"] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeds datasets.

        Args:
            dataset_features: of a sample of the images, from the image encoder that the config names.
            dataset_labels: class numbers of the images, as the outputs of the models are numbered.
            dataset_mask: true where there is an image; all true if left out.

        Returns:
            Moments of the classes as ``last_hidden_state`` and the projected embedding, of any length, as
            ``pooler_output``.
        """
        output = self.dataset_model(dataset_features, dataset_labels, dataset_mask)
        output.pooler_output = self.dataset_projection(output.pooler_output)
        return output

    def get_weight_features(
        self,
        weight_values: Entries,
        weight_mask: EntryMask,
        position_ids: Positions,
        attention_mask: TokenMask | None = None,
        depths: Depths | None = None,
        weight_links: Links | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeds whole models, of any mix of architectures; see `weightspace.models.shapes` for the tensors.

        Returns:
            Latents as ``last_hidden_state`` and the projected embedding, of any length, as ``pooler_output``.
        """
        output = self.weight_model(weight_values, weight_mask, position_ids, attention_mask, depths, weight_links)
        output.pooler_output = self.weight_projection(output.pooler_output)
        return output

    def get_result_features(
        self, results: Float[Tensor, "batch results"], stated: Bool[Tensor, "batch results"] | None = None
    ) -> BaseModelOutputWithPooling:
        """Embeds results.

        Args:
            results: one column for each name in the config; NaN where a value is missing.
            stated: true for the results that a row states; all known ones if left out.

        Returns:
            Embeddings of the single results as ``last_hidden_state`` and the projected embedding, of any length, as
            ``pooler_output``.
        """
        output = self.result_model(results, results.isfinite() if stated is None else stated)
        output.pooler_output = self.result_projection(output.pooler_output)
        return output

    def forward(
        self,
        weight_values: Entries | None = None,
        weight_mask: EntryMask | None = None,
        position_ids: Positions | None = None,
        attention_mask: TokenMask | None = None,
        depths: Depths | None = None,
        weight_links: Links | None = None,
        dataset_features: Float[Tensor, "datasets images features"] | None = None,
        dataset_labels: Int[Tensor, "datasets images"] | None = None,
        dataset_mask: Bool[Tensor, "datasets images"] | None = None,
        results: Float[Tensor, "batch results"] | None = None,
        stated: Bool[Tensor, "batch results"] | None = None,
        dataset_index: Int[Tensor, " batch"] | None = None,
        dataset_ids: Int[Tensor, " datasets"] | None = None,
        labels: Entries | None = None,
        return_loss: bool = False,
    ) -> JointOutput:
        """Embeds what is given, compares it, and computes the losses if wanted.

        Arguments are those of `get_weight_features`, `get_dataset_features` and `get_result_features`; leave out all of
        a tower to leave it out. The losses, for which all three are needed, take the results of the models, and

        - ``dataset_index``: the dataset of each model, -1 if unknown; by default, model i belongs to dataset i;
        - ``dataset_ids``: the same number for the same dataset on all processes; by default, all datasets differ;
        - ``labels``: tokens to reconstruct; ``weight_values`` by default.

        With several processes, the losses of the pairs are those of all their rows together; see `gather_rows`.
        """
        output = JointOutput()
        if dataset_features is not None:
            assert dataset_labels is not None
            output["dataset_model_output"] = self.get_dataset_features(dataset_features, dataset_labels, dataset_mask)
            output["dataset_embeds"] = unit(output["dataset_model_output"])
        if weight_values is not None:
            assert weight_mask is not None and position_ids is not None
            output["weight_model_output"] = self.get_weight_features(
                weight_values, weight_mask, position_ids, attention_mask, depths, weight_links
            )
            output["weight_embeds"] = unit(output["weight_model_output"])
        if results is not None:
            stated = results.isfinite() if stated is None else stated & results.isfinite()
            output["result_model_output"] = self.get_result_features(results, stated)
            output["result_embeds"] = unit(output["result_model_output"])
        for number, pair in enumerate(PAIRS):
            one, other = (output.get(f"{tower}_embeds") for tower in pair.split("_"))
            if one is not None and other is not None:
                output[f"logits_{pair}"] = self._logits(number, one, other)
        if return_loss:
            self._add_losses(output, results, stated, dataset_index, dataset_ids)
        if return_loss and self.config.reconstruction_weight:
            assert weight_values is not None and weight_mask is not None and position_ids is not None
            target = weight_values if labels is None else labels
            latents = output["weight_model_output"].last_hidden_state
            decoded = self.weight_model.encoder.decode(latents, weight_mask, position_ids, attention_mask)
            output["reconstruction_loss"] = masked_mse(decoded.float(), target.float(), weight_mask)
            output["loss"] = output["loss"] + self.config.reconstruction_weight * output["reconstruction_loss"]
        return output

    def scale(self, pair: str) -> float:
        """Returns the factor of the cosines of a pair of towers, one of ``PAIRS``."""
        return float(self._scale(PAIRS.index(pair)).detach())

    def _scale(self, number: int) -> Tensor:
        return self.logit_scale[number].clamp(max=_LARGEST_LOGIT_SCALE).exp()

    def _logits(self, number: int, one: Tensor, other: Tensor) -> Tensor:
        return self._scale(number) * (one @ other.T)

    def _add_losses(
        self,
        output: JointOutput,
        results: Tensor | None,
        stated: Tensor | None,
        dataset_index: Tensor | None,
        dataset_ids: Tensor | None,
    ) -> None:
        """Compares the rows of all processes; row i stands for its dataset, its weights and its statement."""
        weights = output["weight_embeds"]
        rows = {"weight": weights, "dataset": torch.zeros_like(weights), "result": torch.zeros_like(weights)}
        ids = torch.full((len(weights),), -1, device=weights.device)
        if "dataset_embeds" in output:
            index = _count(weights) if dataset_index is None else dataset_index
            given = _count(output["dataset_embeds"]) if dataset_ids is None else dataset_ids
            ids = torch.where(index < 0, -1, given[index.clamp(min=0)])
            rows["dataset"] = output["dataset_embeds"][index.clamp(min=0)]
        if results is None or stated is None:
            results = weights.new_zeros(len(weights), len(self.result_model.edges))
            stated = torch.zeros_like(results, dtype=torch.bool)
        else:
            rows["result"] = output["result_embeds"]
        losses = self.pair_losses(
            {tower: gather_rows(embeds) for tower, embeds in rows.items()},
            gather_rows(ids),
            gather_rows(results),
            gather_rows(stated),
        )
        for pair, loss in losses.items():
            output[f"{pair}_loss"] = loss
        output["loss"] = torch.stack(list(losses.values())).sum()

    def pair_losses(
        self,
        embeds: Mapping[str, Float[Tensor, "batch size"]],
        dataset_ids: Int[Tensor, " batch"],
        results: Float[Tensor, "batch results"],
        stated: Bool[Tensor, "batch results"],
    ) -> dict[str, Float[Tensor, ""]]:
        """Scores every pair of the config on triplets.

        Args:
            embeds: embeddings of length 1 for ``"dataset"``, ``"weight"`` and ``"result"``, row by row.
            dataset_ids: the same number for the same dataset, -1 for a row without one.
            results: of the models, NaN where a value is missing.
            stated: true for what a row states of them; a row that states nothing is left out.

        Returns:
            One loss a pair. 0 where nothing relates its towers.
        """
        present = {
            "weight": torch.ones_like(dataset_ids, dtype=torch.bool),
            "dataset": dataset_ids >= 0,
            "result": stated.any(1),
        }
        same = ((dataset_ids.unsqueeze(1) == dataset_ids) & present["dataset"]).float()
        true_of = self.result_model.agreement(results, stated).float()
        positives = {"dataset_weight": same, "weight_result": true_of.T, "dataset_result": same @ true_of.T}
        losses = {}
        for pair in self.config.pairs:
            one, other = pair.split("_")
            logits = self._logits(PAIRS.index(pair), embeds[one][present[one]], embeds[other][present[other]])
            losses[pair] = pairwise_nt_xent(logits, positives[pair][present[one]][:, present[other]])
        return losses


def _count(rows: Tensor) -> Int[Tensor, " rows"]:
    return torch.arange(len(rows), device=rows.device)


def unit(output: BaseModelOutputWithPooling) -> Float[Tensor, "rows size"]:
    """Scales the embeddings of an output to length 1."""
    assert output.pooler_output is not None
    return F.normalize(output.pooler_output.float(), dim=-1)
