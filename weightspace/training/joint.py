"""Trains the joint model of datasets, weights and results on a zoo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from weightspace.cards import write_card
from weightspace.data.features import DatasetFeatures, dataset_features
from weightspace.data.image_encoders import DEFAULT_ENCODER, ImageEncoder, open_image_encoder
from weightspace.data.images import load_images
from weightspace.errors import SettingsError, WeightspaceError, ZooError
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
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
from weightspace.schema import Architecture
from weightspace.stats.measures import found_correlation
from weightspace.training.autoencoder import (
    EncoderSettings,
    fitted_input,
    read_training,
    training_identity,
    write_training,
)
from weightspace.training.batches import ViewBatches, seeded_generator
from weightspace.training.loop import Objective, clear_checkpoints, fit, is_main_process
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, ZooBatch, load_zoo
from weightspace.zoo.facts import training_zoo
from weightspace.zoo.splits import Split, split_by_run
from weightspace.zoo.views import Augmentation, output_group, reordered_outputs

_VALIDATION_MODELS = 512
_RETRIEVED = 10
_CHUNK = 256


@dataclass(frozen=True)
class TowerSettings:
    """Shape and loss of the joint model; see `JointConfig` and the configs of its towers for the fields.

    Attributes:
        encoder: shape of the autoencoder where none is given that was trained before.
        freeze_encoder: leave the weights of a given encoder as they are.
        hidden_size: width of the towers of datasets and of weights.
        pooling_heads: weighted means that sets are pooled to.
        components: principal components of the images' features that the tower of datasets looks at.
        hops: layers back that weights are followed to.
        last_layer: whether the last layer is looked at.
        dropout: share of numbers that are dropped in training.
        projection_dim: width of the joint space.
        bins: bins a result.
        interpolate: embed a value between the bins around it.
        smoothing: width, in bins, of what counts as the same result; 0 for the same bin.
        pairs: pairs of towers that are contrasted.
        loss: ``"nt_xent"`` or ``"sigmoid"``.
        positives: ``"all"`` or ``"diagonal"``.
        result_kind: ``"bins"`` or ``"regression"``.
        reconstruction_weight: of the autoencoder's loss.
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
    interpolate: bool = True
    smoothing: float = 1.0
    pairs: tuple[str, ...] = PAIRS
    loss: str = "nt_xent"
    positives: str = "all"
    result_kind: str = "bins"
    reconstruction_weight: float = 0.0


