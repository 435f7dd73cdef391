from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.networks.families import family_config, stacked_forward
from weightspace.networks.flat import unflatten
from weightspace.training import batches
from weightspace.training.batches import Batch, ViewBatches
from weightspace.training.loop import Batches
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.views import Augmentation

EXTRACTOR = WeightFeatureExtractor("channel", 65, std=0.25)
PLAIN = Augmentation(permute=False, erase=0.0, noise=0.0)


def source(zoo: Zoo, **changes: Any) -> ViewBatches:
    plain = ViewBatches(zoo, np.arange(len(zoo)), EXTRACTOR, Augmentation(), batch_size=10, window=16, seed=0)
    return replace(plain, **changes)


def take(stream: Batches, count: int, start: int = 0, process: int = 0, processes: int = 1) -> list[Batch]:
    return list(islice(stream(start, process, processes), count))


def same(one: Batch, other: Batch) -> bool:
    return one.number == other.number and all(
        torch.equal(value, other.inputs[name]) if isinstance(value, torch.Tensor) else value == other.inputs[name]
        for name, value in one.inputs.items()
    )


def rows_of(batch: Batch) -> np.ndarray:
    """The zoo row that each place of a batch shows; needs sequences that are whole."""
    rows = np.full(len(batch.inputs["weight_values"]), -1)
    for part in batch.parts:
        rows[part.places.numpy()] = part.rows
    return rows


