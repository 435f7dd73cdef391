"""Image classification datasets for training and evaluating zoos, with controlled variants of each.

An image dataset id is a base, optionally followed by options in the manner of a URL::

    digits
    digits?classes=0-1-2-3-4&rotation=90&polarity=inverted
    org/name?config=small&label=fine_label&size=28

The base is ``digits`` (scikit-learn's handwritten digits), a local folder or a Hub dataset that
``datasets.load_dataset`` opens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx2
import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from weightspace.errors import ZooError, first_line
from weightspace.schema import ImageDataset

ROTATIONS = (0, 90, 180, 270)
POLARITIES = ("normal", "inverted")
_TEST_FRACTION = 0.3
_TEST_SPLITS = ("test", "validation")
_HUB_NAME = re.compile(r"[\w.:/@-]+", re.ASCII)
_FIX_OFFLINE = "check the name and the connection (without the Hub only caches are asked, at once)"
_PATIENCE = 10.0
_OPTIONS = ("classes", "rotation", "polarity", "size", "config", "revision", "label")


def load_images(dataset_id: str) -> ImageDataset:
    """Loads the dataset (variant) called ``dataset_id``.

    Options: ``classes=3-1`` keeps these classes, and a label is the position in this list; ``rotation`` is 90, 180 or
    270 degrees counter-clockwise; ``polarity=inverted`` replaces x by 1 - x; ``size=N`` resizes to N x N pixels when
    decoding; ``config``, ``revision`` and ``label`` choose a configuration, a Hub revision and a label column.
    Without a test (or validation) split, a fixed stratified 30 % of the images becomes the test split.

    The tensors may be shared between calls: treat them as read-only.

    Raises:
        ZooError: the dataset cannot be opened, has no image or label column, or does not fit the options.
    """
    variant = parse_dataset_id(dataset_id)
    base = _load_base(variant.source)
    listed = variant.classes or tuple(range(base.classes))
    if max(listed) >= base.classes:
        raise ZooError(
            f"{dataset_id}: no class {max(listed)} in {base.classes} classes; choose 0 to {base.classes - 1}"
        )
    train, train_labels = _select_and_transform(base.train_images, base.train_labels, base.classes, variant)
    test, test_labels = _select_and_transform(base.test_images, base.test_labels, base.classes, variant)
    if not len(train) or not len(test):
        raise ZooError(f"{dataset_id}: no {'train' if len(test) else 'test'} images are left; choose other classes")
    names = tuple(base.names[number] for number in listed)
    return ImageDataset(dataset_id, train, train_labels, test, test_labels, len(listed), names)


def variants(
    base: str,
    class_subsets: Sequence[Sequence[int] | None] = (None,),
    rotations: Sequence[int] = (0,),
    polarities: Sequence[str] = ("normal",),
) -> list[str]:
    """Lists the ids of all combinations; ``None`` among the subsets stands for all classes, in the base's order.

    Raises:
        ZooError: an option that ``load_images`` would refuse whatever the base.
    """
    source = parse_dataset_id(base)
    return [
        str(replace(source, classes=tuple(classes or ()), rotation=rotation, polarity=polarity))
        for classes, rotation, polarity in product(class_subsets, rotations, polarities)
    ]


@dataclass(frozen=True)
class DatasetVariant:
    """A parsed dataset id; ``str`` writes it back without defaults, in one order.

    Attributes:
        base: ``"digits"``, a folder or a Hub dataset.
        config: configuration of the Hub dataset.
        revision: Hub revision.
        label: label column.
        size: pixels that images are resized to when decoding.
        classes: the classes kept, in the order of their labels; none stands for all of them.
        rotation: degrees counter-clockwise.
        polarity: ``"normal"`` or ``"inverted"``.
    """

    base: str
    config: str | None = None
    revision: str | None = None
    label: str | None = None
    size: int | None = None
    classes: tuple[int, ...] = ()
    rotation: int = 0
    polarity: str = "normal"

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes) or any(c < 0 for c in self.classes) or len(self.classes) == 1:
            listed = "-".join(map(str, self.classes))
            raise ZooError(
                f"{self.base}: classes={listed}; list two or more different class numbers, e.g. classes=0-1-2"
            )
        if self.rotation not in ROTATIONS:
            raise ZooError(f"{self.base}: rotation={self.rotation}; choose one of {', '.join(map(str, ROTATIONS))}")
        if self.polarity not in POLARITIES:
            raise ZooError(f"{self.base}: polarity={self.polarity}; choose one of {', '.join(POLARITIES)}")
        if self.size is not None and self.size < 1:
            raise ZooError(f"{self.base}: size={self.size}; give a positive number of pixels")

    @property
    def source(self) -> DatasetVariant:
        """The images as they are loaded and decoded, once for all variants of them."""
        return replace(self, classes=(), rotation=0, polarity="normal")

    def __str__(self) -> str:
        values = asdict(self) | {"classes": "-".join(map(str, self.classes))}
        del values["base"]
        query = "&".join(f"{key}={value}" for key, value in values.items() if value and value != "normal")
        return f"{self.base}?{query}" if query else self.base


def parse_dataset_id(dataset_id: str) -> DatasetVariant:
    """Parses a dataset id; opens nothing.

    Raises:
        ZooError: it is no dataset id, or an option that ``load_images`` would refuse whatever the base.
    """
    base, _, query = dataset_id.partition("?")
    values: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in _OPTIONS or key in values:
            raise ZooError(f"{dataset_id}: unknown or repeated option {key!r}; the options are {', '.join(_OPTIONS)}")
        try:
            if key == "classes":
                values[key] = tuple(int(number) for number in text.split("-"))
            else:
                values[key] = int(text) if key in ("rotation", "size") else text
        except ValueError:
            raise ZooError(f"{dataset_id}: {key}={text!r} needs whole numbers, e.g. classes=0-1-2") from None
    if not base or (query and not values):
        raise ZooError(f"{dataset_id!r}: not a dataset id; write e.g. digits?classes=0-1-2&rotation=90")
    return DatasetVariant(base, **values)


def _select_and_transform(
    images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], classes: int, variant: DatasetVariant
) -> tuple[Float[Tensor, "m c h2 w2"], Int[Tensor, " m"]]:
    if variant.classes:
        position = torch.full((classes,), -1)
        position[list(variant.classes)] = torch.arange(len(variant.classes))
        labels = position[labels]
        images, labels = images[labels >= 0], labels[labels >= 0]
    if variant.rotation:
        images = torch.rot90(images, variant.rotation // 90, dims=(2, 3)).contiguous()
    return (1 - images if variant.polarity == "inverted" else images), labels


@lru_cache(maxsize=1)
def _load_base(source: DatasetVariant) -> ImageDataset:
    return _digits(source) if source.base == "digits" else _load_source(source)


def _digits(source: DatasetVariant) -> ImageDataset:
    if source != DatasetVariant("digits"):
        raise ZooError(f"{source}: digits has no config, revision, label or size option; leave it out")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    return _hold_out_test("digits", images, torch.from_numpy(bunch.target).long(), tuple(map(str, range(10))))


def _hold_out_test(
    name: str, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], classes: tuple[str, ...]
) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(classes)):
        rows = (labels == label).nonzero().flatten()
        held[rows[torch.randperm(len(rows), generator=generator)][: round(_TEST_FRACTION * len(rows))]] = True
    return ImageDataset(name, images[~held], labels[~held], images[held], labels[held], len(classes), classes)


def _load_source(source: DatasetVariant) -> ImageDataset:
    import datasets

    name, path = str(source), Path(source.base).expanduser()
    if source.base.startswith(("/", ".", "~")) and not path.is_dir():
        raise ZooError(f"{name}: no such folder; check the path")
    if not path.is_dir() and not _HUB_NAME.fullmatch(source.base):
        raise ZooError(
            f"{name}: is neither a folder nor the name of a dataset; write digits, a folder or org/name (a description "
            "of classes has no images)"
        )
    try:
        if path.is_dir():
            splits = datasets.load_dataset(str(path.resolve()), source.config, revision=source.revision)
        else:
            with _asking_caches_only_if_the_hub_is_away():
                splits = datasets.load_dataset(source.base, source.config, revision=source.revision)
    except Exception as error:  # loaders of many formats meet untrusted files here: each raises what it likes
        fix = f"; {_FIX_OFFLINE}" if isinstance(error, ConnectionError) else ""
        raise ZooError(f"{name}: datasets.load_dataset cannot open it: {first_line(error)}{fix}") from error
    if "train" not in splits:
        raise ZooError(f"{name}: no split named 'train' among {', '.join(splits)}; rename one to 'train'")
    train = splits["train"]
    test = next((splits[split] for split in _TEST_SPLITS if split in splits), None)
    image, label = _columns(train.features, source, name)
    parts = [part for part in (train, test) if part is not None]
    classes, labels = _class_numbers([np.asarray(part[label]) for part in parts], train.features[label], name)
    images = _decode([part[image] for part in parts], source, name)
    labelled = [(pixels[known >= 0], known[known >= 0]) for pixels, known in zip(images, labels, strict=True)]
    if len(labelled) == 1 or not len(labelled[1][1]):
        return _hold_out_test(name, *labelled[0], classes)
    return ImageDataset(name, *labelled[0], *labelled[1], len(classes), classes)


@contextmanager
def _asking_caches_only_if_the_hub_is_away() -> Iterator[None]:
    """Spares a dataset the half minute of retries that only huggingface_hub's offline mode can shorten."""
    import datasets

    if _hub_answers():
        yield
        return
    modules: tuple[Any, ...] = (constants, datasets.config)
    modes = [(module, module.HF_HUB_OFFLINE) for module in modules]
    try:
        for module, _ in modes:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, before in modes:
            module.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def _hub_answers() -> bool:
    """Whether the Hub is within reach, which is found out once for all datasets."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except httpx2.TransportError:
        return False
    return True


def _columns(features: Any, source: DatasetVariant, name: str) -> tuple[str, str]:
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    image = _one_of(images, "image", f"{name}: expected one image column")
    if source.label is not None:
        if source.label not in features:
            raise ZooError(f"{name}: no column {source.label!r}; the columns are {', '.join(features)}")
        return image, source.label
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.Value) and ("int" in feature.dtype or feature.dtype in ("string", "bool"))
    ]
    return image, _one_of(labels, "label", f"{name}: expected one label column; choose with ?label=COLUMN")


def _one_of(columns: list[str], preferred: str, problem: str) -> str:
    if preferred in columns or len(columns) == 1:
        return preferred if preferred in columns else columns[0]
    raise ZooError(f"{problem}, found {', '.join(columns) or 'none'}")


def _class_numbers(
    values: list[np.ndarray], feature: Any, name: str
) -> tuple[tuple[str, ...], list[Int[Tensor, " n"]]]:
    """Names of the classes, and class numbers of every split; a negative label (as the Hub marks unknown) stays so."""
    import datasets

    if any(part.dtype == object for part in values):
        raise ZooError(f"{name}: the label column has empty values; label every image or take them out")
    if isinstance(feature, datasets.ClassLabel):
        classes, numbers = tuple(feature.names), values
    else:
        present = np.unique(np.concatenate(values))
        classes, numbers = tuple(map(str, present)), [np.searchsorted(present, part) for part in values]
    if len(classes) < 2:
        raise ZooError(f"{name}: {len(classes)} class in the label column; a classification dataset needs two or more")
    if any(part.size and part.max() >= len(classes) for part in numbers):
        raise ZooError(f"{name}: a label lies above the {len(classes)} named classes; correct the label column")
    return classes, [torch.from_numpy(part.astype(np.int64)) for part in numbers]


def _decode(columns: Sequence[Any], source: DatasetVariant, name: str) -> list[Float[Tensor, "n c h w"]]:
    """Decodes the images of every split alike: one grey channel, or three when any image has colour."""
    arrays = [[_pixels(image, source) for image in column] for column in columns]
    sizes = {array.shape[:2] for part in arrays for array in part}
    if len(sizes) != 1:
        some = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3]) or "none"
        raise ZooError(f"{name}: images of {len(sizes)} sizes ({some}, ...); give one with ?size=PIXELS")
    channels = max(array.shape[2] for part in arrays for array in part)
    return [torch.from_numpy(_stacked(part, channels)) for part in arrays]


def _stacked(arrays: list[np.ndarray], channels: int) -> np.ndarray:
    stacked = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.float32)
    for row, array in enumerate(arrays):
        np.divide(np.moveaxis(array, 2, 0), np.iinfo(array.dtype).max, out=stacked[row])
    return stacked


def _pixels(image: Image, source: DatasetVariant) -> np.ndarray:
    """Pixels of one image as ``height width channels`` integers of 8 bits, or 16 where the file has 16."""
    if image.mode.startswith("I"):
        image = image if source.size is None else image.convert("I").resize((source.size, source.size))
        return np.asarray(image).astype(np.uint16)[..., None]
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if source.size is not None:
        image = image.resize((source.size, source.size))
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def variant_of(dataset: str) -> DatasetVariant | None:
    """Parses a dataset id; None if it is not one of this library's."""
    try:
        return parse_dataset_id(dataset)
    except ZooError:
        return None
