"""What every registered model promises, and what the weight autoencoder promises beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import weightspace.models
from weightspace.losses import masked_mse, nt_xent
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.layers import TokenLayer
from weightspace.models.pooling import depth_weights, relative_depths, state_moments
from weightspace.schema import Architecture, LayerSpec, TensorSpec

# One small model of each type; the residual scale, the window and the parts of the pooling all matter in it.
TINY = {
    "weight_autoencoder": {
        "token_size": 6,
        "latent_size": 3,
        "window": 8,
        "hidden_size": 16,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "projection_size": 8,
    }
}
TINY["weightspace_joint"] = {
    "dataset_config": {"feature_size": 5, "hidden_size": 16, "pooling_heads": 2, "position_size": 4},
    "weight_config": {
        "encoder_config": TINY["weight_autoencoder"],
        "hidden_size": 16,
        "pooling_heads": 2,
        "position_size": 4,
    },
    "result_config": {"results": ["test_accuracy", "test_loss"], "bins": 4, "hidden_size": 8},
    "projection_dim": 8,
    "reconstruction_weight": 0.1,
}


def registered() -> list[str]:
    """Model types of the configuration files of this library."""
    folder = Path(weightspace.models.__file__).parent
    return sorted(path.stem.removeprefix("configuration_") for path in folder.rglob("configuration_*.py"))


def build(model_type: str = "weight_autoencoder", attention: str = "eager", **changes: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**TINY[model_type], **changes})
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # zero biases and unit scales would hide what overwrites them
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def layer(name: str, *shape: int) -> LayerSpec:
    tensors = (TensorSpec(f"{name}.weight", shape, "F32"), TensorSpec(f"{name}.bias", shape[:1], "F32"))
    return LayerSpec(name, "linear", tensors, "channels")


SMALL = Architecture((layer("a", 4, 5), layer("b", 3, 4)))  # 7 tokens: less than a window
LARGE = Architecture((layer("a", 9, 5), layer("b", 6, 4), layer("c", 5, 3)))  # 20 tokens: three windows


def inputs(architecture: Architecture, models: int, seed: int = 0) -> dict[str, Tensor]:
    flat = torch.randn(models, architecture.numel, generator=torch.Generator().manual_seed(seed))
    return dict(WeightFeatureExtractor("channel", 6).batch(flat, architecture))


def padded(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same models with ``count`` tokens of padding after them."""
    return {
        name: torch.cat([value, value.new_zeros(len(value), count, *value.shape[2:])], 1)
        for name, value in batch.items()
    }


def together(*batches: dict[str, Tensor]) -> dict[str, Tensor]:
    longest = max(batch["attention_mask"].shape[1] for batch in batches)
    even = [padded(batch, longest - batch["attention_mask"].shape[1]) for batch in batches]
    return {name: torch.cat([batch[name] for batch in even]) for name in even[0]}


