"""``explain`` on a real zoo and encoder: what it prints; the statistics are tested where they are computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.cli.main import main
from weightspace.probes.explain import explain
from weightspace.probes.representations import statistics_of_rows
from weightspace.probes.runs import run_table
from weightspace.probes.statistics import weight_statistics
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo


def words(zoo: Zoo, encoder: Path, *more: str) -> list[str]:
    return ["explain", str(zoo.path), "--encoder", str(encoder), "--draws", "100", *more]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of draws changes no word of what is printed."""
    monkeypatch.setattr("weightspace.probes.explain.explain", lambda *inputs, draws, seed: explain(*inputs, draws=10))


def refused(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")


def test_json(tiny_zoo: Zoo, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tiny_zoo, tiny_encoder, "--json")) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert record["runs"] == 24
    assert {row["description"] for row in record["clusters"]} == {"embedding", "s(W)"}
    row = record["clusters"][0]
    assert set(row) == {"description", "models", "label", "groups", "runs", "measure", "estimate"}
    estimate = row["estimate"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert 0 < estimate["p_value"] <= 1
    # The two architectures have another number of tensors: only the embedding compares them.
    assert {row["description"] for row in record["clusters"] if row["models"] == "across"} == {"embedding"}
    assert "s(W): its columns differ between architectures, which cannot be compared in it." in record["notes"]


def test_tables_for_people(tiny_zoo: Zoo, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tiny_zoo, tiny_encoder)) == 0
    out = capsys.readouterr().out
    for title in ("Do models of the same dataset cluster?", "Are models of similar datasets similar?"):
        assert title in out
    line = next(line for line in out.splitlines() if "mlp" in line and "polarity" in line and "silhouette" in line)
    assert line.split()[:3] == ["embedding", "mlp", "12"]
    assert "95 % interval" in out and "nan" not in out
    assert "What determines the weights of mlp cannot be said: 12 runs are too few" in out


def test_only_what_training_held_out(
    tiny_zoo: Zoo, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Three or four of 24 runs are held out, which are too few for any question: see which ones are taken.
    assert main(words(tiny_zoo, tiny_encoder, "--held-out")) == 2
    held_out = read_training(tiny_encoder).test_runs  # type: ignore[union-attr]
    assert f"{len(held_out)} runs with all factors known are too few" in capsys.readouterr().err
    table = run_table(tiny_zoo, held_out)
    assert set(tiny_zoo.index["run_id"].iloc[table.rows]) == set(held_out)
    monkeypatch.setattr("weightspace.training.run.read_training", lambda _: None)
    assert main(words(tiny_zoo, tiny_encoder, "--held-out")) == 2
    assert f"--held-out: {tiny_encoder} was not trained on {tiny_zoo.path}" in capsys.readouterr().err


def test_what_the_user_can_mend(tiny_zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tiny_zoo, tmp_path)) == 2
    assert "no encoder" in capsys.readouterr().err
    assert main(["explain", str(tiny_zoo.path), "--encoder", "e", "--draws", "5"]) == 2
    assert "draws" in capsys.readouterr().err


def test_weight_statistics_stand_in_the_order_of_the_runs(tiny_zoo: Zoo) -> None:
    table = run_table(tiny_zoo)
    described, comparable = statistics_of_rows(tiny_zoo.batches(table.rows), table.rows)
    assert not comparable
    rows = table.rows[np.array(table.architectures) == "mlp"]
    alone, comparable = statistics_of_rows(tiny_zoo.batches(rows), rows)
    architecture = tiny_zoo.architectures[tiny_zoo.index["header"][rows[0]]]
    expected = weight_statistics(tiny_zoo.flat(rows), architecture)
    assert comparable
    assert torch.equal(torch.from_numpy(alone).float(), expected)
    positions = np.flatnonzero(np.isin(table.rows, rows))
    assert np.array_equal(described[positions, : expected.shape[1]], alone)
