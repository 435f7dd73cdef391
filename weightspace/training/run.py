"""What every training does around the loop: identity, reuse and resumption, the saved folder, its record and card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from transformers.configuration_utils import PreTrainedConfig

from weightspace.cards.record import write_card
from weightspace.errors import SettingsError, ZooError
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.training.loop import Batches, Objective, clear_checkpoints, fit, is_main_process
from weightspace.zoo.dataset import Zoo
from weightspace.zoo.facts import training_zoo
from weightspace.zoo.splits import Split, split_by_run
from weightspace.zoo.storage import write_text

TRAINING_FILE = "training.json"
_NOT_IDENTITY = ("checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "tracker")

Kind = Literal["autoencoder", "joint", "prior"]
Config = TypeVar("Config", bound=PreTrainedConfig)


@dataclass(frozen=True)
class TrainingRecord:
    """What ``training.json`` records of a trained model.

    Attributes:
        kind: what was trained, named as by ``weightspace train``.
        identity: digest of all that the trained weights follow from.
        zoo: location of the zoo.
        zoo_digest: digest of its content.
        settings: the settings dataclass, as JSON.
        validation_runs: runs of the zoo that the model was validated on.
        test_runs: runs of the zoo that were kept for tests.
        complete: whether the training is finished.
        parameters: number of the model's parameters; None before the training is finished.
        extras: what only this kind of model records, e.g. the folders of the models it was trained with.
    """

    kind: Kind
    identity: str
    zoo: str
    zoo_digest: str
    settings: Mapping[str, Any]
    validation_runs: tuple[str, ...]
    test_runs: tuple[str, ...]
    complete: bool = False
    parameters: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held_out_datasets(self) -> tuple[str, ...]:
        """Datasets of the zoo whose models the model was not trained on."""
        return tuple(self.extras.get("held_out_datasets") or self.settings.get("held_out_datasets") or ())

    def write(self, folder: Path) -> None:
        """Writes ``training.json`` atomically."""
        values = {name: value for name, value in asdict(self).items() if name != "extras" and value is not None}
        write_text(folder / TRAINING_FILE, json.dumps({**values, **self.extras}, indent=2, sort_keys=True) + "\n")


def read_training(folder: Path | str) -> TrainingRecord | None:
    """Reads the training record of a model; None if its folder has none.

    Raises:
        ZooError: the file is not what this library writes.
    """
    path = Path(folder) / TRAINING_FILE
    if not path.exists():
        return None
    names = {one.name for one in fields(TrainingRecord)}
    try:
        state = dict(json.loads(path.read_text()))
        known = {name: state.pop(name) for name in names & state.keys()}
        if not isinstance(known["complete"], bool) or not isinstance(known["test_runs"], list):
            raise TypeError
        known |= {name: tuple(known[name]) for name in ("validation_runs", "test_runs")}
        return TrainingRecord(**({"kind": _unrecorded_kind(known["settings"])} | known), extras=state)
    except (ValueError, KeyError, TypeError):
        raise ZooError(f"{path}: not a training record; train the encoder again") from None


def _unrecorded_kind(settings: Mapping[str, Any]) -> Kind:
    """Infers what was trained from its settings: older records do not say."""
    return "joint" if "held_out_datasets" in settings else "prior" if "shape" in settings else "autoencoder"


def trained_with(folder: Path, kind: Kind, *, name: str) -> TrainingRecord:
    """Reads the record of a finished model that another one is trained with.

    Args:
        folder: the model.
        kind: what it has to be.
        name: argument that named it, for errors.

    Raises:
        SettingsError: the folder holds no such model, or its training is not finished.
    """
    record = read_training(folder)
    if record is None or not record.complete:
        raise SettingsError(f"{name}: {folder} holds no trained model; run `weightspace train {kind}` first")
    if record.kind != kind:
        raise SettingsError(f"{name}: {folder} holds another kind of model; give what `weightspace train {kind}` wrote")
    return record


def ensure_same_test_runs(record: TrainingRecord, zoo: Zoo, split: Split, seed: int, model: str) -> None:
    """Refuses a split whose test runs a model trained on the same zoo has seen; ``model`` names it in errors.

    Raises:
        SettingsError: naming the split seed to use.
    """
    if record.zoo_digest == zoo.digest and set(record.test_runs) != set(_runs(zoo, split.test)):
        raise SettingsError(
            f"split_seed: {seed} tests on runs that the {model} was trained on; use the one that it was trained with, "
            f"{record.settings.get('split_seed')}"
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that a training loop needs, built from settings and a zoo.

    Attributes:
        model: the untrained model, a `PreTrainedModel` with ``card_facts``.
        extractor: its input side, saved beside it.
        batches: the training data.
        objective: losses and validation.
        extras: see `TrainingRecord`.
    """

    model: Any
    extractor: WeightFeatureExtractor
    batches: Batches
    objective: Objective
    extras: Mapping[str, Any] = field(default_factory=dict)


