"""The trained models and zoos that samplers are built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from weightspace.encoder import Encoder, saved_folder
from weightspace.errors import SettingsError
from weightspace.io.folders import LocalFolder
from weightspace.io.hub import HubOptions
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo


@dataclass(frozen=True, eq=False)
class Sources:
    """What samplers are built from; a sampler that needs what is missing is refused.

    Attributes:
        joint: the joint model that datasets and results are embedded with.
        priors: folders of trained priors, or ``org/name`` on the Hub; ``flow`` and ``codes`` need one of their type.
        zoo: models to sample around; ``kde`` needs it.
        encoder: autoencoder whose latents ``kde`` samples; that of the first prior if left out.
        options: how the Hub is reached.
    """

    joint: Encoder
    priors: tuple[str, ...] = ()
    zoo: Zoo | None = None
    encoder: str | None = None
    options: HubOptions | None = None


def prior_type(location: str | Path, options: HubOptions | None = None) -> str | None:
    """Returns the model type of a prior.

    Raises:
        WeightspaceError: there is no prior.
    """
    folder, _ = saved_folder(location, options, kind="prior")
    kind: str | None = (LocalFolder(folder).read_json("config.json") or {}).get("model_type")
    return kind


def public_name(name: str, folder: Path) -> str:
    """Names a model without its location on this machine: by its name on the Hub, or by its folder and identity."""
    if not Path(name).is_absolute():
        return name
    record = read_training(folder)
    return folder.resolve().name + ("" if record is None else f" ({record.identity})")


def training_rows(zoo: Zoo, joint: Encoder) -> Int[np.ndarray, "rows"]:
    """Returns the rows of a zoo that a joint model, and models that hold out the same runs, were trained on.

    Raises:
        SettingsError: the joint model was trained on another zoo.
    """
    record = read_training(joint.path)
    if record is None or record.zoo_digest != zoo.digest:
        known = "of which nothing is recorded" if record is None else f"of digest {record.zoo_digest}"
        raise SettingsError(
            f"{zoo.location}: a zoo of digest {zoo.digest}, but the joint model {joint.name} was trained on one "
            f"{known}; give that zoo, or the joint model of this one"
        )
    held_out = zoo.index["run_id"].isin([*record.test_runs, *record.validation_runs])
    held_out |= zoo.index["dataset"].isin(held_out_datasets(joint))
    return np.flatnonzero(~held_out.to_numpy())


def held_out_datasets(joint: Encoder) -> tuple[str, ...]:
    """Returns the datasets that a joint model was not trained on although its zoo has models of them."""
    record = read_training(joint.path)
    return () if record is None else record.held_out_datasets
