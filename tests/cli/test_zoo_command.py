from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from weightspace.cli.main import main, program
from weightspace.io.writing import save_checkpoint
from weightspace.zoo.dataset import Zoo, load_zoo


def invoke(*words: str) -> str:
    result = CliRunner().invoke(program, ["zoo", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(3):
        file = f"{i}.safetensors"
        save_checkpoint({"fc.weight": torch.full((3, 2), float(i))}, tmp_path / "in" / file) if i else None
        rows.append({"file": file, "run": "r", "dataset": "digits", "test_accuracy": i / 2})
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def _input_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()


def test_import_info_export(folder: Path, tmp_path: Path) -> None:
    out = invoke("import", str(folder), "--output", str(tmp_path / "zoo"))
    assert "2 models imported" in out
    assert "left out: 1\n  0.safetensors: " in out
    again = json.loads(invoke("import", str(folder), "--output", str(tmp_path / "zoo"), "--json"))
    assert (again["models"], again["skipped"][0]["file"]) == (2, "0.safetensors")

    info = json.loads(invoke("info", str(tmp_path / "zoo"), "--json"))
    assert (info["models"], info["runs"], info["datasets"]) == (2, 1, {"digits": 2})
    assert info["architectures"][0]["parameters"] == 6
    assert info["results"] == {"test_accuracy": {"models": 2, "lowest": 0.5, "mean": 0.75, "highest": 1.0}}
    text = invoke("info", str(tmp_path / "zoo"))
    assert "2 models of 1 runs" in text
    assert "test_accuracy" in text

    exported = json.loads(invoke("export", str(tmp_path / "zoo"), "--output", str(tmp_path / "out"), "--json"))
    assert exported["models"] == len(list((tmp_path / "out").rglob("*.safetensors"))) == 2
    assert "2 models" in invoke("export", str(tmp_path / "zoo"), "--output", str(tmp_path / "out2"))


def test_strict_import_refuses_the_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "import", str(folder), "--output", str(tmp_path / "zoo"), "--strict"]) == 2
    assert "0.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_info_of_no_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "info", str(tmp_path)]) == 2
    assert "no zoo" in capsys.readouterr().err


def test_train_options_override_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("import", str(folder), "--output", str(tmp_path / "zoo"))
    called: list[Any] = []

    def train_zoo(settings: Any, output: Path) -> Zoo:
        called.append((settings.runs, settings.seed, output))
        return load_zoo(tmp_path / "zoo")

    monkeypatch.setattr("weightspace.zoo.training.train_zoo", train_zoo)
    (tmp_path / "zoo.yaml").write_text("runs: 40\nseed: 5\n")
    words = ("--config", str(tmp_path / "zoo.yaml"), "--runs", "30", "--output", str(tmp_path / "new"))
    assert json.loads(invoke("train", *words, "--json"))["models"] == 2
    assert called == [(30, 5, tmp_path / "new")]


def test_train_refuses_unknown_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zoo.yaml").write_text("rums: 40\n")
    assert main(["zoo", "train", "--config", str(tmp_path / "zoo.yaml"), "--output", str(tmp_path / "z")]) == 2
    assert "'rums'; did you mean 'runs'" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
