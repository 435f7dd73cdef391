"""The main job from end to end: train a zoo, open it as files, train encoders, measure them, write a report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from weightspace.cards import EncoderFacts, Measurement, Score, write_card
from weightspace.data.image_encoders import OFFLINE_ENCODER, open_image_encoder
from weightspace.encoder import Encoder, embed_zoo, load_encoder
from weightspace.errors import SettingsError
from weightspace.evaluation.bars import judge
from weightspace.evaluation.functions import FunctionComparison, compare_functions
from weightspace.evaluation.proof import ProofRow
from weightspace.evaluation.retrieval import retrieval_table
from weightspace.probes.explain import Description, Explanation, explain
from weightspace.probes.probe import ProbeRow, rows_to_records
from weightspace.probes.representations import LinearCodes, statistics_of_rows
from weightspace.probes.runs import MIN_RUNS, run_table
from weightspace.probes.zoo import ENCODER, JOINT, probe_zoo
from weightspace.report.page import (
    ALL_ARCHITECTURES,
    Curve,
    PredictedTrue,
    ReconstructionRow,
    Report,
    RetrievalRow,
    ZooMap,
    write_report,
)
from weightspace.sampling.opening import Sources, open_sampler
from weightspace.sampling.trials import EvaluationSettings, evaluate_samplers
from weightspace.schema import Architecture
from weightspace.training.autoencoder import (
    AutoencoderSettings,
    EncoderSettings,
    read_training,
    train_autoencoder,
)
from weightspace.training.joint import JointSettings, TowerSettings, train_joint
from weightspace.training.loop import read_history
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.describing import training_zoo
from weightspace.zoo.exporting import export_folder
from weightspace.zoo.importing import import_folder
from weightspace.zoo.storage import write_text
from weightspace.zoo.training import ZooSettings, train_zoo
from weightspace.zoo.views import Augmentation

_TARGETS = ("test_accuracy", "generalization_gap", "classes")
_DRAWS = 200  # a p-value of 0.005 can be told
_IDENTITY_FILE, _SECONDS_FILE = "report-of.json", "seconds.json"


def _joint_settings() -> JointSettings:
    """What two cores train in a minute or two; the image encoder is the one that needs no Hub."""
    return JointSettings(
        towers=TowerSettings(
            encoder=EncoderSettings(hidden_size=32, layers=1, heads=2), dropout=0.3, reconstruction_weight=0.0
        ),
        image_encoder=OFFLINE_ENCODER,
        augmentation=Augmentation(erase=0.0, noise=0.2),
        loop=LoopSettings(steps=900, batch_size=128, weight_decay=0.3, validate_every=300),
    )


def _sample_settings() -> EvaluationSettings:
    return EvaluationSettings(datasets=8, count=4, activations=1)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains and measures.

    Attributes:
        zoo: the zoo.
        autoencoder: the encoder.
        joint: the joint model, which holds out the same runs. A file that says anything of it has to name its image
            encoder, too.
        targets: what probes predict.
        seeds: split seeds of the probes.
    """

    zoo: ZooSettings = field(default_factory=ZooSettings)
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    joint: JointSettings = field(default_factory=_joint_settings)
    samplers: tuple[str, ...] = ("kde", "kde+selected", "kde+refined")
    samples: EvaluationSettings = field(default_factory=_sample_settings)
    targets: tuple[str, ...] = _TARGETS
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Refuses encoders that were trained on each other's test runs."""
        if self.joint.split_seed != self.autoencoder.split_seed:
            raise SettingsError(
                f"joint: split_seed {self.joint.split_seed} holds out other runs than the "
                f"{self.autoencoder.split_seed} of the autoencoder; give both the same"
            )


