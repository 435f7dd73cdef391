"""Sampled models on datasets that were trained on and on datasets that nothing has ever seen.

For each seed, 8 of the demo's 32 variants of digits are held out of everything: a zoo without their models is made, and
an autoencoder and a joint model are trained on it with the demo's settings, a quantised autoencoder with twice as many
numbers a token, and a prior on each with its own defaults. Samplers then sample models for 8 seen and of the 8
unseen datasets, and evaluated as `weightspace evaluate-samples` does.

    python benchmarks/sampling.py --demo demo --output sampling --seeds 0 1 2

Everything is kept in the output folder; interrupted runs continue, and samplers with results are skipped.
``--table`` only prints the results: the numbers, and which `CRITERIA` each seed meets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weightspace.demo import DemoSettings
from weightspace.encoder import embed_dataset, load_encoder
from weightspace.evaluation.baselines import nearest_datasets
from weightspace.evaluation.comparison import SCRATCH, SPEARMAN, ZOO, ComparisonRow, accuracy_after
from weightspace.evaluation.criteria import BETTER_THAN_BASELINES, Criterion, check
from weightspace.files import atomic_write_text
from weightspace.sampling.base import Sources
from weightspace.sampling.evaluate import EvaluationPlan, EvaluationSettings, evaluate_samplers, plan_evaluation
from weightspace.sampling.factory import open_sampler
from weightspace.search.queries import dataset_for
from weightspace.training.autoencoder import train_autoencoder
from weightspace.training.joint import train_joint
from weightspace.training.prior import CodePriorSettings, PriorSettings, train_prior
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.importing import import_folder
from weightspace.zoo.transfer import export_folder

FOLDS = 4
STEPS = ("", "+selected", "+refined")
SAMPLERS = tuple(f"{base}{step}" for base in ("flow", "codes", "kde") for step in STEPS)
CODES = {"code_levels": (8, 8, 8), "latent_size": 24}
SETTINGS = EvaluationSettings(datasets=8, count=4, activations=1)
CRITERIA = (
    Criterion(accuracy_after(0), "at least", baseline=ZOO, share=0.95, group="seen"),
    Criterion(SPEARMAN, "at least", 0.8, group="seen"),
    Criterion(accuracy_after(1), "above", baseline=SCRATCH, everywhere=True),
    *BETTER_THAN_BASELINES,
)
"""What this project asks of samplers."""


@dataclass(frozen=True)
class Trained:
    """Models that have not seen the held-out datasets.

    Attributes:
        zoo: what they were trained on.
        held_out: the datasets.
        autoencoder: of latents.
        joint: the joint model.
        priors: of latents and of codes, as far as samplers need them.
    """

    zoo: Zoo
    held_out: tuple[str, ...]
    autoencoder: Path
    joint: Path
    priors: tuple[str, ...]


def folds(datasets: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns parts of the datasets, drawn once."""
    shuffled = np.random.default_rng(0).permutation(sorted(datasets))
    return [tuple(str(name) for name in part) for part in np.array_split(shuffled, FOLDS)]


def trained(demo: Path, output: Path, seed: int, samplers: Sequence[str]) -> Trained:
    """Trains what samplers need on the zoo without the datasets of a fold; what is there already is opened."""
    whole, settings = load_zoo(demo / "zoo"), DemoSettings()
    held_out = folds(whole.index["dataset"].unique())[seed % FOLDS]
    folder = output / f"seed-{seed}"
    models = folder / "models"
    if not (models / "metadata.jsonl").exists():
        shutil.rmtree(models, ignore_errors=True)  # of an export that was interrupted
        export_folder(whole, models, np.flatnonzero(~whole.index["dataset"].isin(held_out).to_numpy()))
    import_folder(models, folder / "zoo", on_problem="error")
    zoo = load_zoo(folder / "zoo")
    one = replace(settings.autoencoder, split_seed=seed, loop=replace(settings.autoencoder.loop, seed=seed))
    autoencoder = train_autoencoder(zoo.path, folder / "autoencoder", one)
    two = replace(settings.joint, split_seed=seed, loop=replace(settings.joint.loop, seed=seed))
    joint = train_joint(zoo.path, folder / "joint", two)
    priors = []
    if any(name.startswith("flow") for name in samplers):
        flow = PriorSettings(split_seed=seed, loop=replace(PriorSettings().loop, seed=seed))
        priors.append(train_prior(zoo.path, folder / "prior", flow, autoencoder=autoencoder, joint=joint))
    if any(name.startswith("codes") for name in samplers):
        three = replace(one, encoder=replace(one.encoder, **CODES))
        quantised = train_autoencoder(zoo.path, folder / "quantised", three)
        codes = CodePriorSettings(split_seed=seed, loop=replace(CodePriorSettings().loop, seed=seed))
        priors.append(train_prior(zoo.path, folder / "code-prior", codes, autoencoder=quantised, joint=joint))
    return Trained(zoo, held_out, autoencoder, joint, tuple(map(str, priors)))


