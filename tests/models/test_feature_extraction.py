from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor

from weightspace.dtypes import dtype_name
from weightspace.errors import SettingsError, TokenError, WeightspaceError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import save_checkpoint
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.networks.families import CNNConfig, MLPConfig, Network, initialize
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, TensorSpec

SMALL, LARGE = MLPConfig((1, 2, 2), 3, (4,)), CNNConfig((1, 4, 4), 3, (5, 4))
EXTRACTORS = {
    "channel": WeightFeatureExtractor("channel", 8, mean=0.25, std=0.5),
    "dense": WeightFeatureExtractor("dense", 8, mean=-0.5, std=2.0),
}


def state(config: MLPConfig | CNNConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    module = Network(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in module.state_dict().items()}


def architecture_of(tensors: dict[str, torch.Tensor]) -> Architecture:
    return infer_architecture(TensorSpec(n, tuple(v.shape), dtype_name(v.dtype)) for n, v in tensors.items())


def population(config: MLPConfig | CNNConfig, models: int) -> tuple[torch.Tensor, Architecture]:
    stacked = initialize(config, ["kaiming_normal"] * models, torch.Generator().manual_seed(0))
    architecture = architecture_of(state(config))
    each = [flatten({name: value[i] for name, value in stacked.items()}, architecture) for i in range(models)]
    return torch.stack(each), architecture


@pytest.mark.parametrize("name", EXTRACTORS)
class TestInputs:
    def test_files_checkpoints_and_state_dicts_are_the_same(self, name: str, tmp_path: Path) -> None:
        extractor, tensors = EXTRACTORS[name], state(SMALL)
        path = tmp_path / "model.safetensors"
        save_checkpoint(tensors, path)
        expected = extractor(tensors)
        assert set(expected) == set(WeightFeatureExtractor.model_input_names)
        for other in (path, str(path), tmp_path, open_checkpoint(path), [tensors]):
            found = extractor(other)
            assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_models_of_any_mix_share_a_batch(self, name: str) -> None:
        extractor, models = EXTRACTORS[name], [state(SMALL), state(LARGE), state(SMALL, 1)]
        batch = extractor(models)
        lengths = batch["attention_mask"].sum(1).tolist()
        assert lengths == [extractor.token_count(architecture_of(tensors)) for tensors in models]
        assert batch["weight_values"].shape[:2] == (3, max(lengths))
        for number, tensors in enumerate(models):
            alone, length = extractor(tensors), lengths[number]
            for key, value in batch.items():
                assert torch.equal(value[number, :length], alone[key][0])
                assert not value[number, length:].any()

    def test_flat_vectors_give_the_same_batch(self, name: str) -> None:
        extractor, (flat, architecture) = EXTRACTORS[name], population(LARGE, 3)
        batch = extractor.batch(flat, architecture)
        each = extractor([{k: v.clone() for k, v in unflatten(row, architecture).items()} for row in flat])
        for key, value in batch.items():
            torch.testing.assert_close(each[key], value)
        assert torch.equal(batch["weight_mask"][0], extractor.layout(architecture, 1)["weight_mask"][0])

    def test_weights_come_back(self, name: str) -> None:
        extractor, (flat, architecture) = EXTRACTORS[name], population(LARGE, 3)
        tokens = extractor.batch(flat, architecture)["weight_values"].clone().requires_grad_()
        restored = extractor.restore(tokens, architecture)
        torch.testing.assert_close(restored, flat)
        restored.sum().backward()
        assert tokens.grad is not None
        torch.testing.assert_close(
            tokens.grad, extractor.layout(architecture, len(tokens))["weight_mask"] * extractor.std
        )

    def test_entries_are_standardised_and_padding_is_zero(self, name: str) -> None:
        extractor, (flat, architecture) = EXTRACTORS[name], population(SMALL, 2)
        batch = extractor.batch(flat, architecture)
        mask = batch["weight_mask"]
        valid = batch["weight_values"][mask].sort().values
        torch.testing.assert_close(valid, ((flat.flatten() - extractor.mean) / extractor.std).sort().values)
        assert not batch["weight_values"][~mask].any()
        assert not mask.all()

    def test_is_saved_and_loaded_by_the_auto_class(self, name: str, tmp_path: Path) -> None:
        extractor = EXTRACTORS[name]
        extractor.save_pretrained(tmp_path)
        loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
        assert loaded.to_dict() == extractor.to_dict()
        assert torch.equal(loaded(state(LARGE))["weight_values"], extractor(state(LARGE))["weight_values"])


class TestRefusals:
    def test_weights_that_are_not_finite(self) -> None:
        tensors = state(SMALL)
        tensors["head.weight"][0, 0] = float("nan")
        with pytest.raises(TokenError, match=r"head\.weight"):
            EXTRACTORS["channel"](tensors)

    def test_tokens_of_another_architecture(self) -> None:
        with pytest.raises(TokenError, match="decoded tokens"):
            EXTRACTORS["channel"].restore(torch.zeros(1, 3, 8), architecture_of(state(LARGE)))

    def test_nothing_to_embed(self) -> None:
        with pytest.raises(WeightspaceError, match="no models"):
            EXTRACTORS["channel"]([])

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(WeightspaceError, match="nowhere"):
            EXTRACTORS["channel"](tmp_path / "nowhere")

    def test_wrong_settings(self) -> None:
        with pytest.raises(SettingsError, match="vowel"):
            WeightFeatureExtractor("vowel", 8)
        with pytest.raises(TokenError, match="std 0"):
            WeightFeatureExtractor("channel", 8, std=0.0)
