"""Trains a zoo: many runs drawn from a seeded grid of hyper-parameters, on variants of one image dataset."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from weightspace.data.images import load_images, variants
from weightspace.errors import SettingsError
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.families import Activation, FamilyConfig, Initialization, family_config
from weightspace.networks.population import Recipe, Snapshot, train_population
from weightspace.schema import ModelRef, ZooEntry
from weightspace.settings import (
    Fraction,
    NonEmpty,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Settings,
)
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.writer import ZooWriter

_RUNS_TOGETHER = 256


@dataclass(frozen=True)
class ZooSettings(Settings):
    """Which runs a zoo has. Every run draws one value of each list; datasets and architectures are dealt in turn.

    Attributes:
        dataset: base dataset: ``"digits"``, a local folder or a Hub id; see `weightspace.data.images.load_images`.
        class_subsets: class numbers of each subset, all of one length; ``None`` stands for all classes.
        rotations: orientations of the images, degrees.
        polarities: ``"normal"`` and ``"inverted"``.
        architectures: configs of families without ``image_shape``, ``classes`` and ``activation``, which the dataset
            and the grid give, e.g. ``{"family": "mlp", "hidden": [24]}``.
        runs: number of training runs.
        seed: draws the grid and everything random in the runs.
        activations: grid of activations.
        learning_rates: grid of AdamW's peak learning rates.
        weight_decays: grid of AdamW's weight decays.
        initializations: grid of initialisation schemes.
        label_noise: grid of shares of training labels that are replaced at random.
        train_sizes: grid of numbers of training images.
        steps: grid of numbers of optimizer steps.
        checkpoints: shares of a run's steps after which its weights are kept.
        batch_size: images a model and step.
        device: ``"auto"`` is a GPU where there is one.
    """

    dataset: str = "digits"
    class_subsets: NonEmpty[tuple[int, ...] | None] = (
        (0, 1, 2, 3, 4),
        (5, 6, 7, 8, 9),
        (0, 2, 4, 6, 8),
        (1, 3, 5, 7, 9),
    )
    rotations: NonEmpty[int] = (0, 90, 180, 270)
    polarities: NonEmpty[Literal["normal", "inverted"]] = ("normal", "inverted")
    architectures: NonEmpty[dict[str, Any]] = (
        {"family": "mlp", "hidden": [24]},
        {"family": "cnn", "channels": [24], "kernel_size": 7, "stride": 4},
    )
    runs: PositiveInt = 1200
    seed: int = 0
    activations: NonEmpty[Activation] = ("relu", "gelu", "tanh")
    learning_rates: NonEmpty[PositiveFloat] = (1e-3, 3e-3, 1e-2)
    weight_decays: NonEmpty[NonNegativeFloat] = (0.0, 0.01, 0.1, 1.0)
    initializations: NonEmpty[Initialization] = (
        "kaiming_uniform",
        "kaiming_normal",
        "xavier_uniform",
        "xavier_normal",
    )
    label_noise: NonEmpty[Fraction] = (0.0, 0.1, 0.25)
    train_sizes: NonEmpty[PositiveInt] = (60, 120, 250, 500)
    steps: NonEmpty[PositiveInt] = (250, 500, 1000)
    checkpoints: NonEmpty[PositiveFraction] = (0.2, 0.6, 1.0)
    batch_size: PositiveInt = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuses empty grids and impossible values."""
        super().__post_init__()
        if len({subset and len(subset) for subset in self.class_subsets}) > 1:
            raise SettingsError("class_subsets: give subsets of one length; the models share their number of outputs")


def train_zoo(settings: ZooSettings, output: Path | str) -> Zoo:
    """Trains the runs that ``settings`` describe and writes them as a zoo.

    Models of one architecture train together. An interrupted zoo continues with the missing shards; a complete zoo of
    the same settings is left as it is.

    Args:
        settings: see `ZooSettings`.
        output: folder of the zoo.

    Raises:
        SettingsError: an architecture or a training size does not fit the dataset.
        ZooError: the dataset cannot be opened, or ``output`` holds a zoo of other settings.
    """
    described = asdict(settings)
    del described["device"]  # does not determine the content
    writer = ZooWriter(output, settings={"kind": "trained", **described})
    recipes = draw_recipes(settings)
    with tqdm(total=len(recipes), desc="train zoo", unit="run") as progress:
        writer.write_all(
            _shards(recipes),
            lambda number, members: _train_shard(number, members, settings),
            name=lambda number, _: f"population-{number:05d}",
            progress=progress,
        )
    return load_zoo(output)


