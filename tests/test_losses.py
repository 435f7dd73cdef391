from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightspace.losses import behaviour_loss, gather_rows, masked_mse, nt_xent, pairwise_nt_xent


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestMaskedMse:
    def batch(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = draw(seed + 2, 3, 5, 4) > -0.5
        return draw(seed, 3, 5, 4) * mask, draw(seed + 1, 3, 5, 4) * mask, mask

    def test_is_the_error_over_the_variance_of_the_valid_entries(self) -> None:
        prediction, target, mask = self.batch()
        mean, std = target[mask].mean(), target[mask].std(correction=0)
        expected = torch.nn.functional.mse_loss((prediction[mask] - mean) / std, (target[mask] - mean) / std)
        torch.testing.assert_close(masked_mse(prediction, target, mask), expected)

    def test_the_mean_prediction_costs_one(self) -> None:
        _, target, mask = self.batch()
        assert masked_mse(torch.full_like(target, target[mask].mean()), target, mask) == pytest.approx(1.0)

    @given(scale=st.floats(0.01, 100), shift=st.floats(-3, 3), seed=st.integers(0, 2**32))
    def test_the_scale_of_a_zoo_does_not_matter(self, scale: float, shift: float, seed: int) -> None:
        prediction, target, mask = (value.double() for value in self.batch(seed))
        plain = masked_mse(prediction, target, mask.bool())
        moved = masked_mse(prediction * scale + shift, target * scale + shift, mask.bool())
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-9)

    def test_constant_and_missing_targets_are_finite(self) -> None:
        prediction, target, mask = self.batch()
        assert math.isfinite(masked_mse(prediction, torch.ones_like(target), mask))
        assert masked_mse(prediction, target, torch.zeros_like(mask)) == 0


class TestNtXent:
    def literal(self, first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
        """Equation 1 of Chen et al. (2020), term by term."""
        views = [v / v.norm() for v in torch.cat([first, second]).double()]
        pairs, total = len(first), 0.0
        for i in range(2 * pairs):
            j = (i + pairs) % (2 * pairs)
            below = sum(math.exp(float(views[i] @ views[k]) / temperature) for k in range(2 * pairs) if k != i)
            total -= math.log(math.exp(float(views[i] @ views[j]) / temperature) / below)
        return total / (2 * pairs)

    @pytest.mark.parametrize(("pairs", "temperature"), [(1, 0.1), (2, 0.5), (6, 0.1)])
    def test_is_the_published_formula(self, pairs: int, temperature: float) -> None:
        first, second = draw(0, pairs, 7), draw(1, pairs, 7)
        expected = self.literal(first, second, temperature)
        assert float(nt_xent(first, second, temperature)) == pytest.approx(expected, abs=1e-5)

    def test_knows_neither_lengths_nor_which_view_came_first(self) -> None:
        first, second = draw(0, 4, 7), draw(1, 4, 7)
        torch.testing.assert_close(nt_xent(second, first), nt_xent(first, second))
        torch.testing.assert_close(nt_xent(3 * first, 0.2 * second), nt_xent(first, second))

    def test_pairs_must_match(self) -> None:
        first = draw(0, 8, 7)
        assert nt_xent(first, first + 0.01) < 0.5 < nt_xent(first, (first + 0.01).roll(1, 0))


class TestBehaviourLoss:
    def test_is_the_divergence_from_the_original(self) -> None:
        imitated, original = draw(0, 2, 3, 5), draw(1, 2, 3, 5)
        p, q = (torch.distributions.Categorical(logits=value) for value in (original, imitated))
        expected = torch.distributions.kl_divergence(p, q).mean()
        torch.testing.assert_close(behaviour_loss(imitated, original), expected)

    def test_equal_functions_cost_nothing(self) -> None:
        logits = draw(0, 2, 3, 5)
        # A constant added to all logits leaves the class distribution as it is.
        assert abs(float(behaviour_loss(logits + 3.0, logits))) < 1e-6

    @given(seed=st.integers(0, 2**32), scale=st.floats(0.1, 50))
    def test_is_never_negative(self, seed: int, scale: float) -> None:
        assert behaviour_loss(draw(seed, 2, 3, 4) * scale, draw(seed + 1, 2, 3, 4) * scale) >= -1e-6


class TestPairwiseNtXent:
    def literal(self, logits: torch.Tensor, positives: torch.Tensor) -> float:
        """The formula of the docstring for rows, term by term."""
        rows = []
        for row, weights in zip(logits.double().tolist(), positives.double().tolist(), strict=True):
            if sum(weights):
                below = sum(math.exp(value) for value in row)
                terms = [w * math.log(math.exp(z) / below) for z, w in zip(row, weights, strict=True)]
                rows.append(-sum(terms) / sum(weights))
        return sum(rows) / len(rows)

    def test_is_the_formula_in_both_directions(self) -> None:
        logits, positives = draw(0, 5, 7), draw(1, 5, 7).clamp(min=0)
        positives[2], positives[:, 3] = 0, 0  # an anchor of each direction without a positive
        expected = (self.literal(logits, positives) + self.literal(logits.T, positives.T)) / 2
        assert float(pairwise_nt_xent(logits, positives)) == pytest.approx(expected, abs=1e-5)

    def test_with_one_positive_a_row_is_the_loss_of_clip(self) -> None:
        logits, own = draw(0, 6, 6), torch.arange(6)
        cross_entropy = torch.nn.functional.cross_entropy
        expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(pairwise_nt_xent(logits, torch.eye(6)), expected)

    def test_members_of_a_group_are_not_pushed_apart(self) -> None:
        groups = torch.tensor([0, 0, 1, 1])
        same = (groups.unsqueeze(1) == groups).float()
        embeds = torch.nn.functional.one_hot(groups).float() * 5
        logits = (embeds @ embeds.T).requires_grad_()
        pairwise_nt_xent(logits, same).backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-6
        assert float(pairwise_nt_xent(logits.detach(), same)) == pytest.approx(math.log(2), abs=1e-6)
        pairwise_nt_xent(logits, torch.eye(4)).backward()
        assert logits.grad.abs().max() > 0.1

    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (0, 0), (0, 3), (3, 0), (4, 4)])
    def test_nothing_to_tell_apart_costs_nothing_and_has_a_gradient(self, rows: int, columns: int) -> None:
        logits = draw(0, rows, columns).requires_grad_()
        positives = torch.ones(rows, columns) if rows == 1 else torch.zeros(rows, columns)
        loss = pairwise_nt_xent(logits, positives)
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad is not None
        assert not logits.grad.any()

    def test_one_dataset_alone_is_finite(self) -> None:
        assert float(pairwise_nt_xent(torch.zeros(4, 4), torch.ones(4, 4))) == pytest.approx(math.log(4))


def test_a_single_process_gathers_nothing() -> None:
    rows = draw(0, 3, 2)
    assert gather_rows(rows) is rows
