"""``weightspace embed``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightspace.cli.options import Amount, hub_options, json_option, pickle_option
from weightspace.cli.output import print_json, print_list

if TYPE_CHECKING:
    from weightspace.io.hub import HubOptions


@click.command()
@click.argument("locations", nargs=-1, required=True)
@click.option("--encoder", required=True, help="Folder of a trained encoder, or org/name on the Hub.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
@click.option(
    "--max-bytes",
    type=Amount("B"),
    show_default="all of them",
    help="Read at most so many bytes of a model's weights, e.g. 64MB, and estimate the embedding.",
)
@click.option("--seed", type=int, default=0, help="Seed of the sample that --max-bytes draws.")
@pickle_option
@hub_options
@json_option
def embed(
    locations: tuple[str, ...],
    encoder: str,
    output: Path,
    max_bytes: int | None,
    seed: int,
    allow_pickle: bool,
    options: HubOptions,
    as_json: bool,
) -> None:
    """Embed the models of zoos, files or folders, or of the Hub.

    LOCATIONS are paths or org/name[@revision][:path].

    The file has one row a model: its id, what else is known of it, and its embedding.
    """
    from weightspace.encoder import embed as embed_locations
    from weightspace.encoder import save_embeddings

    frame = embed_locations(
        locations, encoder, max_bytes=max_bytes, seed=seed, options=options, allow_pickle=allow_pickle
    )
    save_embeddings(frame, output)
    size = len(frame["embedding"].iloc[0])
    sampled = frame[frame["share"] < 1]
    shares = {str(model): float(share) for model, share in zip(sampled["model_id"], sampled["share"], strict=True)}
    if as_json:
        print_json({"output": str(output), "models": len(frame), "size": size, "sampled": shares})
        return
    click.echo(f"{output}: {len(frame):,} embeddings of {size} numbers")
    if shares:
        print_list("estimated from a sample", [f"{model}: {share:.3%} of its bytes" for model, share in shares.items()])
