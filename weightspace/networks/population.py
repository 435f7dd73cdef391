"""Trains many small models together: the parameters of a population carry a model axis, one step trains them all.

Every model has its own learning rate, weight decay, training subset, label noise and number of steps; only the
architecture is shared by the models of one population.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from weightspace.errors import SettingsError
from weightspace.networks.families import (
    FamilyConfig,
    Initialization,
    initialize,
    stacked_forward,
)
from weightspace.schema import ImageDataset


@dataclass(frozen=True)
class Recipe:
    """How one model of a population is trained.

    Attributes:
        run_id: name of the run.
        dataset: image dataset id.
        config: architecture.
        learning_rate: of AdamW; annealed to zero by a half cosine over the run's own steps.
        weight_decay: of AdamW, decoupled.
        initialization: scheme of the weights.
        label_noise: fraction of training labels replaced by a uniformly drawn class.
        train_size: training images drawn from the dataset's training split, without replacement.
        steps: optimizer steps.
    """

    run_id: str
    dataset: str
    config: FamilyConfig
    learning_rate: float
    weight_decay: float
    initialization: Initialization
    label_noise: float
    train_size: int
    steps: int

    def hyperparameters(self) -> dict[str, Any]:
        """Everything a probe may want to predict that is not a result, ready for JSON."""
        values = asdict(self)
        del values["run_id"], values["dataset"], values["config"], values["train_size"]
        return {**values, "family": self.config.family, "activation": self.config.activation}


@dataclass(frozen=True)
class Snapshot:
    """A population's weights at one checkpoint and what each model reached with them.

    Attributes:
        members: numbers of the recipes that reach this checkpoint now.
        steps: optimizer steps each of them has done.
        parameters: ``(members, *shape)`` by name.
        results: metric name -> one value a member: accuracies are fractions, losses mean nats an image.
    """

    members: list[int]
    steps: list[int]
    parameters: dict[str, Float[Tensor, "members ..."]]
    results: dict[str, Float[Tensor, " members"]]


@dataclass(frozen=True)
class _Images:
    """The images of several datasets in one table; row numbers stand for images from here on."""

    images: Float[Tensor, "rows c h w"]
    labels: Int[Tensor, " rows"]
    train: dict[str, Int[Tensor, " _n"]]
    test: dict[str, Int[Tensor, " _n"]]

    def chosen(self, rows: Int[Tensor, "models batch"]) -> Float[Tensor, "models batch c h w"]:
        """Returns the images of these rows; whole images are copied, where indexing would go entry by entry."""
        return self.images.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def train_population(
    recipes: Sequence[Recipe],
    datasets: dict[str, ImageDataset],
    *,
    checkpoints: Sequence[float],
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    initial: Mapping[str, Float[Tensor, "models ..."]] | None = None,
    in_passes: bool = False,
) -> Iterator[Snapshot]:
    """Trains all ``recipes`` at once with AdamW on cross-entropy and yields their weights at every checkpoint.

    Args:
        recipes: must share one architecture config.
        datasets: image datasets by id, at least those that the recipes name.
        checkpoints: fractions of each run's own steps, e.g. ``(0.25, 1.0)``.
        batch_size: images a model and step, drawn with replacement from its own training subset.
        seed: draws initial weights, subsets, noise and batches.
        device: where to train.
        initial: weights to start from, one row a recipe, instead of weights drawn by the recipes' schemes.
        in_passes: draw batches without replacement: a model sees its whole subset, then all of it in another order.

    Yields:
        Snapshots in the order of steps; each run appears once for each of its distinct checkpoint steps.

    Raises:
        SettingsError: the recipes do not share one architecture, or ``initial`` has another one.
    """
    config = recipes[0].config
    if any(recipe.config != config for recipe in recipes):
        raise SettingsError("a population shares one architecture; group the recipes by their config first")
    generator = torch.Generator().manual_seed(seed)
    table = _image_table([datasets[name] for name in dict.fromkeys(recipe.dataset for recipe in recipes)], device)
    subsets, targets = _training_subsets(recipes, table, config.classes, generator)
    if initial is None:
        initial = initialize(config, [recipe.initialization for recipe in recipes], generator)
    _check_initial(initial, config, len(recipes))
    optimizer = _PopulationAdamW(recipes, initial, device)
    sizes = torch.tensor([recipe.train_size for recipe in recipes])
    batches = _passes(sizes, batch_size, generator) if in_passes else _drawn(sizes, batch_size, generator)
    due = _checkpoint_steps(recipes, checkpoints)
    numbers = torch.arange(len(recipes)).unsqueeze(1)
    for step in range(max(due) + 1):
        if members := due.get(step):
            chosen = {name: value.detach()[members].cpu() for name, value in optimizer.parameters.items()}
            results = _results(config, chosen, [recipes[m] for m in members], table, subsets[members], targets[members])
            yield Snapshot(members, [step] * len(members), chosen, results)
        if step == max(due):
            return
        draws = next(batches)
        rows, labels = subsets[numbers, draws].to(device), targets[numbers, draws].to(device)
        logits = stacked_forward(config, optimizer.parameters, table.chosen(rows))
        # The sum over models keeps their gradients apart: each model's loss is the mean over its own batch. Classes
        # stand before models and images, for a softmax over the few entries of a last axis is slow.
        scores = logits.permute(2, 0, 1).flatten(1).unsqueeze(0)
        F.cross_entropy(scores, labels.flatten().unsqueeze(0), reduction="sum").div(batch_size).backward()
        optimizer.step()


class _PopulationAdamW:
    """AdamW (Loshchilov & Hutter 2019) with one learning rate, decay and schedule length a model."""

    betas, epsilon = (0.9, 0.999), 1e-8

    def __init__(self, recipes: Sequence[Recipe], parameters: Mapping[str, Tensor], device: torch.device | str) -> None:
        # A copy: the steps change it in place, and given weights belong to the caller.
        self.parameters = {n: v.detach().clone().to(device).requires_grad_() for n, v in parameters.items()}
        self._moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self._learning_rates = torch.tensor([recipe.learning_rate for recipe in recipes], device=device)
        self._decays = torch.tensor([recipe.weight_decay for recipe in recipes], device=device)
        self._steps = torch.tensor([recipe.steps for recipe in recipes], device=device)
        self._step = 0

    @torch.no_grad()
    def step(self) -> None:
        progress = (self._step / self._steps).clamp(max=1.0)
        rates = self._learning_rates * 0.5 * (1 + torch.cos(torch.pi * progress))
        self._step += 1
        first, second = (1 - beta**self._step for beta in self.betas)
        for name, parameter in self.parameters.items():
            mean, square = self._moments[name]
            assert parameter.grad is not None
            mean.lerp_(parameter.grad, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(parameter.grad, parameter.grad, value=1 - self.betas[1])
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            if name.endswith(".weight"):
                parameter.mul_((1 - rates * self._decays).view(shape))
            # mean / first / (sqrt(square / second) + epsilon), with the divisions of whole tensors taken out
            root = square.sqrt().add_(self.epsilon * math.sqrt(second))
            parameter.addcdiv_(mean * (rates * (-math.sqrt(second) / first)).view(shape), root)
            parameter.grad = None


def _check_initial(initial: Mapping[str, Tensor], config: FamilyConfig, models: int) -> None:
    expected = {name: (models, *shape) for name, shape in config.shapes().items()}
    found = {name: tuple(value.shape) for name, value in initial.items()}
    if found != expected:
        raise SettingsError(f"initial weights have the shapes {found}; the recipes need {expected}")


def _drawn(
    sizes: Int[Tensor, " models"], batch_size: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "models batch"]]:
    """Yields places in each model's subset, drawn with replacement."""
    while True:
        yield (torch.rand(len(sizes), batch_size, generator=generator) * sizes.unsqueeze(1)).long()


