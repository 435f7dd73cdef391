"""Writes ``docs/commands``: one page per command, from its own help. Run it after changing an option or a help text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from weightspace.cli.main import program

_FOLDER = Path(__file__).parent / "commands"
_WIDTH = 100


def pages() -> dict[str, str]:
    """Returns the text of each page by its file name."""
    found = dict(_commands(program, "weightspace"))
    lines = [f"- [`{path}`]({_file(path)}): {command.get_short_help_str(_WIDTH)}" for path, command in found.items()]
    head = "# Commands\n\nThese pages are generated from `--help` by `docs/command_pages.py`.\n\n"
    texts = {"README.md": head + "\n".join(lines) + "\n"}
    for path, command in found.items():
        sizes = {"terminal_width": _WIDTH, "max_content_width": _WIDTH}
        context = click.Context(command, info_name=path, **program.context_settings, **sizes)
        texts[_file(path)] = f"# {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    return texts


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _file(path: str) -> str:
    return f"{'-'.join(path.split()[1:])}.md"


def main() -> None:
    """Writes the pages and removes those of commands that are gone."""
    texts = pages()
    _FOLDER.mkdir(exist_ok=True)
    for file in _FOLDER.glob("*.md"):
        if file.name not in texts:
            file.unlink()
    for name, text in texts.items():
        (_FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(texts)} pages in {_FOLDER}", file=sys.stderr)


if __name__ == "__main__":
    main()
