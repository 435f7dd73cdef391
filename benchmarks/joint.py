"""Ablations of the joint model, and what it says of datasets that it was not trained on.

    python benchmarks/joint.py --demo FOLDER --output FILE.json [--seeds 0 1 2] [--variants NAME ...] [--unseen]
    python benchmarks/joint.py --output FILE.json --table

Zoo, autoencoder and settings are those of a finished demo. A model is trained for every variant and seed, which draws
weights, batches and the split; trained models stay beside the output, and what the output has already is not done
again. The second line trains nothing and prints the tables as Markdown. --steps shortens training, to see that it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from weightspace.data.features import DatasetFeatures, features_of_datasets
from weightspace.data.image_encoders import open_image_encoder
from weightspace.demo import DemoSettings
from weightspace.encoder import Encoder, embed_dataset, load_encoder
from weightspace.errors import SettingsError, WeightspaceError
from weightspace.files import atomic_write_text
from weightspace.models.joint.configuration_joint import PAIRS
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.probes.estimators import RidgePath
from weightspace.probes.probe import probe_table
from weightspace.probes.representations import Representation, WeightBlock, baselines, collect_weights, fit_codes
from weightspace.probes.zoo import encoder_features
from weightspace.stats.resampling import RunBootstrap, pooled_interval
from weightspace.stats.retrieval import first_ranks, result_correlation, retrieval, same_identity
from weightspace.training.joint import JointSettings, train_joint
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.splits import Split, split_by_run

RESULT = "test_accuracy"
FOLDS, REPLICATES, QUERIES = 4, 400, 40
BASELINES = {"s(W)": ("boosting",), "s(W)+invariants": ("extra-trees",)}
JOINT = ("ridge", "extra-trees")
QUESTIONS = ("D → W", "W → D", "R → W, 10", "R → W, 1")


@dataclass(frozen=True)
class Variant:
    """One change of the demo's joint model.

    Attributes:
        name: what the table calls it.
        towers: changed tower settings.
        pretrained: start from the demo's autoencoder.
        fixed_split: test on the runs that the autoencoder held out, whatever the seed; it has seen all others.
    """

    name: str
    towers: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    fixed_split: bool = False

    @property
    def reference(self) -> str:
        """Key of the variant to compare with, which is tested on the same runs."""
        return "fixed-split" if self.fixed_split else "default"


def without(pair: str) -> dict[str, Any]:
    """Returns tower settings that leave a pair out."""
    return {"pairs": tuple(one for one in PAIRS if one != pair)}


VARIANTS = {
    "default": Variant("default"),
    "no-dataset-weight": Variant("without D-W", without("dataset_weight")),
    "no-weight-result": Variant("without W-R", without("weight_result")),
    "no-dataset-result": Variant("without D-R", without("dataset_result")),
    "no-last-layer": Variant("without the last layer", {"last_layer": False}),
    "fixed-split": Variant("default, the autoencoder's split", fixed_split=True),
    "fine-tuned": Variant("from the autoencoder, fine-tuned", pretrained=True, fixed_split=True),
    "frozen": Variant("from the autoencoder, frozen", {"freeze_encoder": True}, pretrained=True, fixed_split=True),
}
UNSEEN = ("default", "no-last-layer")


class Demo:
    """A finished demo folder, and what is computed of it once."""

    def __init__(self, folder: Path, models: Path, steps: int | None) -> None:
        self.zoo, self.models, self.steps = load_zoo(folder / "zoo"), models, steps
        self.autoencoder = folder / "encoder"
        training = json.loads((self.autoencoder / "training.json").read_text())
        self.split_seed = int(training["settings"]["split_seed"])
        index = self.zoo.index
        self.runs = index["run_id"].to_numpy().astype(str)
        self.names = sorted(set(index["dataset"]))
        self.own = np.array([self.names.index(name) for name in index["dataset"]])
        self.accuracy = index[RESULT].to_numpy(dtype=np.float64)
        settings = DemoSettings().joint
        encoder = open_image_encoder(settings.image_encoder)
        self.datasets = features_of_datasets(self.names, encoder, images=settings.sample)
        self.blocks = collect_weights(self.zoo.batches(), torch.Generator().manual_seed(0))
        self.baselines = baselines(self.blocks)

    def settings(self, variant: Variant, seed: int, held_out: tuple[str, ...] = ()) -> JointSettings:
        """Returns the demo's settings with the changes of a variant."""
        own = DemoSettings().joint
        steps = own.loop.steps if self.steps is None else self.steps
        return replace(
            own,
            towers=replace(own.towers, **variant.towers),
            loop=replace(own.loop, seed=seed, tracker="none", steps=steps),
            split_seed=self.split_seed if variant.fixed_split else seed,
            held_out_datasets=held_out,
        )

    def trained(self, settings: JointSettings, *, pretrained: bool = False) -> Encoder:
        """Trains a model, unless that has been done; equal settings share one."""
        identity = json.dumps([asdict(settings), pretrained], sort_keys=True)
        folder = self.models / hashlib.sha256(identity.encode()).hexdigest()[:16]
        return load_encoder(train_joint(self.zoo.path, folder, settings, self.autoencoder if pretrained else None))

    def split(self, seed: int) -> Split:
        """Returns the split that training with this seed uses."""
        return split_by_run(self.runs, seed)


