"""Trains priors of weights given datasets and results on a zoo: by flow matching on latents, or of codes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightspace.errors import SettingsError
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.codec import LatentCodec
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.models.loading import load_trained
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import WeightPriorModel
from weightspace.settings import Fraction, FractionBelowOne, Settings
from weightspace.training.batches import Batch, BatchPart, seeded_generator
from weightspace.training.behaviour import BehaviourLoss, BehaviourSettings
from weightspace.training.loop import Objective
from weightspace.training.prior_data import AlignedModels, Conditions
from weightspace.training.run import (
    Prepared,
    TrainingRecord,
    config_from,
    ensure_same_test_runs,
    run_training,
    trained_with,
)
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.splits import Split

_VALIDATION_MODELS = 256


@dataclass(frozen=True)
class PriorShape:
    """Shape of the prior: width, layers and attention heads of its transformer."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True)
class PriorSettings(Settings):
    """Everything that determines a trained prior besides the zoo, the autoencoder and the joint model.

    Attributes:
        shape: shape of the model.
        behaviour: the behaviour loss on what the guessed latents decode to, for models that the library can run.
        shuffle_classes: share of rows whose classes come in an order drawn anew, and the model's outputs with them: a
            prior that sees every dataset in its one order need not look at its classes to know what to do.
        drop: share of rows whose dataset, and of those whose results, are kept from the model, each by itself.
        loop: the training loop.
        split_seed: number of the split over runs; the test runs are never seen in training.
    """

    shape: PriorShape = field(default_factory=PriorShape)
    behaviour: BehaviourSettings = field(default_factory=lambda: BehaviourSettings(weight=0.9, images=24))
    shuffle_classes: Fraction = 1.0
    drop: FractionBelowOne = 0.1
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=1600, batch_size=128, learning_rate=2e-3))
    split_seed: int = 0


@dataclass(frozen=True)
class CodePriorSettings(PriorSettings):
    """Everything that determines a trained prior of codes, a `WeightCodePriorModel`, besides what it is trained on.

    Attributes:
        unknown: largest share of a model's tokens whose codes are kept from the prior; the share is drawn for each
            model, from 0 on.
    """

    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=720, batch_size=64, learning_rate=2e-3))
    unknown: Fraction = 1.0


def train_prior(
    zoo: Path | str,
    output: Path | str,
    settings: PriorSettings,
    *,
    autoencoder: Path | str,
    joint: Path | str,
    allow_pickle: bool = False,
) -> Path:
    """Trains a prior on the training runs of a zoo and saves it as a `save_pretrained` folder.

    Models that differ by a reordering of their neurons are one model: all are brought into the order of the best one of
    their dataset, and these into that of the best one of all, by weight matching (see `align`), so that the prior need
    not learn every order. Latents and weights of the training models are held in memory.

    A finished folder with the same settings and inputs is left as it is; an unfinished one goes on where it stopped.

    Args:
        zoo: the zoo, as `load_zoo` takes it.
        output: folder of the prior.
        settings: see `PriorSettings`; of a `WeightPriorModel`, or as `CodePriorSettings` of a `WeightCodePriorModel`.
        autoencoder: folder of the trained autoencoder whose latents or codes are modelled.
        joint: folder of the trained joint model that datasets and results are embedded with; datasets that it held out
            are held out here, too.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Returns:
        ``output`` as a path.

    Raises:
        ZooError: the zoo cannot be used, or ``output`` holds another model.
        SettingsError: the settings, the autoencoder or the joint model do not fit the zoo or this machine.
    """
    opened = load_zoo(zoo).usable()
    given = {
        "autoencoder": trained_with(Path(autoencoder), "autoencoder", name="autoencoder"),
        "joint": trained_with(Path(joint), "joint", name="joint"),
    }

    def prepare(split: Split) -> Prepared:
        for (name, record), folder in zip(given.items(), (autoencoder, joint), strict=True):
            ensure_same_test_runs(record, opened, split, settings.split_seed, f"{name} {folder}")
        codec = LatentCodec(*load_trained(autoencoder, WeightAutoencoderModel))
        if isinstance(settings, CodePriorSettings) and codec.model.quantizer is None:
            raise SettingsError(f"autoencoder: {autoencoder} has no codes; train one with `encoder.code_levels` set")
        joint_model, _ = load_trained(joint, JointModel)
        conditions = Conditions.of(opened, joint_model, allow_pickle=allow_pickle)
        extras = {
            "autoencoder": str(autoencoder),
            "joint": str(joint),
            "held_out_datasets": list(given["joint"].held_out_datasets),
            "datasets_left_out": conditions.left_out,
        }
        return _prepared(opened, split, settings, codec, conditions, given["joint"], extras)

    differs = "a prior of another zoo, other models"
    others = tuple(record.identity for record in given.values())
    return run_training("prior", opened, output, settings, prepare, others=others, differs=differs)


