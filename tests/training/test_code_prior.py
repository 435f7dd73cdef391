"""What is particular to the training of priors of codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from weightspace.errors import SettingsError
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.training import prior
from weightspace.training.behaviour import BehaviourSettings
from weightspace.training.loop import read_history
from weightspace.training.prior import CodePriorSettings, PriorSettings, train_prior
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo


@pytest.fixture
def settings(tiny_prior_settings: PriorSettings) -> CodePriorSettings:
    return CodePriorSettings(shape=tiny_prior_settings.shape, loop=tiny_prior_settings.loop)


def test_training_is_recorded(tiny_code_prior: Path, tiny_code_encoder: Path, tiny_clip_joint: Path) -> None:
    model, state, joint = (
        AutoModel.from_pretrained(tiny_code_prior),
        *map(read_training, (tiny_code_prior, tiny_clip_joint)),
    )
    assert isinstance(model, WeightCodePriorModel)
    assert state is not None and joint is not None
    assert state.complete and state.settings["unknown"] == 1.0
    assert model.config.joint_identity == joint.identity
    assert model.config.activations == ["relu", "tanh"]
    own = WeightAutoencoderModel.from_pretrained(tiny_code_encoder).state_dict()
    assert all(torch.equal(model.autoencoder.state_dict()[name], value) for name, value in own.items())
    last = read_history(tiny_code_prior)[-1]
    expected = 0.1 * last["validation_codes"] + 0.9 * last["validation_behaviour"]
    assert last["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_repeats_to_the_bit(
    tiny_zoo: Zoo,
    tiny_code_prior: Path,
    tiny_code_encoder: Path,
    tiny_clip_joint: Path,
    settings: CodePriorSettings,
    tmp_path: Path,
) -> None:
    folders = {"autoencoder": tiny_code_encoder, "joint": tiny_clip_joint}
    again = train_prior(tiny_zoo.path, tmp_path / "p", settings, **folders)
    one, other = (AutoModel.from_pretrained(folder).state_dict() for folder in (tiny_code_prior, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_the_loss_falls(
    tiny_zoo: Zoo, tiny_code_encoder: Path, tiny_clip_joint: Path, settings: CodePriorSettings, tmp_path: Path
) -> None:
    loop = replace(settings.loop, steps=60, batch_size=32, checkpoint_every=0, validate_every=10, log_every=10)
    chosen = replace(settings, loop=loop, behaviour=BehaviourSettings(weight=0.5, images=4))
    folders = {"autoencoder": tiny_code_encoder, "joint": tiny_clip_joint}
    history = read_history(train_prior(tiny_zoo.path, tmp_path / "p", chosen, **folders))
    assert history[-1]["validation_codes"] < 0.9 * history[0]["validation_codes"]


def test_any_share_of_the_tokens_may_be_unknown() -> None:
    latents = torch.zeros(4000, 50, 2)
    for largest in (0.0, 0.5, 1.0):
        known = prior._drawn(CodePriorSettings(unknown=largest), latents, torch.Generator().manual_seed(0))["known"]
        shares = 1 - known.float().mean(1)
        assert shares.mean().item() == pytest.approx(largest / 2, abs=0.02)
        assert shares.quantile(0.9).item() == pytest.approx(0.9 * largest, abs=0.05)


def test_what_does_not_fit_is_refused(
    tiny_zoo: Zoo, tiny_encoder: Path, tiny_clip_joint: Path, settings: CodePriorSettings, tmp_path: Path
) -> None:
    folders = {"autoencoder": tiny_encoder, "joint": tiny_clip_joint}
    with pytest.raises(SettingsError, match=r"autoencoder: .* has no codes; train one with `encoder.code_levels` set"):
        train_prior(tiny_zoo.path, tmp_path / "p", settings, **folders)
    assert not (tmp_path / "p").exists()
    with pytest.raises(SettingsError, match=r"unknown: 1\.5 is out of range, give 0 to 1"):
        replace(settings, unknown=1.5)
    with pytest.raises(SettingsError, match="drop: 1"):
        replace(settings, drop=1.0)
