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

import weightspace
from weightspace.errors import SettingsError, TokenError
from weightspace.losses import masked_mse, nt_xent
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import ScalarQuantizer, WeightAutoencoderModel
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
ENCODERS = sorted(TINY)
_PRIOR = {
    "class_size": 4,
    "result_size": 4,
    "activations": ["relu"],
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "position_size": 4,
}
TINY["weight_prior"] = {"autoencoder_config": TINY["weight_autoencoder"], **_PRIOR, "time_size": 4}
TINY["weight_code_prior"] = {
    "autoencoder_config": {**TINY["weight_autoencoder"], "latent_size": 4, "code_levels": [4, 3]},
    **_PRIOR,
    "number_size": 8,
}


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
    if model_type not in ENCODERS:
        latent = TINY[model_type]["autoencoder_config"]["latent_size"]
        latents = torch.randn(*batch["attention_mask"].shape, latent, generator=generator)
        noise = {"noise": latents.flip(0), "times": torch.rand(models, generator=generator)}
        return {
            **{name: batch[name] for name in ("weight_mask", "position_ids", "attention_mask")},
            "latents": latents,
            "class_features": torch.randn(models, 3, 4, generator=generator)
            * torch.arange(models).ne(0).view(-1, 1, 1),
            "result_embeds": torch.eye(models, 4) * torch.arange(models).ne(1)[:, None],
            "activation": torch.arange(models).remainder(2),
            **(noise if model_type == "weight_prior" else {}),
        }
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
    configs = [getattr(weightspace, name) for name in weightspace.__all__ if name.endswith("Config")]
    assert sorted(config.model_type for config in configs) == sorted(TINY)
    assert [CONFIG_MAPPING[config.model_type] for config in configs] == configs


@pytest.mark.parametrize("model_type", sorted(TINY))
class TestEveryModel:
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

    def test_both_attentions_agree(self, model_type: str) -> None:
        batch = together(inputs(SMALL, 2), inputs(LARGE, 2))
        eager, fused = build(model_type), build(model_type, attention="sdpa")
        assert fused.config._attn_implementation == "sdpa"
        with torch.no_grad():
            outputs = (model(**for_loss(model_type, batch)) for model in (eager, fused))
            for one, other in zip(*map(tensors, outputs), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def test_every_parameter_matters(self, model_type: str) -> None:
        model = build(model_type)
        model(**for_loss(model_type, together(inputs(SMALL, 2), inputs(LARGE, 2)))).loss.backward()
        trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        silent = [name for name, gradient in trained.items() if gradient is None or not gradient.any()]
        assert silent == []


@pytest.mark.parametrize("model_type", ENCODERS)
class TestEveryEncoder:
    @pytest.mark.slow
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
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=1800
        )
        assert done.stdout == "True\n", done.stderr

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
            ({"code_levels": []}, r"code_levels \[\]"),
            ({"code_levels": [8, 1, 8]}, r"code_levels \[8, 1, 8\]"),
            ({"code_levels": [64, 64, 64]}, r"at most 65,536"),
            ({"code_levels": [8, 8]}, "latent_size 3 is not a multiple of the 2 code_levels"),
            ({"code_levels": 8}, "code_levels"),
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


LEVELS = [5, 4, 3]


