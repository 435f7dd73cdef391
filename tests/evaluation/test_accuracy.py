from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.data.images import load_images
from weightspace.evaluation.accuracy import FunctionComparison, compare_functions
from weightspace.networks.permutation import permute, random_permutations
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo, ZooBatch, load_zoo
from weightspace.zoo.writer import ZooWriter


def first(zoo: Zoo) -> ZooBatch:
    return next(zoo.batches())


def compared(zoo: Zoo, decoded: torch.Tensor, rows: Any = None) -> FunctionComparison:
    batch = first(zoo)
    return compare_functions(zoo, batch.rows if rows is None else rows, batch.flat, decoded, batch.architecture)


def test_a_perfect_reconstruction_agrees_everywhere(tiny_zoo: Zoo) -> None:
    batch = first(tiny_zoo)
    found = compared(tiny_zoo, batch.flat.clone())
    assert found.rows.tolist() == batch.rows.tolist()
    assert (found.agreement == 1).all()
    assert np.array_equal(found.original, found.decoded)
    np.testing.assert_allclose(found.original, tiny_zoo.index["test_accuracy"][found.rows], atol=0.01)


def test_a_permuted_model_is_the_same_model(tiny_zoo: Zoo) -> None:
    batch = first(tiny_zoo)
    generator = torch.Generator().manual_seed(0)
    moved = permute(batch.flat, random_permutations(batch.architecture, len(batch.flat), generator), batch.architecture)
    assert (compared(tiny_zoo, moved).agreement > 0.99).all()


def test_a_broken_model_is_found_out(tiny_zoo: Zoo) -> None:
    batch = first(tiny_zoo)
    found = compared(tiny_zoo, torch.zeros_like(batch.flat))
    # All logits are equal, so that the first class is always predicted.
    for row, accuracy in zip(found.rows, found.decoded, strict=True):
        labels = load_images(tiny_zoo.index["dataset"][row]).test_labels
        assert accuracy == pytest.approx(float((labels == 0).float().mean()))
    assert found.agreement.mean() < 0.9


def test_chance_is_the_most_frequent_class(tiny_zoo: Zoo) -> None:
    found = compared(tiny_zoo, first(tiny_zoo).flat)
    for row, chance in zip(found.rows, found.chance, strict=True):
        labels = load_images(tiny_zoo.index["dataset"][row]).test_labels
        assert chance == pytest.approx(np.bincount(labels).max() / len(labels))
    assert np.array_equal(found.learned, found.original > found.chance)
    assert found.learned.sum() > 0


def test_models_in_any_order_come_back_by_row(tiny_zoo: Zoo) -> None:
    batch = first(tiny_zoo)
    order = np.random.default_rng(0).permutation(len(batch.rows))
    found = compare_functions(tiny_zoo, batch.rows[order], batch.flat[order], batch.flat[order], batch.architecture)
    assert found.rows.tolist() == batch.rows.tolist()
    assert np.array_equal(found.original, compared(tiny_zoo, batch.flat).original)


@pytest.mark.parametrize("changes", [{"config": None}, {"dataset": None}, {"config": {"family": "rnn"}}])
def test_models_that_cannot_be_run_are_left_out(changes: dict[str, Any], tiny_zoo: Zoo, tmp_path: Path) -> None:
    batch = first(tiny_zoo)
    rows = batch.rows[:4]
    entries = [tiny_zoo.entry(int(row)) for row in rows]
    entries[1] = replace(entries[1], **changes)
    writer = ZooWriter(tmp_path / "zoo", settings={})
    writer.write_shard("all", entries, [tiny_zoo.blob(int(row)) for row in rows])
    writer.finish()
    zoo = load_zoo(tmp_path / "zoo")
    found = compare_functions(zoo, np.arange(4), batch.flat[:4], batch.flat[:4], batch.architecture)
    assert found.rows.tolist() == [0, 2, 3]
    none = compare_functions(zoo, np.array([1]), batch.flat[:1], batch.flat[:1], batch.architecture)
    assert len(none.rows) == len(none.agreement) == len(none.learned) == 0


def test_the_architecture_is_the_one_that_the_weights_have(tiny_zoo: Zoo) -> None:
    batch = first(tiny_zoo)
    other: Architecture = next(a for a in tiny_zoo.architectures.values() if a.digest != batch.architecture.digest)
    with pytest.raises(Exception, match="flat weights"):
        compare_functions(tiny_zoo, batch.rows, batch.flat, batch.flat, other)
