# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace"]
# ///
"""Trains a prior that samples weights given datasets and results, on one processor or on many.

    python hub_scripts/train_prior.py --zoo ZOO --autoencoder ENCODER --joint JOINT --output PRIOR [--config FILE]
        [--push-to ORG/NAME [--private]]
    accelerate launch hub_scripts/train_prior.py --zoo ZOO --autoencoder ENCODER --joint JOINT --output PRIOR

ZOO, ENCODER and JOINT are folders or org/name on the Hub. FILE holds settings as YAML or JSON: the fields of
`weightspace.training.prior.PriorSettings`, or with --codes, which models the codes of a quantised autoencoder, those of
`CodePriorSettings`. ORG/NAME is where the prior is published.
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
        epilog="Other options: weightspace train prior -h",
    )
    parser.add_argument("--output", required=True, help="folder of the prior")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="model repository to publish the prior in")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, others = parser.parse_known_args()
    code = weightspace(["train", "prior", "--output", options.output, *others])
    # Every process of a launch comes here; one of them publishes.
    if code == 0 and options.push_to and int(os.environ.get("RANK", "0")) == 0:
        code = weightspace(["push", options.output, options.push_to, "--private" if options.private else "--yes"])
    return code


if __name__ == "__main__":
    sys.exit(main())
