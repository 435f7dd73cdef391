"""Which models of a zoo may be published again: the one place that decides it.

This is a cautious rule, not legal advice. A copy is published of models that are the publisher's own, and of models
whose licence is in the list below: licences that let everyone pass on unchanged copies without asking or accepting
terms first. Left out are models from elsewhere without a known licence, licences called ``other`` or ``unknown``,
licences against derivatives (a zoo changes the form of what it holds), and community licences that ask whoever passes a
copy on to add an agreement, a notice or a name (``llama3``, ``gemma``, ...).
"""

from __future__ import annotations

import re

from weightspace.io.locations import is_repo_id

_REDISTRIBUTABLE = re.compile(
    r"""
      apache-2\.0 | mit | isc | zlib | ncsa | unlicense | wtfpl | postgresql | ms-pl | bsl-1\.0 | ecl-2\.0
    | bsd(-[23]-clause(-clear)?)? | afl-3\.0 | artistic-2\.0 | osl-3\.0
    | (a|l)?gpl(-[23](\.[01])?)? | mpl-2\.0 | epl-[12]\.0 | eupl-1\.[12] | cecill-[bc]? | ofl-1\.1
    | cc0-1\.0 | cc-by(-nc)?(-sa)?-[234]\.[05] | pddl | odc-by | odbl | c-uda | openmdw-1\.0
    | cdla-permissive-[12]\.0 | cdla-sharing-1\.0 | etalab-2\.0
    | openrail(\+\+)? | (bigscience|creativeml|bigcode)-openrail-m | bigscience-bloom-rail-1\.0
    """,
    re.VERBOSE,
)


def is_own(location: str, licence: str | None) -> bool:
    """Whether a model counts as the publisher's own: it came from no repository, and no licence of others is known."""
    return licence is None and not is_repo_id(location)


def obstacle(location: str, licence: str | None) -> str | None:
    """Says why a model cannot be published again, or returns None if it can.

    Args:
        location: repository or path that the weights came from.
        licence: id of their licence as the Hub writes it, or None if unknown.
    """
    if is_own(location, licence):
        return None
    if licence is None:
        return "no licence known"
    if _REDISTRIBUTABLE.fullmatch(licence.strip().lower()):
        return None
    return f"licence {licence!r} is not known to let everyone pass on copies"
