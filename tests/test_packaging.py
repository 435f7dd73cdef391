"""What a user installs: a wheel with every module, template and command."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import weightspace

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "weightspace").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9a-z.]+", line) for line in lines)
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {name_of(line) for line in needed} <= {name_of(line) for line in lines}


@pytest.mark.slow
def test_the_wheel_installs_and_is_whole(tmp_path: Path) -> None:
    # Built from a copy: a build leaves files in the folder it builds from.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "weightspace", source / "weightspace", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")

    files = {path.relative_to(source).as_posix() for path in (source / "weightspace").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("weightspace/")}
    assert packed == files
    assert any("/templates/" in name for name in packed)

    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    code = "import weightspace; print(weightspace.__file__); from weightspace.cli.main import main; main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(installed) in done.stdout
    assert weightspace.__version__ in done.stdout
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.version == weightspace.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    scripts = configparser.ConfigParser()
    scripts.read_string(distribution.read_text("entry_points.txt") or "")
    assert dict(scripts["console_scripts"]) == {
        "weightspace": "weightspace.cli.main:main",
        "hf-weightspace": "weightspace.cli.main:main",
    }