def run_training(
    kind: Kind,
    zoo: Zoo,
    output: Path | str,
    settings: Any,
    prepare: Callable[[Split], Prepared],
    *,
    others: tuple[str, ...] = (),
    differs: str,
) -> Path:
    """Trains a model on the training runs of a zoo and saves it as a `save_pretrained` folder.

    A finished folder of the same identity is left as it is; an unfinished one continues where it stopped.
    ``training.json`` beside the model records settings, zoo and held-out runs, and a card describes it.

    Args:
        kind: what is trained.
        zoo: what it is trained on.
        output: folder of the model.
        settings: a settings dataclass with ``loop`` and ``split_seed``.
        prepare: builds everything from the split; called only if there is something to train.
        others: digests of whatever else the weights follow from.
        differs: what a folder of another identity holds, for the error.

    Returns:
        ``output`` as a path.

    Raises:
        ZooError: ``output`` holds a model of another identity.
        WeightspaceError: whatever ``prepare`` or the training loop raises.
    """
    output = Path(output)
    identity = _identity(zoo, settings, *others)
    record = read_training(output)
    if record is not None and record.identity != identity:
        raise ZooError(
            f"{output}: holds {differs} or other settings ({record.identity}, asked for {identity}); choose another "
            "--output or delete it"
        )
    if record is not None and record.complete:
        return output
    split = split_by_run(zoo.index["run_id"].to_numpy(), settings.split_seed)
    prepared = prepare(split)
    record = TrainingRecord(
        kind=kind,
        identity=identity,
        zoo=zoo.location,
        zoo_digest=zoo.digest,
        settings=asdict(settings),
        validation_runs=_runs(zoo, split.validation),
        test_runs=_runs(zoo, split.test),
        extras=prepared.extras,
    )
    writes = is_main_process()
    if writes:
        record.write(output)
    model: Any = fit(prepared.model, prepared.batches, prepared.objective, settings.loop, output)
    if writes:
        model.save_pretrained(output)
        prepared.extractor.save_pretrained(output)
        write_card(output, replace(model.card_facts(), zoo=training_zoo(zoo), training=asdict(settings)))
        replace(record, complete=True, parameters=model.num_parameters()).write(output)
        clear_checkpoints(output)
    return output


def config_from(cls: type[Config], settings: Any, *, name: str, **given: Any) -> Config:
    """Builds a model configuration from the fields that it shares with settings, and from ``given`` ones.

    Settings say ``layers`` and ``heads`` where configurations say ``num_..._layers`` and ``num_attention_heads``, and
    feed-forward networks are four times as wide as the transformer.

    Args:
        cls: class of the configuration.
        settings: a dataclass.
        name: key of the settings, for errors.
        **given: further fields; they win.

    Raises:
        SettingsError: the configuration refuses a value.
    """
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}
    if "layers" in shape:
        shape |= {f"num_{side}layers": shape["layers"] for side in ("", "encoder_", "decoder_")}
        shape |= {"num_attention_heads": shape["heads"], "intermediate_size": 4 * shape["hidden_size"]}
    known = {one.name for one in fields(cls)}
    try:
        return cls(**({key: value for key, value in shape.items() if key in known} | given))
    except Exception as error:  # strict configs raise their own family of errors
        raise SettingsError(f"{name}: {' '.join(str(error).split())}") from error


def _identity(zoo: Zoo, settings: Any, *others: str) -> str:
    """Digest of all that the trained weights follow from, without how the run is watched and kept."""
    values = asdict(settings)
    for name in _NOT_IDENTITY:
        del values["loop"][name]
    return hashlib.sha256(json.dumps([zoo.digest, values, *others]).encode()).hexdigest()[:16]


def _runs(zoo: Zoo, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(sorted(set(zoo.index["run_id"].to_numpy()[rows])))
