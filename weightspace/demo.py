"""The main job from end to end: train a zoo, import its files, train encoders, evaluate them, write a report."""

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

import numpy as np
import torch
from tqdm.auto import tqdm

from weightspace.cards.facts import EncoderFacts, Measurement
from weightspace.cards.record import write_card
from weightspace.data.image_encoders import OFFLINE_ENCODER, open_image_encoder
from weightspace.encoder import Encoder, embed_zoo, load_encoder
from weightspace.errors import SettingsError
from weightspace.evaluation.comparison import ComparisonRow
from weightspace.evaluation.criteria import check
from weightspace.evaluation.retrieval import RetrievalRow, retrieval_table
from weightspace.probes.explain import Explanation, explain
from weightspace.probes.measurements import probe_measurements, reconstruction_measurements, retrieval_measurements
from weightspace.probes.reconstruction import ReconstructionRow, family_names, reconstruction_table
from weightspace.probes.rows import ProbeRow, rows_to_records
from weightspace.probes.runs import MIN_RUNS, run_table
from weightspace.probes.zoo import ENCODER, JOINT, describe_runs, probe_zoo
from weightspace.report.page import Curve, PredictedTrue, Report, ZooMap, write_report
from weightspace.sampling.base import Sources
from weightspace.sampling.evaluate import EvaluationSettings, evaluate_samplers
from weightspace.sampling.factory import open_sampler
from weightspace.training.autoencoder import (
    AutoencoderSettings,
    EncoderSettings,
    train_autoencoder,
)
from weightspace.training.joint import JointSettings, TowerSettings, train_joint
from weightspace.training.loop import read_history
from weightspace.training.run import TrainingRecord, read_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.facts import training_zoo
from weightspace.zoo.importing import import_folder
from weightspace.zoo.storage import write_text
from weightspace.zoo.training import ZooSettings, train_zoo
from weightspace.zoo.transfer import export_folder
from weightspace.zoo.views import Augmentation

_TARGETS = ("test_accuracy", "generalization_gap", "classes")
_DRAWS = 200  # the least p-value is 1 / 201
_SECONDS_FILE = "seconds.json"
_COSTS = {
    "train the zoo": 60.0,
    "import its files": 23.0,
    "train the autoencoder": 123.0,
    "train the joint model": 76.0,
    "reconstruct, probe, retrieve and explain": 92.0,
    "sample and evaluate models": 66.0,
    "write the report": 12.0,
}
"""The steps, and the seconds that each takes on two cores; their ratios tell how long is left on other machines."""


def _autoencoder_settings() -> AutoencoderSettings:
    """A third of the default's time on two cores; decoded models lose three points of accuracy more."""
    return AutoencoderSettings(encoder=EncoderSettings(hidden_size=96), loop=LoopSettings(batch_size=32))


