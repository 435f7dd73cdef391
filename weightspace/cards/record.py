"""A card and the facts it was rendered from, side by side in a folder, and what people wrote into the card.

``card.json`` holds the facts, so that the card can be rendered again for another place. Of a card that is there
already, the text between two markers is kept; a card that was changed anywhere else is a person's own and stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from weightspace.cards.facts import EncoderFacts, Facts, ModelsFacts, ZooFacts
from weightspace.cards.rendering import render
from weightspace.errors import WeightspaceError
from weightspace.files import atomic_write_text, json_ready
from weightspace.settings import settings_from_mapping

CARD, RECORD = "README.md", "card.json"
BEGIN = "<!-- notes: what stands between these two lines stays when the card is rendered again -->"
END = "<!-- end of notes -->"

_EMPTY = f"{BEGIN}\n{END}"
_NOTES = re.compile(f"{re.escape(BEGIN)}\n(.*?)\n?{re.escape(END)}", re.DOTALL)
_KINDS = {cls.kind: cls for cls in (EncoderFacts, ZooFacts, ModelsFacts)}
_LARGEST = 16 * 2**20
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardRecord:
    """What ``card.json`` holds.

    Attributes:
        facts: what the card says.
        rendered: sha256 of the card as it was rendered, without notes.
        weights: sha256 of the weights that the facts were measured on, or None.
    """

    facts: Facts
    rendered: str
    weights: str | None = None

    def to_json(self) -> str:
        """Writes the file's content."""
        values = {"kind": self.facts.kind, "weights": self.weights, "rendered": self.rendered}
        return json.dumps({**values, "facts": json_ready(asdict(self.facts))}, indent=1, ensure_ascii=False) + "\n"


def render_card(facts: Facts, notes: str = "") -> str:
    """Renders the card of facts, with notes that people wrote."""
    return render(facts).replace(_EMPTY, f"{BEGIN}\n{notes.strip()}\n{END}" if notes.strip() else _EMPTY)


def notes_of(card: str) -> str:
    """Returns what people wrote between the markers of a card."""
    found = _NOTES.search(card)
    return found[1].strip() if found else ""


def card_digest(card: str) -> str:
    """Returns the sha256 of a card without its notes."""
    return hashlib.sha256(_NOTES.sub(_EMPTY, card).strip().encode()).hexdigest()


def is_edited(card: str, record: str | None) -> bool:
    """Whether a card differs outside of its notes from what was rendered.

    Args:
        card: content of ``README.md``.
        record: content of ``card.json`` beside it; without one, the card is taken for a person's own.
    """
    if record is None or len(record) > _LARGEST:
        return True
    try:
        values = json.loads(record)
    except (ValueError, RecursionError):
        return True
    return not isinstance(values, dict) or values.get("rendered") != card_digest(card)


def read_record(folder: Path) -> CardRecord | None:
    """Reads ``card.json``; None if there is none.

    Raises:
        WeightspaceError: the file is not what this library writes.
    """
    content = read_text(folder / RECORD)
    return None if content is None else parse_record(content, where=str(folder / RECORD))


def parse_record(content: str, *, where: str) -> CardRecord:
    """Reads the content of ``card.json``.

    Raises:
        WeightspaceError: it is not what this library writes.
    """
    try:
        if len(content) > _LARGEST:
            raise ValueError(f"{len(content)} characters")
        values = json.loads(content)
        facts = settings_from_mapping(_KINDS[values["kind"]], values["facts"], where="facts")
        weights = values.get("weights")
        return CardRecord(facts, str(values["rendered"]), None if weights is None else str(weights))
    except (ValueError, KeyError, TypeError, RecursionError, WeightspaceError) as error:
        raise WeightspaceError(
            f"{where}: not the facts of a card ({' '.join(str(error).split())}); delete it and write the card again"
        ) from error


def known_facts(folder: Path) -> Facts | None:
    """Returns the recorded facts of a folder, without measurements of other weights than those that lie there."""
    record = read_record(folder)
    if record is None:
        return None
    facts = record.facts
    if isinstance(facts, EncoderFacts) and facts.measurements and record.weights != weights_digest(folder):
        _LOG.warning("%s: the weights have changed since they were measured; the card leaves the numbers out", folder)
        return replace(facts, measurements=())
    return facts


def write_card(folder: str | Path, facts: Facts) -> Path:
    """Writes ``README.md`` and ``card.json`` for what lies in a folder, each whole or not at all.

    Notes in a card that is there already are kept. A card that was changed outside of them is left as it is, with a
    warning.

    Args:
        folder: where the encoder, zoo or models were saved; created if need be.
        facts: what to say. Texts in it are escaped.

    Returns:
        Path of the card.

    Raises:
        WeightspaceError: the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / CARD
    present = read_text(path)
    rendered = render_card(facts, notes_of(present or ""))
    if present is not None and is_edited(present, read_text(folder / RECORD)):
        _LOG.warning("%s: changed by hand, left as it is; delete it to have it written from the recorded facts", path)
    else:
        _write(path, rendered)
    record = CardRecord(facts, card_digest(rendered), weights_digest(folder))
    _write(folder / RECORD, record.to_json())
    return path


def weights_digest(folder: Path) -> str | None:
    """Returns the sha256 over the names and contents of the safetensors files of a folder; None without any."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def read_text(path: Path) -> str | None:
    """Reads a text file; None if there is none.

    Raises:
        WeightspaceError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        raise WeightspaceError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _write(path: Path, content: str) -> None:
    try:
        atomic_write_text(path, content)
    except OSError as error:
        raise WeightspaceError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from error
