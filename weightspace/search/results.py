"""Wanted results: from a text such as ``">=0.9"`` to statements that the tower of results embeds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from weightspace.errors import SettingsError

UNNAMED = "test_accuracy"
"""The result that is meant where none is named."""

_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_WANTED = re.compile(
    rf"(?P<name>[A-Za-z_]\w*)?\s*(?:(?P<sign>[<>]=?)\s*(?P<bound>{_NUMBER})"
    rf"|=?\s*(?P<low>{_NUMBER})(?:\s*\.\.\s*(?P<high>{_NUMBER}))?)",
    re.ASCII,
)
_LONGEST = 1000
_EXAMPLES = 'write e.g. ">=0.9", "0.8..0.9" or "test_accuracy>=0.9,test_loss<0.3"'


@dataclass(frozen=True)
class WantedResult:
    """A result and the values that are wanted, bounds included.

    Attributes:
        name: of the result.
        low: least value; minus infinity for no bound.
        high: largest value; infinity for no bound.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf


def parse_results(text: str) -> tuple[WantedResult, ...]:
    """Reads a wish of one or more results, separated by commas; all of them are to be met.

    A result is ``name`` followed by ``>=x``, ``>x``, ``<=x``, ``<x``, ``=x`` or ``=x..y``; without a name it is the
    test accuracy, and ``=`` may be left out then. Results are continuous, so ``>`` and ``>=`` are the same.

    Raises:
        SettingsError: the text says something else, wants a result twice, or values that cannot be.
    """
    if len(text) > _LONGEST:
        raise SettingsError(f"result: {len(text):,} characters are too many; {_EXAMPLES}")
    wanted = tuple(_parsed(part.strip(), text) for part in text.split(","))
    names = [one.name for one in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"result {text!a}: wants {twice} twice; write a range, e.g. {twice}=0.8..0.9")
    return wanted


def _parsed(part: str, text: str) -> WantedResult:
    match = _WANTED.fullmatch(part)
    named_value = match is not None and match["name"] and match["low"] and "=" not in part
    if match is None or named_value:
        raise SettingsError(f"result {text!a}: {part!a} is no wanted result; {_EXAMPLES}")
    name = match["name"] or UNNAMED
    if match["sign"]:
        bound = float(match["bound"])
        wanted = WantedResult(name, low=bound) if match["sign"][0] == ">" else WantedResult(name, high=bound)
    else:
        low = float(match["low"])
        wanted = WantedResult(name, low, float(match["high"]) if match["high"] else low)
    numbers = [float(number) for number in (match["bound"], match["low"], match["high"]) if number]
    if not all(map(math.isfinite, numbers)):
        raise SettingsError(f"result {text!a}: {part!a} is too large a number; {_EXAMPLES}")
    if wanted.low > wanted.high:
        raise SettingsError(f"result {text!a}: {part!a} is an empty range; write the smaller number first")
    return wanted


def values_of(
    wanted: WantedResult, names: Sequence[str], edges: Float[np.ndarray, "results edges"]
) -> Float[np.ndarray, "values"]:
    """Replaces a range by values in it, each as likely as the others among the models that the edges were fitted on.

    The edges are quantiles, so that equal steps along the bins hold equally many models: a range becomes the middles of
    as many equal steps as it covers bins, one at least, cut off at the first and the last edge.

    Args:
        wanted: the range.
        names: of the results that there are edges for.
        edges: ascending edges of the bins of each result.

    Raises:
        SettingsError: there are no edges for the result, or no model had such values.
    """
    if wanted.name not in names:
        raise SettingsError(f"result {wanted.name!a}: the joint model knows {', '.join(names)}; choose from these")
    own = edges[list(names).index(wanted.name)].astype(np.float64)
    if wanted.low > own[-1] or wanted.high < own[0]:
        raise SettingsError(
            f"result {wanted.name}: wanted from {wanted.low:g} to {wanted.high:g}, but the joint model knows models "
            f"with {own[0]:.4g} to {own[-1]:.4g} only; ask for a part of that"
        )
    low, high = _place(wanted.low, own, "left"), _place(wanted.high, own, "right")
    steps = max(1, math.ceil(round(high - low, 6)))
    middles = low + (np.arange(steps) + 0.5) * (high - low) / steps
    return np.interp(middles, np.arange(len(own)), own)


def _place(value: float, edges: Float[np.ndarray, "edges"], side: Literal["left", "right"]) -> float:
    """Where a value stands among the edges, 0 to the number of bins; on equal edges the first or the last of them."""
    after = int(np.searchsorted(edges, value, side=side))
    if after == 0 or after == len(edges):
        return float(min(after, len(edges) - 1))
    return float(after - 1 + (value - edges[after - 1]) / (edges[after] - edges[after - 1]))
