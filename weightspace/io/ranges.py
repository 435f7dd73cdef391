"""Which byte ranges to ask a server for, and where fetched ones are kept. Nothing here touches the network."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from weightspace.files import atomic_file

Range = tuple[int, int]
"""First byte and byte after the last."""

MAX_GAP = 256 * 2**10
"""Widest gap that is read along with its neighbours: about what a connection carries in one round trip."""

MAX_SPAN = 16 * 2**20
"""Most bytes of one request, so that large tensors arrive over several connections and a retry costs little."""

WASTE = 0.05
"""Largest share of unwanted bytes, in terms of the wanted ones."""

_NAME = re.compile(r"(\d{1,19})-(\d{1,19})")


def union(ranges: Iterable[Range]) -> list[Range]:
    """Merges ranges that overlap or touch; ascending, empty ranges left out."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if stop <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(ranges: Iterable[Range], present: Sequence[Range]) -> list[Range]:
    """Returns what ``ranges`` hold beyond ``present``; both are what `union` returns."""
    missing: list[Range] = []
    for start, stop in ranges:
        for held_start, held_stop in present:
            if held_stop <= start:
                continue
            if held_start >= stop:
                break
            if held_start > start:
                missing.append((start, held_start))
            start = max(start, held_stop)
        if start < stop:
            missing.append((start, stop))
    return missing


def spans(ranges: Iterable[Range]) -> list[Range]:
    """Plans the requests that read ``ranges``.

    Neighbours are joined across the narrowest gaps first, for as long as the gaps add up to at most ``WASTE`` of the
    wanted bytes; long stretches are cut into requests of at most ``MAX_SPAN``.
    """
    merged = union(ranges)
    allowed = WASTE * sum(stop - start for start, stop in merged)
    gaps = sorted((after[0] - before[1], place) for place, (before, after) in enumerate(itertools.pairwise(merged)))
    joined: set[int] = set()
    for gap, place in gaps:
        allowed -= gap
        if gap > MAX_GAP or allowed < 0:
            break
        joined.add(place)
    stretches: list[Range] = []
    for place, (start, stop) in enumerate(merged):
        stretches.append((stretches.pop()[0] if place - 1 in joined else start, stop))
    return [(first, min(first + MAX_SPAN, stop)) for start, stop in stretches for first in range(start, stop, MAX_SPAN)]


class SpanStore:
    """Fetched spans of one file, each in a file of its own that is named ``start-stop``.

    A span is complete under its name or not there at all, so that any number of processes can read and add spans.
    """

    def __init__(self, folder: Path, size: int) -> None:
        """Opens the spans of a file of ``size`` bytes that lie in ``folder``, which need not exist."""
        self._folder = folder
        self._spans = sorted(_spans_in(folder, size))

    def held(self) -> list[Range]:
        """Returns what is there, as `union` does."""
        return union(self._spans)

    def add(self, start: int, content: bytes | bytearray | memoryview) -> None:
        """Keeps a span. A full disk or a folder that cannot be written only means that it is fetched again."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._folder / f"{start}-{start + len(content)}") as partial:
                partial.write_bytes(content)
            insort(self._spans, (start, start + len(content)))

    def read_into(self, target: memoryview, start: int) -> None:
        """Fills ``target`` with bytes ``start`` on, which must be held.

        Raises:
            OSError: a span has gone in the meantime.
        """
        filled = 0
        while filled < len(target):
            at = start + filled
            first, stop = self._span_at(at)
            with (self._folder / f"{first}-{stop}").open("rb") as file:
                file.seek(at - first)
                part = target[filled : filled + stop - at]
                if file.readinto(part) != len(part):
                    raise OSError(f"{file.name}: shorter than its name says")
            filled += len(part)

    def forget(self) -> None:
        """Takes all spans for lost; those that are fetched again replace them."""
        self._spans = []

    def discard(self) -> None:
        """Deletes all spans: what they hold is wrong."""
        for first, stop in self._spans:
            (self._folder / f"{first}-{stop}").unlink(missing_ok=True)
        self.forget()

    def _span_at(self, byte: int) -> Range:
        place = bisect_right(self._spans, byte, key=lambda span: span[0])
        for span in reversed(self._spans[:place]):
            if span[1] > byte:
                return span
        raise OSError(f"{self._folder}: byte {byte} is not there")


def _spans_in(folder: Path, size: int) -> Iterator[Range]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None:
            start, stop = int(match[1]), int(match[2])
            # A span that a failing disk cut short is as good as none.
            if start < stop <= size and path.stat().st_size == stop - start:
                yield start, stop
