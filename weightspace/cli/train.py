"""``weightspace train``, one command a model, and ``weightspace demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightspace.cli.options import PATH, Result, command, output_option, settings_from

zoo_option = click.option("--zoo", type=PATH, required=True, help="Zoo: a folder, or org/name of the Hub.")


@click.group()
def train() -> None:
    """Train models of weights."""


@command("training", group=train)
@zoo_option
@output_option("Folder of the encoder.")
def autoencoder(zoo: Path, output: Path, config: Path | None, **overrides: Any) -> Result:
    """Train a weight autoencoder.

    After an interruption, the same command goes on.
    """
    from weightspace.training.autoencoder import AutoencoderSettings, train_autoencoder

    encoder = train_autoencoder(zoo, output, settings_from(AutoencoderSettings, config, overrides))
    return {"encoder": str(encoder)}, [f"encoder: {encoder}"]


@command("pickle", "training", group=train)
@zoo_option
@output_option("Folder of the joint model.")
@click.option("--encoder", type=PATH, help="Trained weight autoencoder to start from.")
@click.option(
    "--image-encoder",
    show_default="from the settings",
    help="What datasets are seen with: efficientnet-lite0 (needs no Hub), a folder or org/name of the Hub.",
)
def joint(
    zoo: Path, output: Path, encoder: Path | None, config: Path | None, allow_pickle: bool, **overrides: Any
) -> Result:
    """Train a joint model of datasets, weights and results.

    After an interruption, the same command goes on.
    """
    from weightspace.training.joint import JointSettings, train_joint

    settings = settings_from(JointSettings, config, overrides)
    model = train_joint(zoo, output, settings, encoder, allow_pickle=allow_pickle)
    return {"joint": str(model)}, [f"joint model: {model}"]


@command("pickle", "training", group=train)
@zoo_option
@click.option("--autoencoder", required=True, help="Autoencoder whose latents are sampled: a folder, or org/name.")
@click.option("--joint", required=True, help="Joint model of datasets and results: a folder, or org/name.")
@click.option("--codes", is_flag=True, help="Model the codes of an autoencoder that has code_levels.")
@output_option("Folder of the prior.")
def prior(
    zoo: Path,
    autoencoder: str,
    joint: str,
    codes: bool,
    output: Path,
    config: Path | None,
    allow_pickle: bool,
    **overrides: Any,
) -> Result:
    """Train a prior that samples weights given datasets and results.

    After an interruption, the same command goes on.
    """
    from weightspace.encoder import saved_folder
    from weightspace.training.prior import CodePriorSettings, PriorSettings, train_prior

    settings = settings_from(CodePriorSettings if codes else PriorSettings, config, overrides)
    folders = {kind: saved_folder(at, kind=kind)[0] for kind, at in (("autoencoder", autoencoder), ("joint", joint))}
    model = train_prior(zoo, output, settings, **folders, allow_pickle=allow_pickle)
    return {"prior": str(model)}, [f"prior: {model}"]


@command("config")
@click.option("--output", type=PATH, default=Path("demo"), help="Folder of everything it makes.")
def demo(output: Path, config: Path | None) -> Result:
    """Run the whole job and write a report.

    Trains a zoo, a weight encoder and a joint model of datasets, weights and results, and measures both.

    A second run reuses what is there already.
    """
    from weightspace.demo import DemoSettings, run_demo

    report = run_demo(output, settings_from(DemoSettings, config, {}))
    return {"report": str(report)}, [f"report: {report}"]
