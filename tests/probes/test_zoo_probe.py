from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.encoder import embed_zoo, load_encoder
from weightspace.errors import SettingsError, ZooError
from weightspace.probes import zoo as probes
from weightspace.probes.representations import collect_weights
from weightspace.probes.rows import ProbeRow
from weightspace.probes.zoo import ENCODER, JOINT, encoder_features, probe_zoo
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.splits import split_by_dataset

RIDGE: dict[str, Sequence[str]] = {}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the probe table is called with; probes nothing but ridge, which is what takes the time."""
    noted: dict[str, Any] = {}
    table = probes.probe_table

    def cheap(representations: Any, targets: Any, run_ids: Any, seeds: Any, **options: Any) -> Any:
        noted.update(options, representations=representations, targets=targets, run_ids=run_ids)
        return table(representations, targets, run_ids, seeds, estimators=RIDGE, replicates=20, **options)

    monkeypatch.setattr(probes, "probe_table", cheap)
    return noted


class TestTable:
    def test_has_every_baseline_and_the_encoder(self, called: Any, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        rows = probe_zoo(tiny_zoo, tiny_encoder, ["test_accuracy", "learning_rate"], seeds=(0,))
        names = {"W", "s(W)", "s(W)+invariants", "PCA", "IncrementalPCA", ENCODER}
        found = {row.representation for row in rows}
        assert {name for name in names if any(other.startswith(name) for other in found)} == names
        assert {row.target for row in rows} == {"test_accuracy", "learning_rate"}
        assert all(row.models == 48 and row.seeds == (0,) for row in rows)

    def test_tests_on_the_runs_that_the_encoder_never_saw(self, called: Any, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        rows = probe_zoo(tiny_zoo, load_encoder(tiny_encoder), ["test_accuracy"], seeds=(0, 1))
        state = read_training(tiny_encoder)
        assert state is not None
        assert called["test_runs"] == state.test_runs
        for row in rows:
            assert row.predictions is not None
            assert set(tiny_zoo.index["run_id"][row.predictions.rows]) == set(state.test_runs)

    def test_has_an_autoencoder_and_a_joint_model_side_by_side(
        self, called: Any, tiny_zoo: Zoo, tiny_encoder: Path, tiny_clip_joint: Path
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

    def test_has_one_encoder_of_a_kind(self, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        with pytest.raises(SettingsError, match="a second autoencoder model; probe one of each kind"):
            probe_zoo(tiny_zoo, [tiny_encoder, tiny_encoder], ["test_accuracy"], seeds=(0,))

    def test_draws_its_test_runs_without_an_encoder(self, called: Any, tiny_zoo: Zoo) -> None:
        rows = probe_zoo(tiny_zoo.path, None, ["test_accuracy"], seeds=(0,))
        assert called["test_runs"] is None
        assert ENCODER not in {row.representation for row in rows}


class TestFeatures:
    def test_are_the_embeddings_of_the_models_and_of_their_permuted_copies(
        self, tiny_zoo: Zoo, tiny_encoder: Path
    ) -> None:
        encoder = load_encoder(tiny_encoder)
        blocks = collect_weights(tiny_zoo.batches(), torch.Generator().manual_seed(0))
        found = encoder_features(encoder, blocks)
        everyone = np.arange(48)
        plain, moved = found.features(everyone), found.permuted_features(everyone)
        width = encoder.embedding_size
        np.testing.assert_allclose(plain[:, :width], embed_zoo(encoder, tiny_zoo), rtol=1e-4, atol=1e-5)
        assert np.isfinite(moved).all()
        assert (moved != plain).any(1).all()
        # The statistics of the weights do not know the order of neurons.
        latents = encoder.model.config.depth_bins * 2 * encoder.model.config.latent_size
        np.testing.assert_allclose(moved[:, latents:], plain[:, latents:], rtol=1e-3, atol=1e-3)


class TestUnseenDatasets:
    def test_are_drawn_by_the_seed_without_an_encoder(self, called: Any, tiny_zoo: Zoo) -> None:
        rows = probe_zoo(tiny_zoo, None, ["test_accuracy"], seeds=(0,), unseen_datasets=True)
        tested = datasets_of(tiny_zoo, rows[0])
        assert called["test_datasets"] is None and called["test_runs"] is None
        assert len(tested) == round(0.15 * tiny_zoo.index["dataset"].nunique())

    def test_have_been_seen_by_an_autoencoder_which_is_said(
        self, called: Any, tiny_zoo: Zoo, tiny_encoder: Path
    ) -> None:
        state = read_training(tiny_encoder)
        assert state is not None
        held_out = tiny_zoo.index["run_id"].isin(state.test_runs)
        seeds = [seed for seed in range(20) if draws_some_of(tiny_zoo, held_out.to_numpy(), seed)][:1]
        rows = probe_zoo(tiny_zoo, tiny_encoder, ["test_accuracy"], seeds=seeds, unseen_datasets=True)
        assert called["test_runs"] == state.test_runs
        for row in rows:
            assert ("the encoder has seen other models" in row.note) == (row.representation == ENCODER)

    def test_are_those_that_a_joint_model_held_out(
        self, called: Any, tiny_zoo: Zoo, tiny_clip_joint: Path, tmp_path: Path
    ) -> None:
        chosen = sorted(set(tiny_zoo.index["dataset"]))[:4]
        joint = holding_out(tiny_clip_joint, tmp_path / "joint", chosen)
        rows = probe_zoo(tiny_zoo, joint, ["test_accuracy"], seeds=(0,), unseen_datasets=True)
        assert called["test_runs"] is None
        assert datasets_of(tiny_zoo, rows[0]) == set(chosen)
        assert not any("encoder" in row.note for row in rows)

    def test_may_be_known_to_what_a_joint_model_started_from(
        self, called: Any, tiny_zoo: Zoo, tiny_clip_joint: Path, tmp_path: Path
    ) -> None:
        state = json.loads((tiny_clip_joint / "training.json").read_text())
        tested = tiny_zoo.index["dataset"][tiny_zoo.index["run_id"].isin(state["test_runs"])]
        joint = holding_out(tiny_clip_joint, tmp_path / "joint", sorted(set(tested)), encoder="somewhere")
        rows = probe_zoo(tiny_zoo, joint, ["test_accuracy"], seeds=(0,), unseen_datasets=True)
        assert called["test_runs"] == tuple(state["test_runs"])
        assert "started from one that may have seen" in rows[-1].note

    def test_of_an_encoder_of_another_zoo_are_not_known(
        self, called: Any, tiny_zoo: Zoo, tiny_encoder: Path, tmp_path: Path
    ) -> None:
        other = shutil.copytree(tiny_encoder, tmp_path / "other")
        (other / "training.json").unlink()
        rows = probe_zoo(tiny_zoo, other, ["test_accuracy"], seeds=(0,), unseen_datasets=True)
        assert called["test_runs"] is None and "is not known" in rows[-1].note

    def test_are_refused_where_a_joint_model_has_seen_all(self, tiny_zoo: Zoo, tiny_clip_joint: Path) -> None:
        with pytest.raises(SettingsError, match=r"clip_joint: was trained on all datasets .*with held_out_datasets"):
            probe_zoo(tiny_zoo, tiny_clip_joint, ["test_accuracy"], seeds=(0,), unseen_datasets=True)


def datasets_of(zoo: Zoo, row: ProbeRow) -> set[str]:
    assert row.predictions is not None
    return set(zoo.index["dataset"][row.predictions.rows])


def draws_some_of(zoo: Zoo, rows: np.ndarray, seed: int) -> bool:
    """Tells whether the datasets that a seed draws have models among ``rows``."""
    split = split_by_dataset(zoo.index["run_id"].to_numpy(), zoo.index["dataset"].to_numpy(), seed)
    return bool(rows[split.test].any())


def holding_out(joint: Path, copy: Path, datasets: list[str], **changes: Any) -> Path:
    """Copies a joint model with a record that says that it held out ``datasets``."""
    shutil.copytree(joint, copy)
    state = json.loads((copy / "training.json").read_text()) | changes
    state["settings"]["held_out_datasets"] = datasets
    (copy / "training.json").write_text(json.dumps(state))
    return copy


def test_labels_and_numbers_stand_in_one_table(called: Any, tiny_zoo: Zoo) -> None:
    rows = probe_zoo(tiny_zoo, None, ["test_accuracy", "activation", "classes"], seeds=(0,))
    assert [row.target for row in rows if row.representation == "s(W)"] == ["test_accuracy", "activation", "classes"]
    assert {row.labels for row in rows if row.target == "activation"} == {("relu", "tanh")}
    assert all(("auc" in row.scores) == (row.target != "test_accuracy") for row in rows)


def test_a_folder_without_a_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="nowhere"):
        probe_zoo(tmp_path / "nowhere", None, ["test_accuracy"])
