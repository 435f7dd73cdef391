"""``weightspace train``: one command a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from weightspace.cli.options import config_option, json_option, pickle_option, settings_from
from weightspace.cli.output import print_json

zoo_option = click.option(
    "--zoo", type=click.Path(path_type=Path), required=True, help="Zoo: a folder, or org/name of the Hub."
)

_LOOP_OPTIONS = (
    config_option,
    click.option("--steps", type=int, show_default="from the settings", help="Optimizer steps."),
    click.option("--seed", type=int, show_default="from the settings", help="Seed of weights, views and order."),
    click.option(
        "--mixed-precision", type=click.Choice(["auto", "no", "bf16", "fp16"]), show_default="from the settings"
    ),
)


def loop_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that every training has."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_LOOP_OPTIONS), command)


@click.group()
def train() -> None:
    """Train models of weights."""


@train.command()
@zoo_option
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the encoder.")
@loop_options
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
@zoo_option
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the joint model.")
@click.option("--encoder", type=click.Path(path_type=Path), help="Trained weight autoencoder to start from.")
@click.option(
    "--image-encoder",
    show_default="from the settings",
    help="What datasets are seen with: efficientnet-lite0 (needs no Hub), a folder or org/name of the Hub.",
)
@pickle_option
@loop_options
@json_option
def joint(
    zoo: Path,
    output: Path,
    encoder: Path | None,
    image_encoder: str | None,
    allow_pickle: bool,
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
    settings = settings_from(JointSettings, config, overrides)
    model = train_joint(zoo, output, settings, encoder, allow_pickle=allow_pickle)
    if as_json:
        print_json({"joint": str(model)})
    else:
        click.echo(f"joint model: {model}")


@train.command()
@zoo_option
@click.option("--autoencoder", required=True, help="Autoencoder whose latents are sampled: a folder, or org/name.")
@click.option("--joint", required=True, help="Joint model of datasets and results: a folder, or org/name.")
@click.option("--codes", is_flag=True, help="Model the codes of an autoencoder that has code_levels.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the prior.")
@pickle_option
@loop_options
@json_option
def prior(
    zoo: Path,
    autoencoder: str,
    joint: str,
    codes: bool,
    output: Path,
    allow_pickle: bool,
    config: Path | None,
    steps: int | None,
    seed: int | None,
    mixed_precision: str | None,
    as_json: bool,
) -> None:
    """Train a prior that samples weights given datasets and results.

    After an interruption, the same command goes on.
    """
    from weightspace.encoder import saved_folder
    from weightspace.training.prior import CodePriorSettings, PriorSettings, train_prior

    overrides = {"loop.steps": steps, "loop.seed": seed, "loop.mixed_precision": mixed_precision}
    settings = settings_from(CodePriorSettings if codes else PriorSettings, config, overrides)
    folders = {kind: saved_folder(at, kind=kind)[0] for kind, at in (("autoencoder", autoencoder), ("joint", joint))}
    model = train_prior(zoo, output, settings, **folders, allow_pickle=allow_pickle)
    if as_json:
        print_json({"prior": str(model)})
    else:
        click.echo(f"prior: {model}")
