"""Trains the joint model of datasets, weights and results on a zoo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightspace.data.features import dataset_features
from weightspace.data.image_encoders import DEFAULT_ENCODER, ImageEncoder, open_image_encoder
from weightspace.data.images import load_images
from weightspace.encoder import embed_dataset
from weightspace.errors import SettingsError, ZooError
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.joint.configuration_joint import (
    PAIRS,
    DatasetTowerConfig,
    JointConfig,
    ResultTowerConfig,
    WeightTowerConfig,
)
from weightspace.models.joint.feature_extraction_joint import JointFeatureExtractor
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.models.loading import load_trained
from weightspace.settings import Fraction, NonEmpty, PositiveInt, Settings
from weightspace.stats.measures import found_correlation
from weightspace.training.autoencoder import EncoderSettings, fitted_input
from weightspace.training.batches import Batch, ViewBatches
from weightspace.training.classes import StepOrders
from weightspace.training.joint_data import JointBatches, JointData, opened_datasets
from weightspace.training.loop import Objective
from weightspace.training.run import Prepared, config_from, ensure_same_test_runs, run_training, trained_with
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.splits import Split
from weightspace.zoo.views import Augmentation

_VALIDATION_MODELS = 512
_RETRIEVED = 10
_CHUNK = 256


@dataclass(frozen=True)
class TowerSettings:
    """Shape and loss of the joint model; the other fields are those of `JointConfig` and the configs of its towers.

    Attributes:
        encoder: shape of the autoencoder where no trained one is given.
        freeze_encoder: leave the weights of a given encoder as they are.
        hidden_size: width of the towers of datasets and of weights.
        projection_dim: width of the joint space and of the tower of results.
    """

    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(hidden_size=32, layers=1, heads=2))
    freeze_encoder: bool = False
    hidden_size: int = 128
    pooling_heads: int = 8
    components: int = 32
    hops: int = 2
    last_layer: bool = True
    dropout: float = 0.3
    projection_dim: int = 64
    bins: int = 12
    smoothing: float = 1.0
    pairs: tuple[str, ...] = PAIRS
    reconstruction_weight: float = 0.0


@dataclass(frozen=True)
class JointSettings(Settings):
    """Everything that determines a trained joint model besides the zoo and a given encoder.

    Attributes:
        towers: the model.
        results: columns of the zoo's index that the tower of results knows; those without a number in the training
            split are left out.
        image_encoder: what datasets are seen with; see `open_image_encoder`.
        sample: images of a dataset whose features are computed, once.
        images: images of it that a step sees.
        held_out_datasets: datasets whose models are not trained on, to measure what is said of unseen ones.
        tokens: tokens of a model that a step sees; of longer ones a window is drawn.
        augmentation: how the weights of a step differ from the model's.
        shuffle_classes: share of the steps in which the classes of each dataset are numbered anew, and the outputs of
            its models with them: what is not in the weights cannot be learned by heart.
        loop: the training loop.
        split_seed: number of the split over runs; the test runs are never seen in training.
    """

    towers: TowerSettings = field(default_factory=TowerSettings)
    results: NonEmpty[str] = ("test_accuracy", "test_loss", "generalization_gap")
    image_encoder: str = DEFAULT_ENCODER
    sample: PositiveInt = 64
    images: PositiveInt = 64
    held_out_datasets: tuple[str, ...] = ()
    tokens: PositiveInt = 1024
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(erase=0.0, noise=0.2))
    shuffle_classes: Fraction = 0.0
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=900, batch_size=128, weight_decay=0.3))
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Refuses batches without negatives."""
        super().__post_init__()
        if self.loop.batch_size < 2:
            raise SettingsError(
                f"loop: batch_size: {self.loop.batch_size} leaves a model no other to be told from, give 2 or more"
            )


def train_joint(
    zoo: Path | str,
    output: Path | str,
    settings: JointSettings,
    encoder: Path | str | None = None,
    *,
    allow_pickle: bool = False,
) -> Path:
    """Trains a joint model on the training runs of a zoo and saves it as a `save_pretrained` folder.

    A finished folder with the same settings, zoo and encoder is left as it is; an unfinished one goes on where it
    stopped. ``training.json`` beside the model records settings, zoo and held-out runs, and a card says what is known.

    Args:
        zoo: the zoo, as `load_zoo` takes it.
        output: folder of the model.
        settings: see `JointSettings`.
        encoder: folder of a trained weight autoencoder whose weights the tower of weights starts from.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Returns:
        ``output`` as a path.

    Raises:
        ZooError: the zoo cannot be used, or ``output`` holds another model.
        SettingsError: the settings do not fit the zoo, the encoder or this machine.
    """
    opened = load_zoo(zoo).usable()
    image_encoder = open_image_encoder(settings.image_encoder, allow_pickle=allow_pickle)
    started = None if encoder is None else trained_with(Path(encoder), "autoencoder", name="encoder")

    def prepare(split: Split) -> Prepared:
        if started is not None:
            ensure_same_test_runs(started, opened, split, settings.split_seed, f"encoder {encoder}")
        data = _joint_data(opened, split, settings, image_encoder)
        extractor, model = _built(opened, data, settings, image_encoder, encoder)
        extras = {
            "encoder": None if encoder is None else str(encoder),
            "datasets_left_out": data.left_out,
            "results_left_out": [name for name in settings.results if name not in data.result_names],
        }
        objective = JointObjective(opened, data, extractor)
        return Prepared(model, extractor, _batches(opened, data, extractor, settings), objective, extras)

    others = (image_encoder.digest, "" if started is None else started.identity)
    differs = "a model of another zoo, encoder"
    return run_training("joint", opened, output, settings, prepare, others=others, differs=differs)


