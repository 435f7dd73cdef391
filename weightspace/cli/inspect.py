"""``weightspace inspect``."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import COUNT, Result, command
from weightspace.printing import listing, reasons, table

_MOST_LINES = 100
_NUMBER = re.compile(r"\d+")
_NUMBER_IN_NAME = re.compile(r"\.\d+(?=\.)")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightspace.inspection import AdapterFacts, Inspection, Survey
    from weightspace.io.hub import HubOptions
    from weightspace.schema import LayerSpec


@command("pickle", "hub")
@click.argument("location")
@click.option("--token-size", type=COUNT, help="Entries a token, for the token counts.")
@click.option("--values", is_flag=True, help="Also read all weights and count NaN and infinite values.")
def inspect(location: str, token_size: int | None, values: bool, allow_pickle: bool, options: HubOptions) -> Result:
    """Show what checkpoints are made of.

    Layers, shapes, dtypes, symmetries, token counts, and what would be left out of the tokens.

    LOCATION is a safetensors file, a tree of them, or org/name[@revision][:path] on the Hub. Only headers are read.
    """
    from weightspace.inspection import inspect_location

    sizes: dict[str, Any] = {} if token_size is None else {"token_size": token_size}
    survey = inspect_location(location, check_values=values, options=options, allow_pickle=allow_pickle, **sizes)
    record = {
        "models": [inspection.to_record() for inspection in survey.inspections],
        "unreadable": reasons(survey.unreadable),
    }
    if len(survey.inspections) == 1 and not survey.unreadable:
        return record, _one(survey.inspections[0])
    return record, _many(survey, location)


def _one(inspection: Inspection) -> list[str]:
    architecture = inspection.architecture
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in inspection.dtypes.items()) or "none"
    tokens = ", ".join(f"{count:,} {name}" for name, count in inspection.token_counts.items())
    order = "forward order" if architecture.ordered else "order of names, the forward order is not known"
    rows = _layer_rows(architecture.layers)
    groups = [
        f"{group.size} channels: "
        + ", ".join(
            f"{axis.tensor} axis {axis.axis}" + (f" in blocks of {axis.block}" if axis.block > 1 else "")
            for axis in group.axes
        )
        for group in architecture.groups
    ]
    left_out = [(f"{e.tensor} ({inspection.left_out[e.tensor]:,} entries)", e.reason) for e in architecture.exclusions]
    if len(left_out) > _MOST_LINES:
        left_out = _alike([(e.tensor, e.reason) for e in architecture.exclusions])
    lines = [
        inspection.location,
        f"parameters  {inspection.parameters:,} ({dtypes})",
        f"tokens      {tokens} (of {inspection.token_size} entries)",
        f"layers      {len(architecture.layers)} ({order})",
        *(table(("layer", "kind", "tensors", "parameters"), rows) if rows else ()),
        *listing("permutation groups", groups[:_MOST_LINES]),
        *([f"  ... and {len(groups) - _MOST_LINES:,} more"] if len(groups) > _MOST_LINES else ()),
        *listing("left out of the tokens", left_out),
        *listing("stored once, used twice", [f"{alias} is {kept}" for alias, kept in architecture.aliases]),
        *listing("notes", (*inspection.notes, *architecture.notes)),
    ]
    if inspection.adapter is not None:
        lines += _adapter(inspection.adapter)
    if inspection.quantization is not None:
        lines += listing("quantised", [inspection.quantization.reason])
    if inspection.not_finite is not None:
        counts = [(name, f"{count:,}") for name, count in inspection.not_finite.items()]
        lines += listing("NaN or infinite", counts)
    return lines


def _layer_rows(layers: Sequence[LayerSpec]) -> list[tuple[str, str, str, int]]:
    """One row a layer; for many, one for all that differ in the numbers in their names only."""
    rows: list[tuple[str, str, str, int]] = [
        (
            layer.name,
            layer.kind,
            "  ".join(
                f"{t.name.removeprefix(f'{layer.name}.') or t.name} {_shape(t.shape)} {t.dtype}" for t in layer.tensors
            ),
            layer.numel,
        )
        for layer in layers
    ]
    if len(rows) <= _MOST_LINES:
        return rows
    counts: Counter[tuple[str, str, str]] = Counter()
    totals: Counter[tuple[str, str, str]] = Counter()
    for name, kind, tensors, numel in rows:
        alike = (_NUMBER.sub("*", name), kind, _NUMBER_IN_NAME.sub(".*", tensors))
        counts[alike] += 1
        totals[alike] += numel
    return [
        (f"{name} ({counts[name, kind, tensors]:,})", kind, tensors, total)
        for (name, kind, tensors), total in totals.items()
    ]


def _alike(left_out: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    counts = Counter((_NUMBER.sub("*", name), reason) for name, reason in left_out)
    return [(f"{name} ({count:,} tensors)", reason) for (name, reason), count in counts.items()]


def _adapter(adapter: AdapterFacts) -> list[str]:
    ranks, scalings = (", ".join(f"{value:g}" for value in values) for values in (adapter.ranks, adapter.scalings))
    return [
        f"LoRA adapter of {adapter.base_model or 'no base model named'}",
        f"{adapter.modules} modules, rank {ranks or 'none'}, scaling {scalings or 'unknown'}",
        f"named as by {', '.join(adapter.namings) or 'no trainer known'}",
        *(["untrained: no module has an update"] if adapter.untrained else ()),
        *(listing("trained whole", adapter.saved) if adapter.saved else ()),
        *listing("problems", adapter.problems),
        *(listing("notes on the adapter", adapter.notes) if adapter.notes else ()),
    ]


def _many(survey: Survey, folder: str) -> list[str]:
    lines: list[str] = []
    if survey.inspections:
        names = list(dict.fromkeys(name for one in survey.inspections for name in one.token_counts))
        rows = [(_within(folder, one.location), *_counts(one, names)) for one in survey.inspections]
        rows.append((f"{len(rows)} checkpoints", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
        head = ("file", "layers", "parameters", *(f"{name} tokens" for name in names), "groups", "left out")
        lines += table((*head, "not finite")[: len(rows[0])], rows, indent="")
    return lines + listing("unreadable", [(_within(folder, file), reason) for file, reason in survey.unreadable])


def _counts(inspection: Inspection, tokenizers: list[str]) -> list[int]:
    architecture = inspection.architecture
    counts = [
        len(architecture.layers),
        inspection.parameters,
        *(inspection.token_counts.get(name, 0) for name in tokenizers),
    ]
    bad = [] if inspection.not_finite is None else [sum(inspection.not_finite.values())]
    return [*counts, len(architecture.groups), len(architecture.exclusions), *bad]


def _within(folder: str, file: str) -> str:
    return file.removeprefix(folder).lstrip("/\\")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
