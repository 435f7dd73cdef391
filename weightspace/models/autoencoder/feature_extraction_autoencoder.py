"""The input side of weight encoders: checkpoints to model inputs, and decoded tokens back to weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from weightspace.dtypes import dtype_name
from weightspace.errors import SettingsError, TokenError
from weightspace.io.checkpoint import Checkpoint, open_checkpoint
from weightspace.io.header import byte_count, shown
from weightspace.models.configuration import FIX, LARGEST
from weightspace.networks.infer import infer_architecture
from weightspace.schema import Architecture, ModelRef, TensorSpec
from weightspace.tokenizers import get_tokenizer
from weightspace.tokenizers.normalization import TokenNormalizer
from weightspace.tokenizers.sampling import sample_windows

Weights = str | Path | ModelRef | Checkpoint | Mapping[str, Tensor]
"""A checkpoint's location on disk or on the Hub, an open checkpoint, or a state dict."""

LARGEST_WHOLE = 4 * 2**30
"""Most bytes of weights that are read whole: their tokens and what is computed of them take several times as much."""


class WeightFeatureExtractor(FeatureExtractionMixin):
    """Turns models into the inputs of a weight encoder, with the statistics that the encoder was trained with.

    Saved beside a model by `save_pretrained` and loaded by `AutoFeatureExtractor.from_pretrained`.

    Args:
        tokenizer: name of the weight tokenizer, ``"channel"`` or ``"dense"``.
        token_size: entries a token.
        mean: mean of the training zoo's weights.
        std: their standard deviation.
    """

    model_input_names = ["weight_values", "weight_mask", "position_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, tokenizer: str = "channel", token_size: int = 64, mean: float = 0.0, std: float = 1.0, **kwargs: object
    ) -> None:
        _check(tokenizer, token_size, mean, std, kwargs)
        super().__init__()
        self.tokenizer = tokenizer
        self.token_size = token_size
        self.mean = mean
        self.std = std
        self._tokenizer = get_tokenizer(tokenizer, token_size)
        self._normalizer = TokenNormalizer(mean, std)

    def to_dict(self) -> dict[str, object]:
        """Everything that `from_pretrained` needs, ready for JSON."""
        return {key: value for key, value in super().to_dict().items() if not key.startswith("_")}

    def __call__(self, models: Weights | Sequence[Weights]) -> BatchFeature:
        """Builds one padded batch of whole models, of any mix of architectures.

        Args:
            models: one model or several: locations (a path, or ``org/name[@revision][:path]`` on the Hub), open
                checkpoints or state dicts.

        Returns:
            ``weight_values (batch, n, d)``, ``weight_mask (batch, n, d)``, ``position_ids (batch, n, 3)`` and
            ``attention_mask (batch, n)``; n is the longest model's number of tokens.

        Raises:
            WeightspaceError: a model cannot be read, is larger than ``LARGEST_WHOLE`` or holds entries that are not
                finite, or there is none.
        """
        single = isinstance(models, str | Path | ModelRef | Checkpoint | Mapping)
        items: Sequence[Weights] = [models] if single else models  # type: ignore[list-item, assignment]
        if not items:
            raise TokenError("no models given; pass at least one location, checkpoint or state dict")
        batches = []
        for item in items:
            architecture, tensors = _read(item)
            tokens = self._tokenizer.tokenize(tensors, architecture)
            every = torch.ones(len(tokens.mask), dtype=torch.bool)
            inputs = self._inputs(tokens.tokens, tokens.mask, tokens.positions, every)
            batches.append({**inputs, **self.links(architecture)})
        longest = max(len(inputs["weight_values"]) for inputs in batches)
        return BatchFeature(
            {name: torch.stack([_padded(inputs[name], longest) for inputs in batches]) for name in batches[0]}
        )

    def sample(
        self, model: str | Path | ModelRef | Checkpoint, *, window: int, max_bytes: int, seed: int = 0
    ) -> tuple[BatchFeature, float]:
        """Builds the inputs of one model of any size from a stratified sample of its token windows.

        Args:
            model: a location or an open checkpoint.
            window: tokens that the encoder sees at once; its config's ``window``.
            max_bytes: most bytes of weights to read; a smaller model is taken whole.
            seed: draws the sample.

        Returns:
            Inputs of whole windows, with the relative depth of each token's layer as ``depths``; and the share of the
            model's bytes that they hold.

        Raises:
            WeightspaceError: the model cannot be read or holds entries that are not finite, or ``max_bytes`` is less
                than a window.
        """
        checkpoint, architecture = _opened(model)
        chosen = sample_windows(self._tokenizer, architecture, window=window, max_bytes=max_bytes, seed=seed)
        if not chosen.runs:
            raise TokenError(f"{checkpoint.where}: no floating point tensor; there is nothing to encode")
        runs = self._tokenizer.tokenize_windows(checkpoint.entries, architecture, chosen.runs)
        columns = zip(*((run.tokens, run.mask, run.positions) for run in runs), strict=True)
        values, mask, positions = (
            torch.cat([_padded(part, math.ceil(len(part) / window) * window) for part in column]) for column in columns
        )
        inputs = {
            **self._inputs(values, mask, positions, mask.any(-1)),
            "depths": positions[:, 1] / max(1, len(architecture.layers) - 1),
        }
        return BatchFeature({name: value.unsqueeze(0) for name, value in inputs.items()}), chosen.share

    def _inputs(self, values: Tensor, mask: Tensor, positions: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        normalized = self._normalizer.normalize(values.float(), mask)
        return dict(zip(WeightFeatureExtractor.model_input_names, (normalized, mask, positions, tokens), strict=True))

    def batch(self, flat: Float[Tensor, "models params"], architecture: Architecture) -> BatchFeature:
        """Builds the batch of many models of one architecture from their flat weight vectors.

        Raises:
            ArchitectureError: the vectors have another length than the architecture.
        """
        values = self._tokenizer.tokenize_batch(flat.float(), architecture)
        mask = self._tokenizer.layout(architecture).mask
        return BatchFeature(
            {
                "weight_values": self._normalizer.normalize(values, mask),
                **self.layout(architecture, len(flat)),
                **{name: value.expand(len(flat), -1, -1) for name, value in self.links(architecture).items()},
            }
        )

    def layout(self, architecture: Architecture, models: int) -> dict[str, Tensor]:
        """Returns ``weight_mask``, ``position_ids`` and ``attention_mask``: the inputs that need no weights."""
        layout = self._tokenizer.layout(architecture)
        return {
            "weight_mask": layout.mask.expand(models, -1, -1),
            "position_ids": layout.positions.expand(models, -1, -1),
            "attention_mask": torch.ones(models, len(layout.positions), dtype=torch.bool),
        }

    def links(self, architecture: Architecture) -> dict[str, Tensor]:
        """Further inputs ``(n, ...)`` that follow from the architecture; zero in the padding. None here."""
        return {}

    def token_count(self, architecture: Architecture) -> int:
        """Number of tokens of a model of this architecture."""
        return self._tokenizer.token_count(architecture)

    def restore(
        self, reconstruction: Float[Tensor, "models n d"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Turns decoded tokens back into flat weight vectors; differentiable.

        Raises:
            TokenError: the tokens have another shape than the architecture gives.
        """
        mask = self._tokenizer.layout(architecture).mask
        if reconstruction.shape[1:] != mask.shape:
            raise TokenError(
                f"decoded tokens: expected {tuple(mask.shape)} a model, found {tuple(reconstruction.shape[1:])}; "
                "restore with the architecture of the models that were encoded"
            )
        tokens = self._normalizer.denormalize(reconstruction, mask)
        return self._tokenizer.detokenize_batch(tokens, architecture)


def _check(tokenizer: object, token_size: object, mean: object, std: object, others: Mapping[str, object]) -> None:
    """Refuses values of wrong types and what is unknown, since a saved extractor may be anyone's.

    Raises:
        SettingsError: naming the field.
    """
    wanted = (
        ("tokenizer", tokenizer, str),
        ("token_size", token_size, int),
        ("mean", mean, float),
        ("std", std, float),
    )
    for name, value, kind in wanted:
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise SettingsError(f"feature extractor: {name}: expected {kind.__name__}, got {shown(value)}; {FIX}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise SettingsError(f"feature extractor: {name}: {shown(value)} is above the limit of {LARGEST:,}; {FIX}")
    for name, value in others.items():
        if name == "auto_map":
            raise SettingsError(f"feature extractor: auto_map {shown(value)} names code, which is never run; remove it")
        if name not in ("feature_extractor_type", "processor_class", "return_attention_mask"):
            raise SettingsError(f"feature extractor: unknown field {shown(name)}; remove it, or update weightspace")


def _read(model: Weights) -> tuple[Architecture, Mapping[str, Tensor]]:
    if isinstance(model, Mapping):
        specs = [TensorSpec(name, tuple(value.shape), dtype_name(value.dtype)) for name, value in model.items()]
        return infer_architecture(specs), model
    checkpoint, architecture = _opened(model)
    size = sum(byte_count(spec, checkpoint.where) for spec in architecture.tensors)
    if size > LARGEST_WHOLE:
        raise TokenError(
            f"{checkpoint.where}: {size:,} bytes of weights are too many to read whole; read a sample of them with "
            "--max-bytes 64MB (WeightFeatureExtractor.sample)"
        )
    return architecture, checkpoint.tensors([spec.name for spec in architecture.tensors])


def _opened(model: str | Path | ModelRef | Checkpoint) -> tuple[Checkpoint, Architecture]:
    """Opens a checkpoint. Its architecture is without what never becomes tokens, so that this need not be read."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    checkpoint.ensure_weights()
    return checkpoint, replace(checkpoint.architecture, exclusions=())


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
