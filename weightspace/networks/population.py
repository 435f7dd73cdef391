"""Trains a population of small models at once: their parameters are stacked along a model axis.

Every model has its own learning rate, weight decay, training subset, label noise and number of steps; only the
architecture is shared by the models of one population.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from weightspace.errors import SettingsError
from weightspace.networks.families import (
    FamilyConfig,
    Initialization,
    Parameters,
    initialize,
    run_models,
    stacked_forward,
)
from weightspace.schema import ImageDataset


@dataclass(frozen=True)
class Recipe:
    """How one model of a population is trained.

    Attributes:
        dataset: image dataset id.
        config: architecture.
        learning_rate: of AdamW; annealed to zero by a half cosine over the run's own steps.
        weight_decay: of AdamW, decoupled.
        train_size: training images drawn from the dataset's training split, without replacement.
        steps: optimizer steps.
        run_id: name of the run.
        initialization: scheme of the weights, where none are given.
        label_noise: fraction of training labels replaced by a uniformly drawn class.
    """

    dataset: str
    config: FamilyConfig
    learning_rate: float
    weight_decay: float
    train_size: int
    steps: int
    run_id: str = ""
    initialization: Initialization = "kaiming_uniform"
    label_noise: float = 0.0

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters that a probe may predict, ready for JSON."""
        names = ("learning_rate", "weight_decay", "initialization", "label_noise", "steps")
        values = {name: getattr(self, name) for name in names}
        return {**values, "family": self.config.family, "activation": self.config.activation}


@dataclass(frozen=True)
class Snapshot:
    """Weights and results of a population at one checkpoint.

    Attributes:
        members: indices of the recipes with this checkpoint.
        steps: optimizer steps of each member.
        parameters: ``(members, *shape)`` by name.
        results: metric name -> one value per member; accuracies are fractions, losses mean nats per image.
    """

    members: list[int]
    steps: list[int]
    parameters: dict[str, Float[Tensor, "members ..."]]
    results: dict[str, Float[Tensor, " members"]]


@dataclass(frozen=True)
class _Examples:
    """What each model is trained or evaluated on: rows of one table of images, padded to one length, and labels."""

    rows: Int[Tensor, "models most"]
    labels: Int[Tensor, "models most"]
    sizes: Int[Tensor, " models"]


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
        batch_size: images per model and step, drawn with replacement from its own training subset.
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
    used = [datasets[name] for name in dict.fromkeys(recipe.dataset for recipe in recipes)]
    images = torch.cat([part for one in used for part in (one.train_images, one.test_images)]).to(device)
    train, test = _examples(recipes, used, config.classes, generator)
    if initial is None:
        initial = initialize(config, [recipe.initialization for recipe in recipes], generator)
    expected = {name: (len(recipes), *shape) for name, shape in config.shapes().items()}
    found = {name: tuple(value.shape) for name, value in initial.items()}
    if found != expected:
        raise SettingsError(f"initial weights have the shapes {found}; the recipes need {expected}")
    optimizer = _PopulationAdamW(recipes, initial, device)
    batches = (_passes if in_passes else _drawn)(train.sizes, batch_size, generator)
    due = _checkpoint_steps(recipes, checkpoints)
    ends = torch.tensor([recipe.steps for recipe in recipes])
    training = torch.arange(len(recipes))
    for step in range(max(due) + 1):
        if members := due.get(step):
            rows = torch.searchsorted(training, torch.tensor(members))
            chosen = {name: value.detach()[rows] for name, value in optimizer.parameters.items()}
            results: dict[str, Tensor] = {}
            for split, examples in (("test", test), ("train", train)):
                accuracy, loss = _evaluate(config, chosen, images, examples, members)
                results |= {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
            stored = {name: value.cpu() for name, value in chosen.items()}
            yield Snapshot(members, [step] * len(members), stored, results)
        if step == max(due):
            return
        if (kept := ends[training] > step).logical_not().any():  # finished runs leave the population
            training = training[kept]
            optimizer.keep(kept)
        numbers, draws = training.unsqueeze(1), next(batches)[training]
        rows, labels = train.rows[numbers, draws].to(device), train.labels[numbers, draws].to(device)
        # Whole images are copied, where indexing would go entry by entry.
        batch = images.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        logits = stacked_forward(config, optimizer.parameters, batch)
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

    def keep(self, models: Bool[Tensor, " models"]) -> None:
        """Goes on with some of the models."""
        chosen = models.to(self._steps.device)
        self.parameters = {n: p.detach()[chosen].requires_grad_() for n, p in self.parameters.items()}
        self._moments = {n: (mean[chosen], square[chosen]) for n, (mean, square) in self._moments.items()}
        self._learning_rates, self._decays = self._learning_rates[chosen], self._decays[chosen]
        self._steps = self._steps[chosen]

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


def _examples(
    recipes: Sequence[Recipe], datasets: Sequence[ImageDataset], classes: int, generator: torch.Generator
) -> tuple[_Examples, _Examples]:
    """Draws each model's training images and (noisy) labels; all test images are for evaluation.

    Rows count through the training and test images of one dataset after the other.
    """
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    start = 0
    for dataset in datasets:
        middle = start + len(dataset.train_images)
        end = middle + len(dataset.test_images)
        splits[dataset.id] = torch.arange(start, middle), torch.arange(middle, end)
        start = end
    known = torch.cat([part for dataset in datasets for part in (dataset.train_labels, dataset.test_labels)])
    subsets, targets = [], []
    for recipe in recipes:
        rows = splits[recipe.dataset][0]
        if recipe.train_size > len(rows):
            raise SettingsError(
                f"{recipe.dataset}: train_size {recipe.train_size} exceeds its {len(rows)} training images; choose less"
            )
        subsets.append(rows[torch.randperm(len(rows), generator=generator)[: recipe.train_size]])
        labels = known[subsets[-1]]
        noisy = torch.rand(len(labels), generator=generator) < recipe.label_noise
        targets.append(torch.where(noisy, torch.randint(classes, labels.shape, generator=generator), labels))
    test = [splits[recipe.dataset][1] for recipe in recipes]
    return _padded(subsets, targets), _padded(test, [known[rows] for rows in test])


def _padded(rows: list[Tensor], labels: list[Tensor]) -> _Examples:
    sizes = torch.tensor([len(own) for own in rows])
    return _Examples(pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True), sizes)


def _checkpoint_steps(recipes: Sequence[Recipe], checkpoints: Sequence[float]) -> dict[int, list[int]]:
    due: dict[int, list[int]] = {}
    for number, recipe in enumerate(recipes):
        for step in sorted({max(1, round(fraction * recipe.steps)) for fraction in checkpoints}):
            due.setdefault(step, []).append(number)
    return due


@torch.no_grad()
def _evaluate(
    config: FamilyConfig, parameters: Parameters, images: Tensor, examples: _Examples, members: list[int]
) -> tuple[Tensor, Tensor]:
    """Mean accuracy and cross-entropy of some members of a population on their examples."""
    rows, labels, sizes = examples.rows[members], examples.labels[members], examples.sizes[members]
    logits = run_models(config, parameters, images, rows.to(images.device)).cpu()
    valid = torch.arange(rows.shape[1]) < sizes.unsqueeze(1)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels).float()
    return (correct * valid).sum(1) / sizes, (losses * valid).sum(1) / sizes
