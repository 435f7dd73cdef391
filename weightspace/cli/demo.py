"""``weightspace demo``."""

from __future__ import annotations

from pathlib import Path

import click

from weightspace.cli.options import config_option, json_option, settings_from
from weightspace.cli.output import print_json


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo"), help="Folder of everything it makes.")
@config_option
@json_option
def demo(output: Path, config: Path | None, as_json: bool) -> None:
    """Run the whole job and write a report.

    Trains a zoo, a weight encoder and a joint model of datasets, weights and results, and measures both.

    A second run reuses what is there already.
    """
    from weightspace.demo import DemoSettings, run_demo

    report = run_demo(output, settings_from(DemoSettings, config, {}))
    if as_json:
        print_json({"report": str(report)})
    else:
        click.echo(f"report: {report}")
