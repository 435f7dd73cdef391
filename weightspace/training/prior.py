"""Trains priors of weights given datasets and results on a zoo: by flow matching on latents, or of codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from weightspace.cards import write_card
from weightspace.errors import SettingsError, ZooError
from weightspace.losses import behaviour_loss
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.codec import LatentCodec
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.models.prior.configuration_code_prior import WeightCodePriorConfig
from weightspace.models.prior.configuration_prior import WeightPriorConfig
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import ConditionedPrior, WeightPriorModel
from weightspace.networks.families import run_flat
from weightspace.training.aligned import AlignedModels, Members
from weightspace.training.autoencoder import (
    BehaviourSettings,
    QueryImages,
    read_training,
    training_identity,
    write_training,
)
from weightspace.training.batches import seeded_generator
from weightspace.training.conditions import Conditions
from weightspace.training.loop import Objective, clear_checkpoints, fit, is_main_process
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.facts import training_zoo
from weightspace.zoo.splits import split_by_run

_VALIDATION_MODELS = 256


@dataclass(frozen=True)
class PriorShape:
    """Shape of the prior; see `WeightPriorConfig` for the fields.

    Attributes:
        hidden_size: width of the transformer.
        layers: its layers.
        heads: attention heads.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True)
class PriorSettings:
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
    shuffle_classes: float = 1.0
    drop: float = 0.1
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=1600, batch_size=128, learning_rate=2e-3))
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Refuses shares that are none."""
        if not 0 <= self.drop < 1:
            raise SettingsError(f"drop: {self.drop} is no share of the rows, give 0 to below 1")
        if not 0 <= self.shuffle_classes <= 1:
            raise SettingsError(f"shuffle_classes: {self.shuffle_classes} is no share of the rows, give 0 to 1")


@dataclass(frozen=True)
class CodePriorSettings(PriorSettings):
    """Everything that determines a trained prior of codes, a `WeightCodePriorModel`, besides what it is trained on.

    Attributes:
        unknown: largest share of a model's tokens whose codes are kept from the prior; the share is drawn for each
            model, from 0 on.
    """

    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=720, batch_size=64, learning_rate=2e-3))
    unknown: float = 1.0

    def __post_init__(self) -> None:
        """Refuses shares that are none."""
        super().__post_init__()
        if not 0 <= self.unknown <= 1:
            raise SettingsError(f"unknown: {self.unknown} is no share of the tokens, give 0 to 1")


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
    output, opened = Path(output), load_zoo(zoo)
    folders = {"autoencoder": Path(autoencoder), "joint": Path(joint)}
    records = {name: _record(folder, name) for name, folder in folders.items()}
    identity = training_identity(opened, settings, *(str(record["identity"]) for record in records.values()))
    state = read_training(output)
    if state is not None and state["identity"] != identity:
        raise ZooError(
            f"{output}: holds a prior of another zoo, other models or other settings ({state['identity']}, asked for "
            f"{identity}); choose another --output or delete it"
        )
    if state is not None and state["complete"]:
        return output
    method = _method(settings)
    if method.codes and records["autoencoder"]["settings"]["encoder"].get("code_levels") is None:
        raise SettingsError(f"autoencoder: {autoencoder} has no codes; train one with `encoder.code_levels` set")
    split = split_by_run(opened.index["run_id"].to_numpy(), settings.split_seed)
    runs = opened.index["run_id"].to_numpy()
    for name, record in records.items():
        if record["zoo_digest"] == opened.digest and set(record["test_runs"]) != set(runs[split.test]):
            raise SettingsError(
                f"split_seed: {settings.split_seed} tests on runs that the {name} {folders[name]} was trained on; use "
                f"the {record['settings']['split_seed']} that it was trained with"
            )
    held_out = list(records["joint"]["settings"]["held_out_datasets"])
    facts = {
        "identity": identity,
        "zoo": opened.location,
        "zoo_digest": opened.digest,
        "settings": asdict(settings),
        "autoencoder": str(autoencoder),
        "joint": str(joint),
        "held_out_datasets": held_out,
        "validation_runs": sorted(set(runs[split.validation])),
        "test_runs": sorted(set(runs[split.test])),
    }
    writes = is_main_process()
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        write_training(output, {**facts, "complete": False})
    joint_model = JointModel.from_pretrained(folders["joint"]).eval()
    extractor = WeightFeatureExtractor.from_pretrained(folders["autoencoder"])
    own = WeightAutoencoderModel.from_pretrained(folders["autoencoder"]).eval()
    codec = LatentCodec(own, extractor)
    own.config.name_or_path = ""  # where it lies on this machine is nothing that a card should say
    seen = ~opened.index["dataset"].isin(held_out).to_numpy()
    conditions = Conditions.of(opened, joint_model, records["joint"]["settings"], allow_pickle=allow_pickle)
    training = AlignedModels.of(opened, split.train[seen[split.train]], codec)
    torch.manual_seed(settings.loop.seed)
    model = method.model(
        _config(method, settings, own, joint_model, str(records["joint"]["identity"]), conditions.activations)
    )
    model.autoencoder.load_state_dict(own.state_dict())
    if isinstance(model, WeightPriorModel):
        model.scaler.fit(training.tokens())
    loop = settings.loop
    batches = PriorBatches(
        training, conditions, settings.drop, loop.batch_size, loop.seed, method.draw, settings.shuffle_classes
    )
    validation = split.validation[seen[split.validation]]
    chosen = np.random.default_rng(settings.loop.seed).permutation(validation)[:_VALIDATION_MODELS]
    aligned = AlignedModels.of(opened, np.sort(chosen), codec, references=training.references)
    objective = PriorObjective(opened, aligned, conditions, extractor, settings)
    trained = fit(model, batches, objective, settings.loop, output)
    assert isinstance(trained, method.model)
    if writes:
        trained.save_pretrained(output)
        extractor.save_pretrained(output)
        write_card(output, replace(trained.card_facts(), zoo=training_zoo(opened), training=asdict(settings)))
        write_training(output, {**facts, "complete": True, "parameters": trained.num_parameters()})
        clear_checkpoints(output)
    return output


def _record(folder: Path, what: str) -> dict[str, Any]:
    state = read_training(folder)
    if state is None or not state["complete"]:
        raise SettingsError(f"{what}: {folder} holds no trained model; run `weightspace train {what}` first")
    if ("held_out_datasets" in state["settings"]) != (what == "joint"):
        raise SettingsError(f"{what}: {folder} holds another kind of model; give what `weightspace train {what}` wrote")
    return state


def _config(
    method: _Method,
    settings: PriorSettings,
    autoencoder: WeightAutoencoderModel,
    joint: JointModel,
    joint_identity: str,
    activations: list[str],
) -> PreTrainedConfig:
    shape = settings.shape
    try:
        return method.config(
            autoencoder_config=autoencoder.config,
            class_size=joint.dataset_model.class_size,
            result_size=joint.embedding_size,
            joint_identity=joint_identity,
            activations=activations,
            hidden_size=shape.hidden_size,
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden_size,
        )
    except Exception as error:  # strict configs raise their own family of errors
        raise SettingsError(f"shape: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class _Method:
    """What is particular to the training of one kind of prior.

    Attributes:
        loss: name of what is minimised besides the behaviour loss.
        config: class of the configuration.
        model: class of the model.
        draw: draws further arguments of the model's forward for a batch.
    """

    loss: str
    config: Callable[..., PreTrainedConfig]
    model: type[ConditionedPrior]
    draw: Callable[[Mapping[str, Tensor], torch.Generator], dict[str, Tensor]]

    @property
    def codes(self) -> bool:
        """Whether it takes an autoencoder with codes."""
        return self.model is WeightCodePriorModel


def _method(settings: PriorSettings) -> _Method:
    if isinstance(settings, CodePriorSettings):
        draw = functools.partial(_known_tokens, unknown=settings.unknown)
        return _Method("codes", WeightCodePriorConfig, WeightCodePriorModel, draw)
    return _Method("flow", WeightPriorConfig, WeightPriorModel, _noise_and_times)


def _noise_and_times(inputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    latents = inputs["latents"]
    noise = torch.randn(latents.shape, generator=generator)
    return {"noise": noise, "times": torch.rand(len(latents), generator=generator)}


def _known_tokens(inputs: Mapping[str, Tensor], generator: torch.Generator, unknown: float) -> dict[str, Tensor]:
    batch, length, _ = inputs["latents"].shape
    shares = unknown * torch.rand(batch, 1, generator=generator)
    return {"known": torch.rand(batch, length, generator=generator) >= shares}


@dataclass(frozen=True, eq=False)
class PriorBatch:
    """Models as latents, with what is asked of them.

    Attributes:
        inputs: arguments of the model's forward.
        members: what the behaviour loss needs, one entry an architecture.
        rows: of the models in the zoo.
        number: running number of the micro-batch.
    """

    inputs: dict[str, Tensor]
    members: list[Members]
    rows: Int[np.ndarray, "batch"]
    number: int


@dataclass(frozen=True, eq=False)
class PriorBatches:
    """Endless micro-batches; see `weightspace.training.loop.Batches`."""

    models: AlignedModels
    conditions: Conditions
    drop: float
    batch_size: int
    seed: int
    draw: Callable[[Mapping[str, Tensor], torch.Generator], dict[str, Tensor]] = _noise_and_times
    shuffle_classes: float = 0.0

    def __call__(self, start: int, process: int, processes: int) -> Iterator[PriorBatch]:
        """Yields the micro-batches of one process from number ``start`` on."""
        number, count = start, len(self.models.rows)
        while True:
            generator = seeded_generator(self.seed, number, process)
            places = torch.randint(count, (self.batch_size,), generator=generator).numpy()
            yield self.batch(places, number, generator)
            number += 1

    def batch(self, places: Int[np.ndarray, "batch"], number: int, generator: torch.Generator) -> PriorBatch:
        """Puts models together, and draws what is asked of them and what else the model is given."""
        rows = self.models.rows[places]
        orders = self.conditions.orders(rows, self.models.outputs(places), self.shuffle_classes, generator)
        inputs, members = self.models.batch(places, orders)
        inputs |= self.conditions.asked(rows, orders, self.drop, generator)
        inputs |= self.draw(inputs, generator)
        return PriorBatch(inputs, members, rows, number)


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
        self._extractor, self._behaviour, self._seed = extractor, settings.behaviour, settings.loop.seed
        self._method = _method(settings)
        queries = QueryImages(zoo) if settings.behaviour.weight else None
        self._queries = queries if queries is not None and queries.runnable else None
        models = len(validation.rows)
        batches = PriorBatches(validation, conditions, settings.drop, models, self._seed, self._method.draw)
        self._validation = batches.batch(np.arange(models), 0, torch.Generator().manual_seed(self._seed))

    def losses(self, model: nn.Module, batch: PriorBatch) -> Mapping[str, Tensor]:
        """``loss``, ``flow`` or ``codes`` and, where functions can be run, ``behaviour``."""
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        output = model(**inputs, decode=self._queries is not None)
        losses = {"loss": output.loss, self._method.loss: output.loss}
        if self._queries is not None:
            weight, behaviour = self._behaviour.weight, self._behaviour_of(output.reconstruction.float(), batch)
            losses |= {"loss": (1 - weight) * output.loss + weight * behaviour, "behaviour": behaviour}
        return losses

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        """The losses of unseen models, always with the same draws."""
        return {name: float(value) for name, value in self.losses(model, self._validation).items()}

    def _behaviour_of(self, tokens: Float[Tensor, "batch n d"], batch: PriorBatch) -> Float[Tensor, ""]:
        """The behaviour loss of rows that know their dataset; 0 where there is none."""
        assert self._queries is not None
        told = batch.inputs["class_features"].flatten(1).any(1)
        generator = torch.Generator().manual_seed(self._seed + batch.number)
        values, count = [tokens.new_zeros(())], 0
        for members in batch.members:
            chosen = told[members.places].nonzero().flatten()
            places, architecture = members.places[chosen], members.architecture
            decoded = self._extractor.restore(
                tokens[places.to(tokens.device), : self._extractor.token_count(architecture)], architecture
            )
            rows = batch.rows[places.numpy()]
            for config, inside in self._queries.functions(rows).items():
                images = self._queries.draw(rows[inside], self._behaviour.images, generator).to(decoded.device)
                original = run_flat(config, architecture, members.flat[chosen[inside]].to(decoded), images)
                imitated = run_flat(config, architecture, decoded[inside], images)
                values.append(behaviour_loss(imitated, original) * len(inside))
                count += len(inside)
        return torch.stack(values).sum() / max(1, count)
