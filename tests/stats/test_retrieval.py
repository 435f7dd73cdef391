from __future__ import annotations

import math

import numpy as np
import pytest

from weightspace.stats.retrieval import first_ranks, result_correlation, retrieval, same_identity


class TestRanks:
    def test_wrong_answers_before_the_first_right_one_are_counted(self) -> None:
        similarity = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
        positives = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=bool)
        assert first_ranks(similarity, positives).tolist() == [1, 3, 4]

    def test_who_finds_all_alike_finds_nothing(self) -> None:
        positives = same_identity(np.arange(3), np.arange(3))
        assert first_ranks(np.zeros((3, 3)), positives).tolist() == [3, 3, 3]

    def test_unknown_identities_match_nothing(self) -> None:
        assert same_identity(np.array([0, -1]), np.array([0, -1, 0])).tolist() == [[True, False, True], [False] * 3]


class TestRetrieval:
    def test_perfect_retrieval(self) -> None:
        datasets, runs = np.repeat(np.arange(30) % 5, 2), np.repeat(np.arange(30), 2)
        found = retrieval(
            -((np.arange(5)[:, None] - datasets) ** 2.0),
            same_identity(np.arange(5), datasets),
            np.random.default_rng(0),
            candidate_runs=runs,
            draws=50,
        )
        assert found is not None
        assert (found.queries, found.candidates) == (5, 60)
        assert found.recall[1].value == found.recall[1].low == found.recall[1].high == 1.0
        assert found.median_rank.value == 1.0

    def test_chance_is_what_random_similarities_reach(self) -> None:
        rng = np.random.default_rng(0)
        positives = np.zeros((4000, 20), dtype=bool)
        positives[:, :3] = True
        found = retrieval(rng.normal(size=(4000, 20)), positives, rng, draws=1)
        assert found is not None
        for k, estimate in found.recall.items():
            assert estimate.null_mean == pytest.approx(1 - math.comb(17, k) / math.comb(20, k))
            assert estimate.value == pytest.approx(estimate.null_mean, abs=0.03)
        assert found.median_rank.null_mean == pytest.approx(21 / 4)

    def test_more_than_there_are_wrong_ones_is_always_found(self) -> None:
        found = retrieval(np.eye(3), np.eye(3, dtype=bool), np.random.default_rng(0), cutoffs=(3, 10), draws=2)
        assert found is not None
        assert found.recall[3].null_mean == found.recall[10].null_mean == 1.0

    def test_queries_without_a_right_answer_are_left_out(self) -> None:
        positives = np.array([[True, False], [False, False]])
        found = retrieval(np.array([[1.0, 0.0], [1.0, 0.0]]), positives, np.random.default_rng(0), draws=2)
        assert found is not None
        assert found.queries == 1
        assert found.recall[1].value == 1.0
        assert retrieval(np.eye(2), np.zeros((2, 2), dtype=bool), np.random.default_rng(0)) is None

    @pytest.mark.parametrize("side", ["queries", "candidates"])
    def test_intervals_hold_what_other_runs_give(self, side: str) -> None:
        def measured(seed: int, draws: int):
            rng = np.random.default_rng(seed)
            centres = np.random.default_rng(99).normal(size=(12, 8))
            own = np.arange(72) % 12
            embedded = centres[own] + 1.3 * rng.normal(size=(72, 8))
            similarity, positives = centres @ embedded.T, same_identity(np.arange(12), own)
            if side == "queries":
                return retrieval(similarity.T, positives.T, rng, query_runs=np.arange(72), draws=draws)
            return retrieval(similarity, positives, rng, candidate_runs=np.arange(72), draws=draws)

        truth = np.mean([measured(seed, 1).recall[5].value for seed in range(200)])
        intervals = [measured(seed, 100).recall[5] for seed in range(40)]
        covered = np.mean([one.low - 1e-9 <= truth <= one.high + 1e-9 for one in intervals])
        assert covered >= 0.8
        assert np.mean([one.high - one.low for one in intervals]) < 0.7

    def test_checkpoints_of_a_run_are_drawn_together(self) -> None:
        rng = np.random.default_rng(0)
        right = rng.random(40) < 0.5
        similarity = np.stack([right, ~right], axis=1).astype(float)
        positives = np.tile([True, False], (40, 1))

        def width(runs: np.ndarray) -> float:
            found = retrieval(similarity, positives, np.random.default_rng(1), query_runs=runs, draws=400)
            assert found is not None
            return found.recall[1].high - found.recall[1].low

        # Four copies of each answer say no more than one of them.
        order = np.argsort(right, kind="stable")
        runs = np.empty(40, dtype=np.int64)
        runs[order] = np.arange(40) // 4
        assert width(runs) > 1.5 * width(np.arange(40))


class TestResultCorrelation:
    def correlation(self, similarity: np.ndarray, wanted: np.ndarray, known: np.ndarray):
        runs = np.arange(len(known)) // 2
        return result_correlation(
            similarity, wanted, known, np.random.default_rng(0), candidate_runs=runs, first=4, draws=100
        )

    def test_models_that_have_what_was_asked_for(self) -> None:
        wanted, known = np.linspace(0.2, 0.9, 8), np.random.default_rng(0).uniform(0.1, 1.0, 60)
        known[5] = np.nan
        found = self.correlation(-np.abs(wanted[:, None] - np.nan_to_num(known)), wanted, known)
        assert found is not None
        assert found.value == pytest.approx(1.0)
        assert found.low > 0.8

    def test_models_that_have_anything(self) -> None:
        values = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            found = self.correlation(rng.normal(size=(30, 60)), np.linspace(0.2, 0.9, 30), rng.uniform(size=60))
            assert found is not None
            values.append(found.value)
        assert abs(np.mean(values)) < 0.1

    def test_all_alike_have_no_order(self) -> None:
        similarity = np.random.default_rng(0).normal(size=(4, 10))
        assert self.correlation(similarity, np.full(4, 0.5), np.linspace(0, 1, 10)) is None
        assert self.correlation(similarity, np.linspace(0, 1, 4), np.full(10, 0.5)) is None
        assert self.correlation(similarity, np.linspace(0, 1, 4), np.full(10, np.nan)) is None

    def test_who_finds_the_same_whatever_is_asked_for_finds_nothing(self) -> None:
        alike = np.tile(np.random.default_rng(0).normal(size=20), (4, 1))
        found = self.correlation(alike, np.linspace(0, 1, 4), np.linspace(0, 1, 20))
        assert found is not None
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
