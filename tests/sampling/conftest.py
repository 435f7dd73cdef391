"""A density over the models of ``tiny_zoo``, and a condition for its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weightspace.encoder import Encoder, load_encoder
from weightspace.models.codec import LatentCodec
from weightspace.networks.families import FamilyConfig
from weightspace.sampling.base import Condition
from weightspace.sampling.kde import KdeSampler
from weightspace.search.queries import dataset_for, parse_results
from weightspace.zoo.dataset import Zoo


@pytest.fixture(scope="session")
def tiny_joint(tiny_clip_joint: Path) -> Encoder:
    """A joint model, loaded."""
    return load_encoder(tiny_clip_joint)


@pytest.fixture(scope="session")
def tiny_codec(tiny_encoder: Path) -> LatentCodec:
    """An autoencoder, loaded."""
    encoder = load_encoder(tiny_encoder)
    return encoder.codec


@pytest.fixture(scope="session")
def tiny_kde(tiny_zoo: Zoo, tiny_codec: LatentCodec, tiny_joint: Encoder) -> KdeSampler:
    """A density over all models of the zoo."""
    return KdeSampler(tiny_zoo, np.arange(len(tiny_zoo)), tiny_codec, tiny_joint)


@pytest.fixture(scope="session")
def tiny_family(tiny_zoo: Zoo) -> FamilyConfig:
    """The config of the first model."""
    family = tiny_zoo.families[0]
    assert family is not None
    return family


@pytest.fixture(scope="session")
def tiny_condition(tiny_zoo: Zoo, tiny_joint: Encoder, tiny_family: FamilyConfig) -> Condition:
    """The architecture and the dataset of the first model, and good results."""
    dataset = dataset_for(tiny_joint, tiny_zoo.index["dataset"][0])
    return replace(Condition.from_config(tiny_family.to_dict()), dataset=dataset, results=parse_results(">=0.3"))
