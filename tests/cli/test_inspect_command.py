from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from weightspace.cli.main import program
from weightspace.io.writing import save_checkpoint


def invoke(*words: str) -> str:
    result = CliRunner().invoke(program, ["inspect", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def network() -> dict[str, torch.Tensor]:
    return {
        "fc1.weight": torch.ones(4, 3),
        "fc1.bias": torch.ones(4),
        "fc2.weight": torch.full((2, 4), torch.nan),
        "fc2.bias": torch.ones(2),
        "steps": torch.tensor(7),
    }


def test_one_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(network(), tmp_path / "model.safetensors")
    out = invoke(str(tmp_path))
    for text in (
        "parameters  26 (26 F32)",
        "6 channel, 2 dense (of 64 entries)",
        "fc1    linear  weight 4x3 F32  bias 4 F32",
        "permutation groups: 1\n  4 channels: fc1.weight axis 0, fc1.bias axis 0, fc2.weight axis 1",
        "left out of the tokens: 1\n  steps (1 entries): integers (I64)",
    ):
        assert text in out
    assert "NaN" not in out
    assert "NaN or infinite: 1\n  fc2.weight: 8" in invoke(str(tmp_path), "--values")
    assert "8 channel, 7 dense (of 4 entries)" in invoke(str(tmp_path), "--token-size", "4")


def test_a_tree_is_one_line_a_file_with_totals(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_checkpoint(network(), tmp_path / name / "model.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no checkpoint")
    lines = [line.split() for line in invoke(str(tmp_path), "--values").splitlines()]
    assert lines[0][-2:] == ["not", "finite"]
    assert lines[1] == ["a/model.safetensors", "2", "26", "6", "2", "1", "1", "8"]
    assert lines[3] == ["2", "checkpoints", "4", "52", "12", "4", "2", "2", "16"]
    assert lines[4] == ["unreadable:", "1"]
    assert lines[5][0] == "c.safetensors:"


def test_json(tmp_path: Path) -> None:
    save_checkpoint(network(), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    found = json.loads(invoke(str(tmp_path), "--json"))
    (model,), (unreadable,) = found["models"], found["unreadable"]
    assert model["parameters"] == 26
    assert model["left_out"] == [{"tensor": "steps", "reason": model["left_out"][0]["reason"], "entries": 1}]
    assert unreadable["file"] == str(tmp_path / "b.safetensors")
    assert unreadable["reason"]
