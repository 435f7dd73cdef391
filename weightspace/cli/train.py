"""``weightspace train``: one command a model."""

from __future__ import annotations

from pathlib import Path

import click

from weightspace.cli.options import config_option, json_option, settings_from
from weightspace.cli.output import print_json


@click.group()
def train() -> None:
    """Train models of weights."""


@train.command()
@click.option("--zoo", type=click.Path(path_type=Path), required=True, help="Zoo: a folder, or org/name of the Hub.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the encoder.")
@config_option
@click.option("--steps", type=int, show_default="from the settings", help="Optimizer steps.")
@click.option("--seed", type=int, show_default="from the settings", help="Seed of weights, views and order.")
@click.option("--mixed-precision", type=click.Choice(["auto", "no", "bf16", "fp16"]), show_default="from the settings")
@json_option
def autoencoder(
    zoo: Path,
    output: Path,
    config: Path | None,
    steps: int | None,
    seed: int | None,
    mixed_precision: str | None,
    as_json: bool,
) -> None:
    """Train a weight autoencoder.

    After an interruption, the same command goes on.
    """
    from weightspace.training.autoencoder import AutoencoderSettings, train_autoencoder

    overrides = {"loop.steps": steps, "loop.seed": seed, "loop.mixed_precision": mixed_precision}
    encoder = train_autoencoder(zoo, output, settings_from(AutoencoderSettings, config, overrides))
    if as_json:
        print_json({"encoder": str(encoder)})
    else:
        click.echo(f"encoder: {encoder}")


@train.command()
@click.option("--zoo", type=click.Path(path_type=Path), required=True, help="Zoo: a folder, or org/name of the Hub.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the joint model.")
@click.option("--encoder", type=click.Path(path_type=Path), help="Trained weight autoencoder to start from.")
@click.option(
    "--image-encoder",
    show_default="from the settings",
    help="What datasets are seen with: efficientnet-lite0 (needs no Hub), a folder or org/name of the Hub.",
)
@config_option
@click.option("--steps", type=int, show_default="from the settings", help="Optimizer steps.")
@click.option("--seed", type=int, show_default="from the settings", help="Seed of weights, views and order.")
@click.option("--mixed-precision", type=click.Choice(["auto", "no", "bf16", "fp16"]), show_default="from the settings")
@json_option
def joint(
    zoo: Path,
    output: Path,
    encoder: Path | None,
    image_encoder: str | None,
    config: Path | None,
    steps: int | None,
    seed: int | None,
    mixed_precision: str | None,
    as_json: bool,
) -> None:
    """Train a joint model of datasets, weights and results.

    After an interruption, the same command goes on.
    """
    from weightspace.training.joint import JointSettings, train_joint

    overrides = {
        "image_encoder": image_encoder,
        "loop.steps": steps,
        "loop.seed": seed,
        "loop.mixed_precision": mixed_precision,
    }
    model = train_joint(zoo, output, settings_from(JointSettings, config, overrides), encoder)
    if as_json:
        print_json({"joint": str(model)})
    else:
        click.echo(f"joint model: {model}")