# --- variants --------------------------------------------------------------------------------------------------------


def measure_variant(demo: Demo, variant: Variant, seed: int) -> dict[str, Any]:
    """Trains and measures a variant on the test runs of its own split."""
    settings = demo.settings(variant, seed)
    encoder = demo.trained(settings, pretrained=variant.pretrained)
    features = encoder_features(encoder, demo.blocks)
    test = demo.split(settings.split_seed).test
    embeds = torch.from_numpy(features.features(test)[:, : features.dimensions])
    return {
        **probed(demo, {"joint": features}, {"joint": JOINT}, settings.split_seed),
        **retrieved(demo, encoder, F.normalize(embeds, dim=-1), test),
    }


def measure_baselines(demo: Demo, seed: int) -> dict[str, Any]:
    """Measures what needs no training, on the test runs of a split."""
    return probed(demo, {name: demo.baselines[name] for name in BASELINES}, BASELINES, seed)


def probed(
    demo: Demo,
    representations: Mapping[str, Representation],
    estimators: Mapping[str, Sequence[str]],
    split_seed: int,
) -> dict[str, Any]:
    """Predicts accuracy on one split; replicates are drawn alike for all that share it."""
    found: dict[str, Any] = {}
    rows = probe_table(
        representations, {RESULT: demo.accuracy}, demo.runs, (split_seed,), estimators=estimators, replicates=1
    )
    for row in rows:
        assert row.predictions is not None
        bootstrap = RunBootstrap(demo.runs[row.predictions.rows], np.random.default_rng(split_seed), REPLICATES)
        replicates = bootstrap.r2(row.predictions.targets, row.predictions.predicted)
        found[row.estimator] = {
            "r2": row.scores["r2"].value,
            "permuted": row.scores["r2"].permuted,
            "replicates": replicates.round(4).tolist(),
        }
    return {"probes": found}


def retrieved(demo: Demo, encoder: Encoder, weights: Tensor, test: np.ndarray) -> dict[str, float]:
    """Asks the questions that the model was trained to answer."""
    model, generator = encoder.model, np.random.default_rng(0)
    assert isinstance(model, JointModel)
    found: dict[str, float] = {}
    if "dataset_weight" in model.config.pairs:
        similarity, own = similarities(model, demo.datasets, weights), demo.own[test]
        everything = np.arange(len(demo.names))
        ways = {"D → W": (similarity, everything, own), "W → D": (similarity.T, own, everything)}
        for name, (one, asked, candidates) in ways.items():
            measured = retrieval(one, same_identity(asked, candidates), generator, cutoffs=(1,), draws=0)
            assert measured is not None
            found[name] = measured.recall[1].value
    if "weight_result" in model.config.pairs:
        accuracies = demo.accuracy[test]
        wanted = np.quantile(accuracies, np.linspace(0.02, 0.98, QUERIES))
        names = model.result_model.config.results
        results = torch.full((QUERIES, len(names)), torch.nan)
        results[:, names.index(RESULT)] = torch.from_numpy(wanted)
        with torch.no_grad():
            similarity = (unit(model.get_result_features(results)) @ weights.T).numpy()
        _, runs = np.unique(demo.runs[test], return_inverse=True)
        for first in (10, 1):
            correlation = result_correlation(
                similarity, wanted, accuracies, generator, candidate_runs=runs, first=first, draws=0
            )
            found[f"R → W, {first}"] = 0.0 if correlation is None else correlation.value
    return found


def similarities(model: JointModel, datasets: Sequence[DatasetFeatures], weights: Tensor) -> np.ndarray:
    """Compares datasets with weights, both of length 1."""
    found: np.ndarray = (torch.cat([embed_dataset(model, one) for one in datasets]) @ weights.T).numpy()
    return found


# --- unseen datasets -------------------------------------------------------------------------------------------------