def for_loss(model_type: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    """All that a model's loss needs: each of its parameters has a part in it."""
    if model_type == "weight_autoencoder":
        return {**batch, "views": 2}
    models, generator = len(batch["weight_values"]), torch.Generator().manual_seed(7)
    return {
        **batch,
        "dataset_features": torch.randn(models, 6, 5, generator=generator),
        "dataset_labels": torch.arange(6).remainder(3).expand(models, -1),
        "results": torch.rand(models, 2, generator=generator),
        "return_loss": True,
    }


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, those of outputs inside of it, too."""
    return [each for value in output.to_tuple() for each in ([value] if torch.is_tensor(value) else tensors(value))]


@torch.no_grad()
def embedded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.get_weight_features(**batch).pooler_output


def test_every_configuration_is_registered_and_tried_here() -> None:
    types = [name for name, config in CONFIG_MAPPING._extra_content.items() if "weightspace" in config.__module__]
    assert sorted(types) == sorted(TINY)
    assert len(registered()) == len(TINY)


@pytest.mark.parametrize("model_type", sorted(TINY))
class TestEveryModel:
    def test_embeddings_survive_saving_to_the_bit(self, model_type: str, tmp_path: Path) -> None:
        model = build(model_type)
        model.save_pretrained(tmp_path / "model")
        batch = together(inputs(SMALL, 2), inputs(LARGE, 2))
        save_file({**batch, "expected": embedded(model, batch)}, tmp_path / "batch.safetensors")
        code = """
import sys, torch, weightspace
from safetensors.torch import load_file
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1] + "/model").eval()
batch = load_file(sys.argv[1] + "/batch.safetensors")
expected = batch.pop("expected")
with torch.no_grad():
    print(torch.equal(model.get_weight_features(**batch).pooler_output, expected))
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.stdout == "True\n", done.stderr

    def test_loading_overwrites_nothing(self, model_type: str, tmp_path: Path) -> None:
        model = build(model_type)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name

    def test_a_missing_tensor_is_drawn_and_the_others_stay(self, model_type: str, tmp_path: Path) -> None:
        model = build(model_type)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        missing = next(name for name in stored if name.endswith("attention.out.weight"))
        del stored[missing]
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(found["missing_keys"]) == {missing}
        state = loaded.state_dict()
        for name, value in stored.items():
            assert torch.equal(state[name], value), name
        fresh = type(model)(model.config).state_dict()[missing]
        assert float(state[missing].std()) == pytest.approx(float(fresh.std()), rel=0.3)
        assert float(state[missing].std()) < 0.75 * float(stored[missing.replace(".out.", ".qkv.")].std())

    @pytest.mark.parametrize("architecture", [SMALL, LARGE], ids=["one window", "three windows"])
    def test_padding_changes_nothing(self, model_type: str, architecture: Architecture) -> None:
        model, batch = build(model_type), inputs(architecture, 3)
        for count in (1, 4, 21):
            torch.testing.assert_close(embedded(model, padded(batch, count)), embedded(model, batch))

    def test_the_rest_of_the_batch_changes_nothing(self, model_type: str) -> None:
        model, small, large = build(model_type), inputs(SMALL, 3), inputs(LARGE, 2, seed=1)
        expected = torch.cat([embedded(model, small), embedded(model, large)])
        torch.testing.assert_close(embedded(model, together(small, large)), expected)
        alone = [embedded(model, {k: v[i : i + 1] for k, v in small.items()}) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), expected[:3])

    def test_both_attentions_agree(self, model_type: str) -> None:
        batch = together(inputs(SMALL, 2), inputs(LARGE, 2))
        eager, fused = build(model_type), build(model_type, attention="sdpa")
        assert fused.config._attn_implementation == "sdpa"
        with torch.no_grad():
            outputs = (model(**for_loss(model_type, batch)) for model in (eager, fused))
            for one, other in zip(*map(tensors, outputs), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(self, model_type: str) -> None:
        batch, gradients, calls = together(inputs(SMALL, 2), inputs(LARGE, 2)), [], []
        for again in (False, True):
            model = build(model_type).train()
            if again:
                model.activation_checkpointing_enable()
            count = [0]
            layers = [module for module in model.modules() if isinstance(module, TokenLayer)]
            for module in layers:
                module.attention.register_forward_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
            torch.manual_seed(3)  # of dropout
            model(**for_loss(model_type, batch)).loss.backward()
            calls.append(count[0] / len(layers))
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert calls == [1, 2]
        for name, value in gradients[0].items():
            assert value is not None, name
            torch.testing.assert_close(gradients[1][name], value, msg=name)

    def test_loads_and_runs_in_bf16(self, model_type: str, tmp_path: Path) -> None:
        model = build(model_type)
        model.save_pretrained(tmp_path)
        half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        batch = inputs(LARGE, 4)
        with torch.no_grad():
            loss = half(**{**for_loss(model_type, batch), **({"views": 1} if "auto" in model_type else {})}).loss
        assert loss.isfinite()
        assert torch.nn.functional.cosine_similarity(embedded(half, batch), embedded(model, batch)).min() > 0.98

    def test_every_parameter_matters(self, model_type: str) -> None:
        model = build(model_type)
        model(**for_loss(model_type, together(inputs(SMALL, 2), inputs(LARGE, 2)))).loss.backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"hidden_size": 15}, "num_attention_heads"),
            ({"position_size": 7}, "position_size"),
            ({"beta": 1.5}, "beta"),
            ({"temperature": 0.0}, "temperature"),
            ({"depth_bins": 0}, "depth_bins"),
            ({"window": 0}, "window"),
            ({"token_size": "six"}, "token_size"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, change: dict[str, Any], named: str) -> None:
        with pytest.raises(Exception, match=named):
            WeightAutoencoderConfig(**{**TINY["weight_autoencoder"], **change})

    def test_is_plain_json(self, tmp_path: Path) -> None:
        config = WeightAutoencoderConfig(**TINY["weight_autoencoder"])
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "weight_autoencoder"
        loaded = AutoConfig.from_pretrained(tmp_path).to_dict()
        assert loaded == {**config.to_dict(), "_name_or_path": str(tmp_path)}


