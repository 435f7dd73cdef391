# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Trains a joint model of datasets, weights and results on a zoo, on one processor or on many.

    python hub_scripts/train_joint.py --zoo ZOO --output JOINT [--config FILE] [--push-to ORG/NAME [--private]]
    accelerate launch hub_scripts/train_joint.py --zoo ZOO --output JOINT [--config FILE]

ZOO is a folder or org/name on the Hub. FILE holds settings as YAML or JSON: the fields of
`weightspace.training.joint.JointSettings`. ORG/NAME is where the model is published.
"""

from __future__ import annotations

import sys

from weightspace.cli.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["train", "joint"], __doc__))
