from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.errors import SettingsError, ZooError
from weightspace.index import embed_zoo, load_encoder
from weightspace.probes import zoo as probes
from weightspace.probes.representations import collect_weights
from weightspace.probes.zoo import ENCODER, JOINT, encoder_features, probe_zoo, target_values
from weightspace.training.autoencoder import read_training
from weightspace.zoo.dataset import Zoo

RIDGE: dict[str, Sequence[str]] = {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the probe table is asked for; probes nothing but ridge, which is what takes the time."""
    noted: dict[str, Any] = {}
    table = probes.probe_table

    def cheap(representations: Any, targets: Any, run_ids: Any, seeds: Any, **options: Any) -> Any:
        noted.update(options, representations=representations, targets=targets, run_ids=run_ids)
        return table(representations, targets, run_ids, seeds, estimators=RIDGE, replicates=20, **options)

    monkeypatch.setattr(probes, "probe_table", cheap)
    return noted


class TestTable:
    def test_has_every_baseline_and_the_encoder(self, asked: Any, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        rows = probe_zoo(tiny_zoo, tiny_encoder, ["test_accuracy", "learning_rate"], seeds=(0,))
        names = {"W", "s(W)", "s(W)+invariants", "PCA", "IncrementalPCA", ENCODER}
        found = {row.representation for row in rows}
        assert {name for name in names if any(other.startswith(name) for other in found)} == names
        assert {row.target for row in rows} == {"test_accuracy", "learning_rate"}
        assert all(row.models == 48 and row.seeds == (0,) for row in rows)

    def test_tests_on_the_runs_that_the_encoder_never_saw(self, asked: Any, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        rows = probe_zoo(tiny_zoo, load_encoder(tiny_encoder), ["test_accuracy"], seeds=(0, 1))
        state = read_training(tiny_encoder)
        assert state is not None
        assert asked["test_runs"] == state["test_runs"]
        for row in rows:
            assert row.predictions is not None
            assert set(tiny_zoo.index["run_id"][row.predictions.rows]) == set(state["test_runs"])

    def test_has_an_autoencoder_and_a_joint_model_side_by_side(
        self, asked: Any, tiny_zoo: Zoo, tiny_encoder: Path, tiny_clip_joint: Path
    ) -> None:
        rows = probe_zoo(tiny_zoo, [tiny_encoder, tiny_clip_joint], ["test_accuracy"], seeds=(0,))
        sizes = {row.representation: row.dimensions for row in rows}
        assert sizes[ENCODER] == load_encoder(tiny_encoder).embedding_size
        assert sizes[JOINT] == load_encoder(tiny_clip_joint).embedding_size

    def test_refuses_encoders_that_held_out_other_runs(
        self, tiny_zoo: Zoo, tiny_encoder: Path, tiny_clip_joint: Path, tmp_path: Path
    ) -> None:
        other = shutil.copytree(tiny_clip_joint, tmp_path / "other")
        state = json.loads((other / "training.json").read_text())
        (other / "training.json").write_text(json.dumps({**state, "test_runs": state["test_runs"][:-1]}))
        with pytest.raises(SettingsError, match=r"other: held out other runs than .*one split_seed"):
            probe_zoo(tiny_zoo, [tiny_encoder, other], ["test_accuracy"], seeds=(0,))

    def test_draws_its_test_runs_without_an_encoder(self, asked: Any, tiny_zoo: Zoo) -> None:
        rows = probe_zoo(tiny_zoo.path, None, ["test_accuracy"], seeds=(0,))
        assert asked["test_runs"] is None
        assert ENCODER not in {row.representation for row in rows}


class TestFeatures:
    def test_are_the_embeddings_of_the_models_and_of_their_permuted_copies(
        self, tiny_zoo: Zoo, tiny_encoder: Path
    ) -> None:
        encoder = load_encoder(tiny_encoder)
        blocks = collect_weights(tiny_zoo.batches(), torch.Generator().manual_seed(0))
        found = encoder_features(encoder, blocks, len(tiny_zoo))
        everyone = np.arange(48)
        plain, moved = found.features(everyone), found.permuted_features(everyone)
        width = encoder.embedding_size
        np.testing.assert_allclose(plain[:, :width], embed_zoo(encoder, tiny_zoo), rtol=1e-4, atol=1e-5)
        assert np.isfinite(moved).all()
        assert (moved != plain).any(1).all()
        # The statistics of the weights do not know the order of neurons.
        latents = encoder.model.config.depth_bins * 2 * encoder.model.config.latent_size
        np.testing.assert_allclose(moved[:, latents:], plain[:, latents:], rtol=1e-3, atol=1e-3)


class TestTargets:
    def test_are_results_or_hyperparameters(self, tiny_zoo: Zoo) -> None:
        np.testing.assert_array_equal(target_values(tiny_zoo, "test_loss"), tiny_zoo.index["test_loss"])
        expected = [entry.hyperparameters["weight_decay"] for entry in tiny_zoo.entries()]
        np.testing.assert_array_equal(target_values(tiny_zoo, "weight_decay"), expected)

    @pytest.mark.parametrize("name", ["no_such_thing", "activation"])
    def test_without_numbers_are_refused_with_what_there_is(self, name: str, tiny_zoo: Zoo) -> None:
        with pytest.raises(SettingsError, match=f"'{name}'.*test_accuracy"):
            probe_zoo(tiny_zoo, None, [name])

    def test_need_enough_runs(self, tiny_zoo: Zoo, tmp_path: Path) -> None:
        with pytest.raises(ZooError, match="nowhere"):
            probe_zoo(tmp_path / "nowhere", None, ["test_accuracy"])