def folds(datasets: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns parts of the datasets, drawn once."""
    shuffled = np.random.default_rng(0).permutation(sorted(datasets))
    return [tuple(str(name) for name in part) for part in np.array_split(shuffled, FOLDS)]


def measure_unseen(demo: Demo, variant: Variant, fold: int) -> dict[str, Any]:
    """Holds the datasets of a fold out, and looks for them and their test models among each other."""
    held_out = folds(demo.names)[fold]
    settings = demo.settings(variant, 0, held_out)
    encoder = demo.trained(settings)
    assert isinstance(encoder.model, JointModel)
    held = np.array([demo.names.index(name) for name in held_out])
    split = demo.split(settings.split_seed)
    test = split.test[np.isin(demo.own[split.test], held)]
    features = encoder_features(encoder, demo.blocks)
    embeds = torch.from_numpy(features.features(test)[:, : features.dimensions])
    datasets = [demo.datasets[number] for number in held]
    found = {"joint": similarities(encoder.model, datasets, F.normalize(embeds, dim=-1))}
    blocks = demo.blocks if settings.towers.last_layer else [without_last_layer(block) for block in demo.blocks]
    known = baselines(blocks)
    for name in ("PCA", "s(W)+invariants"):
        found[f"{name} + ridge"] = predicted_datasets(demo, known[name], split, held, test)
    return {
        "models": np.bincount(demo.own[test], minlength=len(demo.names))[held].tolist(),
        "right": {name: right_answers(similarity, held, demo.own[test]) for name, similarity in found.items()},
    }


def without_last_layer(block: WeightBlock) -> WeightBlock:
    """Sets the weights of the last layer to zero: a constant says nothing."""
    kept = torch.arange(block.architecture.numel) < block.architecture.numel - block.architecture.layers[-1].numel
    return replace(block, flat=block.flat * kept, permuted=None)


def predicted_datasets(
    demo: Demo, representation: Representation, split: Split, held: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Predicts the mean features of each class of a model's dataset, and compares them with those of held-out ones.

    Ridge predicts the principal components of the seen datasets, in which nothing of these is lost.
    """
    means = np.stack(
        [
            np.concatenate([one.features[one.labels == number].mean(0).numpy() for number in range(one.classes)])
            for one in demo.datasets
        ]
    )
    seen = np.setdiff1d(np.arange(len(means)), held)
    codes = fit_codes([means[seen]], len(seen) - 1)
    targets = codes.transform(means)
    train, validation = (rows[~np.isin(demo.own[rows], held)] for rows in (split.train, split.validation))
    fitted = representation.fit(train)
    ridge = RidgePath().fit(
        fitted.features(train),
        targets[demo.own[train]],
        fitted.features(validation),
        targets[demo.own[validation]],
    )
    predicted = ridge.predict(fitted.features(test))
    one, other = (torch.from_numpy(np.asarray(values, np.float64)) for values in (targets[held], predicted))
    found: np.ndarray = (F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T).numpy()
    return found


def right_answers(similarity: np.ndarray, held: np.ndarray, own: np.ndarray) -> dict[str, list[float]]:
    """Counts for each dataset whether its first model is right, and how many of its models have it first."""
    right = same_identity(held, own)
    first = first_ranks(similarity.T, right.T) == 1
    return {
        "D → W": (first_ranks(similarity, right) == 1).astype(float).tolist(),
        "W → D": (right @ first.astype(float)).tolist(),
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def variant_table(measured: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table of variants, baselines first."""
    columns = [column for estimator in JOINT for column in (f"R², {estimator}", "beside default")]
    yield line(("variant", "seeds", *columns, "kept", *QUESTIONS))
    yield "|---" * 11 + "|"
    found = by_seed(measured, "baselines")
    if found:
        for name, (estimator,) in BASELINES.items():
            column = with_interval(found, estimator)
            cells = ["", "", column, ""] if estimator in JOINT else [f"{column} ({estimator})", "", "", ""]
            yield line([name, seeds(found), *cells, kept(found, estimator), "", "", "", ""])
    for key, variant in VARIANTS.items():
        found = by_seed(measured, key)
        if found:
            reference = {} if key == variant.reference else by_seed(measured, variant.reference)
            probes = [
                cell
                for estimator in JOINT
                for cell in (with_interval(found, estimator), difference(found, reference, estimator))
            ]
            asked = [mean_and_range(found, name) for name in QUESTIONS]
            yield line([variant.name, seeds(found), *probes, kept(found, "ridge"), *asked])


def unseen_table(measured: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table of unseen datasets."""
    yield "| weights | way | folds | D → W | W → D |"
    yield "|---|---|---|---|---|"
    for key in UNSEEN:
        parts = list(by_seed(measured, f"unseen/{key}").values())
        if not parts:
            continue
        models = np.concatenate([part["models"] for part in parts])
        looked_at = "all" if key == "default" else VARIANTS[key].name
        for way in parts[0]["right"]:
            right = {name: np.concatenate([part["right"][way][name] for part in parts]) for name in QUESTIONS[:2]}
            cells = (share(right["D → W"], np.ones(len(models))), share(right["W → D"], models))
            yield line([looked_at, way, str(len(parts)), *cells])
        # A model of a dataset is found with its share of all models; a dataset with the same chance as any other.
        first = np.concatenate([np.divide(part["models"], np.sum(part["models"])) for part in parts])
        other = sum(np.sum(part["models"]) / len(part["models"]) for part in parts) / models.sum()
        yield line([looked_at, "chance", str(len(parts)), f"{first.mean():.3f}", f"{other:.3f}"])


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def by_seed(measured: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns what was measured of a variant by its seed, or of a fold by its number."""
    return {name.rpartition("/")[2]: one for name, one in measured.items() if name.rpartition("/")[0] == key}


def seeds(found: Mapping[str, Any]) -> str:
    return " ".join(sorted(found))


def with_interval(found: Mapping[str, Any], estimator: str) -> str:
    probes = [one["probes"][estimator] for one in found.values()]
    low, high = pooled_interval(np.array(probe["replicates"]) for probe in probes)
    return f"{np.mean([probe['r2'] for probe in probes]):.3f} [{low:.2f}, {high:.2f}]"


def difference(found: Mapping[str, Any], reference: Mapping[str, Any], estimator: str) -> str:
    """Compares on equal seeds, with an interval over the same draws of test runs."""
    pairs = [
        (found[seed]["probes"][estimator], reference[seed]["probes"][estimator]) for seed in found if seed in reference
    ]
    if not pairs:
        return ""
    low, high = pooled_interval(np.subtract(one["replicates"], other["replicates"]) for one, other in pairs)
    return f"{np.mean([one['r2'] - other['r2'] for one, other in pairs]):+.3f} [{low:+.2f}, {high:+.2f}]"


def kept(found: Mapping[str, Any], estimator: str) -> str:
    probes = [one["probes"][estimator] for one in found.values()]
    return f"{np.mean([probe['permuted'] for probe in probes]) / np.mean([probe['r2'] for probe in probes]):.3f}"


def mean_and_range(found: Mapping[str, Any], name: str) -> str:
    values = [one[name] for one in found.values() if name in one]
    return f"{np.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def share(right: np.ndarray, count: np.ndarray) -> str:
    """Returns the share of right answers with an interval over datasets."""
    datasets = len(right)
    drawn = np.random.default_rng(0).multinomial(datasets, np.full(datasets, 1 / datasets), size=2000)
    low, high = np.percentile((drawn @ right) / (drawn @ count), [2.5, 97.5])
    return f"{right.sum() / count.sum():.3f} [{low:.2f}, {high:.2f}]"


# --- running ---------------------------------------------------------------------------------------------------------


def jobs(
    demo: Demo, chosen: Iterable[str], numbers: Sequence[int], *, unseen: bool
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields what is to be measured, by its key in the output."""
    for seed in numbers:
        yield f"baselines/{seed}", lambda seed=seed: measure_baselines(demo, seed)
    for fold in range(FOLDS if unseen else 0):
        for key in UNSEEN:
            yield f"unseen/{key}/{fold}", lambda key=key, fold=fold: measure_unseen(demo, VARIANTS[key], fold)
    for key in chosen:
        for seed in numbers:
            yield f"{key}/{seed}", lambda key=key, seed=seed: measure_variant(demo, VARIANTS[key], seed)


def run(options: argparse.Namespace) -> None:
    """Measures what the output does not have, and writes it after each."""
    demo = Demo(options.demo, options.output.with_name(f"{options.output.stem}-models"), options.steps)
    settings = json.loads(json.dumps(asdict(demo.settings(VARIANTS["default"], 0))))
    about = {"zoo": demo.zoo.digest, "settings": settings}
    found = json.loads(options.output.read_text()) if options.output.exists() else {"about": about, "measured": {}}
    if found["about"] != about:
        raise SettingsError(f"{options.output}: is of another zoo or other settings; choose another --output")
    planned = dict(jobs(demo, options.variants, options.seeds, unseen=options.unseen))
    with tqdm([key for key in planned if key not in found["measured"]], unit="model") as bar:
        for key in bar:
            bar.set_description(key)
            found["measured"][key] = planned[key]()
            atomic_write_text(options.output, json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, which is gone on with if it is there")
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--unseen", action="store_true", help="hold datasets out, too")
    parser.add_argument("--steps", type=int, help="training steps; those of the demo by default")
    parser.add_argument("--table", action="store_true", help="print what the output has, and do nothing else")
    options = parser.parse_args()
    if not options.table:
        if options.demo is None:
            parser.error("--demo: name the folder of a finished demo")
        try:
            run(options)
        except WeightspaceError as error:
            parser.exit(1, f"{error}\n")
    measured = json.loads(options.output.read_text())["measured"]
    print("\n".join([*variant_table(measured), "", *unseen_table(measured)]))


if __name__ == "__main__":
    main()
