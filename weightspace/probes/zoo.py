"""Probes a whole zoo: baselines and an encoder's embedding, for chosen targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from weightspace.encoder import Encoder, embed_zoo, load_encoder
from weightspace.errors import SettingsError
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.probes.explain import Description
from weightspace.probes.probe import probe_table
from weightspace.probes.representations import (
    Features,
    WeightBlock,
    baselines,
    collect_weights,
    statistics_of_rows,
)
from weightspace.probes.rows import ProbeRow
from weightspace.probes.runs import RunTable
from weightspace.probes.targets import read_target
from weightspace.training.run import TrainingRecord, read_training
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
    unseen_datasets: bool = False,
) -> list[ProbeRow]:
    """Predicts ``targets`` from weights, by every baseline and by the encoder's embedding.

    An encoder that was trained on this zoo is tested on the runs that its training held out, and so are the baselines.

    With ``unseen_datasets`` the test models are of datasets that no probe was trained on. Where a joint model is probed
    these are its ``held_out_datasets``; else each seed draws 15 % of the datasets. An autoencoder holds out no
    datasets: it is tested on runs that it never saw, of datasets whose other models it has seen, and a note says so.
    Datasets are distinguished by their ids, so that two variants of one base are two datasets.

    Args:
        zoo: a zoo or its folder.
        encoder: an encoder or its folder, or an autoencoder and a joint model that held out the same runs; None for the
            baselines alone.
        targets: results, e.g. ``"test_accuracy"``, hyper-parameters, ``"classes"``; see `read_target`.
        seeds: one split each.
        unseen_datasets: whether to test on datasets that are not trained on.

    Raises:
        SettingsError: the zoo does not know a target, encoders held out different runs, or a joint model was trained on
            all datasets of which some are to be unseen.
        ZooError: there are too few runs with a target, or on a side of the split.
    """
    opened = (zoo if isinstance(zoo, Zoo) else load_zoo(zoo)).usable()
    columns = {name: read_target(opened, name) for name in targets}
    given = [] if encoder is None else [encoder] if isinstance(encoder, Encoder | Path | str) else encoder
    encoders = [one if isinstance(one, Encoder) else load_encoder(one) for one in given]
    blocks = collect_weights(opened.batches(), torch.Generator().manual_seed(0))
    representations = baselines(blocks)
    for one in encoders:
        if _name(one) in representations:
            raise SettingsError(f"{one.name}: a second {_name(one)} model; probe one of each kind at a time")
        representations[_name(one)] = encoder_features(one, blocks)
    trained = [(one, _training_on(opened, one)) for one in encoders]
    splitting = _unseen_datasets(opened, trained) if unseen_datasets else {"test_runs": _held_out(trained)}
    with tqdm(desc="probe", unit="probe", leave=False) as progress:

        def advance(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        runs = opened.index["run_id"].to_numpy()
        rows = probe_table(representations, columns, runs, seeds, progress=advance, **splitting)
    notes = {_name(one): _seen_note(state) for one, state in trained} if unseen_datasets else {}
    return [_noted(row, notes.get(row.representation, "")) for row in rows]


def _name(encoder: Encoder) -> str:
    return JOINT if isinstance(encoder.model, JointModel) else ENCODER


def _noted(row: ProbeRow, note: str) -> ProbeRow:
    return replace(row, note="; ".join(filter(None, (row.note, note))))


def _training_on(zoo: Zoo, encoder: Encoder) -> TrainingRecord | None:
    """Returns the record of an encoder's training if it was trained on the zoo."""
    state = read_training(encoder.path)
    # A published zoo may lack some models of the one that it is a copy of; the held-out runs are the same.
    return state if state is not None and state.zoo_digest in (zoo.digest, zoo.settings.get(COPY_OF)) else None


def _held_out(trained: Sequence[tuple[Encoder, TrainingRecord | None]]) -> tuple[str, ...] | None:
    """Returns the test runs of encoders that were trained on the zoo; None if none was."""
    held_out: tuple[str, ...] | None = None
    for encoder, state in trained:
        if state is None:
            continue
        if held_out is not None and set(held_out) != set(state.test_runs):
            raise SettingsError(
                f"{encoder.name}: held out other runs than {trained[0][0].name}; train both with one split_seed"
            )
        held_out = state.test_runs
    return held_out


def _unseen_datasets(zoo: Zoo, trained: Sequence[tuple[Encoder, TrainingRecord | None]]) -> dict[str, Any]:
    """Chooses datasets, and of their runs those that no encoder was trained on; options of `probe_table`."""
    held_out: tuple[str, ...] | None = None
    for encoder, state in trained:
        if state is None or not isinstance(encoder.model, JointModel):
            continue
        held_out = state.held_out_datasets
        if not held_out:
            raise SettingsError(
                f"{encoder.name}: was trained on all datasets of {zoo.location}, so none is unseen; train a joint "
                "model with held_out_datasets in its settings, or leave it out"
            )
    return {
        "datasets": zoo.index["dataset"].to_numpy(),
        "test_datasets": held_out,
        "test_runs": _held_out([(encoder, state) for encoder, state in trained if _seen_note(state)]),
    }


def _seen_note(state: TrainingRecord | None) -> str:
    """Says what an encoder has seen of the datasets that are unseen to a probe; empty if it has seen nothing."""
    if state is None:
        return "whether the encoder has seen models of the test datasets is not known"
    if not state.held_out_datasets:
        return "the encoder has seen other models of the test datasets"
    if state.extras["encoder"] is not None:
        return "the encoder started from one that may have seen other models of the test datasets"
    return ""


def describe_runs(zoo: Zoo, table: RunTable, encoders: Mapping[str, Encoder]) -> list[Description]:
    """Describes runs by the embeddings of encoders, by name, and by s(W), the statistics of the raw weights."""
    return [
        *(Description(name, embed_zoo(encoder, zoo, table.rows)) for name, encoder in encoders.items()),
        Description("s(W)", *statistics_of_rows(zoo.batches(table.rows), table.rows)),
    ]


def encoder_features(encoder: Encoder, blocks: Sequence[WeightBlock]) -> Features:
    """Embeds all models of ``blocks``, and their neuron-permuted copies where the symmetry is known."""
    embedded = [block.described(partial(encoder.embed, architecture=block.architecture)) for block in blocks]
    return Features(embedded, shared=True)
