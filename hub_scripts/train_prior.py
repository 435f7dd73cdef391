# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
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

import sys

from weightspace.cli.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["train", "prior"], __doc__))
