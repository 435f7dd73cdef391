"""What a user installs: a wheel with every module, template and command."""

from __future__ import annotations

import ast
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
from weightspace.errors import DISTRIBUTION, REPOSITORY, install_command

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


def test_the_distribution_has_one_name_and_one_address() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert PROJECT["urls"]["Repository"] == REPOSITORY
    assert install_command("search") == "pip install 'weightspace-hub[search]'"


# Imported by nobody here, and needed all the same.
NOT_IMPORTED = {"safetensors": "transformers saves with it", "tensorboard": "Accelerate's tracker", "peft": "an extra"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported: set[str] = set()
    for path in (ROOT / "weightspace").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "weightspace"}
    distributions = importlib.metadata.packages_distributions()
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
    declared = {name_of(line) for lines in (PROJECT["dependencies"], *extras.values()) for line in lines}
    used = {name: {name_of(it) for it in distributions.get(name, [name])} for name in imported}
    assert {name for name, names in used.items() if not names & declared} == set()
    (offline,) = (name_of(line) for line in extras["offline"])  # found by its folder
    assert declared - set().union(*used.values()) == {*NOT_IMPORTED, offline}


BARE = re.compile(
    r"""(?: (?: \b(?:install|uvx|(?:uv|poetry|pixi)\ add|pip\ download|pipx\ run)\b | --with | --from ) [^\n]*?
          | \bdependencies\s*=\s*\[ [^\]]*? )
        (?<![\w./:@-]) weightspace (?![\w./-])
      | (?<![\w./-]) weightspace\[ [a-z,\ ]+ \]""",
    re.VERBOSE,
)


def bare_names(text: str) -> list[str]:
    """Finds what would install the project that PyPI calls weightspace."""
    return [found[0] for found in BARE.finditer(text)]


def test_nothing_installs_the_other_project_called_weightspace() -> None:
    names = ("weightspace", "weightspace-hub")
    for line in (
        "pip install {}",
        "pip install -U torch '{}>=0.1'",
        "uv add {}",
        "uvx {} demo",
        "uv run --with {} x.py",
        '# dependencies = ["torch", "{}"]',
        'dependencies = [\n    "torch",\n    "{}>=1",\n]',
        "needs FAISS; pip install '{}[search]'",
        "take {}[ray]",
    ):
        assert [bool(bare_names(line.format(name))) for name in names] == [True, False], line
    assert bare_names(f"`weightspace` is installed by `{install_command()}`.") == []
    found = {}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        known = inside[0] in ("weightspace", "hub_scripts", "model_cards", "examples", "benchmarks", "docs", "tests")
        if (known or len(inside) == 1) and path.is_file() and path != Path(__file__):
            lines = bare_names(path.read_text(encoding="utf-8", errors="ignore"))
            found.update({path.relative_to(ROOT).as_posix(): lines} if lines else {})
    assert found == {}


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
    assert wheel.name.startswith("weightspace_hub-")
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.name == DISTRIBUTION
    assert distribution.version == weightspace.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    scripts = configparser.ConfigParser()
    scripts.read_string(distribution.read_text("entry_points.txt") or "")
    assert dict(scripts["console_scripts"]) == {
        "weightspace": "weightspace.cli.main:main",
        "hf-weightspace": "weightspace.cli.main:main",
    }
