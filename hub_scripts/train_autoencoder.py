# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace"]
# ///
"""Trains a weight autoencoder on a zoo, on one processor or on many.

    python hub_scripts/train_autoencoder.py --zoo ZOO --output ENCODER [--config FILE]
    accelerate launch hub_scripts/train_autoencoder.py --zoo ZOO --output ENCODER [--config FILE]

FILE holds settings as YAML or JSON: the fields of `weightspace.training.autoencoder.AutoencoderSettings`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from weightspace import WeightspaceError, train_autoencoder
from weightspace.settings import read_settings
from weightspace.training.autoencoder import AutoencoderSettings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--output", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--config", type=Path, help="settings as YAML or JSON")
    arguments = parser.parse_args()
    try:
        settings = read_settings(AutoencoderSettings, arguments.config) if arguments.config else AutoencoderSettings()
        print(train_autoencoder(arguments.zoo, arguments.output, settings))
    except WeightspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
