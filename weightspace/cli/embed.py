"""``weightspace embed``."""

from __future__ import annotations

from pathlib import Path

import click

from weightspace.cli.options import json_option
from weightspace.cli.output import print_json


@click.command()
@click.argument("locations", nargs=-1, required=True)
@click.option("--encoder", required=True, help="Folder of a trained encoder.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
@json_option
def embed(locations: tuple[str, ...], encoder: str, output: Path, as_json: bool) -> None:
    """Embed the models of zoos, files or folders.

    The file has one row a model: its id, what else is known of it, and its embedding.
    """
    from weightspace.index import embed as embed_locations
    from weightspace.index import save_embeddings

    frame = embed_locations(locations, encoder)
    save_embeddings(frame, output)
    size = len(frame["embedding"].iloc[0])
    if as_json:
        print_json({"output": str(output), "models": len(frame), "size": size})
    else:
        click.echo(f"{output}: {len(frame):,} embeddings of {size} numbers")
