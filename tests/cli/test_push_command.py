"""``weightspace push``: what it shows, asks and prints; what it does is tested with publishing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from loopback_hub import LoopbackHub

from weightspace.cards.record import read_record, render_card
from weightspace.cli.main import main, program
from weightspace.zoo.dataset import Zoo


def invoke(*words: str | Path) -> str:
    result = CliRunner().invoke(program, ["push", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_push_shows_the_plan_and_the_address(hub: LoopbackHub, tiny_encoder: Path) -> None:
    out = invoke(tiny_encoder, "org/encoder", "--yes", "--license", "mit")
    assert "encoder to a new public model repository org/encoder" in out
    assert "files: 6, " in out and "  model.safetensors  " in out
    sha = hub.repository("org/encoder").at("main").sha
    assert f"published: {hub.url}/org/encoder/commit/{sha}\n" in out
    again = invoke(tiny_encoder, "org/encoder", "--license", "mit")
    assert "encoder to the public model repository org/encoder" in again
    assert again.endswith("the repository holds all of it already; nothing was changed\n")


def test_json_names_everything(hub: LoopbackHub, tiny_zoo: Zoo) -> None:
    record = json.loads(invoke(tiny_zoo.path, "org/zoo", "--private", "--json"))
    assert (record["repository"], record["type"], record["kind"]) == ("org/zoo", "dataset", "zoo")
    assert record["private"] and record["new"] and record["changed"] and record["pull_request"] is None
    assert {"path": "zoo.json", "bytes": (tiny_zoo.path / "zoo.json").stat().st_size} in record["files"]
    assert record["left_out"] == [{"file": "ledger.jsonl", "reason": "only needed to go on writing"}]
    assert record["commit"] == hub.repository("org/zoo", "dataset").at("main").sha
    assert any("--license" in notice for notice in record["notices"])
    info = CliRunner().invoke(program, ["zoo", "info", "org/zoo", "--json"], catch_exceptions=False)
    assert json.loads(info.stdout)["zoo"] == f"org/zoo@{record['commit']}"


def test_a_pull_request_is_printed(hub: LoopbackHub, tiny_encoder: Path) -> None:
    invoke(tiny_encoder, "org/encoder", "--private")
    out = invoke(tiny_encoder, "org/encoder", "--create-pr", "--license", "mit")
    assert out.endswith(f"published: {hub.url}/org/encoder/discussions/1\n") and "by a pull request" in out


def test_a_dry_run_sends_nothing(hub: LoopbackHub, tiny_encoder: Path) -> None:
    out = invoke(tiny_encoder, "org/encoder", "--dry-run", "--revision", "next")
    assert "repository org/encoder, branch next" in out and out.endswith("nothing was sent\n")
    record = json.loads(invoke(tiny_encoder, "org/encoder", "--dry-run", "--json"))
    assert record["commit"] is None and not record["changed"] and record["files"]
    assert not hub.repositories and not hub.seen(method="POST")


def test_a_public_repository_is_asked_for(
    hub: LoopbackHub, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tiny_encoder), "org/encoder"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: org/encoder would be a new public repository") and "--yes or --private" in error
    assert not hub.repositories
    monkeypatch.setattr("weightspace.cli.push.sys", Terminal())
    for answer, made in (("n\n", False), ("y\n", True)):
        result = CliRunner().invoke(program, ["push", str(tiny_encoder), "org/encoder"], input=answer)
        assert result.exit_code == 0 and ("org/encoder" in {name for _, name in hub.repositories}) is made
        assert "Make the public repository org/encoder?" in result.stderr


class Terminal:
    """A standard input that somebody sits at."""

    class stdin:
        @staticmethod
        def isatty() -> bool:
            return True


def test_the_card_can_be_kept(hub: LoopbackHub, tiny_encoder: Path, tmp_path: Path) -> None:
    invoke(tiny_encoder, "org/encoder", "--dry-run", "--save-card", tmp_path / "cards" / "encoder.md")
    card = (tmp_path / "cards" / "encoder.md").read_text()
    (tmp_path / "cards" / "encoder.json").rename(tmp_path / "card.json")
    record = read_record(tmp_path)
    assert record is not None and render_card(record.facts) == card and '"org/encoder"' in card


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["{none}", "org/x"], "no such folder"),
        (["{encoder}", "x"], "write org/name"),
        (["{encoder}", "org/x", "--create-pr", "--revision", "next"], "revision next"),
    ],
)
def test_what_can_be_mended_is_one_line(
    words: list[str], named: str, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"none": tmp_path / "none", "encoder": tiny_encoder}
    assert main(["push", *(word.format(**names) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and named in printed.err
