"""From nothing to a probe table: trains a small zoo, a small encoder on it, and asks what weights say of results.

    python examples/train_and_probe.py [--output FOLDER] [--runs N] [--steps N]

Takes about a minute on two cores. It shows the steps, not how good they get: `weightspace demo` trains long enough.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from weightspace import train_autoencoder, train_zoo
from weightspace.probes.rows import format_table
from weightspace.probes.zoo import probe_zoo
from weightspace.training.autoencoder import AutoencoderSettings, EncoderSettings
from weightspace.training.settings import LoopSettings
from weightspace.zoo.training import ZooSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/train_and_probe"), help="folder of all results")
    parser.add_argument("--runs", type=int, default=200, help="training runs in the zoo")
    parser.add_argument("--steps", type=int, default=100, help="steps of the encoder's training")
    arguments = parser.parse_args()

    # Two architectures on four variants of the digits; everything else is drawn from the default grid.
    zoo = train_zoo(
        ZooSettings(
            class_subsets=((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
            rotations=(0,),
            architectures=({"family": "mlp", "hidden": [12]}, {"family": "cnn", "channels": [8]}),
            steps=(50, 100, 200),
            checkpoints=(0.5, 1.0),
            runs=arguments.runs,
        ),
        arguments.output / "zoo",
    )
    print(zoo)

    encoder = train_autoencoder(
        zoo.path,
        arguments.output / "encoder",
        AutoencoderSettings(
            encoder=EncoderSettings(hidden_size=64, layers=1),
            loop=LoopSettings(steps=arguments.steps, validate_every=0, checkpoint_every=0, tracker="none"),
        ),
    )

    # Split by run; every number a second time after the test models' neurons were permuted.
    print(format_table(probe_zoo(zoo, encoder, ["test_accuracy", "step"], seeds=(0,))))


if __name__ == "__main__":
    main()
