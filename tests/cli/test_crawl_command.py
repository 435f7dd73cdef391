from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from loopback_hub import LoopbackHub
from safetensors.torch import save

from weightspace.cli.main import main, program
from weightspace.zoo.dataset import load_zoo

CARD = "---\nlicense: {}\npipeline_tag: image-classification\nlibrary_name: timm\n---\n"


@pytest.fixture
def models(hub: LoopbackHub) -> LoopbackHub:
    for number, licence in enumerate(["mit", "mit", "apache-2.0", "gpl-3.0"]):
        weights = save({"w": torch.full((4,), float(number))})
        hub.create(
            f"org/m{number}", {"model.safetensors": weights, "README.md": CARD.format(licence)}, downloads=9 - number
        )
    hub.create("org/pickle", {"pytorch_model.bin": b"x", "README.md": CARD.format("mit")})
    return hub


def invoke(*words: str) -> tuple[str, str]:
    result = CliRunner().invoke(program, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_dry_run_fetches_and_writes_nothing(models: LoopbackHub, tmp_path: Path) -> None:
    words = ["crawl", "--output", str(tmp_path / "zoo"), "--license", "mit", "--license", "apache-2.0", "--dry-run"]
    out, _ = invoke(*words)
    assert "plan: 3 models of 3 repositories, 48 bytes\n" in out
    assert "licences: mit 2, apache-2.0 1" in out
    assert "tasks: image-classification 3" in out
    assert "not asked for: another licence 1" in out
    assert "cannot be fetched: 1\n  org/pickle: only 'pytorch_model.bin'" in out
    record = json.loads(invoke(*words, "--json")[0])
    assert record["repositories"] == ["org/m0", "org/m1", "org/m2"]
    assert record["licences"] == {"mit": 2, "apache-2.0": 1}
    assert not (tmp_path / "zoo").exists()
    assert not models.seen("resolve")


def test_the_plan_comes_first_and_the_zoo_last(models: LoopbackHub, tmp_path: Path) -> None:
    words = ["crawl", "--output", str(tmp_path / "zoo"), "--task", "image-classification", "--library", "timm"]
    words += ["--author", "org", "--max-params", "5K", "--limit", "10", "--no-adapters", "--jobs", "2"]
    out, err = invoke(*words)
    assert "plan: 4 models of 4 repositories" in err
    assert f"{tmp_path / 'zoo'}: 4 models\nleft out: 1\n  org/pickle: only 'pytorch_model.bin'" in out
    record = json.loads(invoke(*words, "--json")[0])
    assert (record["models"], len(record["skipped"])) == (4, 1)
    assert load_zoo(tmp_path / "zoo").settings["crawl"]["max_params"] == 5000


def test_shards_are_crawled_apart_and_joined(models: LoopbackHub, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        invoke("crawl", "--output", str(tmp_path / part[0]), "--shard", part, "--reference")
    out, _ = invoke("zoo", "join", str(tmp_path / "1"), str(tmp_path / "2"), "--output", str(tmp_path / "zoo"))
    assert f"{tmp_path / 'zoo'}: 4 models joined\nleft out: 1\n" in out
    record = json.loads(invoke("zoo", "info", str(tmp_path / "zoo"), "--json")[0])
    assert (record["models"], record["runs"]) == (4, 4)


@pytest.mark.parametrize(
    ("option", "value"), [("--shard", "3/2"), ("--shard", "0/2"), ("--limit", "0"), ("--sort", "x")]
)
def test_impossible_options(tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crawl", "--output", str(tmp_path / "zoo"), option, value]) == 2
    assert option in capsys.readouterr().err


def test_no_model_is_said(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.create("org/pickle", {"pytorch_model.bin": b"x"})
    assert main(["crawl", "--output", str(tmp_path / "zoo")]) == 2
    err = capsys.readouterr().err
    assert "there is no model to make a zoo of (org/pickle: only 'pytorch_model.bin'" in err
