"""Embeds models with a trained encoder, and keeps the embeddings as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, BatchFeature

from weightspace.errors import WeightspaceError, ZooError
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.pooling import STATISTICS
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.storage import replacing

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Encoder:
    """A trained encoder with its input side.

    Attributes:
        path: folder it was loaded from.
        model: the encoder, in evaluation mode.
        extractor: turns weights into its inputs.
    """

    path: Path
    model: WeightAutoencoderModel
    extractor: WeightFeatureExtractor

    @torch.no_grad()
    def embed(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models features"]:
        """Embeds models of one architecture from their flat weight vectors."""
        return torch.cat([self._features(self.extractor.batch(part, architecture)) for part in flat.split(_CHUNK)])

    @torch.no_grad()
    def embed_checkpoint(self, location: str | Path) -> Float[Tensor, " features"]:
        """Embeds one checkpoint file or folder.

        Raises:
            WeightspaceError: it cannot be read, or holds entries that are not finite.
        """
        return self._features(self.extractor(location))[0]

    def _features(self, inputs: BatchFeature) -> Tensor:
        features = self.model.get_weight_features(**inputs).pooler_output
        assert features is not None
        return features

    @torch.no_grad()
    def reconstruct(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Encodes models to latents and decodes them again."""
        parts = []
        for part in flat.split(_CHUNK):
            inputs = self.extractor.batch(part, architecture)
            tokens = self.model(**inputs, return_loss=False).reconstruction
            parts.append(self.extractor.restore(tokens, architecture))
        return torch.cat(parts)

    @property
    def embedding_size(self) -> int:
        """Length of the embedding of one model."""
        config = self.model.config
        return int(config.depth_bins * (2 * config.latent_size + STATISTICS))

    def latent_size(self, architecture: Architecture) -> int:
        """Numbers that a whole model of this architecture is compressed to."""
        return self.extractor.token_count(architecture) * self.model.config.latent_size


def load_encoder(folder: str | Path) -> Encoder:
    """Loads a `save_pretrained` folder.

    Raises:
        WeightspaceError: there is no encoder in the folder.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise WeightspaceError(f"{folder}: no encoder (there is no config.json); train one or check the path")
    try:
        model = AutoModel.from_pretrained(path).eval()
        extractor = AutoFeatureExtractor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise WeightspaceError(f"{folder}: the encoder cannot be loaded: {str(error).splitlines()[0]}") from error
    if not isinstance(model, WeightAutoencoderModel):
        raise WeightspaceError(
            f"{folder}: a {type(model).__name__} is no weight encoder; give a folder of this library"
        )
    return Encoder(path, model, extractor)


def embed_zoo(
    encoder: Encoder, zoo: Zoo, rows: Int[np.ndarray, "models"] | None = None
) -> Float[np.ndarray, "models features"]:
    """Embeds the models of a zoo, in the order of ``rows`` (all by default, ascending)."""
    chosen, places = np.unique(np.arange(len(zoo)) if rows is None else np.asarray(rows), return_inverse=True)
    embeddings: np.ndarray | None = None
    with tqdm(total=len(chosen), desc="embed", unit="model", leave=False) as bar:
        for batch in zoo.batches(chosen, chunk=_CHUNK):
            values = encoder.embed(batch.flat, batch.architecture).numpy()
            if embeddings is None:
                embeddings = np.empty((len(chosen), values.shape[1]), dtype=np.float32)
            embeddings[np.searchsorted(chosen, batch.rows)] = values
            bar.update(len(batch.rows))
    if embeddings is None:
        raise ZooError(f"{zoo.path}: no rows to embed; choose at least one")
    return embeddings[places]


def embed(locations: Sequence[str], encoder: str | Path) -> pd.DataFrame:
    """Embeds zoos, checkpoint files and folders.

    Args:
        locations: a folder with a ``zoo.json`` is a zoo, any other folder or file a checkpoint, and a folder that is no
            checkpoint itself stands for all safetensors files below it.
        encoder: folder of the encoder.

    Returns:
        One row a model: ``model_id``, ``location``, the zoo's metadata where there is any, and ``embedding``.

    Raises:
        WeightspaceError: the encoder or a model cannot be read.
    """
    loaded = load_encoder(encoder)
    frames = []
    for location in locations:
        if (Path(location) / "zoo.json").exists():
            zoo = load_zoo(location)
            frame = zoo.index.assign(location=str(location))
            frame["embedding"] = list(embed_zoo(loaded, zoo))
            frames.append(frame)
            continue
        paths = list(checkpoint_paths(Path(location)))
        rows = []
        for path in tqdm(paths, desc="embed", unit="model", leave=False, disable=len(paths) < 2):
            embedding = loaded.embed_checkpoint(path).numpy()
            rows.append({"model_id": _model_id(path), "location": str(path), "embedding": embedding})
        frames.append(pd.DataFrame(rows))
    return pd.concat(frames, ignore_index=True)


def checkpoint_paths(location: Path) -> Iterator[Path]:
    """Yields the checkpoints that a location stands for: itself, or every safetensors file below a plain folder.

    Raises:
        WeightspaceError: there is nothing at ``location``.
    """
    if location.is_file():
        yield location
        return
    found = sorted(location.rglob("*.safetensors")) if location.is_dir() else []
    if not found:
        raise WeightspaceError(f"{location}: no zoo, safetensors file or folder of them; check the path")
    whole = {path.parent for path in location.rglob("*.safetensors.index.json")}
    yield from sorted(whole)
    yield from (path for path in found if path.parent not in whole)


def _model_id(path: Path) -> str:
    """Names a checkpoint by its file, or by its folder where the file has the name that all models have."""
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem == "model" else path.stem


def save_embeddings(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes embeddings as one parquet file, whole or not at all.

    Raises:
        ZooError: the file cannot be written.
    """
    path = Path(path)
    with replacing(path) as partial:
        frame.to_parquet(partial)
