"""What samplers from trained priors share: loading them, and telling them what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from weightspace.encoder import Encoder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.io.header import load_json_object, shown
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.codec import LatentCodec
from weightspace.models.loading import load_whole
from weightspace.models.prior.modeling_prior import ConditionedPrior, PriorCondition
from weightspace.sampling.conditions import Blueprint, Condition
from weightspace.search.queries import dataset_classes, result_query
from weightspace.training.run import read_training

P = TypeVar("P", bound=ConditionedPrior)


def load_prior(folder: str | Path, joint: Encoder, kind: type[P]) -> tuple[P, LatentCodec]:
    """Loads a prior that `train_prior` wrote, in evaluation mode, and its autoencoder.

    Args:
        folder: what `train_prior` wrote.
        joint: the joint model that it was trained with.
        kind: class of the prior.

    Raises:
        WeightspaceError: there is no prior of this kind, or it was trained with another joint model.
        ValueError: its file lacks weights.
    """
    if not (Path(folder) / "config.json").is_file():
        raise WeightspaceError(f"{folder}: no prior (there is no config.json); train one or check the path")
    found = load_json_object((Path(folder) / "config.json").read_bytes(), where=str(folder)).get("model_type")
    assert kind.config_class is not None
    wanted = kind.config_class.model_type
    if found != wanted:
        raise SettingsError(f"{folder}: holds a model of type {shown(found)}; give a prior of type {wanted}")
    prior = load_whole(kind, folder)
    record = read_training(joint.path)
    if record is None or prior.config.joint_identity != record.identity:
        raise SettingsError(
            f"joint model {joint.name}: the prior {folder} was trained with another one "
            f"({prior.config.joint_identity}); give that"
        )
    return prior, LatentCodec(prior.autoencoder, WeightFeatureExtractor.from_pretrained(folder))


def told(
    prior: ConditionedPrior, condition: Condition, blueprint: Blueprint, count: int, joint: Encoder
) -> PriorCondition:
    """Puts a condition, and the activation of the network asked for, as the prior knows them, for ``count`` samples.

    Raises:
        SettingsError: the condition does not fit the joint model.
    """
    config, family = prior.config, blueprint.family
    dataset, result = torch.zeros(1, config.class_size), torch.zeros(config.result_size)
    if condition.dataset is not None:
        dataset = dataset_classes(joint, condition.dataset)
    if condition.wanted:
        result = result_query(joint, condition.wanted)
    activation = prior.activation_number(None if family is None else family.activation)
    return PriorCondition(dataset.expand(count, -1, -1), result.expand(count, -1), torch.full((count,), activation))