class TestOrder:
    def test_a_stream_can_start_anywhere(self, tiny_zoo: Zoo) -> None:
        stream = source(tiny_zoo)
        assert isinstance(stream, Batches)
        whole = take(stream, 11)
        assert [batch.number for batch in whole] == list(range(11))
        for start in (1, 3, 4, 9):  # four batches make an epoch
            assert all(same(*pair) for pair in zip(take(stream, 2, start), whole[start:], strict=False))

    def test_an_epoch_shows_a_model_once_and_the_next_in_another_order(self, tiny_zoo: Zoo) -> None:
        epochs = []
        for start in (0, 4):
            rows = np.concatenate([rows_of(batch)[:12] for batch in take(source(tiny_zoo, batch_size=12), 4, start)])
            assert sorted(rows) == list(range(48))
            epochs.append(rows.tolist())
        assert epochs[0] != epochs[1] != sorted(epochs[1])

    def test_blocks_bound_the_memory_and_are_shuffled(self, tiny_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        size = int(tiny_zoo.index["size"].sum())
        monkeypatch.setattr(batches, "_BLOCK_BYTES", size // 4 + 1)
        firsts = set()
        for start in range(0, 32, 4):
            rows = [rows_of(batch)[:8] for batch in take(source(tiny_zoo, batch_size=8), 4, start)]
            assert all(np.ptp(part) < 24 for part in rows)
            firsts.add(int(rows[0].min()))
        assert len(firsts) > 1

    def test_a_short_batch_is_left_out_unless_it_is_the_only_one(self, tiny_zoo: Zoo) -> None:
        assert [len(rows_of(batch)) for batch in take(source(tiny_zoo), 9)] == [20] * 9
        few = source(tiny_zoo, rows=np.array([3, 30, 5]))
        assert [sorted(rows_of(batch)) for batch in take(few, 2)] == [[3, 3, 5, 5, 30, 30]] * 2

    def test_processes_share_a_batch_without_overlap(self, tiny_zoo: Zoo) -> None:
        stream = source(tiny_zoo, batch_size=6)
        for number in range(8):
            parts = [take(stream, 1, number, process, 2)[0] for process in range(2)]
            shown = [set(rows_of(part)) for part in parts]
            assert len(shown[0]) == len(shown[1]) == 6
            assert not shown[0] & shown[1]
        assert not same(*parts)

    def test_seed_and_rows_decide(self, tiny_zoo: Zoo) -> None:
        assert not same(take(source(tiny_zoo), 1)[0], take(source(tiny_zoo, seed=1), 1)[0])
        chosen = np.arange(5, 25)
        assert set(np.concatenate([rows_of(b) for b in take(source(tiny_zoo, rows=chosen), 6)])) == set(chosen)


class TestViews:
    def test_halves_show_the_same_models_with_equal_functions(self, tiny_zoo: Zoo) -> None:
        (batch,) = take(source(tiny_zoo), 1)
        rows = rows_of(batch)
        assert rows[:10].tolist() == rows[10:].tolist()
        assert len(batch.parts) == 2
        for part in batch.parts:
            original = tiny_zoo.flat(part.rows)
            assert (part.flat != original).any(1).all()
            config = family_config(tiny_zoo.entry(int(part.rows[0])).config or {})
            assert config is not None
            images = torch.rand(len(part.rows), 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            shown, true = (
                stacked_forward(config, unflatten(f, part.architecture), images) for f in (part.flat, original)
            )
            torch.testing.assert_close(shown, true, atol=1e-5, rtol=1e-4)

    def test_labels_are_the_view_before_it_was_corrupted(self, tiny_zoo: Zoo) -> None:
        (batch,) = take(source(tiny_zoo), 1)
        for part in batch.parts:
            features = EXTRACTOR.batch(part.flat, part.architecture)
            length = EXTRACTOR.token_count(part.architecture)
            for name, found in (
                ("weight_values", "labels"),
                ("weight_mask", "weight_mask"),
                ("position_ids", "position_ids"),
                ("attention_mask", "attention_mask"),
            ):
                value = batch.inputs[found][part.places]
                assert torch.equal(value[:, :length], features[name])
                assert not value[:, length:].any()
        inputs = batch.inputs
        assert (inputs["weight_values"] != inputs["labels"]).flatten(1).any(1).all()
        assert not inputs["weight_values"][~inputs["weight_mask"]].any()

    def test_nothing_is_changed_unless_asked_for(self, tiny_zoo: Zoo) -> None:
        (batch,) = take(source(tiny_zoo, augmentation=PLAIN), 1)
        assert torch.equal(batch.inputs["weight_values"], batch.inputs["labels"])
        for part in batch.parts:
            assert torch.equal(part.flat, tiny_zoo.flat(part.rows))

    def test_depths_go_from_input_to_output(self, tiny_zoo: Zoo) -> None:
        (batch,) = take(source(tiny_zoo), 1)
        layers, depths = batch.inputs["position_ids"][..., 1], batch.inputs["depths"]
        last = layers.amax(1, keepdim=True)
        assert torch.equal(depths, (layers / last) * batch.inputs["attention_mask"])


class TestWindows:
    def test_a_window_is_a_piece_of_its_model(self, tiny_zoo: Zoo) -> None:
        (batch,) = take(source(tiny_zoo, augmentation=PLAIN, window=4), 1)
        assert batch.parts == []  # pieces of models have no function
        values, positions = batch.inputs["weight_values"], batch.inputs["position_ids"]
        assert values.shape[1] == 4
        assert batch.inputs["attention_mask"].all()
        wholes = [
            (
                EXTRACTOR.batch(one.flat, one.architecture)["weight_values"],
                EXTRACTOR._tokenizer.layout(one.architecture),
            )
            for one in tiny_zoo.batches()
        ]
        for number in range(len(values)):
            index = positions[number, :, 0]
            assert index.diff().tolist() == [1, 1, 1]
            assert any(
                int(index[-1]) < whole.shape[1]
                and torch.equal(layout.positions[index], positions[number])
                and bool((whole[:, index] == values[number]).flatten(1).all(1).any())
                for whole, layout in wholes
            )

    def test_depths_are_those_of_the_whole_model(self, tiny_zoo: Zoo) -> None:
        stream = source(tiny_zoo, window=2)
        for batch in take(stream, 3):
            layers = batch.inputs["position_ids"][..., 1]
            # The last layer of an MLP is number 1 and that of a CNN number 2.
            for depth, layer in zip(batch.inputs["depths"].flatten(), layers.flatten(), strict=True):
                assert float(depth) in ({0.0} if layer == 0 else {0.5, 1.0} if layer == 1 else {1.0})