def _joint_data(zoo: Zoo, split: Split, settings: JointSettings, encoder: ImageEncoder) -> JointData:
    """Opens the datasets of a zoo and gathers its results."""
    names = zoo.index["dataset"].to_numpy()
    opened, left_out = opened_datasets(
        names, lambda name: dataset_features(load_images(name), encoder, images=settings.sample)
    )
    needed = [pair for pair in settings.towers.pairs if "dataset" in pair]
    if not opened and needed:
        reason = next(iter(left_out.values()), "no model names one")
        raise ZooError(
            f"{zoo.location}: no dataset can be opened ({reason}); train with towers: pairs: [weight_result]"
        )
    unknown = [name for name in settings.held_out_datasets if name not in opened]
    if unknown:
        raise SettingsError(f"held_out_datasets: the zoo has no dataset {unknown[0]!r} that can be opened")
    place = {name: number for number, name in enumerate(opened)}
    numbers = np.array([place.get(name, -1) if isinstance(name, str) else -1 for name in names])
    held_out = tuple(place[name] for name in settings.held_out_datasets)
    data = JointData(split, tuple(opened.values()), numbers, (), np.empty((len(zoo), 0)), held_out, left_out)
    for side, rows in (("train", data.train), ("validate", data.validation)):
        if not len(rows):
            raise SettingsError(f"held_out_datasets: no model is left to {side} on; hold out fewer datasets")
    result_names, results = _known_results(zoo, settings, data.train)
    return replace(data, result_names=result_names, results=results)


def _known_results(
    zoo: Zoo, settings: JointSettings, train: Int[np.ndarray, "train"]
) -> tuple[tuple[str, ...], Float[np.ndarray, "models results"]]:
    """Finds the results that training models have, with the values of all models."""
    columns = {}
    for name in settings.results:
        values = zoo.index[name].to_numpy(dtype=np.float64) if name in zoo.result_names else np.full(len(zoo), np.nan)
        columns[name] = np.where(np.isfinite(values), values, np.nan)
    known = tuple(name for name, values in columns.items() if np.isfinite(values[train]).any())
    if not known and any("result" in pair for pair in settings.towers.pairs):
        choice = f"choose from {', '.join(zoo.result_names)}" if zoo.result_names else "add results"
        raise SettingsError(
            f"results: the models to train on have no numbers in {', '.join(settings.results)}; {choice}, or train "
            "with towers: pairs: [dataset_weight]"
        )
    known = known or settings.results  # a tower that nothing is asked of
    return known, np.stack([columns[name] for name in known], axis=1)


def _built(
    zoo: Zoo, data: JointData, settings: JointSettings, image_encoder: ImageEncoder, encoder: Path | str | None
) -> tuple[JointFeatureExtractor, JointModel]:
    """Builds the model, from a trained encoder if there is one, and fits its statistics and edges of bins."""
    towers, started = settings.towers, None
    if encoder is None:
        given, encoder_config = fitted_input(zoo, replace(data.split, train=data.train), towers.encoder)
    else:
        started, given = load_trained(encoder, WeightAutoencoderModel)
        encoder_config = started.config
    extractor = JointFeatureExtractor(given.tokenizer, given.token_size, given.mean, given.std)
    datasets = config_from(
        DatasetTowerConfig,
        towers,
        name="towers",
        feature_size=data.datasets[0].features.shape[1] if data.datasets else 1,
        image_encoder=image_encoder.name,
        image_encoder_digest=image_encoder.digest,
        sample=settings.sample,
    )
    results = config_from(
        ResultTowerConfig,
        towers,
        name="towers",
        results=list(data.result_names),
        hidden_size=towers.projection_dim,
    )
    weights = config_from(WeightTowerConfig, towers, name="towers", encoder_config=encoder_config)
    config = config_from(
        JointConfig, towers, name="towers", dataset_config=datasets, weight_config=weights, result_config=results
    )
    torch.manual_seed(settings.loop.seed)
    model = JointModel(config)
    if started is not None:
        own = model.weight_model.encoder.state_dict()
        model.weight_model.encoder.load_state_dict({k: v for k, v in started.state_dict().items() if k in own})
    seen = [one.features for number, one in enumerate(data.datasets) if number not in data.held_out]
    if seen:
        model.dataset_model.principal_axes.fit(torch.cat(seen))
    model.result_model.fit(torch.from_numpy(data.results[data.train]))
    statistics = []
    for batch in zoo.batches(data.train, chunk=_CHUNK):
        inputs = extractor.batch(batch.flat, batch.architecture)
        statistics.append(
            model.weight_model.statistics(inputs["weight_values"], inputs["weight_mask"], inputs["position_ids"])
        )
    model.weight_model.standardizer.fit(torch.cat(statistics))
    _freeze(model, frozen_encoder=started is not None and towers.freeze_encoder)
    return extractor, model


