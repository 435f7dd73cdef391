from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from weightspace.errors import SettingsError
from weightspace.networks.running_statistics import running_statistics


@pytest.fixture(scope="module")
def resnet() -> ResNetForImageClassification:
    """A classifier that has seen a few batches of its own images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        config.num_labels = 3
        model = ResNetForImageClassification(config).train()
    for batch in images():
        model(batch)
    return model.eval()


def images(shift: float = 0.0, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 16, 16, generator=generator) * 2 + shift for _ in range(batches)]


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def test_are_those_of_the_images(resnet: ResNetForImageClassification) -> None:
    given = images(shift=1.0)
    found = running_statistics(resnet.config.to_dict(), parameters(resnet), given)
    expected = {name for name, _ in resnet.named_buffers()}
    assert set(found) == expected
    first = "resnet.embedder.embedder"
    with torch.no_grad():
        maps = [resnet.resnet.embedder.embedder.convolution(batch) for batch in given]
    means = torch.stack([value.mean((0, 2, 3)) for value in maps]).mean(0)
    variances = torch.stack([value.var((0, 2, 3)) for value in maps]).mean(0)
    torch.testing.assert_close(found[f"{first}.normalization.running_mean"], means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[f"{first}.normalization.running_var"], variances, rtol=1e-4, atol=1e-5)


def test_make_a_network_work_on_its_images(resnet: ResNetForImageClassification) -> None:
    given = images(shift=3.0, batches=1)
    found = running_statistics(resnet.config.to_dict(), parameters(resnet), given)
    fresh = ResNetForImageClassification(resnet.config).eval()
    fresh.load_state_dict({**parameters(resnet), **found})
    trained = ResNetForImageClassification(resnet.config).train()
    trained.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        # In training mode a network normalises by the batch, which is all that the statistics have seen here.
        torch.testing.assert_close(fresh(given[0]).logits, trained(given[0]).logits, rtol=1e-2, atol=1e-2)
        assert (resnet(given[0]).logits - trained(given[0]).logits).abs().max() > 0.1


def test_refusals(resnet: ResNetForImageClassification) -> None:
    config, weights = resnet.config.to_dict(), parameters(resnet)
    name = next(iter(weights))
    with pytest.raises(SettingsError, match=f"{name}: the config asks for shape .*no such tensor; give the config"):
        running_statistics(config, {key: value for key, value in weights.items() if key != name}, images())
    with pytest.raises(SettingsError, match=r"asks for shape \(3, 8\), the weights have \(2, 8\); give the config"):
        wrong = next(key for key in weights if key.startswith("classifier") and key.endswith("weight"))
        running_statistics(config, {**weights, wrong: torch.zeros(2, 8)}, images())
    with pytest.raises(SettingsError, match=r"images: none, or .*give other images"):
        running_statistics(config, weights, [])
    kinds: list[dict[str, Any]] = [{}, {"model_type": "nothing"}, {"model_type": "bert"}, {**config, "depths": "many"}]
    for other in kinds:
        with pytest.raises(SettingsError, match=r"builds no image classifier of it .*give one with the model_type"):
            running_statistics(other, weights, images())


def test_a_network_without_any_is_refused() -> None:
    config = ViTConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, image_size=16)
    weights = parameters(ViTForImageClassification(config))
    with pytest.raises(SettingsError, match="vit: has no running statistics to estimate; use the weights as they are"):
        running_statistics(config.to_dict(), weights, images())


def test_code_that_a_config_names_is_not_run(resnet: ResNetForImageClassification) -> None:
    remote = {"auto_map": {"AutoModelForImageClassification": "somebody/else--code.Evil"}}
    found = running_statistics({**resnet.config.to_dict(), **remote}, parameters(resnet), images())
    expected = running_statistics(resnet.config.to_dict(), parameters(resnet), images())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_sizes": [4, 8_000_000_000]},
        {"depths": [1, 10**9]},
        {"depths": [1, 10**4]},
        {"num_labels": 10**9},
        {"embedding_size": 200_000},
        {"backbone_config": {"hidden": [[10**12]]}},
    ],
)
def test_a_config_allocates_no_more_than_its_weights(resnet: ResNetForImageClassification, sizes: dict) -> None:
    with pytest.raises(SettingsError, match=r"config: .*give the config of (these|the) weights"):
        running_statistics({**resnet.config.to_dict(), **sizes}, parameters(resnet), images())
