"""The main job on crawled zoos: crawl, train an autoencoder, embed, probe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from loopback_hub import LoopbackHub

from weightspace.cli.main import program
from weightspace.zoo.dataset import Zoo, load_zoo

REAL = os.environ.get("WEIGHTSPACE_DATA")

TRAINING = """
encoder: {hidden_size: 32, layers: 1, heads: 2, window: 16, token_size: 64}
behaviour: {weight: 0.5, images: 4}
loop: {steps: 12, batch_size: 8, mixed_precision: "no", tracker: none, log_every: 4, validate_every: 6}
"""


def invoke(*words: str | Path) -> Any:
    result = CliRunner().invoke(program, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def train_and_embed(zoo: Path, folder: Path) -> str:
    """Runs the commands that people use; returns the encoder's folder."""
    (folder / "train.yaml").write_text(TRAINING)
    words = ("--zoo", zoo, "--output", folder / "run", "--config", folder / "train.yaml")
    encoder: str = invoke("train", "autoencoder", *words)["encoder"]
    embedded = invoke("embed", zoo, "--encoder", encoder, "--output", folder / "e.parquet")
    frame = pd.read_parquet(folder / "e.parquet")
    assert len(frame) == embedded["models"] == len(load_zoo(zoo))
    assert np.isfinite(np.stack(frame["embedding"].to_list())).all()
    return encoder


def check_probe(zoo: Path, encoder: str, target: str) -> None:
    rows = invoke("probe", zoo, "--encoder", encoder, "--target", target, "--seed", "0")
    assert {row["representation"] for row in rows} >= {"autoencoder", "s(W)"}


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
def test_crawled_small_models(hub: LoopbackHub, tmp_path: Path, tiny_zoo: Zoo, reference: bool) -> None:
    files: dict[str, dict[str, Any]] = {}
    for row, entry in enumerate(tiny_zoo.entries()):
        place = f"step-{entry.results['step']:.0f}/"
        record = {"step": 1, "eval_accuracy": entry.results["test_accuracy"]}
        own = files.setdefault(entry.run_id, {"README.md": f"---\ndatasets: [{entry.dataset}]\nlicense: mit\n---\n"})
        own[f"{place}model.safetensors"] = tiny_zoo.blob(row)
        own[f"{place}config.json"] = json.dumps(entry.config)
        own[f"{place}trainer_state.json"] = json.dumps({"global_step": 1, "log_history": [record]})
    for run_id, own in files.items():
        hub.create(f"org/run-{run_id}", own)
    zoo = tmp_path / "zoo"
    summary = invoke("crawl", "--output", zoo, *(["--reference"] if reference else []))
    assert (summary["models"], summary["skipped"]) == (len(tiny_zoo), [])
    assert load_zoo(zoo).families.count(None) == 0
    check_probe(zoo, train_and_embed(zoo, tmp_path), "test_accuracy")


def real_repositories(folder: Path, hub: LoopbackHub) -> None:
    """Every real checkpoint as it would stand on the Hub."""
    for source in ("rl_agents", "small_models"):
        for line in (folder / source / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            name = Path(row["file"]).stem.replace("__", ".")[-60:].strip("._-")
            facts: dict[str, Any] = {"license": row["licence"].lower(), "tags": [source]}
            facts |= {"datasets": [row["dataset"]]} if row.get("dataset") else {}
            values = {"accuracy": row.get("test_accuracy"), "reward": row.get("benchmark_mean_reward")}
            metrics = [{"type": kind, "value": value} for kind, value in values.items() if value is not None]
            if metrics:
                result = {
                    "dataset": {"type": row.get("environment") or row["dataset"], "split": "test"},
                    "metrics": metrics,
                }
                facts["model-index"] = [{"name": name, "results": [result]}]
            card = f"---\n{json.dumps(facts)}\n---\n"
            weights = folder / source / row["file"]
            hub.create(f"{source}/{name}", {"README.md": card, "model.safetensors": weights})
    for path in sorted((folder / "lora").iterdir()):
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
            hub.create(f"lora/{path.name.replace('__', '.')[:90]}", {**files, "README.md": "---\ntags: [lora]\n---\n"})


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="WEIGHTSPACE_DATA names no folder of real checkpoints")
def test_crawled_real_models(hub: LoopbackHub, tmp_path: Path) -> None:
    real_repositories(Path(str(REAL)), hub)
    zoo = tmp_path / "zoo"
    summary = invoke("crawl", "--output", zoo)
    for skip in summary["skipped"]:
        assert "the same tensors as" in skip["reason"] or "pickles" in skip["reason"], skip
    index = load_zoo(zoo).index
    assert index["model_id"].str.startswith("lora/").sum() >= 10
    assert index["reward"].notna().sum() > 80
    assert (index["accuracy"].notna().sum(), index["test_accuracy"].notna().sum()) == (4, 4 + 3)  # 3 in trainer states
    adapters = invoke("crawl", "--output", tmp_path / "adapters", "--adapters")
    entries = list(load_zoo(tmp_path / "adapters").entries())
    assert adapters["models"] == len(entries) == index["model_id"].str.startswith("lora/").sum()
    assert all(entry.hyperparameters["adapter_rank"] >= 1 for entry in entries)
    encoder = train_and_embed(zoo, tmp_path)
    check_probe(zoo, encoder, "reward")
