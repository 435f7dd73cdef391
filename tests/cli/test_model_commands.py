"""``train``, ``embed``, ``probe`` and ``demo``: what they call and print; the work is tested where it is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from weightspace.cli.main import main, program
from weightspace.io.hub import HubOptions


def invoke(*words: str) -> str:
    result = CliRunner().invoke(program, words, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_train_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def train_autoencoder(zoo: Path, output: Path, settings: Any) -> Path:
        loop = settings.loop
        called.append((zoo, output, loop.steps, loop.seed, loop.mixed_precision))
        return output / "encoder"

    monkeypatch.setattr("weightspace.training.autoencoder.train_autoencoder", train_autoencoder)
    (tmp_path / "train.yaml").write_text("loop: {steps: 40, seed: 5}\n")
    words = ("train", "autoencoder", "--zoo", "z", "--output", "e", "--config", str(tmp_path / "train.yaml"))
    assert invoke(*words, "--steps", "30", "--mixed-precision", "bf16") == f"encoder: {Path('e/encoder')}\n"
    assert json.loads(invoke(*words, "--json")) == {"encoder": str(Path("e/encoder"))}
    assert called[0] == (Path("z"), Path("e"), 30, 5, "bf16")
    assert called[1][2:4] == (40, 5)


def test_train_joint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def train_joint(zoo: Path, output: Path, settings: Any, encoder: Path | None, *, allow_pickle: bool) -> Path:
        assert not allow_pickle
        loop = settings.loop
        called.append((zoo, output, encoder, settings.image_encoder, loop.steps, loop.seed, loop.mixed_precision))
        return output / "joint"

    monkeypatch.setattr("weightspace.training.joint.train_joint", train_joint)
    (tmp_path / "train.yaml").write_text("image_encoder: org/one\nloop: {steps: 40, seed: 5}\n")
    words = ("train", "joint", "--zoo", "z", "--output", "j", "--config", str(tmp_path / "train.yaml"))
    assert invoke(*words) == f"joint model: {Path('j/joint')}\n"
    assert json.loads(invoke(*words, "--json")) == {"joint": str(Path("j/joint"))}
    given = (
        "--encoder",
        "e",
        "--image-encoder",
        "org/two",
        "--steps",
        "30",
        "--seed",
        "6",
        "--mixed-precision",
        "bf16",
    )
    invoke(*words, *given)
    assert called[0] == (Path("z"), Path("j"), None, "org/one", 40, 5, "auto")
    assert called[2] == (Path("z"), Path("j"), Path("e"), "org/two", 30, 6, "bf16")


def test_train_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[Any] = []
    kinds: list[str] = []

    consents: list[bool] = []

    def train_prior(
        zoo: Path, output: Path, settings: Any, *, autoencoder: Path, joint: Path, allow_pickle: bool
    ) -> Path:
        called.append((zoo, output, autoencoder, joint, settings.drop, settings.loop.steps, settings.loop.seed))
        consents.append(allow_pickle)
        kinds.append(type(settings).__name__)
        return output

    monkeypatch.setattr("weightspace.training.prior.train_prior", train_prior)
    for name in ("a", "j"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "train.yaml").write_text("drop: 0.25\nloop: {steps: 40, seed: 5}\n")
    inputs = ("--autoencoder", str(tmp_path / "a"), "--joint", str(tmp_path / "j"))
    words = ("train", "prior", "--zoo", "z", "--output", "p", "--config", str(tmp_path / "train.yaml"))
    assert invoke(*words, *inputs) == "prior: p\n"
    assert json.loads(invoke(*words, *inputs, "--seed", "6", "--json")) == {"prior": "p"}
    assert called[0] == (Path("z"), Path("p"), tmp_path / "a", tmp_path / "j", 0.25, 40, 5)
    assert called[1][5:] == (40, 6)
    invoke(*words, *inputs, "--codes", "--allow-pickle")
    assert consents == [False, False, True]
    assert kinds == ["PriorSettings", "PriorSettings", "CodePriorSettings"]
    assert main([*words, "--autoencoder", str(tmp_path / "a"), "--joint", str(tmp_path / "no")]) == 2
    assert f"{tmp_path / 'no'}: no joint (there is no config.json)" in capsys.readouterr().err


def test_train_autoencoder_refuses_unknown_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.yaml").write_text("loop: {step: 40}\n")
    words = ["train", "autoencoder", "--zoo", "z", "--output", "e", "--config", str(tmp_path / "train.yaml")]
    assert main(words) == 2
    assert "'step'; did you mean 'steps'" in capsys.readouterr().err


def test_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"model_id": ["a", "b"], "share": [1.0, 0.25], "embedding": [[0.0] * 3, [1.0] * 3]})
    called: list[Any] = []
    written: list[Any] = []

    def embed(locations: Sequence[str], encoder: str, **options: Any) -> pd.DataFrame:
        called.append((list(locations), encoder, options))
        return frame

    monkeypatch.setattr("weightspace.encoder.embed", embed)
    monkeypatch.setattr("weightspace.encoder.save_embeddings", lambda *arguments: written.append(arguments))
    words = ("embed", "zoo", "file.safetensors", "--encoder", "enc", "--output", "e.parquet")
    assert invoke(*words) == ("e.parquet: 2 embeddings of 3 numbers\nread in part: 1\n  b: 25.000% of it\n")
    limits = ("--max-bytes", "1.5MB", "--seed", "3", "--token", "secret", "--local-files-only", "--allow-pickle")
    record = json.loads(invoke(*words, *limits, "--json"))
    assert record == {"output": "e.parquet", "models": 2, "size": 3, "sampled": {"b": 0.25}, "left_out": []}
    locations, encoder, options = called[1]
    assert (locations, encoder) == (["zoo", "file.safetensors"], "enc")
    assert options.pop("options") == HubOptions(token="secret", local_files_only=True)
    assert options == {"max_bytes": 1_500_000, "seed": 3, "allow_pickle": True}
    assert written[0][0] is frame
    assert written[0][1] == Path("e.parquet")


def test_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def probe_zoo(
        zoo: Path, encoders: Sequence[str], targets: Sequence[str], seeds: Sequence[int], unseen_datasets: bool
    ) -> list[Any]:
        called.append((zoo, encoders, targets, seeds, unseen_datasets))
        return []

    monkeypatch.setattr("weightspace.probes.zoo.probe_zoo", probe_zoo)
    assert json.loads(invoke("probe", "z", "--json")) == []
    words = ("--encoder", "e", "--encoder", "j", "--target", "step", "--target", "classes", "--seed", "7")
    invoke("probe", "z", *words, "--unseen-datasets", "--json")
    assert called[0] == (Path("z"), (), ("test_accuracy",), (0, 1, 2), False)
    assert called[1] == (Path("z"), ("e", "j"), ("step", "classes"), (7,), True)


def test_demo_ends_with_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.demo.run_demo", lambda output, settings: output / "report.html")
    assert invoke("demo", "--output", "d") == f"report: {Path('d/report.html')}\n"
    assert json.loads(invoke("demo", "--json")) == {"report": str(Path("demo/report.html"))}