def evaluated(models: Trained, names: Sequence[str]) -> list[dict[str, Any]]:
    """Evaluates samplers on seen and unseen datasets; returns records of comparison rows."""
    joint = load_encoder(models.joint)
    sources = Sources(joint, models.priors, models.zoo, str(models.autoencoder))
    seen = plan_evaluation(models.zoo, joint, SETTINGS).conditions
    features = {name: dataset_for(joint, name) for name in sorted(models.zoo.index["dataset"].unique())}
    unseen = {name: dataset_for(joint, name) for name in models.held_out}
    queries = [{name: embed_dataset(joint.joint, one)[0] for name, one in part.items()} for part in (unseen, features)]
    # All variants have the same architectures.
    usual = [one for one in seen if one.dataset is seen[0].dataset]
    conditions = [*seen, *(replace(one, dataset=dataset) for dataset in unseen.values() for one in usual)]
    samplers = {name: open_sampler(name, sources).sampler for name in names}
    plan = EvaluationPlan(conditions, nearest_datasets(*queries))
    rows = evaluate_samplers(samplers, models.zoo, joint, SETTINGS, plan)
    return [asdict(row) for row in rows]


def outcomes(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Yields the table of criteria: the outcome of each seed."""
    checked: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for rows in found.values():
        for row in check([ComparisonRow(**record) for record in rows], CRITERIA):
            key = (row.datasets, row.measure, row.subject, row.requirement)
            checked.setdefault(key, {}).setdefault(row.sampler, []).append(row.outcome)
    yield f"| datasets | measure | of | criterion | {' | '.join(SAMPLERS)} |"
    yield "|---" * (4 + len(SAMPLERS)) + "|"
    for key, own in sorted(checked.items()):
        yield f"| {' | '.join((*key, *(', '.join(own.get(sampler, [])) for sampler in SAMPLERS)))} |"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Yields the table of all seeds: the mean, and in brackets the least and the most of the seeds."""
    keys = dict.fromkeys((row["datasets"], row["measure"], row["subject"]) for rows in found.values() for row in rows)
    measures = list(dict.fromkeys(measure for _, measure, _ in keys))
    yield f"| datasets | measure | of | {' | '.join(SAMPLERS)} |"
    yield "|---" * (3 + len(SAMPLERS)) + "|"
    for key in sorted(keys, key=lambda key: (key[0], measures.index(key[1]))):
        cells = []
        for sampler in SAMPLERS:
            values = [
                row["value"]
                for rows in found.values()
                for row in rows
                if (row["sampler"], row["datasets"], row["measure"], row["subject"]) == (sampler, *key)
            ]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        yield f"| {' | '.join((*key, *cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of everything")
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--table", action="store_true", help="print the results, and do nothing else")
    options = parser.parse_args()
    if not options.table and options.demo is None:
        parser.error("--demo: name the folder of a finished demo")
    results = {seed: options.output / f"seed-{seed}" / "proof.json" for seed in options.seeds}
    for seed, path in results.items():
        rows = json.loads(path.read_text()) if path.exists() else []
        missing = [name for name in options.samplers if name not in {row["sampler"] for row in rows}]
        if not options.table and missing:
            rows += evaluated(trained(options.demo, options.output, seed, missing), missing)
            atomic_write_text(path, json.dumps(rows) + "\n")
    found = {str(seed): json.loads(path.read_text()) for seed, path in results.items() if path.exists()}
    print("\n".join((*table(found), "", *outcomes(found))))


if __name__ == "__main__":
    main()