def run_demo(output: Path | str, settings: DemoSettings) -> Path:
    """Runs the main job; what is there already and unchanged is reused.

    ``output`` gets ``trained`` (the zoo as it was trained), ``models`` (the same models as plain safetensors files with
    ``metadata.jsonl``), ``zoo`` (imported from these files, as a user's own models would be), ``encoder`` and ``joint``
    (`save_pretrained` folders with their cards), ``report.html`` and ``report.json``.

    Args:
        output: folder of everything.
        settings: see `DemoSettings`.

    Returns:
        Path of the HTML report.

    Raises:
        ZooError: ``output`` holds something made with other settings.
        SettingsError: settings that cannot be trained with, or the image encoder is not there.
    """
    output = Path(output)
    open_image_encoder(settings.joint.image_encoder)  # what is not there is missed before minutes of training
    with _timed(output, "1/7 train the zoo"):
        trained = train_zoo(settings.zoo, output / "trained")
    with _timed(output, "2/7 open it as files"):
        if not (output / "models" / "metadata.jsonl").exists():
            export_folder(trained, output / "models")
        import_folder(output / "models", output / "zoo", on_problem="error")
        zoo = load_zoo(output / "zoo")
    with _timed(output, "3/7 train the autoencoder"):
        encoder_path = train_autoencoder(zoo.path, output / "encoder", settings.autoencoder)
    with _timed(output, "4/7 train the joint model"):
        joint_path = train_joint(zoo.path, output / "joint", settings.joint)
    report = output / "report.html"
    state, joint_state = _trained(encoder_path), _trained(joint_path)
    identity = {
        "encoder": state["identity"],
        "joint": joint_state["identity"],
        "samplers": list(settings.samplers),
        "samples": json.loads(json.dumps(asdict(settings.samples))),
        "targets": list(settings.targets),
        "seeds": list(settings.seeds),
    }
    if report.exists() and _read_identity(output) == identity:
        return report
    encoder, joint = load_encoder(encoder_path), load_encoder(joint_path)
    with _timed(output, "5/7 reconstruct, probe, retrieve and explain"):
        reconstruction = reconstruction_table(zoo, encoder, state)
        probes = probe_zoo(zoo, [encoder, joint], settings.targets, seeds=settings.seeds)
        retrieval = retrieval_table(zoo, joint, joint_state)
        explanation = explain_test_runs(zoo, {ENCODER: encoder, JOINT: joint}, state)
    with _timed(output, "6/7 sample models and judge them"):
        sources = Sources(joint, zoo=zoo, encoder=str(encoder_path))
        samplers = {name: open_sampler(name, sources).sampler for name in settings.samplers}
        samples = evaluate_samplers(samplers, zoo, joint, settings.samples)
    tables = _Tables(reconstruction, probes, retrieval, explanation, samples)
    with _timed(output, "7/7 write the report"):
        measured = _probe_measurements(probes, ENCODER) + _kept_measurements(reconstruction)
        write_card(encoder_path, _card(zoo, encoder.model.card_facts(), state, measured))
        measured = _probe_measurements(probes, JOINT) + _retrieval_measurements(retrieval)
        write_card(joint_path, _card(zoo, joint.model.card_facts(), joint_state, measured))
        write_report(_report(zoo, encoder, joint, settings, tables, _seconds(output)), output)
        write_text(output / _IDENTITY_FILE, json.dumps(identity) + "\n")
    return report


def _trained(folder: Path) -> dict[str, Any]:
    state = read_training(folder)
    assert state is not None
    return state


@dataclass(frozen=True)
class _Tables:
    reconstruction: list[ReconstructionRow]
    probes: list[ProbeRow]
    retrieval: list[RetrievalRow]
    explanation: Explanation | None
    samples: list[ProofRow]


def explain_test_runs(zoo: Zoo, encoders: Mapping[str, Encoder], training: Mapping[str, Any]) -> Explanation | None:
    """Asks encoders and s(W) whether models of one dataset cluster and what determines the weights.

    Args:
        zoo: the zoo that the encoders were trained on.
        encoders: by the name to show; all held out the same runs.
        training: the training record of one of them, which names these runs.

    Returns:
        The answers, or None where too few runs were held out for any.
    """
    table = run_table(zoo, training["test_runs"])
    if len(table) < MIN_RUNS:
        return None
    descriptions = [
        *(Description(name, embed_zoo(encoder, zoo, table.rows)) for name, encoder in encoders.items()),
        Description("s(W)", *statistics_of_rows(zoo.batches(table.rows), table.rows)),
    ]
    return explain(table, descriptions, draws=_DRAWS)


