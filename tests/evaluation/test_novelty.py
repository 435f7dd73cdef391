from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from weightspace.evaluation.novelty import (
    KnownModels,
    disagreement,
    error_overlap,
    of_partner_pairs,
    of_partners,
    partners,
    sorted_weights,
)
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo


def known(zoo: Zoo, place: int = 0) -> tuple[torch.Tensor, Architecture]:
    batch = list(zoo.batches())[place]
    return batch.flat, batch.architecture


def permuted(flat: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    return permute(flat, random_permutations(architecture, len(flat), torch.Generator().manual_seed(1)), architecture)


@pytest.mark.parametrize("place", [0, 1])
class TestNearest:
    def test_finds_permuted_copies(self, tiny_zoo: Zoo, place: int) -> None:
        flat, architecture = known(tiny_zoo, place)
        for copies in (flat[5:9], permuted(flat[5:9], architecture)):
            found = KnownModels(flat, architecture).nearest(copies, shortlist=2)
            assert found.place.tolist() == [5, 6, 7, 8]
            assert found.distance.tolist() == found.relative.tolist() == [0, 0, 0, 0]
            assert torch.equal(found.aligned, copies)

    def test_of_a_noisy_copy_is_as_far_as_the_noise(self, tiny_zoo: Zoo, place: int) -> None:
        flat, architecture = known(tiny_zoo, place)
        noise = F.normalize(torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)), dim=1)
        moved = permuted(flat + 0.05 * noise, architecture)[:4]
        found = KnownModels(flat, architecture).nearest(moved)
        assert found.distance.tolist() == pytest.approx([0.05] * 4, rel=1e-3)
        assert found.relative.tolist() == pytest.approx((0.05 / moved.norm(dim=1)).tolist(), rel=1e-3)

    def test_is_that_of_a_search_through_all(self, tiny_zoo: Zoo, place: int) -> None:
        flat, architecture = known(tiny_zoo, place)
        models, others = flat[:6], flat[6:]
        quick = KnownModels(others, architecture).nearest(models)
        whole = KnownModels(others, architecture).nearest(models, shortlist=len(others))
        torch.testing.assert_close(quick.distance, whole.distance, rtol=0.02, atol=0)
        assert (quick.distance >= whole.distance - 1e-4).all()

    def test_sorted_weights_bound_every_order(self, tiny_zoo: Zoo, place: int) -> None:
        flat, architecture = known(tiny_zoo, place)
        ordered = sorted_weights(flat, architecture)
        assert torch.equal(ordered, sorted_weights(permuted(flat, architecture), architecture))
        bound = torch.cdist(ordered, ordered, compute_mode="donot_use_mm_for_euclid_dist")
        assert (bound <= torch.cdist(flat, permuted(flat, architecture)) + 1e-3).all()


def test_overlap_is_intersection_over_union() -> None:
    wrong = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    others = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert error_overlap(wrong, others).tolist() == [[pytest.approx(1 / 3), 1, 0, 0], [0, 0, 1, 0]]


def test_disagreement_is_the_share_of_different_predictions() -> None:
    one = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]])
    other = torch.tensor([[0, 1, 2, 0], [3, 3, 3, 3], [4, 4, 4, 4]])
    assert disagreement(one, other).tolist() == [[0.25, 0.75, 1], [1, 0, 1]]
    assert disagreement(one, other[:0]).shape == (2, 0)


class TestPartners:
    def test_make_about_as_many_errors(self) -> None:
        weights = partners(torch.tensor([10, 100, 60]), torch.tensor([8, 12, 13, 90, 111]), share=0.1, least=2)
        assert weights.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5]

    def test_stand_for_the_model(self) -> None:
        weights = partners(torch.tensor([10, 60]), torch.tensor([8, 12, 13]))
        found = of_partners(weights, torch.tensor([0.2, 0.4, 0.9]))
        assert found[0] == pytest.approx(0.3)
        assert found[1].isnan()

    def test_of_one_run_are_no_pair(self) -> None:
        weights = partners(torch.tensor([10, 20, 60]), torch.tensor([10, 10, 20]))
        values = torch.tensor([[0.0, 9.0, 0.3], [9.0, 0.0, 0.5], [0.3, 0.5, 0.0]])
        found = of_partner_pairs(weights, values, torch.tensor([0, 0, 1]))
        assert found[0, 1] == found[1, 0] == pytest.approx(0.4)
        assert found[0, 0].isnan()
        assert found[2].isnan().all()