def draw_recipes(settings: ZooSettings) -> list[Recipe]:
    """Draws the recipe of every run; the same settings give the same recipes.

    Raises:
        SettingsError: an architecture's config is wrong.
        ZooError: the dataset cannot be opened.
    """
    datasets = variants(settings.dataset, settings.class_subsets, settings.rotations, settings.polarities)
    first = load_images(datasets[0])
    shape = tuple(first.train_images.shape[1:])
    draw = random.Random(settings.seed)
    recipes = []
    for number in range(settings.runs):
        architecture = settings.architectures[number % len(settings.architectures)]
        activation = draw.choice(settings.activations)
        recipes.append(
            Recipe(
                run_id=f"run-{number:06d}",
                dataset=datasets[number // len(settings.architectures) % len(datasets)],
                config=_completed(architecture, shape, first.classes, activation),
                learning_rate=draw.choice(settings.learning_rates),
                weight_decay=draw.choice(settings.weight_decays),
                initialization=draw.choice(settings.initializations),
                label_noise=draw.choice(settings.label_noise),
                train_size=draw.choice(settings.train_sizes),
                steps=draw.choice(settings.steps),
            )
        )
    return recipes


def _completed(
    architecture: dict[str, Any], image_shape: tuple[int, ...], classes: int, activation: Activation
) -> FamilyConfig:
    given = {"image_shape": image_shape, "classes": classes, "activation": activation}
    twice = sorted(architecture.keys() & given.keys())
    if twice:
        raise SettingsError(f"architectures: {twice[0]} comes from the dataset and the grid; leave it out")
    config = family_config({**architecture, **given})
    if config is None:
        raise SettingsError(f"architectures: {architecture!r} names no family; choose family: mlp or cnn")
    return config


def _shards(recipes: Sequence[Recipe]) -> Iterator[list[Recipe]]:
    populations: dict[FamilyConfig, list[Recipe]] = {}
    for recipe in recipes:
        populations.setdefault(recipe.config, []).append(recipe)
    for members in populations.values():
        # A population takes as many steps as its longest run, so runs of similar length train together.
        ordered = sorted(members, key=lambda recipe: (recipe.steps, recipe.run_id))
        yield from (ordered[start : start + _RUNS_TOGETHER] for start in range(0, len(ordered), _RUNS_TOGETHER))


def _train_shard(number: int, members: Sequence[Recipe], settings: ZooSettings) -> list[tuple[ZooEntry, bytes]]:
    datasets = {dataset: load_images(dataset) for dataset in dict.fromkeys(recipe.dataset for recipe in members)}
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    snapshots = train_population(
        members,
        datasets,
        checkpoints=settings.checkpoints,
        batch_size=settings.batch_size,
        seed=int.from_bytes(hashlib.sha256(f"{settings.seed}/{number}".encode()).digest()[:6]),
        device=device,
    )
    models = [model for snapshot in snapshots for model in _models(snapshot, members)]
    return sorted(models, key=lambda model: model[0].model_id)


def _models(snapshot: Snapshot, recipes: Sequence[Recipe]) -> Iterator[tuple[ZooEntry, bytes]]:
    for place, (member, step) in enumerate(zip(snapshot.members, snapshot.steps, strict=True)):
        recipe = recipes[member]
        tensors = {name: value[place].clone() for name, value in snapshot.parameters.items()}
        model_id = f"{recipe.run_id}-step-{step:06d}"
        results = {name: float(values[place]) for name, values in snapshot.results.items()}
        entry = ZooEntry(
            model_id=model_id,
            run_id=recipe.run_id,
            ref=ModelRef(f"./{model_id}.safetensors"),
            dataset=recipe.dataset,
            results={**results, "step": float(step), "train_size": float(recipe.train_size)},
            hyperparameters=recipe.hyperparameters(),
            config=json.loads(json.dumps(recipe.config.to_dict())),
        )
        yield entry, checkpoint_bytes(tensors)
