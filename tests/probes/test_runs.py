from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from weightspace.data.images import variant_of
from weightspace.errors import ZooError
from weightspace.io.writing import checkpoint_bytes
from weightspace.probes.runs import last_checkpoints, run_table
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter


def zoo_of(path: Path, runs: Sequence[Mapping[str, Any]], widths: Sequence[int] = (2,)) -> Zoo:
    """A zoo of one model a run, with these fields of its entry."""
    entries = [
        replace(ZooEntry(f"m{number:03d}", f"r{number:03d}", ModelRef(f"./m{number}.safetensors")), **changes)
        for number, changes in enumerate(runs)
    ]
    blobs = [checkpoint_bytes({"w": torch.ones(3, widths[number % len(widths)])}) for number in range(len(runs))]
    writer = ZooWriter(path, settings={"seed": 1})
    writer.write_shard("0", entries, blobs)
    writer.finish()
    return load_zoo(path)


def levels(zoo: Zoo) -> dict[str, tuple[str, ...]]:
    return {factor.name: factor.levels for factor in run_table(zoo).factors}


def test_a_trained_zoo(tiny_zoo: Zoo) -> None:
    table = run_table(tiny_zoo)
    assert len(table) == 24
    assert tiny_zoo.index["run_id"].iloc[table.rows].is_unique
    assert (tiny_zoo.index["step"].iloc[table.rows].isin([6, 12])).all()  # half of the checkpoints come after 3 or 6
    assert set(table.architectures) == {"mlp", "cnn"}
    assert {factor.name: (factor.kind, factor.in_dataset) for factor in table.factors} == {
        "architecture": ("architecture", False),
        "classes": ("data", True),
        "rotation": ("data", True),
        "polarity": ("data", True),
        "train_size": ("data", False),
        "label_noise": ("data", False),
        **dict.fromkeys(
            ("learning_rate", "weight_decay", "initialization", "steps", "activation"), ("training", False)
        ),
    }
    assert table.notes == ("Without a share, being the same in all runs: base, image_size.",)
    for factor in table.factors:
        number = 7
        said = {**tiny_zoo.entry(table.rows[number]).hyperparameters, **tiny_zoo.entry(table.rows[number]).results}
        if factor.name in said:
            value = said[factor.name]
            text = value if isinstance(value, str) else f"{value:g}"
            assert factor.levels[factor.codes[number]] == text


def test_the_last_checkpoint_is_that_of_the_latest_step() -> None:
    index = pd.DataFrame(
        {
            "run_id": ["b", "a", "b", "b", "c", "c", "d", "d"],
            "step": [30, 10, 10, 20, np.nan, np.nan, np.nan, 5],
            "epoch": [np.nan] * 4 + [2, 1, np.nan, np.nan],
        }
    )
    assert last_checkpoints(index).tolist() == [0, 1, 4, 7]
    assert last_checkpoints(index[["run_id"]]).tolist() == [1, 3, 5, 7]


def test_some_runs_lose_the_factors_that_they_share(tiny_zoo: Zoo) -> None:
    table = run_table(tiny_zoo)
    mlp = table.where(np.array(table.architectures) == "mlp")
    assert len(mlp) == 12 and set(mlp.architectures) == {"mlp"}
    assert "architecture" not in [factor.name for factor in mlp.factors]
    for factor in mlp.factors:
        assert set(factor.codes) == set(range(len(factor.levels)))


def test_a_zoo_that_knows_nothing(tmp_path: Path) -> None:
    table = run_table(zoo_of(tmp_path, [{}] * 12))
    assert len(table) == 12 and table.factors == () and table.datasets == (None,) * 12


def test_runs_of_another_zoo(tmp_path: Path) -> None:
    zoo = zoo_of(tmp_path, [{}] * 12)
    assert run_table(zoo, ["r003", "r007"]).rows.tolist() == [3, 7]
    with pytest.raises(ZooError, match="none of the 1 requested runs; give runs of this zoo"):
        run_table(zoo, ["other"])


def test_ids_of_other_datasets_are_their_own_base(tmp_path: Path) -> None:
    ids = ["mnist", "org/cifar@main", "weird?x=1", "digits?rotation=45"]
    zoo = zoo_of(tmp_path, [{"dataset": ids[number % 4]} for number in range(20)])
    assert set(levels(zoo)) == {"base"}
    assert set(levels(zoo)["base"]) == set(ids)
    assert variant_of("digits?rotation=45") is None


def test_numbers_of_many_values_are_cut_at_their_quintiles(tmp_path: Path) -> None:
    runs = [
        {"hyperparameters": {"rate": number / 7, "few": number % 3, "flag": number % 2 == 0}} for number in range(50)
    ]
    factors = {factor.name: factor for factor in run_table(zoo_of(tmp_path, runs)).factors}
    assert factors["rate"].levels == tuple(f"quintile {number}" for number in range(1, 6))
    assert np.bincount(factors["rate"].codes).tolist() == [10] * 5
    assert factors["few"].levels == ("0", "1", "2")
    assert set(factors["flag"].levels) == {"True", "False"}


def test_what_is_missing_is_left_out_and_said(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {
            "hyperparameters": {
                "a": number % 2,
                "b": number % 3,
                "name": f"run {number}",
                "list": [1],
                "nan": float("nan"),
            }
        }
        for number in range(40)
    ]
    del runs[5]["hyperparameters"]["a"]
    for run in runs[10:20]:
        del run["hyperparameters"]["b"]
    table = run_table(zoo_of(tmp_path, runs))
    assert [factor.name for factor in table.factors] == ["a"]
    assert len(table) == 39 and 5 not in table.rows
    assert table.notes == (
        "name is left out: it has 40 values in 40 runs.",
        "b is left out: 10 of 40 runs do not say it.",
        "1 of 40 runs are left out: they lack a factor.",
        "Without a share, being the same in all runs: architecture.",
    )


def test_architectures_without_a_family_go_by_their_header(tmp_path: Path) -> None:
    zoo = zoo_of(tmp_path, [{}] * 12, widths=(2, 3))
    assert set(run_table(zoo).architectures) == {header[:8] for header in zoo.index["header"]}


def test_of_very_many_hyperparameters_the_common_ones_are_kept(tmp_path: Path) -> None:
    runs = [{"hyperparameters": {f"h{key}": number % 2 for key in range(40)}} for number in range(20)]
    runs[3]["hyperparameters"] = {"rare": 1, **runs[3]["hyperparameters"]}
    names = levels(zoo_of(tmp_path, runs))
    assert len(names) == 32 and "rare" not in names


@pytest.mark.parametrize("value", [True, "gelu", 3, 0.5])
def test_scalars_are_levels(tmp_path: Path, value: Any) -> None:
    runs = [{"hyperparameters": {"x": value if number % 2 else "other"}} for number in range(12)]
    assert set(levels(zoo_of(tmp_path, runs))["x"]) == {str(value), "other"}
