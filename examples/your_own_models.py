"""Your own models: from a folder of safetensors files to the nearest neighbours of each model.

    python examples/your_own_models.py [--output FOLDER] [--models N] [--steps N]

Two kinds of network are mixed, one with batch norm and an integer counter, as they come out of any torch project. No
class of theirs is known to the library: it sees names, shapes and numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from weightspace import embed, import_folder, inspect_location, save_checkpoint, train_autoencoder
from weightspace.training.autoencoder import AutoencoderSettings, EncoderSettings
from weightspace.training.settings import LoopSettings


def plain_network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))


def normalised_network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))


def write_models(folder: Path, models: int) -> None:
    """Trains small classifiers of two interleaved moons and writes them with one metadata row each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(models):
        kind, build = (("plain", plain_network), ("normalised", normalised_network))[number % 2]
        learning_rate = (1e-3, 1e-2, 1e-1)[number % 3]
        torch.manual_seed(number)
        model = build(16)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        for _ in range(60):
            points, labels = two_moons(64, generator)
            loss = nn.functional.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        points, labels = two_moons(500, generator)
        accuracy = (model.eval()(points).argmax(1) == labels).float().mean().item()
        file = f"{kind}/{number:03d}.safetensors"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        save_checkpoint(model.state_dict(), folder / file)
        rows.append({"file": file, "test_accuracy": accuracy, "step": 60, "learning_rate": learning_rate})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def two_moons(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(2, (count,), generator=generator)
    angle = torch.pi * torch.rand(count, generator=generator) + torch.pi * labels
    moons = torch.stack([angle.cos() + labels, angle.sin() + 0.3 * labels], dim=1)
    return moons + 0.15 * torch.randn(count, 2, generator=generator), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/your_own_models"), help="folder of all results")
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60, help="steps of the encoder's training")
    arguments = parser.parse_args()
    models, zoo, encoder = (arguments.output / name for name in ("models", "zoo", "encoder"))

    if not (models / "metadata.jsonl").exists():
        write_models(models, arguments.models)

    survey = inspect_location(models / "normalised")
    first = survey.inspections[0]
    print(f"{len(survey.inspections)} normalised networks of {first.parameters} parameters")
    for layer in first.architecture.layers:
        print(f"  {layer.name}: {layer.kind}, {layer.numel} parameters")
    for exclusion in first.architecture.exclusions:
        print(f"  left out: {exclusion.tensor}, {exclusion.reason}")

    summary = import_folder(models, zoo)
    print(f"{summary.models} models imported, {len(summary.skipped)} left out")

    train_autoencoder(
        zoo,
        encoder,
        AutoencoderSettings(
            encoder=EncoderSettings(hidden_size=32, layers=1, compression=2.0),
            loop=LoopSettings(steps=arguments.steps, batch_size=16, checkpoint_every=0, tracker="none"),
        ),
    )

    frame = embed([str(zoo)], encoder)
    vectors = np.stack(frame["embedding"].to_numpy())
    vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    for number in range(4):
        nearest = distances[number].argmin()
        for text, row in (("model", number), ("  nearest", nearest)):
            print(f"{text} {frame['model_id'][row]}, accuracy {frame['test_accuracy'][row]:.3f}")


if __name__ == "__main__":
    main()
