# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Trains a weight autoencoder on a zoo, on one processor or on many, and publishes it if asked to.

    python hub_scripts/train_autoencoder.py --zoo ZOO --output ENCODER [--config FILE] [--push-to ORG/NAME [--private]]
    accelerate launch hub_scripts/train_autoencoder.py --zoo ZOO --output ENCODER [--config FILE]

ZOO is a folder or org/name on the Hub. FILE holds settings as YAML or JSON: the fields of
`weightspace.training.autoencoder.AutoencoderSettings`.
"""

from __future__ import annotations

import sys

from weightspace.cli.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["train", "autoencoder"], __doc__))