def _prepared(
    zoo: Zoo,
    split: Split,
    settings: PriorSettings,
    codec: LatentCodec,
    conditions: Conditions,
    joint: TrainingRecord,
    extras: Mapping[str, Any],
) -> Prepared:
    """Builds the prior around its autoencoder, and aligns the models of datasets that were not held out."""
    loop, prior_class = settings.loop, _prior_class(settings)
    codec.model.config.name_or_path = ""  # cards must not show where it lies on this machine
    seen = ~zoo.index["dataset"].isin(joint.held_out_datasets).to_numpy()
    training = AlignedModels.of(zoo, split.train[seen[split.train]], codec)
    torch.manual_seed(loop.seed)
    assert prior_class.config_class is not None
    config: Any = config_from(
        prior_class.config_class,
        settings.shape,
        name="shape",
        autoencoder_config=codec.model.config,
        class_size=conditions.joint.dataset_model.class_size,
        result_size=conditions.joint.embedding_size,
        joint_identity=joint.identity,
        activations=conditions.activations,
    )
    model = prior_class(config)
    model.autoencoder.load_state_dict(codec.model.state_dict())
    if isinstance(model, WeightPriorModel):
        model.scaler.fit(training.tokens())
    batches = PriorBatches(training, conditions, settings)
    validation = split.validation[seen[split.validation]]
    chosen = np.random.default_rng(loop.seed).permutation(validation)[:_VALIDATION_MODELS]
    aligned = AlignedModels.of(zoo, np.sort(chosen), codec, references=training.references)
    objective = PriorObjective(zoo, aligned, conditions, codec.extractor, settings)
    return Prepared(model, codec.extractor, batches, objective, extras)


def _prior_class(settings: PriorSettings) -> type[WeightPriorModel | WeightCodePriorModel]:
    return WeightCodePriorModel if isinstance(settings, CodePriorSettings) else WeightPriorModel


def _drawn(
    settings: PriorSettings, latents: Float[Tensor, "batch n latent"], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draws what else the forward of a prior takes: which codes are known, or noise and times."""
    if isinstance(settings, CodePriorSettings):
        shares = settings.unknown * torch.rand(len(latents), 1, generator=generator)
        return {"known": torch.rand(latents.shape[:2], generator=generator) >= shares}
    noise = torch.randn(latents.shape, generator=generator)
    return {"noise": noise, "times": torch.rand(len(latents), generator=generator)}


@dataclass(frozen=True, eq=False)
class PriorBatches:
    """Endless micro-batches; see `weightspace.training.loop.Batches`."""

    models: AlignedModels
    conditions: Conditions
    settings: PriorSettings

    def __call__(self, start: int, process: int, processes: int) -> Iterator[Batch]:
        """Yields the micro-batches of one process from number ``start`` on."""
        for number in itertools.count(start):
            generator = seeded_generator(self.settings.loop.seed, number, process)
            size = (self.settings.loop.batch_size,)
            places = torch.randint(len(self.models.rows), size, generator=generator).numpy()
            yield self.batch(places, number, generator)

    def batch(self, places: Int[np.ndarray, "batch"], number: int, generator: torch.Generator) -> Batch:
        """Puts models together, and draws what is asked of them and what else the model is given."""
        rows = self.models.rows[places]
        outputs = self.models.outputs(places)
        orders = self.conditions.orders(rows, outputs, self.settings.shuffle_classes, generator)
        inputs, parts = self.models.batch(places, orders)
        inputs |= {**self.conditions.asked(rows, orders, self.settings.drop, generator), "ordered": outputs > 0}
        inputs |= _drawn(self.settings, inputs["latents"], generator)
        return Batch(inputs, parts, number, rows)


class PriorObjective(Objective):
    """Flow matching or the likelihood of codes, mixed with what the models do that the guessed latents decode to."""

    def __init__(
        self,
        zoo: Zoo,
        validation: AlignedModels,
        conditions: Conditions,
        extractor: WeightFeatureExtractor,
        settings: PriorSettings,
    ) -> None:
        self._loss = _prior_class(settings).loss_name
        self._behaviour = BehaviourLoss(zoo, extractor, settings.behaviour, settings.loop.seed)
        batches = PriorBatches(validation, conditions, replace(settings, shuffle_classes=0.0))
        generator = torch.Generator().manual_seed(settings.loop.seed)
        self._validation = batches.batch(np.arange(len(validation.rows)), 0, generator)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """``loss``, ``flow`` or ``codes`` and, where functions can be run, ``behaviour``."""
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        weight = self._behaviour.weight
        output = model(**inputs, decode=bool(weight))
        losses = {"loss": output.loss, self._loss: output.loss}
        if weight:
            behaviour = self._behaviour_of(output.reconstruction.float(), batch)
            losses |= {"loss": (1 - weight) * output.loss + weight * behaviour, "behaviour": behaviour}
        return losses

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        """The losses of unseen models, always with the same draws."""
        return {name: float(value) for name, value in self.losses(model, self._validation).items()}

    def _behaviour_of(self, tokens: Float[Tensor, "batch n d"], batch: Batch) -> Float[Tensor, ""]:
        """The behaviour loss of rows that know their dataset; 0 where there is none."""
        known = batch.inputs["class_features"].flatten(1).any(1)
        parts = []
        for part in batch.parts:
            chosen = known[part.places].nonzero().flatten()
            parts.append(
                BatchPart(part.architecture, part.rows[chosen.numpy()], part.places[chosen], part.flat[chosen])
            )
        losses, count = self._behaviour(tokens, parts, batch.number)
        return torch.stack([tokens.new_zeros(()), *losses]).sum() / max(1, count)