def _joint_settings() -> JointSettings:
    """What two cores train in a minute or two; the image encoder is the one that needs no Hub."""
    return JointSettings(
        towers=TowerSettings(
            encoder=EncoderSettings(hidden_size=32, layers=1, heads=2), dropout=0.3, reconstruction_weight=0.0
        ),
        image_encoder=OFFLINE_ENCODER,
        augmentation=Augmentation(erase=0.0, noise=0.2),
        loop=LoopSettings(steps=600, batch_size=128, weight_decay=0.3, validate_every=200),
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
    autoencoder: AutoencoderSettings = field(default_factory=_autoencoder_settings)
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
    """Runs the main job; results that exist already and are unchanged are reused.

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
    open_image_encoder(settings.joint.image_encoder)  # fails before minutes of training
    with _step(output, "train the zoo"):
        trained = train_zoo(settings.zoo, output / "trained")
    with _step(output, "import its files"):
        if not (output / "models" / "metadata.jsonl").exists():
            export_folder(trained, output / "models")
        import_folder(output / "models", output / "zoo", on_problem="error")
        zoo = load_zoo(output / "zoo")
    with _step(output, "train the autoencoder"):
        encoder_path = train_autoencoder(zoo.path, output / "encoder", settings.autoencoder)
    with _step(output, "train the joint model"):
        joint_path = train_joint(zoo.path, output / "joint", settings.joint)
    report = output / "report.html"
    state, joint_state = _trained(encoder_path), _trained(joint_path)
    identity = {
        "encoder": state.identity,
        "joint": joint_state.identity,
        "samplers": list(settings.samplers),
        "samples": json.loads(json.dumps(asdict(settings.samples))),
        "targets": list(settings.targets),
        "seeds": list(settings.seeds),
    }
    identity_file = output / "report-of.json"
    if report.exists() and identity_file.exists() and json.loads(identity_file.read_text()) == identity:
        return report
    encoder, joint = load_encoder(encoder_path), load_encoder(joint_path)
    with _step(output, "reconstruct, probe, retrieve and explain"):
        reconstruction = reconstruction_table(zoo, encoder, state.test_runs)
        probes = probe_zoo(zoo, [encoder, joint], settings.targets, seeds=settings.seeds)
        retrieval = retrieval_table(zoo, joint, joint_state)
        runs, explanation = run_table(zoo, state.test_runs), None
        if len(runs) >= MIN_RUNS:
            explanation = explain(runs, describe_runs(zoo, runs, {ENCODER: encoder, JOINT: joint}), draws=_DRAWS)
    with _step(output, "sample and evaluate models"):
        sources = Sources(joint, zoo=zoo, encoder=str(encoder_path))
        samplers = {name: open_sampler(name, sources).sampler for name in settings.samplers}
        samples = evaluate_samplers(samplers, zoo, joint, settings.samples)
    tables = _Tables(reconstruction, probes, retrieval, explanation, samples)
    with _step(output, "write the report"):
        measured = probe_measurements(probes, ENCODER) + reconstruction_measurements(reconstruction)
        write_card(encoder_path, _card(zoo, encoder.model.card_facts(), state, measured))
        measured = probe_measurements(probes, JOINT) + retrieval_measurements(retrieval)
        write_card(joint_path, _card(zoo, joint.model.card_facts(), joint_state, measured))
        write_report(_report(zoo, encoder, joint, settings, tables, _seconds(output)), output)
        write_text(identity_file, json.dumps(identity) + "\n")
    return report


def _trained(folder: Path) -> TrainingRecord:
    state = read_training(folder)
    assert state is not None
    return state


@dataclass(frozen=True)
class _Tables:
    reconstruction: list[ReconstructionRow]
    probes: list[ProbeRow]
    retrieval: list[RetrievalRow]
    explanation: Explanation | None
    samples: list[ComparisonRow]


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
        f"{name} ({zoo.architectures[header].numel:,} weights, "
        f"{encoder.latent_size(zoo.architectures[header]):,} latents)"
        for header, name in family_names(zoo).items()
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
        **{f"seconds to {name}": round(seconds[name], 1) for name in _COSTS if name in seconds},
    }
    return Report(
        title="weightspace demo",
        facts=facts,
        probes=rows_to_records(tables.probes),
        reconstruction=tables.reconstruction,
        retrieval=tables.retrieval,
        explanation=tables.explanation,
        samples=[asdict(row) for row in tables.samples],
        sample_criteria=[asdict(row) for row in check(tables.samples)],
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


def _card(zoo: Zoo, facts: EncoderFacts, training: TrainingRecord, measurements: Sequence[Measurement]) -> EncoderFacts:
    described = training_zoo(zoo)
    if zoo.index["dataset"].dropna().str.startswith("digits").all():
        described = replace(described, name="small networks on variants of scikit-learn's digits")
    return replace(
        facts,
        licence="apache-2.0",
        zoo=described,
        training=training.settings,
        measurements=tuple(measurements),
        limits=("It was trained on small networks of few architectures; how well it judges others is not known.",),
    )


@contextmanager
def _step(output: Path, name: str) -> Iterator[None]:
    """Announces a step and how long is left, and adds its time to what earlier, interrupted runs spent on it."""
    spent, names = _seconds(output), list(_COSTS)
    done, ahead = names[: names.index(name)], names[names.index(name) :]
    pace = sum(spent.get(one, 0.0) for one in done) / sum(_COSTS[one] for one in done) if done else 1.0
    left = sum(max(pace * _COSTS[one] - spent.get(one, 0.0), 0.0) for one in ahead)
    progress = f"{len(done) + 1}/{len(names)} {name}, about {tqdm.format_interval(left)} left"
    tqdm.write(progress, file=sys.stderr)
    start = time.perf_counter()
    try:
        yield
    finally:
        if output.is_dir():
            seconds = spent.get(name, 0.0) + time.perf_counter() - start
            write_text(output / _SECONDS_FILE, json.dumps({**spent, name: seconds}) + "\n")


def _seconds(output: Path) -> dict[str, float]:
    """Reads the seconds that each step has taken."""
    path = output / _SECONDS_FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}
