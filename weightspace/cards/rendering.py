"""Facts into Markdown: templates, and other people's texts in them."""

from __future__ import annotations

import html
import json
import math
import re
from importlib import resources
from typing import Any

from huggingface_hub import CardData, RepoCard

from weightspace.errors import install_command

_MARKDOWN = re.compile(r"([\\`*_\[\]|#~$])")


def render_template(name: str, metadata: CardData, **values: Any) -> str:
    """Fills the template ``templates/{name}.md``; which may use ``text``, ``code``, ``count`` and ``install``."""
    template = resources.files("weightspace.cards").joinpath("templates", f"{name}.md").read_text(encoding="utf-8")
    functions = {"text": text, "code": code, "count": count, "install": install_command()}
    card = RepoCard.from_template(metadata, template_str=template, **functions, **values)
    return str(card).rstrip() + "\n"


def text(value: object) -> str:
    """Makes one line of Markdown that shows the value as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def code(value: object) -> str:
    """Makes JSON (which Python reads as well where it is a text) that cannot end the code block it stands in."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str).replace("`", "\\u0060")


def count(number: int, noun: str) -> str:
    """Writes a number of things, e.g. ``"1 model"`` or ``"3,600 models"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def decimals(value: float | None) -> str:
    """Writes a measured number for a table."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def thousands(value: float) -> str:
    """Writes a number that may be large: whole ones in full, all others with three digits that count."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
