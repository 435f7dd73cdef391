"""Trains the weight autoencoder on a zoo."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightspace.cards import write_card
from weightspace.data.images import load_images
from weightspace.errors import SettingsError, ZooError
from weightspace.losses import behaviour_loss, masked_mse
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.networks.families import FamilyConfig, run_flat
from weightspace.tokenizers import get_tokenizer
from weightspace.tokenizers.normalization import TokenNormalizer
from weightspace.training.batches import BatchPart, ViewBatch, ViewBatches
from weightspace.training.loop import Objective, clear_checkpoints, fit, is_main_process
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.facts import training_zoo
from weightspace.zoo.splits import Split, split_by_run
from weightspace.zoo.storage import write_text
from weightspace.zoo.views import Augmentation

TRAINING_FILE = "training.json"
_WIDEST_TOKEN = 256
_VALIDATION_MODELS = 256
_SPARSE_MODELS, _FEWEST_LATENTS = 0.1, 4


@dataclass(frozen=True)
class EncoderSettings:
    """Shape of the autoencoder; see `WeightAutoencoderConfig` for the fields.

    Attributes:
        tokenizer: ``"channel"``, ``"dense"``, or ``"lora"`` for zoos with adapters, which are channels otherwise.
        token_size: entries a token; None takes the widest row of the zoo's layers, at most 256.
        latent_size: numbers a token is compressed to; None takes the largest that keeps the latents of nine in ten
            models of the zoo at least ``compression`` times smaller than their weights, but no less than 4, and rounds
            it up to whole codes.
        compression: see ``latent_size``.
        window: tokens that attend to each other.
        hidden_size: width of the transformer.
        layers: transformer layers of the encoder, and of the decoder.
        heads: attention heads.
        beta: weight of the reconstruction loss against NT-Xent.
        temperature: of NT-Xent.
        code_levels: rounds latents to codes: levels of each of the numbers that one code stands for, e.g. ``[8, 8, 8]``
            for a code of 512 for every three numbers. Rounded numbers take few bits, so that twice the ``latent_size``
            is a good choice. None rounds nothing.
    """

    tokenizer: str = "channel"
    token_size: int | None = None
    latent_size: int | None = None
    compression: float = 4.0
    window: int = 64
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    beta: float = 0.95
    temperature: float = 0.1
    code_levels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BehaviourSettings:
    """The behaviour loss, for models whose function the library can run.

    Attributes:
        weight: share of the behaviour loss; the structure loss weighs ``1 - weight``. 0 turns it off.
        images: query images a model and step, drawn from the training split of the model's own dataset.
    """

    weight: float = 0.75
    images: int = 32

    def __post_init__(self) -> None:
        """Refuses shares outside of 0 to 1 and an empty query."""
        if not 0 <= self.weight < 1 or self.images < 1:
            raise SettingsError(
                f"behaviour: weight {self.weight} must be 0 to below 1, images {self.images} at least 1"
            )


@dataclass(frozen=True)
class AutoencoderSettings:
    """Everything that determines a trained autoencoder besides the zoo.

    Attributes:
        encoder: shape of the model.
        augmentation: how views differ.
        behaviour: the behaviour loss.
        loop: the training loop.
        split_seed: number of the split over runs; the test runs are never seen in training.
    """

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    behaviour: BehaviourSettings = field(default_factory=BehaviourSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    split_seed: int = 0


def train_autoencoder(zoo: Path | str, output: Path | str, settings: AutoencoderSettings) -> Path:
    """Trains an autoencoder on the training runs of a zoo and saves it as a `save_pretrained` folder.

    A finished folder with the same settings and zoo is left as it is; an unfinished one goes on where it stopped.
    ``training.json`` beside the model records settings, zoo and held-out runs, and a card says what is known of it.

    Args:
        zoo: folder of the zoo.
        output: folder of the encoder.
        settings: see `AutoencoderSettings`.

    Returns:
        ``output`` as a path.

    Raises:
        ZooError: the zoo cannot be used, or ``output`` holds an encoder of other settings or another zoo.
        SettingsError: the settings do not fit the zoo or this machine.
    """
    output, opened = Path(output), load_zoo(zoo)
    facts = {"zoo": opened.location, "zoo_digest": opened.digest, "settings": asdict(settings)}
    identity = training_identity(opened, settings)
    state = read_training(output)
    if state is not None and state["identity"] != identity:
        raise ZooError(
            f"{output}: holds an encoder of another zoo or other settings ({state['identity']}, asked for {identity}); "
            "choose another --output or delete it"
        )
    if state is not None and state["complete"]:
        return output
    split = split_by_run(opened.index["run_id"].to_numpy(), settings.split_seed)
    runs = opened.index["run_id"].to_numpy()
    facts |= {
        "identity": identity,
        "validation_runs": sorted(set(runs[split.validation])),
        "test_runs": sorted(set(runs[split.test])),
    }
    writes = is_main_process()
    if writes:
        output.mkdir(parents=True, exist_ok=True)
        write_training(output, {**facts, "complete": False})
    extractor, config = fitted_input(opened, split, settings.encoder)
    torch.manual_seed(settings.loop.seed)
    model = WeightAutoencoderModel(config)
    loop = settings.loop
    batches = ViewBatches(
        opened, split.train, extractor, settings.augmentation, loop.batch_size, config.window, loop.seed
    )
    objective = AutoencoderObjective(opened, split.validation, extractor, settings.behaviour, loop.seed)
    trained = fit(model, batches, objective, loop, output)
    assert isinstance(trained, WeightAutoencoderModel)
    if writes:
        trained.save_pretrained(output)
        extractor.save_pretrained(output)
        write_card(output, replace(trained.card_facts(), zoo=training_zoo(opened), training=asdict(settings)))
        write_training(output, {**facts, "complete": True, "parameters": trained.num_parameters()})
        clear_checkpoints(output)
    return output


def training_identity(zoo: Zoo, settings: Any, *others: str) -> str:
    """Digest of all that the trained weights follow from; how a run is watched and kept is none of it.

    Args:
        zoo: what is trained on.
        settings: a settings dataclass with a ``loop``.
        others: digests of whatever else goes in.
    """
    values = asdict(settings)
    for name in ("checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "tracker"):
        del values["loop"][name]
    return hashlib.sha256(json.dumps([zoo.digest, values, *others]).encode()).hexdigest()[:16]


def read_training(folder: Path | str) -> dict[str, Any] | None:
    """Reads what ``training.json`` records of an encoder's training; None if there is none.

    Raises:
        ZooError: the file is not what this library writes.
    """
    path = Path(folder) / TRAINING_FILE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        if not isinstance(state["complete"], bool) or not isinstance(state["test_runs"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ZooError(f"{path}: not a training record; train the encoder again") from None
    return dict(state)


class AutoencoderObjective(Objective):
    """Structure (masked MSE and NT-Xent, from the model) mixed with behaviour."""

    def __init__(
        self,
        zoo: Zoo,
        validation: Int[np.ndarray, "models"],
        extractor: WeightFeatureExtractor,
        behaviour: BehaviourSettings,
        seed: int,
    ) -> None:
        self._extractor, self._behaviour, self._seed = extractor, behaviour, seed
        queries = QueryImages(zoo) if behaviour.weight else None
        self._queries = queries if queries is not None and queries.runnable else None
        chosen = np.random.default_rng(seed).permutation(validation)[:_VALIDATION_MODELS]
        self._validation = list(zoo.batches(chosen))

    def losses(self, model: nn.Module, batch: ViewBatch) -> Mapping[str, Tensor]:
        """``loss``, ``reconstruction``, ``contrastive`` and, where functions can be run, ``behaviour``."""
        device = next(model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
        output = model(**inputs)
        losses = {"loss": output.loss, "reconstruction": output.reconstruction_loss}
        losses["contrastive"] = output.contrastive_loss
        generator = torch.Generator().manual_seed(self._seed + batch.number)
        behaviour = self._behaviour_of(output.reconstruction.float(), batch.parts, generator)
        if behaviour is not None:
            weight = self._behaviour.weight
            losses |= {"loss": (1 - weight) * output.loss + weight * behaviour, "behaviour": behaviour}
        elif self._queries is not None:
            # Processes average what they log by name: a batch that none of them can run must not leave the name out.
            losses["behaviour"] = output.loss.new_zeros(())
        return losses

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        """Reconstruction and behaviour of unseen, unaugmented models, and how evenly their codes are used."""
        assert isinstance(model, WeightAutoencoderModel)
        totals: dict[str, list[tuple[float, int]]] = {}
        codes: list[Tensor] = []
        device = next(model.parameters()).device
        for part in self._validation:
            inputs = self._extractor.batch(part.flat, part.architecture).to(device)
            output = model(**inputs, return_loss=False)
            structure = masked_mse(output.reconstruction.float(), inputs["weight_values"], inputs["weight_mask"])
            totals.setdefault("reconstruction", []).append((float(structure), len(part.rows)))
            everyone = BatchPart(part.architecture, part.rows, torch.arange(len(part.rows)), part.flat)
            generator = torch.Generator().manual_seed(self._seed)
            behaviour = self._behaviour_of(output.reconstruction.float(), [everyone], generator)
            if behaviour is not None:
                totals.setdefault("behaviour", []).append((float(behaviour), len(part.rows)))
            if model.quantizer is not None:
                codes.append(model.to_codes(output.latents).flatten(0, 1))
        figures = {
            name: sum(value * count for value, count in values) / sum(count for _, count in values)
            for name, values in totals.items()
        }
        if codes:
            assert model.quantizer is not None
            figures |= code_use(torch.cat(codes), model.quantizer.codebook_size)
        return figures

    def _behaviour_of(
        self, reconstruction: Tensor, parts: list[BatchPart], generator: torch.Generator
    ) -> Tensor | None:
        if self._queries is None:
            return None
        values, count = [], 0
        for part in parts:
            length = self._extractor.token_count(part.architecture)
            decoded = self._extractor.restore(
                reconstruction[part.places.to(reconstruction.device), :length], part.architecture
            )
            for config, places in self._queries.functions(part.rows).items():
                images = self._queries.draw(part.rows[places], self._behaviour.images, generator).to(decoded.device)
                original = run_flat(config, part.architecture, part.flat[places].to(decoded), images)
                imitated = run_flat(config, part.architecture, decoded[places], images)
                values.append(behaviour_loss(imitated, original) * len(places))
                count += len(places)
        return torch.stack(values).sum() / count if values else None


def code_use(codes: Int[Tensor, "tokens codes"], codebook_size: int) -> dict[str, float]:
    """Measures how much of a codebook is used, in the mean of the places that a code has in a token.

    Args:
        codes: codes of many tokens.
        codebook_size: what they are chosen from.

    Returns:
        ``code_use``, the share of the codebook that occurs at all, and ``code_perplexity``, the number of codes that
        would be as unpredictable if all were equally frequent. Few tokens cannot use many codes.
    """
    counts = torch.stack([place.bincount(minlength=codebook_size) for place in codes.unbind(1)]).double()
    entropies = torch.special.entr(counts / len(codes)).sum(-1)
    return {
        "code_use": float((counts > 0).double().mean()),
        "code_perplexity": float(entropies.exp().mean()),
    }


class QueryImages:
    """Training images of the datasets that a zoo's models were trained on, where function and dataset are known."""

    def __init__(self, zoo: Zoo) -> None:
        self._configs = zoo.families
        self._datasets = zoo.index["dataset"].to_numpy()
        pairs = zip(self._datasets, self._configs, strict=True)
        runnable = {name for name, config in pairs if config and isinstance(name, str)}
        self._ranges: dict[str, tuple[int, int]] = {}
        images, start = [], 0
        for name in sorted(runnable):
            part = load_images(name).train_images
            self._ranges[name] = (start, len(part))
            start += len(part)
            images.append(part)
        self._images = torch.cat(images) if images else torch.empty(0)

    @property
    def runnable(self) -> bool:
        """Whether any model of the zoo can be run."""
        return bool(self._ranges)

    def functions(self, rows: Int[np.ndarray, "models"]) -> dict[FamilyConfig, list[int]]:
        """Groups the places of those rows whose models can be run by their config."""
        groups: dict[FamilyConfig, list[int]] = {}
        for place, row in enumerate(rows):
            config = self._configs[row]
            if config is not None and self._datasets[row] in self._ranges:
                groups.setdefault(config, []).append(place)
        return groups

    def draw(
        self, rows: Int[np.ndarray, "models"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "models count c h w"]:
        """Draws ``count`` training images of each model's own dataset, with replacement."""
        starts, sizes = torch.tensor([self._ranges[self._datasets[row]] for row in rows]).unsqueeze(-1).unbind(1)
        chosen = (torch.rand(len(rows), count, generator=generator) * sizes).long() + starts
        return self._images[chosen]


def fitted_input(
    zoo: Zoo, split: Split, settings: EncoderSettings
) -> tuple[WeightFeatureExtractor, WeightAutoencoderConfig]:
    """Fits the input side on the training models and sizes the encoder by the zoo.

    Raises:
        ZooError: there is nothing to encode.
        SettingsError: the settings do not fit each other.
    """
    architectures = zoo.architectures.values()
    widest = max((layer.width for architecture in architectures for layer in architecture.layers), default=0)
    if not widest:
        raise ZooError(f"{zoo.location}: no model has a floating point tensor; there is nothing to encode")
    token_size = settings.token_size or min(widest, _WIDEST_TOKEN)
    tokenizer = get_tokenizer(settings.tokenizer, token_size)
    normalizer = TokenNormalizer.fit(
        (tokenizer.tokenize_batch(batch.flat, batch.architecture), tokenizer.layout(batch.architecture).mask)
        for batch in zoo.batches(split.train)
    )
    extractor = WeightFeatureExtractor(settings.tokenizer, token_size, normalizer.mean, normalizer.std)
    density = {header: a.numel / max(1, extractor.token_count(a)) for header, a in zoo.architectures.items()}
    sparse = np.quantile(zoo.index["header"].map(density), _SPARSE_MODELS, method="lower")
    latent_size = settings.latent_size or max(_FEWEST_LATENTS, math.floor(sparse / settings.compression))
    if settings.code_levels and settings.latent_size is None:
        latent_size += -latent_size % len(settings.code_levels)
    try:
        config = WeightAutoencoderConfig(
            token_size=token_size,
            latent_size=latent_size,
            window=settings.window,
            hidden_size=settings.hidden_size,
            num_encoder_layers=settings.layers,
            num_decoder_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=4 * settings.hidden_size,
            beta=settings.beta,
            temperature=settings.temperature,
            code_levels=None if settings.code_levels is None else list(settings.code_levels),
        )
    except Exception as error:  # strict configs raise their own family of errors
        raise SettingsError(f"encoder: {' '.join(str(error).split())}") from error
    return extractor, config


def write_training(output: Path, facts: Mapping[str, Any]) -> None:
    """Writes ``training.json``, whole or not at all."""
    write_text(output / TRAINING_FILE, json.dumps(facts, indent=2, sort_keys=True) + "\n")