@dataclass(frozen=True)
class JointSettings:
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
    results: tuple[str, ...] = ("test_accuracy", "test_loss", "generalization_gap")
    image_encoder: str = DEFAULT_ENCODER
    sample: int = 64
    images: int = 64
    held_out_datasets: tuple[str, ...] = ()
    tokens: int = 1024
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(erase=0.0, noise=0.2))
    shuffle_classes: float = 0.0
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(steps=900, batch_size=128, weight_decay=0.3))
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be."""
        for name in ("sample", "images", "tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: {getattr(self, name)} is too small, give 1 or more")
        if not self.results:
            raise SettingsError("results: none are named, give one or more")
        if self.loop.batch_size < 2:
            raise SettingsError(
                f"loop: batch_size: {self.loop.batch_size} leaves a model no other to be told from, give 2 or more"
            )
        if not 0 <= self.shuffle_classes <= 1:
            raise SettingsError(f"shuffle_classes: {self.shuffle_classes} is no share of the steps, give 0 to 1")


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
    output, opened = Path(output), load_zoo(zoo)
    image_encoder = open_image_encoder(settings.image_encoder, allow_pickle=allow_pickle)
    started = None if encoder is None else _started_from(Path(encoder), opened, settings)
    identity = training_identity(opened, settings, image_encoder.digest, "" if started is None else started.identity)
    state = read_training(output)
    if state is not None and state["identity"] != identity:
        raise ZooError(
            f"{output}: holds a model of another zoo, encoder or other settings ({state['identity']}, asked for "
            f"{identity}); choose another --output or delete it"
        )
    if state is not None and state["complete"]:
        return output
    data = _joined(opened, settings, image_encoder)
    runs = opened.index["run_id"].to_numpy()
    facts = {
        "identity": identity,
        "zoo": opened.location,
        "zoo_digest": opened.digest,
        "settings": asdict(settings),
        "encoder": None if encoder is None else str(encoder),
        "validation_runs": sorted(set(runs[data.split.validation])),
        "test_runs": sorted(set(runs[data.split.test])),
        "datasets_left_out": data.left_out,
        "results_left_out": [name for name in settings.results if name not in data.result_names],
    }
    writes = is_main_process()
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        write_training(output, {**facts, "complete": False})
    extractor, model = _built(opened, data, settings, image_encoder, started)
    batches = _batches(opened, data, extractor, settings)
    trained = fit(model, batches, JointObjective(opened, data, extractor), settings.loop, output)
    assert isinstance(trained, JointModel)
    if writes:
        trained.save_pretrained(output)
        extractor.save_pretrained(output)
        write_card(output, replace(trained.card_facts(), zoo=training_zoo(opened), training=asdict(settings)))
        write_training(output, {**facts, "complete": True, "parameters": trained.num_parameters()})
        clear_checkpoints(output)
    return output


@dataclass(frozen=True, eq=False)
class JointData:
    """What is known of a zoo's models besides their weights, row by row.

    Attributes:
        split: runs for training, validation and test.
        datasets: features of the datasets, by number.
        numbers: number of each model's dataset, -1 if it is not known or cannot be opened.
        result_names: names of the results that are known of training models.
        results: one column for each name, NaN where a value is missing.
        held_out: numbers of the datasets whose models are not trained on.
        left_out: datasets that cannot be opened, with the reason.
    """

    split: Split
    datasets: tuple[DatasetFeatures, ...]
    numbers: Int[np.ndarray, "models"]
    result_names: tuple[str, ...]
    results: Float[np.ndarray, "models results"]
    held_out: tuple[int, ...]
    left_out: Mapping[str, str]

    @property
    def train(self) -> Int[np.ndarray, "models"]:
        """Rows to train on."""
        return self._seen(self.split.train)

    @property
    def validation(self) -> Int[np.ndarray, "models"]:
        """Rows to validate on, of datasets that are trained on."""
        return self._seen(self.split.validation)

    def _seen(self, rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(self.numbers[rows], self.held_out)]

    def sampled(
        self, numbers: Sequence[int], images: int, generators: Sequence[torch.Generator]
    ) -> tuple[Float[Tensor, "datasets images features"], Int[Tensor, "datasets images"]]:
        """Draws images of datasets, with replacement, each by a generator of its own."""
        chosen = [
            torch.randint(len(self.datasets[number].labels), (images,), generator=generator)
            for number, generator in zip(numbers, generators, strict=True)
        ]
        pairs = list(zip(numbers, chosen, strict=True))
        features = torch.stack([self.datasets[number].features[places] for number, places in pairs])
        return features, torch.stack([self.datasets[number].labels[places] for number, places in pairs])


def _joined(zoo: Zoo, settings: JointSettings, encoder: ImageEncoder) -> JointData:
    """Opens the datasets of a zoo and gathers its results."""
    split = split_by_run(zoo.index["run_id"].to_numpy(), settings.split_seed)
    names = zoo.index["dataset"].to_numpy()
    opened: dict[str, DatasetFeatures] = {}
    left_out: dict[str, str] = {}
    for name in sorted({name for name in names if isinstance(name, str)}):
        try:
            images = load_images(name)
        except WeightspaceError as error:
            left_out[name] = str(error)
        else:
            opened[name] = dataset_features(images, encoder, images=settings.sample)
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


@dataclass(frozen=True, eq=False)
class _Start:
    """A trained autoencoder to start from."""

    model: WeightAutoencoderModel
    extractor: WeightFeatureExtractor
    identity: str


def _started_from(folder: Path, zoo: Zoo, settings: JointSettings) -> _Start:
    """Loads the encoder, and refuses one that was trained on runs that are to be held out."""
    state = read_training(folder)
    if state is None or not state["complete"]:
        raise ZooError(f"{folder}: no trained encoder; give the folder that `weightspace train autoencoder` wrote")
    split = split_by_run(zoo.index["run_id"].to_numpy(), settings.split_seed)
    tested = set(zoo.index["run_id"].to_numpy()[split.test])
    if state["zoo_digest"] == zoo.digest and set(state["test_runs"]) != tested:
        raise SettingsError(
            f"split_seed: {settings.split_seed} tests on runs that the encoder {folder} was trained on; "
            f"use the {state['settings']['split_seed']} of the encoder"
        )
    return _Start(
        WeightAutoencoderModel.from_pretrained(folder),
        WeightFeatureExtractor.from_pretrained(folder),
        str(state["identity"]),
    )


def _built(
    zoo: Zoo, data: JointData, settings: JointSettings, image_encoder: ImageEncoder, started: _Start | None
) -> tuple[JointFeatureExtractor, JointModel]:
    """Builds the model and fits what it owns of the training split: statistics and the edges of bins."""
    split = replace(data.split, train=data.train)
    encoder_settings = settings.towers.encoder
    given, encoder_config = (
        fitted_input(zoo, split, encoder_settings) if started is None else (started.extractor, started.model.config)
    )
    extractor = JointFeatureExtractor(given.tokenizer, given.token_size, given.mean, given.std)
    torch.manual_seed(settings.loop.seed)
    model = JointModel(_config(data, settings, image_encoder, encoder_config))
    if started is not None:
        own = model.weight_model.encoder.state_dict()
        model.weight_model.encoder.load_state_dict({k: v for k, v in started.model.state_dict().items() if k in own})
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
    _freeze(model, frozen_encoder=started is not None and settings.towers.freeze_encoder)
    return extractor, model


def _config(
    data: JointData, settings: JointSettings, image_encoder: ImageEncoder, encoder: WeightAutoencoderConfig
) -> JointConfig:
    towers = settings.towers
    shape: dict[str, Any] = {
        "hidden_size": towers.hidden_size,
        "pooling_heads": towers.pooling_heads,
        "dropout": towers.dropout,
    }
    try:
        return JointConfig(
            dataset_config=DatasetTowerConfig(
                feature_size=data.datasets[0].features.shape[1] if data.datasets else 1,
                components=towers.components,
                image_encoder=image_encoder.name,
                image_encoder_digest=image_encoder.digest,
                sample=settings.sample,
                **shape,
            ),
            weight_config=WeightTowerConfig(
                encoder_config=encoder, hops=towers.hops, last_layer=towers.last_layer, **shape
            ),
            result_config=ResultTowerConfig(
                results=list(data.result_names),
                kind=towers.result_kind,
                bins=towers.bins,
                interpolate=towers.interpolate,
                smoothing=towers.smoothing,
                hidden_size=towers.projection_dim,
            ),
            projection_dim=towers.projection_dim,
            pairs=list(towers.pairs),
            loss=towers.loss,
            positives=towers.positives,
            reconstruction_weight=towers.reconstruction_weight,
        )
    except Exception as error:  # strict configs raise their own family of errors
        raise SettingsError(f"towers: {' '.join(str(error).split())}") from error


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


@dataclass(frozen=True, eq=False)
class JointBatch:
    """Rows of a zoo as triplets.

    Attributes:
        inputs: arguments of `JointModel.forward`.
        number: running number of the micro-batch.
    """

    inputs: dict[str, Any]
    number: int


class ClassOrders:
    """In which order the classes of each dataset are numbered in a step; the same on all processes."""

    def __init__(self, zoo: Zoo, data: JointData, share: float, seed: int) -> None:
        self._data, self._share, self._seed = data, share, seed
        groups = {header: output_group(one) for header, one in zoo.architectures.items()} if share else {}
        headers = zoo.index["header"].to_numpy()
        # A dataset can be renumbered if all of its models can.
        self._renumbered = {
            number
            for number, dataset in enumerate(data.datasets)
            if all(
                (group := groups.get(header)) is not None and group.size == dataset.classes
                for header in set(headers[data.numbers == number])
            )
        }

    def order(self, step: int, number: int) -> Int[Tensor, " classes"] | None:
        """Returns which class has which place in a step; None for the order of the dataset."""
        if (
            number not in self._renumbered
            or float(torch.rand((), generator=seeded_generator(self._seed, step))) >= self._share
        ):
            return None
        return torch.randperm(self._data.datasets[number].classes, generator=seeded_generator(self._seed, step, number))

    def renumbered(
        self,
        flat: Float[Tensor, "models params"],
        architecture: Architecture,
        rows: Int[np.ndarray, "models"],
        step: int,
    ) -> Float[Tensor, "models params"]:
        """Puts the outputs of models in the order of a step."""
        orders = [self.order(step, int(number)) for number in self._data.numbers[rows]]
        chosen = [place for place, order in enumerate(orders) if order is not None]
        if not chosen:
            return flat
        flat = flat.clone()
        flat[chosen] = reordered_outputs(
            flat[chosen], architecture, torch.stack([order for order in orders if order is not None])
        )
        return flat


@dataclass(frozen=True)
class JointBatches:
    """Endless micro-batches of triplets; see `weightspace.training.loop.Batches`.

    All models of a dataset see the same draw of its images in a step, on all processes, so that it is embedded once.
    Of its results, each model states one or more at random: later questions will state some of them, too.
    """

    views: ViewBatches
    data: JointData
    orders: ClassOrders
    images: int

    def __call__(self, start: int, process: int, processes: int) -> Iterator[JointBatch]:
        """Yields the micro-batches of one process from number ``start`` on."""
        for batch in self.views(start, process, processes):
            inputs = {name: value for name, value in batch.inputs.items() if name != "views"}
            seeds = [self.views.seed, batch.number]
            results = torch.from_numpy(self.data.results[batch.rows]).float()
            inputs |= {"results": results, "stated": stated_results(results, seeded_generator(*seeds, process))}
            numbers, index = np.unique(self.data.numbers[batch.rows], return_inverse=True)
            unknown = int((numbers < 0).sum())
            if len(numbers) > unknown:
                numbers = numbers[unknown:]
                generators = [seeded_generator(*seeds, number) for number in numbers.tolist()]
                features, labels = self.data.sampled(numbers.tolist(), self.images, generators)
                for place, number in enumerate(numbers.tolist()):
                    order = self.orders.order(batch.number, number)
                    labels[place] = labels[place] if order is None else order.argsort()[labels[place]]
                inputs |= {"dataset_features": features, "dataset_labels": labels}
                inputs |= {"dataset_index": torch.from_numpy(index) - unknown, "dataset_ids": torch.from_numpy(numbers)}
            yield JointBatch(inputs, batch.number)


def stated_results(
    results: Float[Tensor, "batch results"], generator: torch.Generator
) -> Bool[Tensor, "batch results"]:
    """Draws what each row states: a subset of its known results, every size equally likely, none empty if avoidable."""
    known = results.isfinite()
    counts = known.sum(1, keepdim=True)
    sizes = (torch.rand(len(results), 1, generator=generator) * counts).floor() + 1
    keys = torch.rand(results.shape, generator=generator).masked_fill(~known, 2.0)
    return known & (keys.argsort(1).argsort(1) < sizes)


def _batches(zoo: Zoo, data: JointData, extractor: JointFeatureExtractor, settings: JointSettings) -> JointBatches:
    loop = settings.loop
    orders = ClassOrders(zoo, data, settings.shuffle_classes, loop.seed)
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

    def losses(self, model: nn.Module, batch: JointBatch) -> Mapping[str, Tensor]:
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
        weights = torch.cat([embed_weights(model, self._extractor, batch) for batch in self._batches])
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


@torch.no_grad()
def embed_weights(model: JointModel, extractor: JointFeatureExtractor, batch: ZooBatch) -> Float[Tensor, "models size"]:
    """Embeds models of one architecture, each to a vector of length 1, on the CPU."""
    inputs = extractor.batch(batch.flat, batch.architecture).to(model.device)
    return unit(model.get_weight_features(**inputs)).cpu()


@torch.no_grad()
def embed_dataset(model: JointModel, dataset: DatasetFeatures) -> Float[Tensor, "1 size"]:
    """Embeds a dataset to a vector of length 1, on the CPU.

    Raises:
        SettingsError: its features come from another image encoder than the model was trained with.
    """
    model.ensure_image_encoder(dataset.encoder, dataset.encoder_digest)
    inputs = (dataset.features.unsqueeze(0).to(model.device), dataset.labels.unsqueeze(0).to(model.device))
    return unit(model.get_dataset_features(*inputs)).cpu()
