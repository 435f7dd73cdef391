from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import eager_attention_forward

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.layers import PositionEmbedding, TokenAttention, TokenTransformer, initialize, start_at


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config() -> WeightAutoencoderConfig:
    tiny = WeightAutoencoderConfig(token_size=6, hidden_size=16, num_attention_heads=4, intermediate_size=32)
    tiny._attn_implementation = "eager"
    return tiny


class TestAttention:
    def test_written_out_attention_is_the_fused_one(self) -> None:
        query, key, value = draw(0, 3, 2, 4, 5, 8)
        additive = torch.zeros(2, 1, 1, 5)
        additive[1, ..., 3:] = torch.finfo(torch.float32).min
        for mask in (None, additive):
            mixed, weights = eager_attention_forward(nn.Identity(), query, key, value, mask, scaling=8**-0.5)
            fused = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.testing.assert_close(mixed, fused.transpose(1, 2))
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        assert not weights[1, ..., 3:].any()

    def test_has_no_order_of_its_own(self) -> None:
        attention, hidden, order = TokenAttention(config()), draw(0, 2, 5, 16), torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(attention(hidden[:, order], None), attention(hidden, None)[:, order])

    def test_blocked_tokens_are_seen_by_nobody(self) -> None:
        stack, hidden = TokenTransformer(config(), 2).eval(), draw(0, 2, 6, 16)
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[:, 4:] = False
        changed = hidden.clone()
        changed[:, 4:] = 100.0
        torch.testing.assert_close(stack(changed, mask)[:, :4], stack(hidden, mask)[:, :4])
        torch.testing.assert_close(stack(hidden, mask)[:, :4], stack(hidden[:, :4], mask[:, :4]))

    def test_a_window_of_padding_alone_is_finite(self) -> None:
        assert TokenTransformer(config(), 1)(draw(0, 1, 4, 16), torch.zeros(1, 4, dtype=torch.bool)).isfinite().all()


class TestPositions:
    def test_tokens_of_deep_and_wide_networks_stay_apart(self) -> None:
        positions = torch.tensor([[i, j, k] for i in (0, 1, 900, 2000) for j in (0, 1, 99) for k in (0, 1, 1023)])
        vectors = PositionEmbedding(config())(positions[None])[0]
        assert vectors.isfinite().all()
        apart = torch.cdist(vectors, vectors) + torch.eye(len(vectors)) * 9
        assert apart.min() > 0.01


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_layers_start_at_unit_gain(scale: float) -> None:
    layer = start_at(scale, nn.Linear(400, 300))
    torch.manual_seed(0)
    initialize(layer)
    assert float(layer.weight.detach().std()) == pytest.approx(scale * 400**-0.5, rel=0.02)
    assert not layer.bias.any()
