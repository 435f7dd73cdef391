"""Features of image datasets from a frozen image encoder.

They are computed once per content and encoder, and cached in huggingface_hub's assets cache (``HF_ASSETS_CACHE``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from weightspace.data.image_encoders import ImageEncoder
from weightspace.data.images import load_images
from weightspace.errors import CheckpointError, SettingsError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.hub import LIBRARY
from weightspace.io.writing import save_checkpoint
from weightspace.schema import ImageDataset

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class DatasetFeatures:
    """A sample of a dataset's images as an image encoder sees them.

    Attributes:
        dataset_id: see `weightspace.data.images.load_images`.
        encoder: name of the encoder.
        encoder_digest: what identifies the encoder; see `ImageEncoder.digest`.
        features: of the sampled images, class by class.
        labels: class numbers in ``range(classes)``.
        classes: number of classes.
        digest: sha256 of the sampled images, their labels and the encoder.
    """

    dataset_id: str
    encoder: str
    encoder_digest: str
    features: Float[Tensor, "images features"]
    labels: Int[Tensor, " images"]
    classes: int
    digest: str


def dataset_features(
    dataset: str | ImageDataset, encoder: ImageEncoder, *, images: int = 64, seed: int = 0, split: Split = "train"
) -> DatasetFeatures:
    """Returns the features of a sample of a dataset, from the cache if they were computed before.

    Variants of one dataset with the same classes are sampled alike, so that they differ in nothing but the variation.

    Args:
        dataset: an id, or the images themselves.
        encoder: see `weightspace.data.image_encoders.open_image_encoder`.
        images: size of the sample, at most: the same number of every class, but at least one. A class that has fewer
            gives all that it has.
        seed: draws the sample.
        split: models are judged by the test split, so the training split describes what they have seen.

    Raises:
        SettingsError: ``images`` is no positive number.
        ZooError: the dataset cannot be opened.
    """
    if images < 1:
        raise SettingsError(f"images: {images} is too small, give 1 or more")
    dataset = load_images(dataset) if isinstance(dataset, str) else dataset
    sample, labels = balanced_sample(dataset, images, seed, split)
    digest = _digest(sample, labels, encoder)
    path = Path(constants.HF_ASSETS_CACHE) / LIBRARY / "features" / digest[:2] / f"{digest}.safetensors"
    features = _read_cached(path, len(sample))
    if features is None:
        features = encoder.encode(sample)
        _write_cached(path, features)
    return DatasetFeatures(dataset.id, encoder.name, encoder.digest, features, labels, dataset.classes, digest)


def features_of_datasets(
    dataset_ids: Sequence[str], encoder: ImageEncoder, *, images: int = 64, seed: int = 0, split: Split = "train"
) -> list[DatasetFeatures]:
    """Returns `dataset_features` of many datasets, in their order, and shows progress."""
    bar = tqdm(dataset_ids, desc="dataset features", unit="dataset", leave=False, disable=None)
    return [dataset_features(name, encoder, images=images, seed=seed, split=split) for name in bar]


def balanced_sample(
    dataset: ImageDataset, count: int, seed: int, split: Split
) -> tuple[Float[Tensor, "m channels height width"], Int[Tensor, " m"]]:
    """Draws the same number of images of every class, but at least one, class by class; and their labels."""
    images, labels = (
        (dataset.train_images, dataset.train_labels) if split == "train" else (dataset.test_images, dataset.test_labels)
    )
    generator = torch.Generator().manual_seed(seed)
    each = max(1, count // dataset.classes)
    members = [(labels == label).nonzero().flatten() for label in range(dataset.classes)]
    rows = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in members])
    return images[rows], labels[rows]


def _digest(images: Float[Tensor, "m channels height width"], labels: Int[Tensor, " m"], encoder: ImageEncoder) -> str:
    content = hashlib.sha256(f"{encoder.digest} {tuple(images.shape)} {images.dtype} {labels.dtype} ".encode())
    for tensor in (images, labels):
        content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()


def _read_cached(path: Path, images: int) -> Float[Tensor, "images features"] | None:
    """Reads a cache entry; one that is missing, damaged or of another size is ignored."""
    with suppress(CheckpointError):
        entry = open_checkpoint(path)
        features = entry.tensor("features")
        if features.ndim == 2 and len(features) == images and entry.metadata.get("sha256") == _sha256(features):
            return features.clone()
    return None


def _write_cached(path: Path, features: Float[Tensor, "images features"]) -> None:
    with suppress(CheckpointError, OSError):  # they are only computed again
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint({"features": features}, path, metadata={"sha256": _sha256(features)})


def _sha256(features: Float[Tensor, "images features"]) -> str:
    return hashlib.sha256(features.numpy().data).hexdigest()
