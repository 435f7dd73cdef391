from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.layers import (
    PositionEmbedding,
    TokenAttention,
    TokenTransformer,
    depth_weights,
    eager_attention,
    entry_moments,
    initialize_linear,
    state_moments,
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config() -> WeightAutoencoderConfig:
    tiny = WeightAutoencoderConfig(token_size=6, hidden_size=16, num_attention_heads=4, intermediate_size=32)
    tiny._attn_implementation = "eager"
    return tiny


def layers(*counts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths and masks of one network with so many tokens in each layer."""
    depths = torch.cat([torch.full((n,), i / max(1, len(counts) - 1)) for i, n in enumerate(counts)])
    return depths[None], torch.ones(1, len(depths), dtype=torch.bool)


class TestAttention:
    def test_written_out_attention_is_the_fused_one(self) -> None:
        query, key, value = draw(0, 3, 2, 4, 5, 8)
        additive = torch.zeros(2, 1, 1, 5)
        additive[1, ..., 3:] = torch.finfo(torch.float32).min
        for mask in (None, additive):
            mixed, weights = eager_attention(nn.Identity(), query, key, value, mask, scaling=8**-0.5)
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


class TestDepthWeights:
    @given(depth=st.floats(0, 1, width=32), bins=st.integers(2, 6))
    def test_shares_of_a_token_add_up_to_one(self, depth: float, bins: int) -> None:
        weights = depth_weights(torch.tensor([[depth]]), torch.ones(1, 1, dtype=torch.bool), bins)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
        assert (weights > 0).sum() <= 2

    def test_parts_follow_each_other_from_input_to_output(self) -> None:
        weights = depth_weights(*layers(1, 1, 1), 3)
        torch.testing.assert_close(weights[0], torch.eye(3))
        assert depth_weights(*layers(1, 1, 1), 1).tolist() == [[[1.0, 1.0, 1.0]]]

    @pytest.mark.parametrize("bins", [1, 3])
    def test_padding_belongs_to_no_part(self, bins: int) -> None:
        depths, mask = layers(2, 2)
        mask[:, -1] = False
        assert not depth_weights(depths, mask, bins)[..., -1].any()


class TestStateMoments:
    def test_are_mean_and_standard_deviation_of_each_part(self) -> None:
        hidden, parts = draw(0, 1, 7, 4), depth_weights(*layers(3, 4), 2)
        mean, std = state_moments(hidden, parts).view(1, 2, 2, 4).unbind(2)
        for number, rows in enumerate((slice(0, 3), slice(3, 7))):
            torch.testing.assert_close(mean[0, number], hidden[0, rows].mean(0))
            torch.testing.assert_close(std[0, number], hidden[0, rows].std(0, correction=0), atol=1e-4, rtol=1e-4)

    def test_order_within_a_layer_changes_nothing(self) -> None:
        hidden, parts = draw(0, 1, 7, 4), depth_weights(*layers(3, 4), 3)
        order = [2, 0, 1, 6, 5, 3, 4]
        torch.testing.assert_close(state_moments(hidden[:, order], parts), state_moments(hidden, parts))

    def test_a_part_without_tokens_is_zero_and_has_a_gradient(self) -> None:
        hidden = torch.ones(1, 4, 4, requires_grad=True)
        moments = state_moments(hidden, depth_weights(*layers(4), 3))
        moments.sum().backward()
        assert not moments.view(3, 8)[1:].any()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()


class TestEntryMoments:
    def test_are_the_named_numbers(self) -> None:
        values = draw(0, 1, 6, 5)
        mask = torch.ones(1, 6, 5, dtype=torch.bool)
        mask[:, 2:, 3:] = False
        values = values * mask
        found = entry_moments(values, mask, depth_weights(*layers(6), 1))[0]
        entries = values[mask].double().numpy()
        norms = ((values**2).sum(-1) / mask.sum(-1)).log()
        expected = [
            entries.mean(),
            math.log(entries.var()),
            stats.skew(entries),
            math.log1p(stats.kurtosis(entries, fisher=False)),
            abs(entries).mean() / entries.std(),
            float(norms.mean()),
            float(norms.std(correction=0)),
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)

    @given(seed=st.integers(0, 2**32))
    def test_neither_the_order_of_rows_nor_of_their_entries_matters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values, parts = torch.randn(1, 7, 5, generator=generator), depth_weights(*layers(3, 4), 3)
        rows = torch.cat([torch.randperm(3, generator=generator), 3 + torch.randperm(4, generator=generator)])
        columns = torch.randperm(5, generator=generator)
        mask = torch.ones_like(values, dtype=torch.bool)
        moved = entry_moments(values[:, rows][..., columns], mask, parts)
        torch.testing.assert_close(moved, entry_moments(values, mask, parts), rtol=1e-4, atol=1e-4)

    def test_padding_tokens_and_columns_weigh_nothing(self) -> None:
        values, (depths, tokens) = draw(0, 1, 4, 5), layers(2, 2)
        mask = torch.ones_like(values, dtype=torch.bool)
        plain = entry_moments(values, mask, depth_weights(depths, tokens, 3))
        pad = (0, 2, 0, 3)
        wider = [nn.functional.pad(value, pad) for value in (values, mask)]
        depths, tokens = (nn.functional.pad(value, (0, 3)) for value in (depths, tokens))
        torch.testing.assert_close(entry_moments(*wider, depth_weights(depths, tokens, 3)), plain)

    def test_constant_and_missing_weights_are_finite(self) -> None:
        values = torch.zeros(1, 4, 5, requires_grad=True)
        mask = torch.ones_like(values, dtype=torch.bool)
        moments = entry_moments(values, mask, depth_weights(*layers(4), 3))
        assert moments.isfinite().all()
        assert not moments.view(3, 7)[1:].any()
        huge = entry_moments(torch.full((1, 4, 5), 1e4), mask, depth_weights(*layers(4), 3))
        assert huge.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_layers_start_at_unit_gain(scale: float) -> None:
    layer = nn.Linear(400, 300)
    torch.manual_seed(0)
    initialize_linear(layer, scale)
    assert float(layer.weight.detach().std()) == pytest.approx(scale * 400**-0.5, rel=0.02)
    assert not layer.bias.any()
