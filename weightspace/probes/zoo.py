"""Probes a whole zoo: baselines and an encoder's embedding, for chosen targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from weightspace.errors import SettingsError
from weightspace.index import Encoder, load_encoder
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.probes.probe import ProbeRow, probe_table
from weightspace.probes.representations import (
    FixedFeatures,
    WeightBlock,
    baselines,
    collect_weights,
    embedding_features,
)
from weightspace.training.autoencoder import read_training
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.storage import COPY_OF

ENCODER = "autoencoder"
JOINT = "joint"


def probe_zoo(
    zoo: Zoo | Path | str,
    encoder: Encoder | Path | str | Sequence[Encoder | Path | str] | None,
    targets: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[ProbeRow]:
    """Predicts ``targets`` from weights, by every baseline and by the encoder's embedding.

    An encoder that was trained on this zoo is tested on the runs that its training held out, and so are the baselines.

    Args:
        zoo: a zoo or its folder.
        encoder: an encoder or its folder, or an autoencoder and a joint model that held out the same runs; None for the
            baselines alone.
        targets: columns of the zoo's index: results, e.g. ``"test_accuracy"``, or numeric hyper-parameters.
        seeds: one split each.

    Raises:
        SettingsError: a target is no numeric column of the zoo, or encoders held out different runs.
        ZooError: there are too few runs with a target.
    """
    opened = zoo if isinstance(zoo, Zoo) else load_zoo(zoo)
    columns = {name: target_values(opened, name) for name in targets}
    given = [] if encoder is None else [encoder] if isinstance(encoder, Encoder | Path | str) else encoder
    encoders = [one if isinstance(one, Encoder) else load_encoder(one) for one in given]
    blocks = collect_weights(opened.batches(), torch.Generator().manual_seed(0))
    representations = baselines(blocks)
    for one in encoders:
        name = JOINT if isinstance(one.model, JointModel) else ENCODER
        representations[name] = encoder_features(one, blocks, len(opened))
    held_out = _held_out(opened, encoders)
    with tqdm(desc="probe", unit="probe", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return probe_table(
            representations,
            columns,
            opened.index["run_id"].to_numpy(),
            seeds,
            test_runs=held_out,
            progress=advance,
        )


def _held_out(zoo: Zoo, encoders: Sequence[Encoder]) -> list[str] | None:
    """Returns the test runs of encoders that were trained on the zoo; None if none was."""
    held_out: list[str] | None = None
    for encoder in encoders:
        state = read_training(encoder.path)
        # A published zoo may lack some models of the one that it is a copy of; the held-out runs are the same.
        if state is None or state["zoo_digest"] not in (zoo.digest, zoo.settings.get(COPY_OF)):
            continue
        if held_out is not None and set(held_out) != set(state["test_runs"]):
            raise SettingsError(
                f"{encoder.name}: held out other runs than {encoders[0].name}; train both with one split_seed"
            )
        held_out = state["test_runs"]
    return held_out


def encoder_features(encoder: Encoder, blocks: Sequence[WeightBlock], models: int) -> FixedFeatures:
    """Embeds all models of ``blocks``, and their neuron-permuted copies where the symmetry is known."""
    plain: Float[np.ndarray, "models features"] | None = None
    moved: Float[np.ndarray, "models features"] | None = None
    names = np.empty(models, dtype=object)
    for number, block in enumerate(blocks):
        values = encoder.embed(block.flat, block.architecture).numpy()
        if plain is None or moved is None:
            plain, moved = np.empty((models, values.shape[1]), np.float32), np.full((models, values.shape[1]), np.nan)
        plain[block.rows] = values
        if block.permuted is not None:
            moved[block.rows] = encoder.embed(block.permuted, block.architecture).numpy()
        names[block.rows] = f"{number}"
    assert plain is not None
    return embedding_features(plain, moved, names.astype(str))


def target_values(zoo: Zoo, name: str) -> Float[np.ndarray, "models"]:
    """Reads one number a model from the zoo's results or hyper-parameters; NaN where it is missing.

    Raises:
        SettingsError: there is no such column, or it holds no numbers.
    """
    if name in zoo.result_names:
        values = zoo.index[name].to_numpy(dtype=np.float64)
    else:
        found = [entry.hyperparameters.get(name) for entry in zoo.entries()]
        values = pd.to_numeric(pd.Series(found, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).any():
        known = [column for column in zoo.result_names if zoo.index[column].notna().any()]
        raise SettingsError(f"target {name!r}: no numbers of that name in {zoo.location}; there are {', '.join(known)}")
    return values
