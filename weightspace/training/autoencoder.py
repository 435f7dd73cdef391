"""Trains the weight autoencoder on a zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from weightspace.errors import ZooError
from weightspace.losses import masked_mse
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.tokenizers import get_tokenizer
from weightspace.tokenizers.normalization import TokenNormalizer
from weightspace.training.batches import Batch, BatchPart, ViewBatches
from weightspace.training.behaviour import BehaviourLoss, BehaviourSettings
from weightspace.training.loop import Objective
from weightspace.training.run import Prepared, config_from, run_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.splits import Split
from weightspace.zoo.views import Augmentation

_WIDEST_TOKEN = 256
_VALIDATION_MODELS = 256
_SPARSE_MODELS, _FEWEST_LATENTS = 0.1, 4


@dataclass(frozen=True)
class EncoderSettings:
    """Shape of the autoencoder; the fields that are not described here are those of `WeightAutoencoderConfig`.

    Attributes:
        tokenizer: ``"channel"``, ``"dense"``, or ``"lora"`` for zoos with adapters, which are channels otherwise.
        token_size: entries a token; None takes the widest row of the zoo's layers, at most 256.
        latent_size: numbers a token is compressed to; None takes the largest that keeps the latents of nine in ten
            models of the zoo at least ``compression`` times smaller than their weights, but no less than 4, and rounds
            it up to whole codes.
        compression: see ``latent_size``.
        layers: transformer layers of the encoder, and of the decoder.
        heads: attention heads.
        code_levels: e.g. ``[8, 8, 8]`` for a code of 512 for every three numbers of a latent. Rounded numbers take few
            bits, so that twice the ``latent_size`` is a good choice. None rounds nothing.
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
    opened, loop = load_zoo(zoo).usable(), settings.loop

    def prepare(split: Split) -> Prepared:
        extractor, config = fitted_input(opened, split, settings.encoder)
        torch.manual_seed(loop.seed)
        batches = ViewBatches(
            opened, split.train, extractor, settings.augmentation, loop.batch_size, config.window, loop.seed
        )
        objective = AutoencoderObjective(opened, split.validation, extractor, settings.behaviour, loop.seed)
        return Prepared(WeightAutoencoderModel(config), extractor, batches, objective)

    return run_training("autoencoder", opened, output, settings, prepare, differs="an encoder of another zoo")


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
        self._extractor = extractor
        self._behaviour = BehaviourLoss(zoo, extractor, behaviour, seed)
        chosen = np.random.default_rng(seed).permutation(validation)[:_VALIDATION_MODELS]
        self._validation = list(zoo.batches(chosen))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """``loss``, ``reconstruction``, ``contrastive`` and, where functions can be run, ``behaviour``."""
        device = next(model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
        output = model(**inputs)
        losses = {"loss": output.loss, "reconstruction": output.reconstruction_loss}
        losses["contrastive"] = output.contrastive_loss
        if self._behaviour.weight:
            behaviour = self._behaviour_of(output.reconstruction.float(), batch.parts, batch.number)
            if behaviour is not None:
                weight = self._behaviour.weight
                losses |= {"loss": (1 - weight) * output.loss + weight * behaviour, "behaviour": behaviour}
            else:
                # Processes average losses by name: a batch that none of them can run must not leave the name out.
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
            behaviour = self._behaviour_of(output.reconstruction.float(), [everyone], number=0)
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

    def _behaviour_of(self, reconstruction: Tensor, parts: list[BatchPart], number: int) -> Tensor | None:
        """The behaviour loss in the mean of the models that can be run; None if none can."""
        losses, count = self._behaviour(reconstruction, parts, number)
        return torch.stack(losses).sum() / count if losses else None


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
    config = config_from(
        WeightAutoencoderConfig, settings, name="encoder", token_size=token_size, latent_size=latent_size
    )
    return extractor, config