def reconstruction_table(zoo: Zoo, encoder: Encoder, training: Mapping[str, Any]) -> list[ReconstructionRow]:
    """Compares the test models that the encoder decodes with the originals, and PCA's at the same size with both.

    PCA and IncrementalPCA are fitted for each architecture on all runs that are no test runs.

    Args:
        zoo: the zoo that the encoder was trained on.
        encoder: the encoder.
        training: its training record, which names the test runs.
    """
    tested = zoo.index["run_id"].isin(training["test_runs"]).to_numpy()
    found: dict[str, list[_Decoded]] = {}
    methods = (ENCODER, "PCA", "IncrementalPCA")
    with tqdm(total=len(methods) * len(zoo.architectures), desc="reconstruct", leave=False) as bar:
        for header, architecture in zoo.architectures.items():
            rows = np.flatnonzero((zoo.index["header"] == header).to_numpy())
            test, rest = rows[tested[rows]], rows[~tested[rows]]
            if not len(test) or len(rest) < 2:
                bar.update(len(methods))
                continue
            flat, size = zoo.flat(test), encoder.latent_size(architecture)
            for method in methods:
                if method == ENCODER:
                    decoded = encoder.reconstruct(flat, architecture)
                else:
                    decoded = _decoded_by_pca(zoo, rest, flat, size, incremental=method == "IncrementalPCA")
                compared = compare_functions(zoo, test, flat, decoded, architecture)
                error = float((decoded - flat).square().mean() / (flat - flat.mean(0)).square().mean())
                name = _architecture_name(zoo, int(test[0]), architecture)
                found.setdefault(method, []).append(_Decoded(name, compared, architecture.numel, size, error))
                bar.update()
    run_ids = zoo.index["run_id"].to_numpy()
    return [
        row
        for method, parts in found.items()
        for row in (
            *([_summary(method, ALL_ARCHITECTURES, parts, run_ids)] if len(parts) > 1 else []),
            *(_summary(method, part.architecture, [part], run_ids) for part in parts),
        )
        if row is not None
    ]


@dataclass(frozen=True, eq=False)
class _Decoded:
    architecture: str
    compared: FunctionComparison
    weights: int
    latent_size: int
    relative_mse: float


def _decoded_by_pca(
    zoo: Zoo, train: np.ndarray, flat: Float[Tensor, "models params"], size: int, *, incremental: bool
) -> Tensor:
    codes = LinearCodes(size, incremental=incremental).fit(batch.flat.numpy() for batch in zoo.batches(train))
    return torch.from_numpy(codes.inverse_transform(codes.transform(flat.numpy()))).float()


def _summary(
    method: str, architecture: str, parts: Sequence[_Decoded], run_ids: np.ndarray, replicates: int = 1000
) -> ReconstructionRow | None:
    learned = [part.compared.learned for part in parts]
    rows, original, decoded, agreement = (
        np.concatenate([getattr(part.compared, name)[keep] for part, keep in zip(parts, learned, strict=True)])
        for name in ("rows", "original", "decoded", "agreement")
    )
    if not len(rows):
        return None
    _, member = np.unique(run_ids[rows], return_inverse=True)
    sums = np.stack([np.bincount(member, values) for values in (original, decoded)], axis=1)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=replicates) @ sums
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    counts = np.array([keep.sum() for keep in learned])
    return ReconstructionRow(
        method=method,
        architecture=architecture,
        models=len(rows),
        weights=float(np.average([part.weights for part in parts], weights=counts)),
        latent_size=float(np.average([part.latent_size for part in parts], weights=counts)),
        original_accuracy=float(original.mean()),
        decoded_accuracy=float(decoded.mean()),
        kept=float(decoded.mean() / original.mean()),
        kept_low=float(low),
        kept_high=float(high),
        agreement=float(agreement.mean()),
        relative_mse=float(np.average([part.relative_mse for part in parts], weights=counts)),
    )


def _architecture_name(zoo: Zoo, row: int, architecture: Architecture) -> str:
    config = zoo.entry(row).config or {}
    return str(config.get("family", architecture.digest))


