"""``weightspace inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import hub_options, json_option, pickle_option
from weightspace.cli.output import print_json, print_list, print_table, printable

if TYPE_CHECKING:
    from weightspace.inspection import AdapterFacts, Inspection, Survey
    from weightspace.io.hub import HubOptions


@click.command()
@click.argument("location")
@click.option("--token-size", type=click.IntRange(min=1), help="Entries a token, for the token counts.")
@click.option("--values", is_flag=True, help="Also read all weights and count NaN and infinite values.")
@pickle_option
@hub_options
@json_option
def inspect(
    location: str,
    token_size: int | None,
    values: bool,
    allow_pickle: bool,
    options: HubOptions,
    as_json: bool,
) -> None:
    """Show what checkpoints are made of.

    Layers, shapes, dtypes, symmetries, token counts, and what would be left out of the tokens.

    LOCATION is a safetensors file, a tree of them, or org/name[@revision][:path] on the Hub. Only headers are read.
    """
    from weightspace.inspection import inspect_location

    sizes: dict[str, Any] = {} if token_size is None else {"token_size": token_size}
    survey = inspect_location(location, check_values=values, options=options, allow_pickle=allow_pickle, **sizes)
    if as_json:
        print_json(
            {
                "models": [inspection.to_record() for inspection in survey.inspections],
                "unreadable": [{"file": file, "reason": reason} for file, reason in survey.unreadable],
            }
        )
    elif len(survey.inspections) == 1 and not survey.unreadable:
        _print_one(survey.inspections[0])
    else:
        _print_many(survey, location)


def _print_one(inspection: Inspection) -> None:
    architecture = inspection.architecture
    click.echo(printable(inspection.location))
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in inspection.dtypes.items()) or "none"
    tokens = ", ".join(f"{count:,} {name}" for name, count in inspection.token_counts.items())
    order = "forward order" if architecture.ordered else "order of names, the forward order is not known"
    click.echo(f"parameters  {inspection.parameters:,} ({dtypes})")
    click.echo(f"tokens      {tokens} (of {inspection.token_size} entries)")
    click.echo(f"layers      {len(architecture.layers)} ({order})")
    rows = [
        (
            layer.name,
            layer.kind,
            "  ".join(f"{_leaf(t.name, layer.name)} {_shape(t.shape)} {t.dtype}" for t in layer.tensors),
            layer.numel,
        )
        for layer in architecture.layers
    ]
    if rows:
        print_table(("layer", "kind", "tensors", "parameters"), rows, indent="  ")
    print_list(
        "permutation groups",
        [
            f"{group.size} channels: "
            + ", ".join(
                f"{axis.tensor} axis {axis.axis}" + (f" in blocks of {axis.block}" if axis.block > 1 else "")
                for axis in group.axes
            )
            for group in architecture.groups
        ],
    )
    print_list(
        "left out of the tokens",
        [f"{e.tensor} ({inspection.left_out[e.tensor]:,} entries): {e.reason}" for e in architecture.exclusions],
    )
    print_list("stored once, used twice", [f"{alias} is {kept}" for alias, kept in architecture.aliases])
    print_list("notes", architecture.notes)
    if inspection.adapter is not None:
        _print_adapter(inspection.adapter)
    if inspection.quantization is not None:
        print_list("quantised", [inspection.quantization.reason])
    if inspection.not_finite is not None:
        print_list("NaN or infinite", [f"{name}: {count:,}" for name, count in inspection.not_finite.items()])


def _print_adapter(adapter: AdapterFacts) -> None:
    ranks, scalings = (", ".join(f"{value:g}" for value in values) for values in (adapter.ranks, adapter.scalings))
    named = printable(adapter.base_model or "no base model named")
    click.echo(f"LoRA adapter of {named}")
    click.echo(f"{adapter.modules} modules, rank {ranks or 'none'}, scaling {scalings or 'none'}")
    click.echo(f"named as by {', '.join(adapter.namings) or 'no trainer known'}")
    if adapter.untrained:
        click.echo("untrained: no module has an update")
    if adapter.saved:
        print_list("trained whole", adapter.saved)
    print_list("problems", adapter.problems)
    if adapter.notes:
        print_list("notes on the adapter", adapter.notes)


def _print_many(survey: Survey, folder: str) -> None:
    names = list(survey.inspections[0].token_counts) if survey.inspections else []
    rows = [(_within(folder, inspection.location), _counts(inspection, names)) for inspection in survey.inspections]
    if rows:
        rows.append((f"{len(rows)} checkpoints", [sum(column) for column in zip(*(c for _, c in rows), strict=True)]))
        head = (
            "file",
            "layers",
            "parameters",
            *(f"{name} tokens" for name in names),
            "groups",
            "left out",
            "not finite",
        )
        print_table(head[: 1 + len(rows[0][1])], [(name, *counts) for name, counts in rows])
    print_list("unreadable", [f"{_within(folder, file)}: {reason}" for file, reason in survey.unreadable])


def _counts(inspection: Inspection, tokenizers: list[str]) -> list[int]:
    architecture = inspection.architecture
    counts = [len(architecture.layers), inspection.parameters, *(inspection.token_counts[name] for name in tokenizers)]
    bad = [] if inspection.not_finite is None else [sum(inspection.not_finite.values())]
    return [*counts, len(architecture.groups), len(architecture.exclusions), *bad]


def _within(folder: str, file: str) -> str:
    return file.removeprefix(folder).lstrip("/\\")


def _leaf(tensor: str, layer: str) -> str:
    return tensor.removeprefix(f"{layer}.") or tensor


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
