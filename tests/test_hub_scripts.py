"""The scripts for jobs: what they do is what the commands do, from the Hub and back to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub

from weightspace.errors import DISTRIBUTION, REPOSITORY
from weightspace.io.writing import checkpoint_bytes
from weightspace.zoo.dataset import load_zoo

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "hub_scripts").glob("*.py"))
SETTINGS = """
encoder: {hidden_size: 16, layers: 1, heads: 2}
loop: {steps: 2, batch_size: 4, mixed_precision: 'no', checkpoint_every: 0, tracker: none}
"""


def run(script: str, *words: Any) -> str:
    """Runs a script in a process of its own, as a job would, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "hub_scripts" / script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_runner_learns_what_to_install(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "# /// script"
    head = "\n".join(line.removeprefix("#").strip() for line in lines[1 : lines.index("# ///", 1)])
    assert tomllib.loads(head) == {"requires-python": ">=3.11", "dependencies": [f"{DISTRIBUTION} @ git+{REPOSITORY}"]}


@pytest.mark.slow
def test_training_script_equals_the_command(tmp_path: Path, tiny_zoo: Any) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text(
        "encoder: {hidden_size: 16, layers: 1, heads: 2}\n"
        "loop: {steps: 2, batch_size: 4, mixed_precision: 'no', checkpoint_every: 0, tracker: none}\n"
    )
    words = ("--zoo", tiny_zoo.path, "--config", settings)
    printed = run("train_autoencoder.py", *words, "--output", tmp_path / "script")
    assert printed == f"encoder: {tmp_path / 'script'}\n"
    code = "import sys; from weightspace.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = ["train", "autoencoder", *map(str, words), "--output", str(tmp_path / "command")]
    subprocess.run([sys.executable, "-c", code, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    script, same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("script", "command"))
    assert script == same


@pytest.mark.slow
def test_training_script_names_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "hub_scripts/train_autoencoder.py", "--zoo", tmp_path / "no", "--output", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "no") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_jobs_from_the_hub_and_back_to_it(hub: LoopbackHub, tmp_path: Path) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        content = {"fc.weight": torch.randn(6, 5, generator=generator), "fc.bias": torch.randn(6, generator=generator)}
        card = "---\nlicense: mit\npipeline_tag: image-classification\n---\n"
        hub.create(f"org/model-{seed:02d}", {"model.safetensors": checkpoint_bytes(content), "README.md": card})
    run("crawl.py", "--author", "org", "--output", tmp_path / "zoo", "--push-to", "me/zoo", "--private")
    assert HfApi().dataset_info("me/zoo").private
    assert len(load_zoo("me/zoo")) == 12
    (tmp_path / "train.yaml").write_text(SETTINGS)
    words = ("--zoo", "me/zoo", "--config", tmp_path / "train.yaml", "--output", tmp_path / "encoder")
    run("train_autoencoder.py", *words, "--push-to", "me/encoder")
    assert not HfApi().model_info("me/encoder").private
    words = ("org/model-03", "--encoder", "me/encoder", "--output", tmp_path / "e.parquet")
    printed = run("embed.py", *words, "--json", "--push-to", "me/embeddings", "--private")
    assert json.loads(printed)["models"] == 1
    stored = HfApi().hf_hub_download("me/embeddings", "e.parquet", repo_type="dataset")
    assert pd.read_parquet(stored)["model_id"].tolist() == ["org/model-03"]


@pytest.mark.slow
def test_a_zoo_is_built_and_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(
        "{runs: 2, steps: [4], checkpoints: [1.0], architectures: [{family: mlp, hidden: [4]}]}"
    )
    run("build_zoo.py", "train", "--config", tmp_path / "zoo.yaml", "--output", tmp_path / "zoo")
    run("push.py", tmp_path / "zoo", "me/zoo", "--yes", "--license", "mit")
    assert len(load_zoo("me/zoo")) == 2