def _report(
    zoo: Zoo,
    encoder: Encoder,
    joint: Encoder,
    settings: DemoSettings,
    tables: _Tables,
    seconds: Mapping[str, float],
) -> Report:
    history = read_history(encoder.path)
    names = dict.fromkeys(name for row in history for name in row if name != "step")
    curves = [
        Curve(name, [row["step"] for row in history if name in row], [row[name] for row in history if name in row])
        for name in names
    ]
    shown = [
        PredictedTrue(f"{row.representation}, {row.estimator}", row.predictions.targets, row.predictions.predicted)
        for row in tables.probes
        if row.target == settings.targets[0]
        and row.predictions is not None
        and (row.representation, row.estimator) in ((ENCODER, "ridge"), (JOINT, "ridge"), ("s(W)", "ridge"))
    ]
    architectures = [
        f"{_architecture_name(zoo, int(np.flatnonzero((zoo.index['header'] == header).to_numpy())[0]), architecture)} "
        f"({architecture.numel:,} weights, {encoder.latent_size(architecture):,} latents)"
        for header, architecture in zoo.architectures.items()
    ]
    facts: dict[str, str | int | float] = {
        "models": len(zoo),
        "training runs": int(zoo.index["run_id"].nunique()),
        "datasets": int(zoo.index["dataset"].nunique()),
        "architectures": "; ".join(architectures),
        "encoder parameters": encoder.model.num_parameters(),
        "numbers in an embedding": encoder.embedding_size,
        "joint model parameters": joint.model.num_parameters(),
        "image encoder": settings.joint.image_encoder,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **{f"seconds to {name.partition(' ')[2]}": round(value, 1) for name, value in seconds.items()},
    }
    return Report(
        title="weightspace demo",
        facts=facts,
        probes=rows_to_records(tables.probes),
        reconstruction=tables.reconstruction,
        retrieval=tables.retrieval,
        explanation=tables.explanation,
        samples=[asdict(row) for row in tables.samples],
        sample_bars=[asdict(bar) for bar in judge(tables.samples)],
        curves=curves,
        predictions=shown,
        zoo_map=ZooMap(
            embed_zoo(encoder, zoo),
            zoo.index["dataset"].tolist(),
            zoo.index["test_accuracy"].to_numpy(dtype=np.float64),
        ),
        settings=asdict(settings),
        commands=["weightspace demo"],
        notes=[
            "Every number is measured on runs that neither an encoder nor a probe was trained on.",
            "The joint model was trained on the results of its training models as well, which the other descriptions "
            "of weights in the probe tables were not.",
            "The map and the training curves are the autoencoder's.",
            "Sampled models are for datasets that were trained on; selecting and refining take 192 training images.",
            "PCA and IncrementalPCA are fitted on all other runs; the autoencoder was trained on 70 % of all runs.",
        ],
    )


def _probe_measurements(probes: Sequence[ProbeRow], name: str) -> list[Measurement]:
    measurements = []
    for target in dict.fromkeys(row.target for row in probes):
        own = [row for row in probes if row.target == target and (row.representation, row.estimator) == (name, "ridge")]
        others = [row for row in probes if row.target == target and row.representation != name]
        if own:
            measurements.append(
                Measurement(
                    f"{target} from the embedding (ridge)",
                    *(("roc_auc", "AUC") if own[0].labels else ("r2", "R²")),
                    _probe_score(own[0], name),
                    tuple(_probe_score(row, f"{row.representation}, {row.estimator}") for row in others),
                )
            )
    return measurements


def _kept_measurements(reconstruction: Sequence[ReconstructionRow]) -> list[Measurement]:
    kept = [
        Score(row.method, row.kept, row.kept_low, row.kept_high)
        for row in reconstruction
        if row.architecture == ALL_ARCHITECTURES
    ]
    if not kept:
        return []
    return [Measurement("reconstruction", "accuracy_kept", "share of accuracy kept", kept[0], tuple(kept[1:]))]


def _retrieval_measurements(retrieval: Sequence[RetrievalRow]) -> list[Measurement]:
    return [
        Measurement(
            f"retrieval {row.pair} ({row.question})",
            "recall_at_1" if row.measure == "R@1" else "spearmanr",
            row.measure,
            Score(JOINT, row.value, row.low, row.high),
            (Score("chance", row.chance),),
        )
        for row in retrieval
    ]


def _card(
    zoo: Zoo, facts: EncoderFacts, training: Mapping[str, Any], measurements: Sequence[Measurement]
) -> EncoderFacts:
    described = training_zoo(zoo)
    if _is_digits(zoo):
        described = replace(described, name="small networks on variants of scikit-learn's digits")
    return replace(
        facts,
        licence="apache-2.0",
        zoo=described,
        training=training["settings"],
        measurements=tuple(measurements),
        limits=("It was trained on small networks of few architectures; how well it judges others is not known.",),
    )


def _is_digits(zoo: Zoo) -> bool:
    return bool(zoo.index["dataset"].dropna().str.startswith("digits").all())


def _probe_score(row: ProbeRow, method: str) -> Score:
    if row.labels:
        return Score(method, row.auc, row.auc_low, row.auc_high)
    return Score(method, row.r2, row.r2_low, row.r2_high)


@contextmanager
def _timed(output: Path, stage: str) -> Iterator[None]:
    """Announces a stage and adds its time to what earlier, interrupted runs spent on it."""
    tqdm.write(stage, file=sys.stderr)
    start = time.perf_counter()
    try:
        yield
    finally:
        if output.is_dir():
            spent = _seconds(output)
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
            write_text(output / _SECONDS_FILE, json.dumps(spent) + "\n")


def _seconds(output: Path) -> dict[str, float]:
    path = output / _SECONDS_FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _read_identity(output: Path) -> Any:
    path = output / _IDENTITY_FILE
    return json.loads(path.read_text()) if path.exists() else None
