"""Which token windows of a model to read when reading all of it costs too much."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from weightspace.errors import SettingsError
from weightspace.io.header import byte_count
from weightspace.schema import Architecture
from weightspace.tokenizers.base import WeightTokenizer

STRATA = 256
"""Most runs of windows that are drawn: each is a request or two, and more of them would not make an estimate better."""

_SHRINK = 0.97


@dataclass(frozen=True)
class WindowSample:
    """Runs of token windows that stand for a whole model.

    Attributes:
        runs: first token and token after the last; each starts at a multiple of the window, ascending, disjoint.
        read_bytes: stored bytes of the entries in them.
        total_bytes: stored bytes of all entries that become tokens.
    """

    runs: tuple[tuple[int, int], ...]
    read_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        """Share of the model's bytes that is read."""
        return self.read_bytes / self.total_bytes if self.total_bytes else 1.0


def sample_windows(
    tokenizer: WeightTokenizer, architecture: Architecture, *, window: int, max_bytes: int, seed: int = 0
) -> WindowSample:
    """Draws a stratified sample of the windows that an encoder cuts a model's tokens into.

    The sequence of windows is cut into at most ``STRATA`` parts of equal length, and one run of consecutive windows is
    drawn in each, uniformly over its places. So every depth of the network is in the sample in proportion to its
    tokens, and means over the sample estimate means over the model without bias.

    Args:
        tokenizer: of the encoder.
        architecture: of the model.
        window: tokens a window.
        max_bytes: most stored bytes to read; a model that is smaller is taken whole.
        seed: draws the runs; the same seed gives the same sample.

    Raises:
        SettingsError: not even one window fits into ``max_bytes``.
    """
    tokens = tokenizer.token_count(architecture)
    sizes = {spec.name: byte_count(spec, spec.name) / spec.numel for spec in architecture.tensors}
    total = sum(byte_count(spec, spec.name) for spec in architecture.tensors)
    if total <= max_bytes:
        return WindowSample(((0, tokens),) if tokens else (), total, total)
    windows = math.ceil(tokens / window)
    affordable = float(min(windows, max_bytes / (total / windows)))
    while affordable >= 1:
        runs = _runs(windows, int(affordable), seed)
        chosen = tuple((window * start, min(tokens, window * stop)) for start, stop in runs)
        counts = tokenizer.window_entries(architecture, chosen)
        size = round(sum(sizes[name] * count for name, count in counts.items()))
        if size <= max_bytes:
            return WindowSample(chosen, size, total)
        affordable *= min(_SHRINK, max_bytes / size)  # these windows hold more than the average
    raise SettingsError(
        f"max_bytes: {max_bytes} bytes hold no window of {window} tokens; allow at least {2 * total // windows}"
    )


def _runs(windows: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Draws about ``count`` of ``windows`` windows as runs of equal length, one in each stratum."""
    strata = min(count, STRATA)
    length = count // strata
    places = torch.rand(strata, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    runs = []
    for stratum, place in enumerate(places):
        first, last = stratum * windows // strata, (stratum + 1) * windows // strata
        own = min(length, last - first)
        start = first + int(place * (last - first - own + 1))
        runs.append((start, start + own))
    return runs
