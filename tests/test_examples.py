"""Every example and script does what its first lines say, with small settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / script), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here() -> None:
    source = Path(__file__).read_text()
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert f'"examples/{path.name}"' in source, path.name


@pytest.mark.slow
def test_train_and_probe(tmp_path: Path) -> None:
    printed = run("examples/train_and_probe.py", "--output", tmp_path, "--runs", "24", "--steps", "3")
    assert "48 models of 2 headers" in printed
    assert "test_accuracy: 48 models" in printed
    assert "autoencoder" in printed
    assert (tmp_path / "encoder" / "model.safetensors").exists()


@pytest.mark.slow
def test_your_own_models(tmp_path: Path) -> None:
    printed = run("examples/your_own_models.py", "--output", tmp_path, "--models", "12", "--steps", "3")
    assert "6 normalised networks of 146 parameters" in printed
    assert "left out: 1.num_batches_tracked, integers (I64), not floating point" in printed
    assert "12 models imported, 0 left out" in printed
    assert "nearest" in printed


def test_tokens_and_symmetry() -> None:
    printed = run("examples/tokens_and_symmetry.py")
    assert "6 channels move together on 0.weight axis 0, 0.bias axis 0, 4.weight axis 1" in printed
    assert "restored bit for bit" in printed
    assert float(printed.split()[-1]) > 0.99


@pytest.mark.slow
def test_benchmarks_compare_equal_things(tmp_path: Path) -> None:
    printed = run("benchmarks/speed.py", "--quick", "--json", tmp_path / "speed.json")
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["machine"] in printed
    assert {result["goal"] for result in record["results"]} == {25, 50, 5, 20, 2.5, 0.25, None}
    assert all(result["ratio"] > 0 for result in record["results"])


@pytest.mark.slow
def test_ablations_of_the_joint_model(tmp_path: Path, tiny_zoo: Any, tiny_encoder: Path) -> None:
    (tmp_path / "zoo").symlink_to(tiny_zoo.path)
    (tmp_path / "encoder").symlink_to(tiny_encoder)
    words = ["--demo", tmp_path, "--output", tmp_path / "joint.json", "--steps", "2", "--seeds", "0"]
    words += ["--variants", "no-last-layer", "frozen"]
    printed = run("benchmarks/joint.py", *words)
    measured = json.loads((tmp_path / "joint.json").read_text())["measured"]
    assert set(measured) == {"baselines/0", "no-last-layer/0", "frozen/0"}
    assert {"probes", "D → W", "W → D", "R → W, 10", "R → W, 1"} == set(measured["no-last-layer/0"])
    assert "| without the last layer | 0 |" in printed
    before = (tmp_path / "joint.json").stat().st_mtime_ns
    assert run("benchmarks/joint.py", *words) == printed
    assert (tmp_path / "joint.json").stat().st_mtime_ns == before
