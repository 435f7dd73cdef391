from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

from weightspace.cli.main import main
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.transfer import export_folder


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["search", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_by_dataset_and_result_from_a_zoo_and_from_its_index(
    tiny_zoo: Zoo, tiny_clip_joint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowest = float(tiny_zoo.index["test_accuracy"].median())
    question = ("--dataset", "digits", "--result", f">={lowest}", "-k", "3")
    made = answer(capsys, tiny_zoo.path, "--joint", tiny_clip_joint, *question, "--save-index", tmp_path / "index")
    assert made == answer(capsys, tmp_path / "index", *question)
    assert made["models"] == 48
    assert [one["rank"] for one in made["found"]] == [1, 2, 3]
    scores = [one["score"] for one in made["found"]]
    assert scores == sorted(scores, reverse=True)
    known = tiny_zoo.index.set_index("model_id")
    for one in made["found"]:
        assert one["dataset"] == known.loc[one["model_id"], "dataset"]
        assert one["results"]["test_accuracy"] == known.loc[one["model_id"], "test_accuracy"]
        assert one["ref"] is None


def test_a_table_for_people(tiny_zoo: Zoo, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_zoo.index["model_id"][0]
    assert main(["search", str(tiny_zoo.path), "--encoder", str(tiny_encoder), "--model", model, "-k", "2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "score", "model", "dataset", "test_accuracy", "test_loss", "generalization_gap"]
    assert [row.split()[0] for row in rows[:2]] == ["1", "2"]
    assert rows[2:] == ["the model itself, left out: 1", f"  {model}"]


def test_relatives_of_a_model_of_the_hub_in_a_zoo_of_the_hub(
    hub: LoopbackHub, tiny_zoo: Zoo, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.relative_to(tiny_zoo.path).as_posix(): path for path in tiny_zoo.path.rglob("*") if path.is_file()}
    sha = hub.create("org/zoo", files, repo_type="dataset")
    export_folder(tiny_zoo, tmp_path / "models", [7])
    (path,) = (tmp_path / "models").rglob("*.safetensors")
    hub.create("org/model", {"model.safetensors": path})
    found = answer(capsys, "org/zoo", "--encoder", tiny_encoder, "--model", "org/model", "-k", 4)
    assert found["itself"] == [tiny_zoo.index["model_id"][7]]
    assert {one["ref"] for one in found["found"]} == {f"org/zoo@{sha}"}
    runs = tiny_zoo.index.set_index("model_id")["run_id"]
    assert runs.iloc[7] not in [runs[one["model_id"]] for one in found["found"]]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--result", "good"], "'good' is no wanted result; write e.g."),
        ([], "nothing to search for"),
        (["--model", "nowhere", "--dataset", "digits"], "no common scale"),
        (["--dataset", "digits"], "knows weights only"),
        (["--model", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "x", "-k", "0"], "-k"),
    ],
)
def test_what_can_be_mended_is_one_line(
    words: list[str], named: str, tiny_zoo: Zoo, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(tiny_zoo.path), "--encoder", str(tiny_encoder), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    assert named in printed.err
