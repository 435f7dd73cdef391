"""What is particular to the joint model; what every model promises is in ``test_autoencoder.py``."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from weightspace.errors import SettingsError
from weightspace.losses import masked_mse, pairwise_nt_xent
from weightspace.models.joint.configuration_joint import JointConfig, ResultTowerConfig
from weightspace.models.joint.feature_extraction_joint import JointFeatureExtractor
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.models.joint.towers import PrincipalAxes, ResultTower, linked_paths, path_ends
from weightspace.networks.families import MLPConfig, Network
from weightspace.networks.infer import infer_architecture
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture, TensorSpec

NAN = math.nan
SMALL = {"hidden_size": 16, "pooling_heads": 2, "position_size": 4, "dropout": 0.0}
TINY: dict[str, Any] = {
    "dataset_config": {"feature_size": 5, **SMALL},
    "weight_config": {
        "encoder_config": {"token_size": 8, "latent_size": 3, "hidden_size": 16, "num_attention_heads": 2},
        **SMALL,
    },
    "result_config": {"results": ["test_accuracy", "test_loss"], "bins": 4, "hidden_size": 8},
    "projection_dim": 8,
}


def architecture(*hidden: int) -> Architecture:
    family = MLPConfig((1, 2, 3), 4, hidden)
    module = Network(family)
    specs = [TensorSpec(name, tuple(value.shape), "F32") for name, value in module.state_dict().items()]
    return infer_architecture(specs, config=family.to_dict())


SHALLOW, DEEP = architecture(5), architecture(5, 6)


def build(weight: dict[str, Any] | None = None, result: dict[str, Any] | None = None, **changes: Any) -> JointModel:
    config = {**TINY, **changes}
    config["weight_config"] = {**TINY["weight_config"], **(weight or {})}
    config["result_config"] = {**TINY["result_config"], **(result or {})}
    torch.manual_seed(0)
    return JointModel(JointConfig(**config)).eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(one: Architecture, models: int, seed: int = 0) -> dict[str, Tensor]:
    return dict(JointFeatureExtractor("channel", 8).batch(draw(models, one.numel, seed=seed), one))


def triplets(models: int = 6, datasets: int = 3) -> dict[str, Any]:
    return {
        **inputs(SHALLOW, models),
        "dataset_features": draw(datasets, 8, 5, seed=1),
        "dataset_labels": torch.arange(8).remainder(4).expand(datasets, -1),
        "dataset_index": torch.arange(models) % datasets,
        "results": draw(models, 2, seed=2).sigmoid(),
        "return_loss": True,
    }


class TestPaths:
    def test_lead_from_the_outputs_of_a_network_to_its_inputs(self) -> None:
        for one, widths in ((SHALLOW, (6, 5, 4)), (DEEP, (6, 5, 6, 4))):
            batch, flat, start = inputs(one, 2), draw(2, one.numel), 0
            product = torch.eye(6).expand(2, -1, -1)
            for fan_in, fan_out in pairwise(widths):
                weight = flat[:, start : start + fan_in * fan_out].view(2, fan_out, fan_in)
                product, start = weight @ product, start + fan_in * fan_out + fan_out
            paths = linked_paths(batch["weight_values"], batch["weight_links"], hops=len(widths) - 2)
            torch.testing.assert_close(paths[:, -4:, :6], product)

    def test_end_at_the_outputs(self) -> None:
        assert path_ends(inputs(DEEP, 2)["weight_links"]).tolist() == [[False] * 11 + [True] * 4] * 2
        assert not path_ends(torch.zeros(2, 7, 8, dtype=torch.int64)).any()

    def test_are_the_tokens_themselves_where_nothing_is_linked(self) -> None:
        values = draw(2, 7, 8)
        torch.testing.assert_close(linked_paths(values, torch.zeros(2, 7, 8, dtype=torch.int64), 3), values)

    def test_do_not_depend_on_how_many_rows_are_taken_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = inputs(DEEP, 2)
        whole = linked_paths(batch["weight_values"], batch["weight_links"], 2)
        monkeypatch.setattr("weightspace.models.joint.towers._ROWS_AT_ONCE", 4)
        torch.testing.assert_close(linked_paths(batch["weight_values"], batch["weight_links"], 2), whole)


class TestDatasetTower:
    @torch.no_grad()
    def embedded(self, model: JointModel, *arguments: Any) -> Tensor:
        embeds = model.get_dataset_features(*arguments).pooler_output
        assert embeds is not None
        return embeds

    def test_knows_neither_order_nor_padding(self) -> None:
        model, features, labels = build(), draw(2, 8, 5), torch.arange(8).remainder(4).repeat(2, 1)
        expected, order = self.embedded(model, features, labels), torch.randperm(8)
        torch.testing.assert_close(self.embedded(model, features[:, order], labels[:, order]), expected)
        more = torch.cat([features, draw(2, 3, 5, seed=4)], 1), torch.cat([labels, torch.full((2, 3), 3)], 1)
        mask = torch.arange(11).expand(2, -1) < 8
        torch.testing.assert_close(self.embedded(model, *more, mask), expected)

    def test_does_not_know_the_size_of_a_set(self) -> None:
        model, features, labels = build(), draw(1, 8, 5), torch.arange(8).remainder(4).unsqueeze(0)
        twice = self.embedded(model, features.repeat(1, 2, 1), labels.repeat(1, 2))
        torch.testing.assert_close(twice, self.embedded(model, features, labels))

    def test_knows_which_class_an_image_belongs_to(self) -> None:
        model, features, labels = build(), draw(1, 8, 5), torch.arange(8).remainder(4).unsqueeze(0)
        expected = self.embedded(model, features, labels)
        assert not torch.allclose(self.embedded(model, features, 3 - labels), expected, atol=1e-3)
        assert not torch.allclose(self.embedded(model, features, labels // 2), expected, atol=1e-3)

    def test_classes_without_images_change_nothing(self) -> None:
        model, features, labels = build(), draw(2, 8, 5), torch.arange(8).remainder(4).repeat(2, 1)
        alone = self.embedded(model, features[:1], labels[:1])
        labels[1] += 3
        torch.testing.assert_close(self.embedded(model, features, labels)[:1], alone)

    def test_sees_the_directions_in_which_training_images_differ_most(self) -> None:
        axes, scales = PrincipalAxes(5, 2), torch.tensor([0.1, 3.0, 0.2, 1.0, 0.1])
        values = draw(400, 5) * scales + 7
        axes.fit(values)
        components = axes(values)
        torch.testing.assert_close(components.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
        assert float(components.square().mean()) == pytest.approx(1, rel=1e-4)
        assert components[:, 0].std() > 2 * components[:, 1].std()  # one scale for all: what varies more, counts more
        for component, own in zip(components.T, (1, 3), strict=True):
            assert torch.corrcoef(torch.stack([component, values[:, own]]))[0, 1].abs() > 0.98

    def test_more_components_than_there_are_add_nothing(self) -> None:
        axes = PrincipalAxes(3, 5)
        axes.fit(draw(20, 3))
        assert axes(draw(2, 3)).shape == (2, 5)
        assert not axes(draw(2, 3))[:, 3:].any()
        axes.fit(torch.ones(4, 3))
        assert axes(torch.ones(1, 3)).isfinite().all()

    def test_another_image_encoder_is_refused(self) -> None:
        named = {**TINY["dataset_config"], "image_encoder": "org/one", "image_encoder_digest": "a" * 64}
        model = build(dataset_config=named)
        model.ensure_image_encoder("renamed", "a" * 64)
        with pytest.raises(SettingsError, match=r"org/two \(bbbbbbbbbbbb\).*trained with org/one.*open that one"):
            model.ensure_image_encoder("org/two", "b" * 64)


class TestWeightTower:
    @torch.no_grad()
    def embedded(self, model: JointModel, batch: dict[str, Tensor]) -> Tensor:
        embeds = model.get_weight_features(**batch).pooler_output
        assert embeds is not None
        return embeds

    def test_knows_the_order_of_outputs_and_but_for_the_latents_not_that_of_neurons(self) -> None:
        model, extractor, flat = build(), JointFeatureExtractor("channel", 8), draw(4, DEEP.numel)
        model.weight_model.encoder.to_latent.weight.data.zero_()
        moved = permute(flat, random_permutations(DEEP, 4, torch.Generator().manual_seed(0)), DEEP)
        expected = self.embedded(model, inputs(DEEP, 4))
        torch.testing.assert_close(self.embedded(model, dict(extractor.batch(moved, DEEP))), expected)
        outputs = inputs(DEEP, 4)
        outputs["weight_values"] = torch.cat(
            [outputs["weight_values"][:, :-4], outputs["weight_values"][:, -4:].flip(1)], 1
        )
        assert not torch.allclose(self.embedded(model, outputs), expected, atol=1e-2)

    def test_can_leave_the_last_layer_out(self) -> None:
        batch = inputs(DEEP, 3)
        other = {**batch, "weight_values": batch["weight_values"].clone()}
        other["weight_values"][:, -4:] = 1.0
        assert torch.equal(
            self.embedded(build({"last_layer": False}), other), self.embedded(build({"last_layer": False}), batch)
        )
        assert not torch.allclose(self.embedded(build(), other), self.embedded(build(), batch))

    def test_models_without_links_are_embedded_too(self) -> None:
        batch = inputs(SHALLOW, 2)
        del batch["weight_links"]
        assert self.embedded(build(), batch).isfinite().all()

    def test_the_input_side_is_saved_with_the_model(self, tmp_path: Path) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        JointFeatureExtractor("channel", 8, 0.1, 0.5).save_pretrained(tmp_path)
        loaded, extractor = AutoModel.from_pretrained(tmp_path).eval(), AutoFeatureExtractor.from_pretrained(tmp_path)
        assert isinstance(extractor, JointFeatureExtractor)
        tensors = {spec.name: draw(*spec.shape) for spec in SHALLOW.tensors}
        own = JointFeatureExtractor("channel", 8, 0.1, 0.5)([tensors])
        assert own["weight_links"].shape == own["weight_values"].shape
        torch.testing.assert_close(self.embedded(loaded, dict(extractor([tensors]))), self.embedded(model, dict(own)))


class TestResultTower:
    def tower(self, **changes: Any) -> ResultTower:
        torch.manual_seed(0)
        values = {"results": ["test_accuracy"], "bins": 4, "hidden_size": 8, **changes}
        tower = ResultTower(ResultTowerConfig(**values))
        tower.table.weight.data.normal_()
        tower.fit(torch.linspace(0, 1, 101).square().unsqueeze(1).expand(-1, len(values["results"])))
        return tower

    def test_bins_hold_equally_many_models(self) -> None:
        tower = self.tower()
        torch.testing.assert_close(tower.edges[0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).square())
        values = torch.tensor([[-1.0], [0.0], [0.25**2], [0.6**2], [1.0], [2.0]])
        expected = torch.tensor([0, 0, 1, 2 + (0.36 - 0.25) / (0.5625 - 0.25), 4, 4])
        torch.testing.assert_close(tower.bin_positions(values)[:, 0], expected)
        assert tower.bin_positions(torch.tensor([[NAN]])).isnan().all()

    def test_many_equal_results_are_one_place(self) -> None:
        tower = self.tower()
        tower.fit(torch.cat([torch.zeros(10), torch.ones(90)]).unsqueeze(1))
        places = tower.bin_positions(torch.tensor([[0.0], [1.0], [1.0]]))
        assert places[0] < places[1] == places[2]

    def test_a_value_is_embedded_between_the_bins_around_it(self) -> None:
        tower = self.tower()
        table, stated = tower.table.weight, torch.ones(1, 1, dtype=torch.bool)
        for place, expected in ((0.2, table[0]), (1.5, table[1]), (2.0, (table[1] + table[2]) / 2), (4.0, table[3])):
            low = int(min(place, 3.0))
            value = tower.edges[0, low] + (place - low) * (tower.edges[0, low + 1] - tower.edges[0, low])
            torch.testing.assert_close(tower(value.view(1, 1), stated).pooler_output[0], expected)

    def test_what_is_not_stated_or_not_known_adds_nothing(self) -> None:
        tower = self.tower(results=["a", "b"])
        values, stated = torch.tensor([[0.3, 0.4], [0.3, NAN], [0.3, 0.9]]), torch.ones(3, 2, dtype=torch.bool)
        stated[2, 1] = False
        embeds = tower(values, stated).pooler_output
        assert torch.equal(embeds[1], embeds[2])
        assert not torch.equal(embeds[0], embeds[1])
        assert not tower(values, torch.zeros_like(stated)).pooler_output.any()

    def test_a_result_that_nobody_has_is_embedded_all_the_same(self) -> None:
        tower = self.tower(results=["a", "b"])
        tower.fit(torch.tensor([[0.2, NAN], [0.4, NAN]]))
        assert tower(torch.tensor([[0.3, 0.9]]), torch.ones(1, 2, dtype=torch.bool)).pooler_output.isfinite().all()

    def test_a_statement_is_true_of_every_model_that_has_what_it_says(self) -> None:
        tower = self.tower(results=["a", "b"], smoothing=0)
        values = torch.tensor([[0.3, 0.9], [0.35, 0.01], [0.3, NAN], [0.9, 0.9]])
        stated = torch.tensor([[True, False], [True, True], [True, False], [False, True]])
        expected = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]])
        assert torch.equal(tower.agreement(values, stated), expected.float())

    def test_smoothing_counts_what_is_near_by_so_much_less(self) -> None:
        tower = self.tower(smoothing=2.0)
        values = torch.tensor([0.125, 0.375, 0.5]).square().unsqueeze(1)
        places = tower.bin_positions(values)
        expected = torch.exp(-0.5 * ((places - places.T) / 2.0).square())
        torch.testing.assert_close(tower.agreement(values, torch.ones(3, 1, dtype=torch.bool)), expected)


class TestLoss:
    def test_is_the_sum_over_pairs_of_triplets(self) -> None:
        model, batch = build(result={"smoothing": 0}), triplets()
        output = model(**batch)
        index = batch["dataset_index"]
        same = (index.unsqueeze(1) == index).float()
        true_of = model.result_model.agreement(batch["results"], torch.ones(6, 2, dtype=torch.bool))
        datasets = output.dataset_embeds[index]
        scales = model.logit_scale.exp()
        expected = {
            "dataset_weight": pairwise_nt_xent(scales[0] * datasets @ output.weight_embeds.T, same),
            "weight_result": pairwise_nt_xent(scales[1] * output.weight_embeds @ output.result_embeds.T, true_of.T),
            "dataset_result": pairwise_nt_xent(scales[2] * datasets @ output.result_embeds.T, same @ true_of.T),
        }
        for pair, loss in expected.items():
            torch.testing.assert_close(output[f"{pair}_loss"], loss)
        torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).sum())
        torch.testing.assert_close(
            output.logits_dataset_weight, scales[0] * output.dataset_embeds @ output.weight_embeds.T
        )
        assert output.reconstruction_loss is None

    def test_latents_can_be_kept_decodable(self) -> None:
        model, plain, batch = build(reconstruction_weight=0.5), build(), triplets()
        output = model(**batch, labels=2 * batch["weight_values"])
        encoder, places = model.weight_model.encoder, (batch["weight_mask"], batch["position_ids"])
        decoded = encoder.decode(encoder.encode(batch["weight_values"], *places), *places)
        torch.testing.assert_close(
            output.reconstruction_loss, masked_mse(decoded, 2 * batch["weight_values"], batch["weight_mask"])
        )
        torch.testing.assert_close(output.loss, plain(**batch).loss + 0.5 * output.reconstruction_loss)

    def test_the_temperature_has_a_limit(self) -> None:
        model, batch = build(), triplets()
        model.logit_scale.data.fill_(20.0)
        output = model(**batch)
        torch.testing.assert_close(
            output.logits_weight_result, 100 * output.weight_embeds @ output.result_embeds.T, rtol=1e-4, atol=1e-3
        )

    def test_pairs_can_be_left_out(self) -> None:
        batch = triplets()
        output = build(pairs=["weight_result"])(**batch)
        assert output.dataset_weight_loss is None
        torch.testing.assert_close(output.loss, build()(**batch).weight_result_loss)

    @pytest.mark.parametrize(
        "change",
        [
            {"dataset_index": torch.zeros(6, dtype=torch.int64)},
            {"dataset_index": torch.full((6,), -1)},
            {"results": torch.full((6, 2), NAN)},
            {"results": torch.full((6, 2), 0.5)},
            {"dataset_features": None},
            {"results": None},
        ],
        ids=["one dataset", "no known dataset", "no results", "one bin", "no datasets", "no tower of results"],
    )
    def test_batches_that_say_little_are_finite(self, change: dict[str, Any]) -> None:
        model = build()
        output = model(**{**triplets(), **change})
        output.loss.backward()
        assert output.loss.isfinite()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_a_single_model_has_nothing_to_be_told_from(self) -> None:
        assert float(build()(**triplets(models=1, datasets=1)).loss.detach()) == 0

    def test_rows_without_dataset_or_results_take_no_part_in_their_pairs(self) -> None:
        model, batch = build(), triplets()
        batch["dataset_index"] = torch.tensor([0, 1, 2, 0, -1, -1])
        batch["results"][3:] = NAN
        output = model(**batch)
        fewer = {
            name: value[:4] if len(value) == 6 else value for name, value in batch.items() if name != "return_loss"
        }
        other = model(**fewer, return_loss=True)
        datasets = output.dataset_embeds[batch["dataset_index"][:4]]
        same = (batch["dataset_index"][:4].unsqueeze(1) == batch["dataset_index"]).float()
        logits = model.logit_scale[0].exp() * datasets @ output.weight_embeds.T
        torch.testing.assert_close(output.dataset_weight_loss, pairwise_nt_xent(logits, same))
        torch.testing.assert_close(output.dataset_result_loss, other.dataset_result_loss)

    def test_what_is_not_given_is_not_compared(self) -> None:
        output = build()(**inputs(SHALLOW, 2))
        assert output.weight_embeds is not None
        assert output.loss is output.logits_dataset_weight is output.result_embeds is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pairs": ["weight_wish"]}, "pairs .*weight_wish"),
        ({"pairs": []}, "pairs"),
        ({"projection_dim": 0}, "projection_dim 0"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight"),
        ({"weight": {"hops": 0}}, "hops 0"),
        ({"weight": {"last_layer": False}, "reconstruction_weight": 0.1}, "last_layer False"),
        ({"weight": {"dropout": 1.0}}, "dropout 1.0"),
        ({"weight": {"position_size": 3}}, "position_size 3"),
        ({"dataset_config": {**TINY["dataset_config"], "components": 0}}, "components 0"),
        ({"result": {"bins": 1}}, "bins 1"),
        ({"result": {"results": ["a", "a"]}}, "different names"),
        ({"result": {"smoothing": -0.5}}, "smoothing -0.5"),
    ],
)
def test_configs_that_cannot_be_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        build(**change)
