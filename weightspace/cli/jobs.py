"""Commands as scripts for job runners, which publish what they wrote: the disk of a job is lost at its end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from weightspace.cli.main import main


def push_folder(output: str, repo_id: str, private: bool) -> int:
    """Publishes what was written by ``weightspace push``."""
    return main(["push", output, repo_id, "--private" if private else "--yes"])


def run_job(command: Sequence[str], description: str, publish: Callable[[str, str, bool], int] = push_folder) -> int:
    """Runs a command with the options of ``sys.argv``, and publishes its output if ``--push-to`` is given.

    Args:
        command: the command's words, e.g. ``("train", "joint")``.
        description: docstring of the script; its first line stands in the help.
        publish: called with the output, the repository and whether a new one is private; returns an exit code.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        allow_abbrev=False,
        epilog=f"Other options: weightspace {' '.join(command)} -h",
    )
    parser.add_argument("--output", required=True, help="where to write")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="repository to publish the output in")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, others = parser.parse_known_args()
    code = main([*command, "--output", options.output, *others])
    # Every process of a launch comes here; one of them publishes.
    if code == 0 and options.push_to and int(os.environ.get("RANK", "0")) == 0:
        code = publish(options.output, options.push_to, options.private)
    return code