class TestWindows:
    @torch.no_grad()
    def test_windows_of_a_long_sequence_are_encoded_apart(self) -> None:
        model, batch = build(), inputs(LARGE, 2)
        del batch["attention_mask"]
        latents = model.encode(**batch)
        decoded = model.decode(latents, batch["weight_mask"], batch["position_ids"])
        for start in (0, 8, 16):
            window = {name: value[:, start : start + 8] for name, value in batch.items()}
            alone = model.encode(**window)
            torch.testing.assert_close(latents[:, start : start + 8], alone)
            piece = model.decode(alone, window["weight_mask"], window["position_ids"])
            torch.testing.assert_close(decoded[:, start : start + 8], piece)

    def test_shapes_are_those_of_the_sequence(self) -> None:
        model, batch = build(), inputs(LARGE, 2)
        output = model(**batch)
        assert output.latents.shape == (2, 20, 3)
        assert output.reconstruction.shape == (2, 20, 6)
        assert not output.reconstruction[~batch["weight_mask"]].any()


class TestLoss:
    def test_is_the_sum_of_its_parts(self) -> None:
        model, batch = build(beta=0.3, temperature=0.5), inputs(SMALL, 4)
        labels = batch["weight_values"] * 2
        output = model(**batch, labels=labels, views=2)
        depths = relative_depths(batch["position_ids"], batch["attention_mask"])
        parts = depth_weights(depths, batch["attention_mask"], model.config.depth_bins)
        first, second = model.projection(state_moments(output.latents, parts)).chunk(2)
        reconstruction = masked_mse(output.reconstruction, labels, batch["weight_mask"])
        contrastive = nt_xent(first, second, 0.5)
        torch.testing.assert_close(output.reconstruction_loss, reconstruction)
        torch.testing.assert_close(output.contrastive_loss, contrastive)
        torch.testing.assert_close(output.loss, 0.3 * reconstruction + 0.7 * contrastive)

    def test_one_view_has_no_contrastive_loss_and_losses_can_be_left_out(self) -> None:
        model, batch = build(), inputs(SMALL, 2)
        output = model(**batch)
        assert output.contrastive_loss is None
        torch.testing.assert_close(output.loss, 0.95 * output.reconstruction_loss)
        assert model(**batch, return_loss=False).loss is None


class TestSymmetry:
    """A model that is told the same weights in another order."""

    @torch.no_grad()
    def test_reordered_tokens_that_keep_their_positions_embed_the_same(self) -> None:
        model, batch = build(), inputs(SMALL, 2)
        order = [2, 0, 3, 1, 6, 4, 5]
        moved = {name: value[:, order] for name, value in batch.items()}
        torch.testing.assert_close(embedded(model, moved), embedded(model, batch))
        torch.testing.assert_close(model.encode(**moved), model.encode(**batch)[:, order])

    @pytest.mark.parametrize("architecture", [SMALL, LARGE], ids=["one window", "three windows"])
    def test_statistics_of_the_weights_do_not_know_the_order_of_neurons(self, architecture: Architecture) -> None:
        model, batch = build(), inputs(architecture, 2)
        first = int(batch["position_ids"][0, :, 1].bincount()[0])
        order = torch.arange(batch["weight_values"].shape[1])
        order[:first] = torch.randperm(first, generator=torch.Generator().manual_seed(0))
        values = batch["weight_values"][:, order].clone()
        columns = torch.randperm(4, generator=torch.Generator().manual_seed(1))
        values[:, first : first + 3, :4] = values[:, first : first + 3, columns]
        moments = model.config.depth_bins * 2 * model.config.latent_size
        before, after = (embedded(model, {**batch, "weight_values": v}) for v in (batch["weight_values"], values))
        torch.testing.assert_close(after[:, moments:], before[:, moments:], atol=1e-5, rtol=1e-5)
        # The latents do know it a little, through the position of a channel.
        assert not torch.equal(after[:, :moments], before[:, :moments])

    def test_embeddings_have_one_length_for_all_architectures(self) -> None:
        model = build()
        assert embedded(model, inputs(SMALL, 1)).shape == embedded(model, inputs(LARGE, 1)).shape


def test_residual_layers_start_small_enough_to_add_up() -> None:
    config = WeightAutoencoderConfig(**{**TINY["weight_autoencoder"], "hidden_size": 64, "num_encoder_layers": 4})
    torch.manual_seed(0)
    model = WeightAutoencoderModel(config)
    for stack, count in ((model.encoder, 4), (model.decoder, 1)):
        for one in stack.layers:
            assert float(one.attention.out.weight.detach().std()) == pytest.approx((2 * count * 64) ** -0.5, rel=0.1)
            assert float(one.attention.qkv.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