def _freeze(model: JointModel, *, frozen_encoder: bool) -> None:
    """Freezes what no loss reaches, which processes that share gradients would wait for, and what is to be kept."""
    encoder, towers = model.weight_model.encoder, {name for pair in model.config.pairs for name in pair.split("_")}
    frozen: list[nn.Module] = []
    if not model.config.reconstruction_weight:
        frozen += encoder.decoding_modules
    if frozen_encoder:
        frozen.append(encoder)
    for tower in {"dataset", "weight", "result"} - towers:
        frozen += [getattr(model, f"{tower}_model"), getattr(model, f"{tower}_projection")]
    for module in frozen:
        module.requires_grad_(False)


def _batches(zoo: Zoo, data: JointData, extractor: JointFeatureExtractor, settings: JointSettings) -> JointBatches:
    loop, counts = settings.loop, [dataset.classes for dataset in data.datasets]
    orders = StepOrders(zoo, data.numbers, counts, settings.shuffle_classes, loop.seed)
    views = ViewBatches(
        zoo,
        data.train,
        extractor,
        settings.augmentation,
        loop.batch_size,
        settings.tokens,
        loop.seed,
        views=1,
        change=orders.renumbered,
    )
    return JointBatches(views, data, orders, settings.images)


class JointObjective(Objective):
    """The losses of the model; on validation models also what they find of each other."""

    def __init__(self, zoo: Zoo, data: JointData, extractor: JointFeatureExtractor) -> None:
        self._data, self._extractor = data, extractor
        rows = np.random.default_rng(0).permutation(data.validation)[:_VALIDATION_MODELS]
        self._batches = list(zoo.batches(rows, chunk=_CHUNK))
        self._rows = np.concatenate([batch.rows for batch in self._batches])
        self._results = torch.from_numpy(data.results[self._rows]).float()

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """``loss`` and those of its parts that the model computes."""
        device = next(model.parameters()).device
        output = model(**{name: value.to(device) for name, value in batch.inputs.items()}, return_loss=True)
        names = ("loss", *(f"{pair}_loss" for pair in PAIRS), "reconstruction_loss")
        return {name.removesuffix("_loss"): output[name] for name in names if name in output}

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        """Losses of unseen, unaugmented models of datasets that are trained on, and what finds what.

        ``dataset_to_weight`` is the share of datasets whose nearest model was trained on them, ``weight_to_dataset``
        that of models whose nearest dataset is theirs, and ``result_to_weight`` the rank correlation between results
        asked for and the mean result of the ten models nearest to each (of a quarter of all models if that is fewer).
        """
        assert isinstance(model, JointModel)
        numbers, results = torch.from_numpy(self._data.numbers[self._rows]), self._results
        inputs = (self._extractor.batch(batch.flat, batch.architecture).to(model.device) for batch in self._batches)
        weights = torch.cat([unit(model.get_weight_features(**one)).cpu() for one in inputs])
        # One statement a model: the first of its results that is known.
        stated = results.isfinite() & (results.isfinite().cumsum(1) == 1)
        statements = unit(model.get_result_features(results.to(model.device), stated.to(model.device))).cpu()
        datasets, figures = torch.zeros_like(weights), {}
        there = numbers[numbers >= 0].unique()
        if len(there):
            each = torch.cat([embed_dataset(model, self._data.datasets[int(number)]) for number in there])
            similarity, own = each @ weights.T, numbers >= 0
            figures["dataset_to_weight"] = float((numbers[similarity.argmax(1)] == there).float().mean())
            figures["weight_to_dataset"] = float((there[similarity.argmax(0)] == numbers)[own].float().mean())
            datasets[own] = each[torch.searchsorted(there, numbers[own])]
        embeds = {"dataset": datasets, "weight": weights, "result": statements}
        losses = model.pair_losses(
            {tower: value.to(model.device) for tower, value in embeds.items()},
            numbers.to(model.device),
            results.to(model.device),
            stated.to(model.device),
        )
        figures |= {pair: float(loss) for pair, loss in losses.items()}
        figures["loss"] = sum(figures[pair] for pair in losses)
        found = _found_results(statements @ weights.T, results, stated)
        return figures if found is None else {**figures, "result_to_weight": found}


def _found_results(similarity: Tensor, results: Tensor, stated: Tensor) -> float | None:
    """`found_correlation` of the first result, asked for where it is stated, among the models that have it."""
    known, asked = results[:, 0].isfinite(), stated[:, 0]
    order = similarity[asked][:, known].argsort(dim=1, descending=True, stable=True)
    found = results[known, 0][order]
    first = max(1, min(_RETRIEVED, found.shape[1] // 4))  # the mean over all models would be the same for each
    return found_correlation(results[asked, 0].double().numpy(), found.double().numpy(), first)
