"""What the README and the documentation show runs: their Python, and their commands on a folder of models."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

from weightspace.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The order in which a reader meets them: each page works on what the ones before have made.
COMMAND_PAGES = ("your-models", "hub", "sampling")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def snippets() -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in blocks(page, "python")]


def commands() -> list[str]:
    pages = [ROOT / "docs" / f"{name}.md" for name in COMMAND_PAGES]
    lines = [
        line for page in pages for block in blocks(page, "bash") for line in block.replace("\\\n", "").splitlines()
    ]
    return [line.removeprefix("weightspace ") for line in lines if line.startswith("weightspace ")]


@pytest.mark.parametrize("number", range(len(snippets())))
def test_snippets(
    number: int, tmp_path: Path, tiny_zoo: Any, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "demo" / "encoder")
    (tmp_path / "model.safetensors").write_bytes(tiny_zoo.blob(0))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    page, code = snippets()[number]
    exec(compile(code, f"{page}, snippet {number}", "exec"), names)
    if "restored" in names:
        tensors = names["checkpoint"].tensors()
        assert names["restored"].keys() == tensors.keys()
        assert all(names["restored"][name].equal(tensor) for name, tensor in tensors.items())
    else:
        size = len(names["table"]["embedding"][0]) if "table" in names else names["embedding"].shape[1]
        assert size > 7


def test_snippets_are_found() -> None:
    assert [page for page, _ in snippets()] == ["README.md", "concepts.md", "concepts.md"]


@pytest.mark.slow
def test_commands_run_one_after_another(
    tmp_path: Path,
    tiny_zoo: Any,
    tiny_encoder: Path,
    tiny_clip_joint: Path,
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from weightspace.zoo.transfer import export_folder

    card = "---\nlicense: apache-2.0\npipeline_tag: image-classification\n---\n"
    hub.create("microsoft/resnet-18", {"model.safetensors": tiny_zoo.blob(0), "README.md": card})
    export_folder(tiny_zoo, tmp_path / "models")
    for name, folder in {"zoo": tiny_zoo.path, "encoder": tiny_encoder, "joint": tiny_clip_joint}.items():
        shutil.copytree(folder, tmp_path / "demo" / name)
    first = next(path for path in sorted((tmp_path / "models").iterdir()) if path.is_dir())
    shutil.copytree(first, tmp_path / "demo" / "models" / "000000-run-000000-step-000100")
    monkeypatch.chdir(tmp_path)
    # One split is enough to see that a probe runs. Accelerate rebuilds a model's output under mixed precision in a way
    # that transformers allows and the type checks of the tests do not.
    quicker = {
        "probe": ["--seed", "0"],
        "train": ["--mixed-precision", "no"],
        "evaluate-samples": ["--datasets", "2", "-n", "2", "--epochs", "0"],
    }
    done = []
    for line in commands():
        line = re.sub(r"--steps \d+", "--steps 2", line).replace("--result 0.95", "--result 0..1")
        words = shlex.split(line)
        words += quicker.get(words[0], [])
        assert main(words) == 0, line
        done.append(words[0])
    wanted = "inspect zoo train embed probe inspect embed crawl push train sample evaluate-samples"
    assert done == wanted.split()
    assert (tmp_path / "embeddings.parquet").exists()
    assert hub.repository("your-name/encoder").private


def test_command_pages_are_those_of_the_help() -> None:
    spec = importlib.util.spec_from_file_location("command_pages", ROOT / "docs" / "command_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "commands").glob("*.md")}
    assert written == module.pages(), "run docs/command_pages.py"


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "commands").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if ".github/" not in target:  # pictures are no part of a source archive
            assert (page.parent / target).exists(), target