class TestCodes:
    @staticmethod
    def every_code() -> Tensor:
        return torch.arange(60).view(6, 5, 2)

    @torch.no_grad()
    def test_off_changes_nothing(self) -> None:
        plain, coded, batch = build(), build(code_levels=LEVELS), inputs(LARGE, 2)
        assert plain.state_dict().keys() == coded.state_dict().keys()
        assert plain.config.code_levels is None
        latents = plain.encode(**batch)
        assert float(latents.abs().max()) > 1  # neither bounded nor rounded
        torch.testing.assert_close(coded.encode(**batch), latents.tanh())

    def test_a_config_from_before_there_were_codes_loads(self, tmp_path: Path) -> None:
        model, batch = build(), inputs(SMALL, 2)
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        written.pop("code_levels", None)
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert torch.equal(embedded(AutoModel.from_pretrained(tmp_path), batch), embedded(model, batch))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_codes_survive_latents(self, dtype: torch.dtype) -> None:
        model = build(latent_size=6, code_levels=LEVELS).to(dtype)
        latents = model.from_codes(self.every_code())
        assert latents.shape == (6, 5, 6)
        assert latents.dtype == dtype
        assert torch.equal(model.to_codes(latents), self.every_code())
        assert (model.codes_per_token, model.quantizer.codebook_size) == (2, 60)

    @torch.no_grad()
    def test_a_level_is_the_nearest_there_is(self) -> None:
        quantizer = ScalarQuantizer((5, 4, 3))
        grid = quantizer.decode(torch.arange(60).unsqueeze(-1))
        assert len(grid.unique(dim=0)) == 60
        assert grid[:, 0].unique().tolist() == pytest.approx([-0.8, -0.4, 0.0, 0.4, 0.8])
        latents = 2.4 * torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 1.2
        assert torch.equal(quantizer.round(latents), grid[torch.cdist(latents, grid).argmin(1)])

    @torch.no_grad()
    def test_codes_are_all_that_is_decoded(self) -> None:
        model, batch = build(latent_size=6, code_levels=LEVELS), inputs(LARGE, 2)
        output = model(**batch)
        where = {name: batch[name] for name in ("weight_mask", "position_ids", "attention_mask")}
        latents = model.from_codes(model.to_codes(output.latents))
        assert not torch.equal(latents, output.latents)
        assert torch.equal(model.decode(latents, **where), output.reconstruction)
        near = model.decode(latents + 1e-3, **where)
        assert torch.equal(near, output.reconstruction)

    def test_gradients_pass_as_if_nothing_were_rounded(self) -> None:
        model, batch = build(code_levels=LEVELS), inputs(SMALL, 2)
        where = {name: batch[name] for name in ("weight_mask", "position_ids", "attention_mask")}
        latents = model.encode(**batch).detach().requires_grad_()
        model.decode(latents, **where).square().sum().backward()
        on_grid = model.from_codes(model.to_codes(latents)).requires_grad_()
        plain = build()
        plain.load_state_dict(model.state_dict())
        plain.decode(on_grid, **where).square().sum().backward()
        torch.testing.assert_close(latents.grad, on_grid.grad)
        assert on_grid.grad is not None
        assert on_grid.grad.any()

    def test_every_parameter_matters(self) -> None:
        model = build(code_levels=LEVELS)
        model(**for_loss("weight_autoencoder", together(inputs(SMALL, 2), inputs(LARGE, 2)))).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    @torch.no_grad()
    def test_survive_saving(self, tmp_path: Path) -> None:
        model, batch = build(latent_size=6, code_levels=LEVELS), inputs(LARGE, 2)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert loaded.config.code_levels == LEVELS
        assert torch.equal(loaded.to_codes(loaded.encode(**batch)), model.to_codes(model.encode(**batch)))
        assert torch.equal(loaded(**batch).reconstruction, model(**batch).reconstruction)

    @torch.no_grad()
    def test_nearly_agree_in_bf16(self, tmp_path: Path) -> None:
        model, batch = build(latent_size=6, code_levels=LEVELS), inputs(LARGE, 16)
        model.save_pretrained(tmp_path)
        half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        codes, rounded = (one.to_codes(one.encode(**batch)) for one in (model, half))
        assert float((codes == rounded).float().mean()) > 0.8
        assert half(**batch).reconstruction.dtype == torch.bfloat16

    @torch.no_grad()
    @pytest.mark.parametrize("architecture", [SMALL, LARGE], ids=["one window", "three windows"])
    def test_padding_changes_nothing(self, architecture: Architecture) -> None:
        model, batch = build(latent_size=6, code_levels=LEVELS), inputs(architecture, 3)
        expected, longer = model(**batch), model(**padded(batch, 5))
        length = batch["weight_values"].shape[1]
        assert torch.equal(model.to_codes(longer.latents[:, :length]), model.to_codes(expected.latents))
        torch.testing.assert_close(longer.reconstruction[:, :length], expected.reconstruction)
        assert not longer.reconstruction[:, length:].any()

    def test_what_is_in_no_codebook_is_refused(self) -> None:
        model = build(code_levels=LEVELS)
        for codes in (torch.tensor([[[60]]]), torch.tensor([[[3], [-1]]])):
            with pytest.raises(TokenError, match=rf"from {codes.min()} to {codes.max()} .* it has 60"):
                model.from_codes(codes)

    def test_a_model_without_codes_says_so(self) -> None:
        model = build()
        for ask in (model.to_codes, model.from_codes, lambda _: model.codes_per_token):
            with pytest.raises(SettingsError, match="code_levels: this autoencoder has none; train one with"):
                ask(torch.zeros(1, 1, 3, dtype=torch.int64 if ask == model.from_codes else torch.float32))

    def test_stand_on_the_card(self) -> None:
        facts = build(latent_size=6, code_levels=LEVELS).card_facts()
        assert {"code_levels": LEVELS, "codes_per_token": 2, "codebook_size": 60}.items() <= facts.config.items()
        assert "codes_per_token" not in build().card_facts().config
