# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace"]
# ///
"""Trains a joint model of datasets, weights and results on a zoo, on one processor or on many.

    python hub_scripts/train_joint.py --zoo ZOO --output JOINT [--config FILE] [--push-to ORG/NAME [--private]]
    accelerate launch hub_scripts/train_joint.py --zoo ZOO --output JOINT [--config FILE]

ZOO is a folder or org/name on the Hub. FILE holds settings as YAML or JSON: the fields of
`weightspace.training.joint.JointSettings`. ORG/NAME is where the model is published.
"""

from __future__ import annotations

import argparse
import os
import sys

from weightspace.cli.main import main as weightspace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        epilog="Other options: weightspace train joint -h",
    )
    parser.add_argument("--output", required=True, help="folder of the joint model")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="model repository to publish the model in")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, others = parser.parse_known_args()
    code = weightspace(["train", "joint", "--output", options.output, *others])
    # Every process of a launch comes here; one of them publishes.
    if code == 0 and options.push_to and int(os.environ.get("RANK", "0")) == 0:
        code = weightspace(["push", options.output, options.push_to, "--private" if options.private else "--yes"])
    return code


if __name__ == "__main__":
    sys.exit(main())
