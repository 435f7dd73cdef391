from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.sampling import priors
from weightspace.sampling.base import Condition, Sampler, sample
from weightspace.sampling.priors import CodeSampler, CodeSettings, FlowSampler


@pytest.fixture(scope="module")
def sampler(tiny_code_prior: Path, tiny_joint: Encoder) -> CodeSampler:
    return CodeSampler.load(tiny_code_prior, tiny_joint)


def drawn(sampler: CodeSampler, condition: Condition, count: int = 3, seed: int = 0) -> Tensor:
    return sampler.latents(condition, count, torch.Generator().manual_seed(seed))


def test_samples_are_models_of_the_architecture_made_of_codes(sampler: CodeSampler, tiny_condition: Condition) -> None:
    assert isinstance(sampler, Sampler)
    latents, autoencoder = drawn(sampler, tiny_condition), sampler.prior.autoencoder
    assert torch.equal(autoencoder.from_codes(autoencoder.to_codes(latents)), latents)
    flat = sample(sampler, tiny_condition, 3, torch.Generator().manual_seed(0))
    assert flat.shape == (3, tiny_condition.architecture.numel)
    assert torch.equal(flat, sampler.codec.decode(latents, tiny_condition.architecture))


def test_samples_follow_from_the_generator_alone(sampler: CodeSampler, tiny_condition: Condition) -> None:
    one, same, other = (drawn(sampler, tiny_condition, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_temperature_is_how_much_samples_differ(sampler: CodeSampler, tiny_condition: Condition) -> None:
    spread = [
        float(drawn(replace(sampler, settings=CodeSettings(temperature=t)), tiny_condition).std(0).mean())
        for t in (0.0, 0.5, 1.0)
    ]
    assert spread[0] == 0 < spread[1] < spread[2]


def test_a_condition_may_be_left_out_and_matters(sampler: CodeSampler, tiny_condition: Condition) -> None:
    conditions = (
        tiny_condition,
        replace(tiny_condition, results=()),
        replace(tiny_condition, dataset=None),
        replace(tiny_condition, dataset=None, results=()),
    )
    strong = replace(sampler, settings=CodeSettings(5.0, 5.0, 1.0))
    samples = [drawn(strong, condition, 8) for condition in conditions]
    assert not any(torch.equal(one, other) for place, one in enumerate(samples) for other in samples[:place])


def test_many_samples_are_drawn_in_parts(
    sampler: CodeSampler, tiny_condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priors, "_BATCH", 2)
    assert len(drawn(sampler, tiny_condition, 5)) == 5


def test_what_does_not_fit_is_refused(
    tiny_code_prior: Path, tiny_prior: Path, tiny_joint: Encoder, tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightspaceError, match=r"no prior \(there is no config\.json\); train one or check the path"):
        CodeSampler.load(tmp_path, tiny_joint)
    with pytest.raises(
        SettingsError, match=r"holds a model of type .weight_prior.; give a prior of type weight_code_p"
    ):
        CodeSampler.load(tiny_prior, tiny_joint)
    with pytest.raises(
        SettingsError, match=r"holds a model of type .weight_code_prior.; give a prior of type weight_pr"
    ):
        FlowSampler.load(tiny_code_prior, tiny_joint)
    with pytest.raises(SettingsError, match=r"joint model .*: the prior .* was trained with another one .*; give that"):
        CodeSampler.load(tiny_code_prior, replace(tiny_joint, path=tiny_encoder))
    with pytest.raises(SettingsError, match=r"temperature: -1\.0 is negative; give 0 or more"):
        CodeSettings(temperature=-1.0)
