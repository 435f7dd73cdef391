"""Measures the size of the package: ``python benchmarks/size.py [ROOT]`` prints one row for CONTRIBUTING.

Public names are classes, functions and methods without a leading underscore. The import time is the median of five new
processes that import ``weightspace.cli.main``, on this machine.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LONG_FILE, LONG_FUNCTION, IMPORTS = 400, 60, 5


def definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The classes and functions of a module, and the methods of its classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body)


def import_seconds(root: Path) -> float:
    """Seconds that a new process takes to import the command line."""
    seconds = []
    for _ in range(IMPORTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import weightspace.cli.main"], cwd=root, check=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(root: Path) -> None:
    sources = [path.read_text() for path in sorted((root / "weightspace").rglob("*.py"))]
    lengths = [len(source.splitlines()) for source in sources]
    found = [node for source in sources for node in definitions(ast.parse(source).body)]
    functions = [node.end_lineno - node.lineno + 1 for node in found if isinstance(node, ast.FunctionDef)]
    print("| files | lines | longest file | files > 400 | longest function | functions > 60 | public names | import |")
    print("|---|---|---|---|---|---|---|---|")
    cells: list[object] = [len(sources), f"{sum(lengths):,}", max(lengths), sum(n > LONG_FILE for n in lengths)]
    cells += [max(functions), sum(n > LONG_FUNCTION for n in functions)]
    cells += [sum(not node.name.startswith("_") for node in found), f"{import_seconds(root):.2f} s"]
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
