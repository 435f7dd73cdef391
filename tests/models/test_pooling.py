from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from weightspace.models.pooling import (
    QUANTILES,
    STATISTICS,
    depth_weights,
    entry_statistics,
    relative_depths,
    state_moments,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(*counts: int) -> tuple[Tensor, Tensor]:
    """Depths and mask of the tokens of one network with so many tokens in each layer."""
    depths = torch.cat([torch.full((n,), i / max(1, len(counts) - 1)) for i, n in enumerate(counts)])
    return depths[None], torch.ones(1, len(depths), dtype=torch.bool)


class TestDepths:
    def test_go_from_the_first_to_the_last_layer_of_each_network(self) -> None:
        positions = torch.zeros(2, 4, 3, dtype=torch.int64)
        positions[:, :, 1] = torch.tensor([[0, 1, 2, 4], [0, 1, 2, 9]])
        mask = torch.tensor([[True] * 4, [True, True, True, False]])
        assert relative_depths(positions, mask)[:, :3].tolist() == [[0.0, 0.25, 0.5], [0.0, 0.5, 1.0]]

    def test_a_network_of_one_layer_has_a_depth(self) -> None:
        assert relative_depths(torch.zeros(1, 2, 3, dtype=torch.int64), layers(2)[1]).tolist() == [[0.0, 0.0]]

    @given(depth=st.floats(0, 1, width=32), bins=st.integers(2, 6))
    def test_shares_of_a_token_add_up_to_one(self, depth: float, bins: int) -> None:
        weights = depth_weights(torch.tensor([[depth]]), torch.ones(1, 1, dtype=torch.bool), bins)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
        assert (weights > 0).sum() <= 2

    def test_parts_follow_each_other_from_input_to_output(self) -> None:
        torch.testing.assert_close(depth_weights(*layers(1, 1, 1), 3)[0], torch.eye(3))
        assert depth_weights(*layers(1, 1, 1), 1).tolist() == [[[1.0, 1.0, 1.0]]]

    @pytest.mark.parametrize("bins", [1, 3])
    def test_padding_belongs_to_no_part(self, bins: int) -> None:
        depths, mask = layers(2, 2)
        mask[:, -1] = False
        assert not depth_weights(depths, mask, bins)[..., -1].any()


class TestStateMoments:
    def test_are_mean_and_standard_deviation_of_each_part(self) -> None:
        states, parts = draw(0, 1, 7, 4), depth_weights(*layers(3, 4), 2)
        mean, std = state_moments(states, parts).view(1, 2, 2, 4).unbind(2)
        for number, rows in enumerate((slice(0, 3), slice(3, 7))):
            torch.testing.assert_close(mean[0, number], states[0, rows].mean(0))
            torch.testing.assert_close(std[0, number], states[0, rows].std(0, correction=0), atol=1e-4, rtol=1e-4)

    def test_order_within_a_layer_changes_nothing(self) -> None:
        states, parts = draw(0, 1, 7, 4), depth_weights(*layers(3, 4), 3)
        order = [2, 0, 1, 6, 5, 3, 4]
        torch.testing.assert_close(state_moments(states[:, order], parts), state_moments(states, parts))

    def test_a_part_without_tokens_is_zero_and_has_a_gradient(self) -> None:
        states = torch.ones(1, 4, 4, requires_grad=True)
        moments = state_moments(states, depth_weights(*layers(4), 3))
        moments.sum().backward()
        assert not moments.view(3, 8)[1:].any()
        assert states.grad is not None
        assert states.grad.isfinite().all()


def token_statistics(entries: np.ndarray) -> list[float]:
    return [
        entries.mean(),
        math.log(entries.var() + 1e-6),
        stats.skew(entries),
        math.log1p(stats.kurtosis(entries, fisher=False)),
        math.log(abs(entries).max() + 1e-6),
        entries[-1],
        abs(entries[-1]),
    ]


class TestEntryStatistics:
    def test_are_the_named_numbers(self) -> None:
        values = draw(0, 1, 6, 8)
        mask = torch.ones(1, 6, 8, dtype=torch.bool)
        mask[:, 2:, 5:] = False
        values = values * mask
        found = entry_statistics(values, mask, depth_weights(*layers(6), 1))[0]
        entries = values[mask].double().numpy()
        expected = [
            entries.mean(),
            math.log(entries.var()),
            stats.skew(entries),
            math.log1p(stats.kurtosis(entries, fisher=False)),
            abs(entries).mean() / entries.std(),
            *np.quantile(entries, QUANTILES, method="nearest"),
        ]
        tokens = np.array(
            [token_statistics(row[kept].double().numpy()) for row, kept in zip(values[0], mask[0], strict=True)]
        )
        expected += [*tokens.mean(0), *np.sqrt(tokens.var(0) + 1e-6)]
        assert len(expected) == STATISTICS
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-3, atol=2e-3)

    @given(seed=st.integers(0, 2**32))
    def test_neither_the_order_of_rows_nor_of_their_weights_matters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values, parts = torch.randn(1, 7, 5, generator=generator), depth_weights(*layers(3, 4), 3)
        rows = torch.cat([torch.randperm(3, generator=generator), 3 + torch.randperm(4, generator=generator)])
        columns = torch.cat([torch.randperm(4, generator=generator), torch.tensor([4])])  # the last one is the bias
        mask = torch.ones_like(values, dtype=torch.bool)
        moved = entry_statistics(values[:, rows][..., columns], mask, parts)
        torch.testing.assert_close(moved, entry_statistics(values, mask, parts), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("bins", [1, 3])
    def test_padding_tokens_and_columns_weigh_nothing(self, bins: int) -> None:
        values, (depths, tokens) = draw(0, 1, 4, 5), layers(2, 2)
        mask = torch.ones_like(values, dtype=torch.bool)
        plain = entry_statistics(values, mask, depth_weights(depths, tokens, bins))
        pad = (0, 2, 0, 3)
        wider = [nn.functional.pad(value, pad) for value in (values, mask)]
        depths, tokens = (nn.functional.pad(value, (0, 3)) for value in (depths, tokens))
        torch.testing.assert_close(entry_statistics(*wider, depth_weights(depths, tokens, bins)), plain)

    def test_networks_of_a_batch_do_not_mix(self) -> None:
        values, parts = draw(0, 3, 7, 5), depth_weights(*layers(3, 4), 3).expand(3, -1, -1)
        mask = torch.ones_like(values, dtype=torch.bool)
        together = entry_statistics(values, mask, parts)
        alone = [entry_statistics(values[i : i + 1], mask[:1], parts[:1]) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone))

    @pytest.mark.parametrize("value", [0.0, 1e-6, 3.0, 1e4])
    def test_constant_and_missing_weights_are_finite(self, value: float) -> None:
        values, parts = torch.full((1, 4, 5), value), depth_weights(*layers(4), 3)
        found = entry_statistics(values, torch.ones_like(values, dtype=torch.bool), parts)
        assert found.isfinite().all()
        shared, tokens = found[:, : 3 * 12].view(3, 12), found[:, 3 * 12 :].view(3, 14)
        assert not shared[1:].any()
        assert not tokens[1:].any()
        none = entry_statistics(values, torch.zeros_like(values, dtype=torch.bool), parts)
        assert not none.any()
