"""What is particular to the prior of codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from weightspace.errors import SettingsError
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.prior.configuration_prior import WeightCodePriorConfig
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel, _drawn
from weightspace.models.prior.modeling_prior import Guidance, PriorCondition
from weightspace.networks.families import MLPConfig
from weightspace.sampling.base import Condition
from weightspace.schema import Architecture

LEVELS = (4, 3)
TINY: dict[str, Any] = {
    "autoencoder_config": {
        "token_size": 8,
        "latent_size": 4,
        "code_levels": list(LEVELS),
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
    "number_size": 8,
    "position_size": 8,
}


def architecture(*hidden: int) -> Architecture:
    return Condition.from_config(MLPConfig((1, 2, 3), 4, hidden).to_dict()).architecture


SHALLOW, WIDE = architecture(5), architecture(30)
SHALLOW_TOKENS = WeightFeatureExtractor("channel", 8).token_count(SHALLOW)


def build(**changes: Any) -> WeightCodePriorModel:
    """A model in which everything that it is given can matter."""
    torch.manual_seed(0)
    model = WeightCodePriorModel(WeightCodePriorConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "initial_scale", 1.0) == 0.0:
                module.weight.normal_(std=0.2)
        model.level_out.weight.mul_(4)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(rows: int = 2, seed: int = 1) -> PriorCondition:
    result = torch.nn.functional.normalize(draw(rows, 6, seed=seed + 1), dim=-1)
    return PriorCondition(draw(rows, 4, 6, seed=seed), result, torch.ones(rows, dtype=torch.int64))


def places(architecture: Architecture, rows: int = 2) -> dict[str, Tensor]:
    return WeightFeatureExtractor("channel", 8).layout(architecture, rows)


def sampled(model: WeightCodePriorModel, asked: PriorCondition, seed: int = 0, **options: Any) -> Tensor:
    where = places(options.pop("architecture", SHALLOW), len(asked.activation))
    return model.sample(asked, **where, generator=torch.Generator().manual_seed(seed), **options)


def inputs(rows: int = 2, architecture: Architecture = SHALLOW) -> dict[str, Tensor]:
    where, asked = places(architecture, rows), condition(rows)
    return {
        "latents": draw(*where["position_ids"].shape[:2], 4, seed=5).tanh(),
        **where,
        "class_features": asked.class_features,
        "result_embeds": asked.result_embeds,
        "activation": asked.activation,
    }


def numbers(model: WeightCodePriorModel, latents: Tensor) -> Tensor:
    return model.autoencoder.from_codes(model.autoencoder.to_codes(latents))


def moved(numbers: Tensor, token: int, number: int) -> Tensor:
    """The same numbers, one of which is at its next level."""
    other = numbers.clone()
    levels = LEVELS[number % 2]
    other[:, token, number] = (other[:, token, number] + 2 / levels + 1).remainder(2) - 1
    return other


@torch.no_grad()
@pytest.mark.parametrize("architecture", [SHALLOW, WIDE], ids=["one window", "three windows"])
def test_a_number_is_predicted_from_all_numbers_before_it_and_no_others(architecture: Architecture) -> None:
    model, batch = build(), inputs(architecture=architecture)
    own, window = numbers(model, batch["latents"]), model.autoencoder.config.window
    before = model(**{**batch, "latents": own}).logits
    count = own.shape[1]
    for token, number in ((0, 0), (2, 1), (5, 3), (count - 1, 2)):
        changed = model(**{**batch, "latents": moved(own, token, number)}).logits != before
        places = torch.arange(count * 4)
        # Tokens see those of their window, and the one before it.
        near = places // 4 // window == min(token + 1, count - 1) // window
        later = (places > 4 * token + number) & (near | (places // 4 == token))
        assert torch.equal(changed.any(-1).flatten(1), later.expand(2, -1))


@torch.no_grad()
def test_chances_of_all_models_of_one_token_sum_to_one() -> None:
    model, batch = build(), inputs(1)
    codes = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    batch = {name: value[:, :1] if value.ndim > 2 or "mask" in name else value for name, value in batch.items()}
    many = {name: value.expand(144, *value.shape[1:]) for name, value in batch.items()}
    latents = model.autoencoder.from_codes(codes[:, None])
    logits = model(**{**many, "latents": latents}).logits[:, 0]
    chances = logits.softmax(-1).gather(-1, model._levels_of(latents)[:, 0, :, None]).prod(1)
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-4)
    loss = model(**{**batch, "latents": latents[7:8]}).loss
    assert float(loss) == pytest.approx(-float(chances[7].log()) / 4, rel=1e-4)


@torch.no_grad()
def test_samples_have_the_frequencies_of_the_model() -> None:
    model, asked = build(), condition(1)
    parts = (
        asked.class_features.expand(4000, -1, -1),
        asked.result_embeds.expand(4000, -1),
        asked.activation.expand(4000),
    )
    many = PriorCondition(*parts)
    found = numbers(model, model.autoencoder.from_codes(sampled(model, many)))[:, 0]
    logits = model(**{**inputs(1), "known": torch.zeros(1, 1, dtype=torch.bool).expand(1, SHALLOW_TOKENS)}).logits
    expected = logits[0, 0, 0].softmax(-1)
    levels = (found[:, 0, None] - model._middles()[0]).abs().argmin(-1)
    torch.testing.assert_close(levels.bincount(minlength=4) / 4000, expected, atol=0.03, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [SHALLOW, WIDE], ids=["one window", "three windows"])
def test_what_is_sampled_at_temperature_zero_is_what_is_expected(architecture: Architecture) -> None:
    model, asked = build(), condition()
    one, other = (sampled(model, asked, seed, temperature=0.0, architecture=architecture) for seed in (0, 1))
    assert torch.equal(one, other)
    expected = model(**{**inputs(architecture=architecture), "latents": model.autoencoder.from_codes(one)}).expected
    assert torch.equal(model.autoencoder.to_codes(expected), one)


def test_samples_follow_from_the_generator_alone() -> None:
    model = build()
    assert torch.equal(sampled(model, condition(), seed=1), sampled(model, condition(), seed=1))
    assert not torch.equal(sampled(model, condition(), seed=1), sampled(model, condition(), seed=2))


def test_lower_temperatures_stay_closer_to_what_is_expected() -> None:
    middles = (2 * torch.arange(40) + 1) / 40 - 1
    chances = torch.linspace(1, 3, 40).div(80).expand(4000, -1)
    mean, spread = (chances[0] * middles).sum(), (chances[0] * middles.square()).sum().sqrt()
    for temperature in (0.0, 0.5, 1.0):
        drawn = _drawn(chances, middles, temperature, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) <= set(middles.tolist())
        torch.testing.assert_close(drawn.mean(), mean, atol=0.03, rtol=0)
        expected = temperature * (spread.square() - mean.square()).sqrt()
        torch.testing.assert_close(drawn.std(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("part", ["dataset", "result", "activation"])
def test_every_part_of_the_condition_matters(part: str) -> None:
    model, asked = build(), condition()
    given = {"dataset": "class_features", "result": "result_embeds", "activation": "activation"}[part]
    batch = inputs()
    other = asked.activation + 1 if part == "activation" else -batch[given]
    assert not torch.allclose(model(**batch).logits, model(**{**batch, given: other}).logits, atol=1e-3)


@torch.no_grad()
def test_guidance_of_one_is_the_model_and_of_zero_leaves_the_condition_out() -> None:
    model, asked = build(), condition(8)
    plain = sampled(model, asked)
    assert torch.equal(sampled(model, asked, guidance=Guidance(1.0, 1.0)), plain)
    without_result = sampled(model, asked.without(result=True))
    assert torch.equal(sampled(model, asked, guidance=Guidance(1.0, 0.0)), without_result)
    nothing = sampled(model, asked.without(dataset=True, result=True))
    assert torch.equal(sampled(model, asked, guidance=Guidance(0.0, 0.0)), nothing)
    assert not torch.equal(sampled(model, asked, guidance=Guidance(3.0, 1.0)), plain)


@torch.no_grad()
def test_guidance_moves_logits_away_from_those_without_the_condition() -> None:
    model, asked, batch = build(), condition(8), inputs(8)
    unknown = torch.zeros(8, SHALLOW_TOKENS, dtype=torch.bool)
    none = {"class_features": torch.zeros(8, 4, 6), "result_embeds": torch.zeros(8, 6)}
    both, dataset, neither = (
        model(**{**batch, **without, "known": unknown}).logits[:, :1]
        for without in ({}, {"result_embeds": none["result_embeds"]}, none)
    )
    expected = model._expected(neither + 2 * (dataset - neither) + 3 * (both - dataset))[:, 0, 0]
    found = model.autoencoder.from_codes(sampled(model, asked, temperature=0.0, guidance=Guidance(2.0, 3.0)))
    own = torch.cat([expected[:, None], torch.zeros(8, 3)], 1)[:, None]
    assert torch.equal(found[:, 0, 0], numbers(model, own)[:, 0, 0])


@torch.no_grad()
def test_unknown_tokens_tell_nothing() -> None:
    model, batch = build(), inputs()
    known = torch.arange(SHALLOW_TOKENS).expand(2, -1) != 3
    own = numbers(model, batch["latents"])
    one = model(**{**batch, "latents": own}, known=known).logits
    other = model(**{**batch, "latents": moved(moved(own, 3, 0), 3, 2)}, known=known).logits
    assert torch.equal(one, other)
    assert not torch.equal(one[:, 4:], model(**{**batch, "latents": own}).logits[:, 4:])


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, given = build(), inputs()
    plain = model(**given, decode=True)
    longer = {
        name: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 3)) if value.ndim > 1 else value
        for name, value in given.items()
        if name not in ("class_features", "result_embeds")
    }
    asked = {name: given[name] for name in ("class_features", "result_embeds")}
    padded = model(**longer, **asked, decode=True)
    torch.testing.assert_close(padded.logits[:, :-3], plain.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.reconstruction[:, :-3], plain.reconstruction, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(padded.loss, plain.loss)


@torch.no_grad()
def test_a_sure_model_expects_the_codes_and_decodes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(), inputs()
    own = numbers(model, given["latents"])
    sure = -100 * (own[..., None] - model._middles()).abs().nan_to_num(nan=torch.inf)
    monkeypatch.setattr(model, "_logits", lambda *_: sure)
    output = model(**given, decode=True)
    assert float(output.loss) < 1e-6
    torch.testing.assert_close(output.expected, own)
    decoded = model.autoencoder.decode(given["latents"], given["weight_mask"], given["position_ids"])
    torch.testing.assert_close(output.reconstruction, decoded)


def test_only_the_prior_is_trained_and_all_of_it() -> None:
    model, given = build(), inputs()
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {f"autoencoder.{name}" for name, _ in model.autoencoder.named_parameters()}
    given["class_features"] = given["class_features"] * torch.tensor([1.0, 0.0]).view(2, 1, 1)
    given["result_embeds"] = given["result_embeds"] * torch.tensor([[0.0], [1.0]])
    model(**given).loss.backward()
    unused = [
        n
        for n, value in model.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    ]
    assert unused == []


def test_what_the_guess_does_can_be_learnt_from() -> None:
    model = build()
    model(**inputs(), decode=True).reconstruction.square().sum().backward()
    assert model.level_out.weight.grad is not None and model.level_out.weight.grad.any()


def test_learns_codes_by_heart() -> None:
    torch.manual_seed(0)
    model, given = WeightCodePriorModel(WeightCodePriorConfig(**TINY)), inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    codes = sampled(model.eval(), condition(), temperature=0.0)
    assert torch.equal(codes, model.autoencoder.to_codes(given["latents"]))


def test_a_new_model_knows_nothing_yet() -> None:
    model = WeightCodePriorModel(WeightCodePriorConfig(**TINY)).eval()
    assert model(**inputs(8)).loss.item() == pytest.approx((math.log(4) + math.log(3)) / 2, rel=0.5)


def test_saved_and_loaded_it_samples_the_same_bits(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, WeightCodePriorModel)
    assert torch.equal(sampled(loaded, condition()), sampled(model, condition()))


def test_samples_in_bf16(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    half = WeightCodePriorModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    codes = sampled(half, condition())
    latents = half.autoencoder.from_codes(codes)
    assert torch.equal(half.autoencoder.to_codes(latents), codes)
    assert half(**{**inputs(), "latents": latents}).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 15}, "hidden_size 15 is not a multiple"),
        ({"position_size": 7}, "position_size 7 is odd"),
        ({"num_layers": 0}, "num_layers 0 must be at least 1"),
        ({"number_size": 0}, "number_size 0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        WeightCodePriorConfig(**{**TINY, **change})


def test_an_autoencoder_without_codes_is_refused() -> None:
    own = {**TINY["autoencoder_config"], "code_levels": None}
    with pytest.raises(SettingsError, match="code_levels: this autoencoder has none; train one with `code_levels` set"):
        build(autoencoder_config=own)


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature -1\.0 is negative; give 0 or more"):
        sampled(build(), condition(), temperature=-1.0)
