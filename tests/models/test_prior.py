"""What is particular to the prior of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.prior.configuration_prior import WeightPriorConfig
from weightspace.models.prior.modeling_prior import Guidance, PriorCondition, WeightPriorModel, _at_outputs
from weightspace.networks.families import MLPConfig
from weightspace.sampling.base import Condition
from weightspace.schema import Architecture

TINY: dict[str, Any] = {
    "autoencoder_config": {
        "token_size": 8,
        "latent_size": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "window": 16,
    },
    "class_size": 6,
    "result_size": 6,
    "activations": ["relu", "tanh"],
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "position_size": 8,
    "time_size": 8,
}


def architecture(*hidden: int) -> Architecture:
    return Condition.from_config(MLPConfig((1, 2, 3), 4, hidden).to_dict()).architecture


SHALLOW, WIDE = architecture(5), architecture(30)


def moving(**changes: Any) -> WeightPriorModel:
    """A model whose last layers are not zero, so that everything it is given can matter."""
    torch.manual_seed(0)
    model = WeightPriorModel(WeightPriorConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "initial_scale", 1.0) == 0.0:
                module.weight.normal_(std=0.2)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(rows: int = 2, seed: int = 1) -> PriorCondition:
    result = torch.nn.functional.normalize(draw(rows, 6, seed=seed + 1), dim=-1)
    ordered = torch.ones(rows, dtype=torch.bool)
    return PriorCondition(draw(rows, 4, 6, seed=seed), result, torch.ones(rows, dtype=torch.int64), ordered)


def places(architecture: Architecture, rows: int = 2) -> dict[str, Tensor]:
    return WeightFeatureExtractor("channel", 8).layout(architecture, rows)


def sampled(model: WeightPriorModel, asked: PriorCondition, seed: int = 0, **options: Any) -> Tensor:
    where = places(options.pop("architecture", SHALLOW), len(asked.activation))
    return model.sample(asked, **where, generator=torch.Generator().manual_seed(seed), **{"steps": 3, **options})


def inputs(rows: int = 2) -> dict[str, Tensor]:
    where, asked = places(SHALLOW, rows), condition(rows)
    shape = (*where["position_ids"].shape[:2], 3)
    return {
        "latents": draw(*shape, seed=5),
        **where,
        **vars(asked),
        "noise": draw(*shape, seed=6),
        "times": torch.linspace(0.2, 0.8, rows),
    }


def test_a_new_model_moves_nothing_and_its_loss_is_that_of_standing_still() -> None:
    model, given = WeightPriorModel(WeightPriorConfig(**TINY)), inputs()
    output = model(**given)
    assert not output.velocity.any()
    assert float(output.loss) == pytest.approx(float((given["latents"] - given["noise"]).square().mean()), rel=1e-5)


def test_the_loss_is_zero_for_the_right_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = moving(), inputs()
    model.scaler.fit(given["latents"].flatten(0, 1))
    right = model.scaler(given["latents"]) - given["noise"]
    monkeypatch.setattr(model, "velocity", lambda *_: right)
    output = model(**given, decode=True)
    assert float(output.loss) < 1e-10
    torch.testing.assert_close(output.denoised, given["latents"], rtol=1e-4, atol=1e-4)
    decoded = model.autoencoder.decode(given["latents"], given["weight_mask"], given["position_ids"])
    torch.testing.assert_close(output.reconstruction, decoded, rtol=1e-3, atol=1e-3)


def test_an_exact_velocity_field_carries_noise_to_its_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, goal = moving(), draw(2, *places(SHALLOW)["position_ids"].shape[1:2], 3, seed=3)
    model.scaler.fit(goal.flatten(0, 1))
    end = model.scaler(goal)
    monkeypatch.setattr(model, "velocity", lambda z, t, *_: (end - z) / (1 - t).view(-1, 1, 1))
    for solver in ("euler", "heun"):
        torch.testing.assert_close(sampled(model, condition(), solver=solver, steps=4), goal, rtol=1e-4, atol=1e-4)


def test_samples_follow_from_the_generator_alone() -> None:
    model = moving()
    assert torch.equal(sampled(model, condition(), seed=1), sampled(model, condition(), seed=1))
    assert not torch.equal(sampled(model, condition(), seed=1), sampled(model, condition(), seed=2))


@pytest.mark.parametrize("part", ["class_features", "result_embeds", "activation"])
def test_every_part_of_the_condition_matters(part: str) -> None:
    model, asked = moving(), condition()
    value = asked.activation + 1 if part == "activation" else -getattr(asked, part)
    changed = sampled(model, replace(asked, **{part: value}))
    assert not torch.allclose(sampled(model, asked), changed, atol=1e-4)


def test_classes_enter_at_no_token_where_the_outputs_are_not_known() -> None:
    model, asked = moving(), condition()
    known = replace(asked, ordered=torch.tensor([True, False]))
    assert torch.equal(sampled(model, replace(asked, ordered=None)), sampled(model, asked))
    assert torch.equal(sampled(model, known)[0], sampled(model, asked)[0])
    assert not torch.allclose(sampled(model, known)[1], sampled(model, asked)[1], atol=1e-4)
    turned = replace(known, class_features=known.class_features.flip(1))
    torch.testing.assert_close(sampled(model, turned)[1], sampled(model, known)[1], atol=1e-4, rtol=1e-4)


def test_guidance_of_one_is_the_model_and_of_zero_leaves_the_condition_out() -> None:
    model, asked = moving(), condition()
    plain = sampled(model, asked)
    torch.testing.assert_close(sampled(model, asked, guidance=Guidance(1.0, 1.0)), plain)
    without_result = sampled(model, asked.without(result=True))
    torch.testing.assert_close(sampled(model, asked, guidance=Guidance(1.0, 0.0)), without_result)
    nothing = sampled(model, asked.without(dataset=True, result=True))
    torch.testing.assert_close(sampled(model, asked, guidance=Guidance(0.0, 0.0)), nothing)
    assert not torch.allclose(sampled(model, asked, guidance=Guidance(3.0, 1.0)), plain, atol=1e-3)


def test_what_is_absent_in_a_row_does_not_touch_the_others() -> None:
    model, asked = moving(), condition()
    mixed = replace(asked, class_features=asked.class_features * torch.tensor([1.0, 0.0]).view(2, 1, 1))
    whole, part = sampled(model, asked), sampled(model, mixed)
    torch.testing.assert_close(whole[0], part[0])
    assert not torch.allclose(whole[1], part[1], atol=1e-4)


def test_each_class_is_told_to_the_output_that_stands_for_it() -> None:
    model, asked, where = moving(), condition(), places(SHALLOW)
    classes, tokens = (
        model.class_in(asked.class_features),
        torch.ones(2, len(where["position_ids"][0]), dtype=torch.bool),
    )
    told = _at_outputs(classes, where["position_ids"], tokens)
    _, layer, channel = where["position_ids"][0].unbind(-1)
    for token in range(len(layer)):
        expected = classes[:, channel[token]] if layer[token] == 1 else torch.zeros(2, 16)
        assert torch.equal(told[:, token], expected)
    fewer = _at_outputs(classes[:, :3], where["position_ids"], tokens)
    assert torch.equal(fewer, told * (channel < 3)[:, None])


def test_without_layers_a_class_matters_to_its_own_output_and_in_the_mean_to_all() -> None:
    model, asked = moving(), condition(1)
    where = {**places(SHALLOW, 1), "attention_mask": torch.ones(1, 9, dtype=torch.bool)}
    for layer in model.layers:
        layer.modulation.weight.data.zero_()  # leaves every layer the identity
    noisy, times = draw(1, 9, 3), torch.full((1,), 0.5)
    swapped = replace(asked, class_features=asked.class_features[:, [1, 0, 2, 3]])
    one, other = (model.velocity(noisy, times, part, **where) for part in (asked, swapped))
    changed = (one - other).abs().amax(-1)[0] > 1e-5
    _, layer, channel = where["position_ids"][0].unbind(-1)
    assert torch.equal(changed, (layer == 1) & (channel < 2))


def test_a_class_that_is_not_there_counts_for_nothing() -> None:
    model, asked = moving(), condition()
    longer = replace(asked, class_features=torch.nn.functional.pad(asked.class_features, (0, 0, 0, 3)))
    torch.testing.assert_close(sampled(model, asked), sampled(model, longer))


def test_padding_changes_nothing() -> None:
    model, given = moving(), inputs()
    plain = model(**given)
    longer = {
        name: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 3)) if value.ndim > 1 else value
        for name, value in given.items()
        if name not in ("class_features", "result_embeds")
    }
    padded = model(**longer, class_features=given["class_features"], result_embeds=given["result_embeds"])
    torch.testing.assert_close(padded.velocity[:, :-3], plain.velocity, rtol=1e-4, atol=1e-5)
    assert not padded.velocity[:, -3:].any()
    torch.testing.assert_close(padded.loss, plain.loss)


def test_starting_from_latents_at_the_end_changes_nothing_and_at_the_start_forgets_them() -> None:
    model, asked = moving(), condition()
    latents = draw(2, places(SHALLOW)["position_ids"].shape[1], 3, seed=9)
    torch.testing.assert_close(sampled(model, asked, latents=latents, begin=1.0), latents)
    torch.testing.assert_close(sampled(model, asked, latents=latents, begin=0.0), sampled(model, asked))


def test_longer_sequences_than_a_window_are_sampled_in_windows() -> None:
    model = moving()
    count = places(WIDE)["position_ids"].shape[1]
    assert count > model.autoencoder.config.window
    given = {**places(WIDE), "attention_mask": torch.ones(2, count, dtype=torch.bool)}
    noisy, asked, times = draw(2, count, 3), condition(), torch.full((2,), 0.5)
    whole = model.velocity(noisy, times, asked, **given)
    changed = torch.cat([noisy[:, :16], draw(2, count - 16, 3, seed=1)], 1)
    other = model.velocity(changed, times, asked, **given)
    torch.testing.assert_close(whole[:, :16], other[:, :16])
    assert not torch.isclose(whole[:, 16:], other[:, 16:]).all(-1).any()


def test_only_the_flow_is_trained() -> None:
    model = moving()
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {f"autoencoder.{name}" for name, _ in model.autoencoder.named_parameters()}
    model(**inputs()).loss.backward()
    unused = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not unused


def test_saved_and_loaded_it_samples_the_same_bits(tmp_path: Path) -> None:
    model = moving()
    model.scaler.fit(draw(50, 3, seed=4) * 3 + 1)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, WeightPriorModel)
    assert torch.equal(sampled(loaded, condition()), sampled(model, condition()))


def test_unknown_activations_are_one() -> None:
    model = moving()
    assert [model.activation_number(name) for name in ("relu", "tanh", "silu", None)] == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 15}, "hidden_size 15 is not a multiple"),
        ({"time_size": 7}, "time_size 7 is odd"),
        ({"position_size": 7}, "position_size 7 is odd"),
        ({"num_layers": 0}, "num_layers 0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        WeightPriorConfig(**{**TINY, **change})


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="solver 'rk4' with 3 steps: choose euler or heun"):
        sampled(moving(), condition(), solver="rk4")