def _passes(
    sizes: Int[Tensor, " models"], batch_size: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "models batch"]]:
    """Yields places in each model's subset, pass by pass; a batch may end one pass and begin the next."""
    coming = [torch.empty(0, dtype=torch.int64)] * len(sizes)
    while True:
        for model, size in enumerate(sizes.tolist()):
            while len(coming[model]) < batch_size:
                coming[model] = torch.cat([coming[model], torch.randperm(size, generator=generator)])
        yield torch.stack([places[:batch_size] for places in coming])
        coming = [places[batch_size:] for places in coming]


def _image_table(datasets: Sequence[ImageDataset], device: torch.device | str) -> _Images:
    images, labels, start = [], [], 0
    train: dict[str, Tensor] = {}
    test: dict[str, Tensor] = {}
    for dataset in datasets:
        for rows, part_images, part_labels in (
            (train, dataset.train_images, dataset.train_labels),
            (test, dataset.test_images, dataset.test_labels),
        ):
            rows[dataset.id] = torch.arange(start, start + len(part_images))
            start += len(part_images)
            images.append(part_images)
            labels.append(part_labels)
    return _Images(torch.cat(images).to(device), torch.cat(labels), train, test)


def _training_subsets(
    recipes: Sequence[Recipe], table: _Images, classes: int, generator: torch.Generator
) -> tuple[Int[Tensor, "models largest"], Int[Tensor, "models largest"]]:
    """Each model's training rows and (noisy) labels, padded by repeating the first row; never read past its size."""
    largest = max(recipe.train_size for recipe in recipes)
    subsets = torch.zeros(len(recipes), largest, dtype=torch.int64)
    targets = torch.zeros_like(subsets)
    for number, recipe in enumerate(recipes):
        rows = table.train[recipe.dataset]
        if recipe.train_size > len(rows):
            raise SettingsError(
                f"{recipe.dataset}: train_size {recipe.train_size} exceeds its {len(rows)} training images; choose less"
            )
        chosen = rows[torch.randperm(len(rows), generator=generator)[: recipe.train_size]]
        labels = table.labels[chosen]
        noisy = torch.rand(len(labels), generator=generator) < recipe.label_noise
        labels = torch.where(noisy, torch.randint(classes, labels.shape, generator=generator), labels)
        subsets[number] = torch.cat([chosen, chosen[:1].expand(largest - len(chosen))])
        targets[number] = torch.cat([labels, labels[:1].expand(largest - len(labels))])
    return subsets, targets


def _checkpoint_steps(recipes: Sequence[Recipe], checkpoints: Sequence[float]) -> dict[int, list[int]]:
    due: dict[int, list[int]] = {}
    for number, recipe in enumerate(recipes):
        for step in sorted({max(1, round(fraction * recipe.steps)) for fraction in checkpoints}):
            due.setdefault(step, []).append(number)
    return due


@torch.no_grad()
def _results(
    config: FamilyConfig,
    parameters: dict[str, Tensor],
    recipes: Sequence[Recipe],
    table: _Images,
    subsets: Tensor,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Accuracy and loss on the test split and on the images and labels that each model was trained on."""
    test = [table.test[recipe.dataset] for recipe in recipes]
    test_sizes = torch.tensor([len(rows) for rows in test])
    test_rows = pad_sequence(test, batch_first=True)
    train_sizes = torch.tensor([recipe.train_size for recipe in recipes])
    results: dict[str, Tensor] = {}
    for split, rows, labels, sizes in (
        ("test", test_rows, table.labels[test_rows], test_sizes),
        ("train", subsets, targets, train_sizes),
    ):
        parts = [
            _scores(config, {name: value[part] for name, value in parameters.items()}, table, *chunk)
            for part, chunk in _chunks(rows, labels, sizes)
        ]
        accuracy, loss = (torch.cat(values) for values in zip(*parts, strict=True))
        results |= {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
    return results


def _chunks(*columns: Tensor, size: int = 64) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    for start in range(0, len(columns[0]), size):
        part = slice(start, start + size)
        yield part, tuple(column[part] for column in columns)


def _scores(
    config: FamilyConfig, parameters: dict[str, Tensor], table: _Images, rows: Tensor, labels: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean accuracy and cross-entropy over the first ``sizes[m]`` columns of each row."""
    device = table.images.device
    on_device = {name: value.to(device) for name, value in parameters.items()}
    logits = stacked_forward(config, on_device, table.chosen(rows.to(device))).cpu()
    valid = torch.arange(rows.shape[1]) < sizes.unsqueeze(1)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels).float()
    return (correct * valid).sum(1) / sizes, (losses * valid).sum(1) / sizes
