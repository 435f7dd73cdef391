from __future__ import annotations

from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weightspace.data import images as module
from weightspace.data.images import load_images, variants
from weightspace.errors import ZooError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Saves splits of (image, label) pairs as a local folder that ``datasets.load_dataset`` opens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save_splits(label=None, **splits):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for name, pairs in splits.items():
            images, labels = zip(*pairs, strict=True)
            table = datasets.Dataset.from_dict({"picture": list(images), "kind": list(labels)})
            table = table.cast_column("picture", datasets.Image())
            if label is not None:
                table = table.cast_column("kind", label)
            table.to_parquet(folder / f"{name}.parquet")
        return str(folder)

    return save_splits


def grey(value, side=4, mode="L"):
    return Image.new(mode, (side, side), value)


def test_digits_are_split_by_class_and_never_overlap():
    digits = load_images("digits")
    assert digits.train_images.dtype == torch.float32 and digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert len(digits.train_images) + len(digits.test_images) == 1797
    share = digits.test_labels.bincount() / (digits.test_labels.bincount() + digits.train_labels.bincount())
    assert torch.allclose(share, torch.full((10,), 0.3), atol=0.005)
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not train & {image.numpy().tobytes() for image in digits.test_images}
    torch.testing.assert_close(load_images("digits").test_images, digits.test_images, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    classes=st.lists(st.integers(0, 9), min_size=2, max_size=5, unique=True),
    rotation=st.sampled_from([0, 90, 180, 270]),
    inverted=st.booleans(),
)
def test_variant_is_the_base_selected_turned_and_inverted(classes, rotation, inverted):
    [name] = variants("digits", [classes], [rotation], ["inverted" if inverted else "normal"])
    base, variant = load_images("digits"), load_images(name)
    assert variant.id == name and variant.classes == len(classes)
    assert variant.names == tuple(map(str, classes))
    for images, labels, changed, numbers in (
        (base.train_images, base.train_labels, variant.train_images, variant.train_labels),
        (base.test_images, base.test_labels, variant.test_images, variant.test_labels),
    ):
        kept = [row for row, label in enumerate(labels.tolist()) if label in classes]
        assert numbers.tolist() == [classes.index(label) for label in labels[kept].tolist()]
        expected = np.rot90(images[kept].numpy(), rotation // 90, axes=(2, 3))
        np.testing.assert_array_equal(changed.numpy(), 1 - expected if inverted else expected)


def test_variants_lists_every_combination_once_without_defaults():
    names = variants("digits", [(0, 1, 2), None], [0, 90], ["normal", "inverted"])
    assert len(set(names)) == len(names) == 8
    assert names[0] == "digits?classes=0-1-2"
    assert "digits" in names and "digits?rotation=90&polarity=inverted" in names


@pytest.mark.parametrize(
    ("dataset_id", "named"),
    [
        ("digits?clases=0-1", "'clases'"),
        ("digits?classes=0-x", "classes='0-x'"),
        ("digits?classes=0-0", "classes=0-0"),
        ("digits?classes=3", "classes=3"),
        ("digits?classes=0-10", "no class 10"),
        ("digits?rotation=45", "rotation=45"),
        ("digits?rotation=90&rotation=180", "'rotation'"),
        ("digits?polarity=negative", "polarity=negative"),
        ("digits?size=28", "digits has no config, revision, label or size"),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("", "not a dataset id"),
        ("a photo of a cat; a photo of a dog", "neither a folder nor the name of a dataset; write digits, a folder"),
    ],
)
def test_refuses_ids_by_name(dataset_id, named):
    with pytest.raises(ZooError) as caught:
        load_images(dataset_id)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_folder_of_grey_images_with_named_classes(save):
    label = datasets.ClassLabel(names=["cat", "dog", "eel"])
    folder = save(label, train=[(grey(0), 0), (grey(51), 1), (grey(255), 1)], test=[(grey(102), 2)])
    opened = load_images(folder)
    assert opened.classes == 3 and opened.train_images.shape == (3, 1, 4, 4)
    assert opened.names == ("cat", "dog", "eel") and load_images(f"{folder}?classes=2-0").names == ("eel", "cat")
    assert opened.train_images[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert opened.train_labels.tolist() == [0, 1, 1] and opened.test_labels.tolist() == [2]


def test_colour_is_kept_and_text_labels_are_numbered(save):
    folder = save(train=[(grey((255, 0, 51), mode="RGB"), "dog"), (grey(51), "cat")], validation=[(grey(0), "dog")])
    opened = load_images(folder)
    assert opened.train_images[:, :, 0, 0].flatten().tolist() == pytest.approx([1, 0, 0.2, 0.2, 0.2, 0.2])
    assert opened.train_labels.tolist() == [1, 0] and opened.test_labels.tolist() == [1]
    assert opened.names == ("cat", "dog")


def test_without_labelled_test_images_a_part_of_train_is_held_out(save):
    label = datasets.ClassLabel(names=["cat", "dog"])
    train = [(grey(value), value % 2) for value in range(20)]
    opened = load_images(save(label, train=train, test=[(grey(99), -1)]))
    assert opened.train_labels.bincount().tolist() == [7, 7] and opened.test_labels.bincount().tolist() == [3, 3]
    values = torch.cat([opened.train_images, opened.test_images])[:, 0, 0, 0] * 255
    assert sorted(values.round().int().tolist()) == list(range(20))


def test_a_dataset_out_of_reach_is_told_from_one_that_is_broken(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ZooError, match=r"nobody/nothing: .* cannot open it: .*; check the name and the connection \(with"
    ):
        load_images("nobody/nothing")


def test_images_of_several_sizes_need_one(save):
    folder = save(train=[(grey(255), 0), (grey(255, side=6), 1)] * 5)
    with pytest.raises(ZooError, match=r"2 sizes \(4x4, 6x6.*\?size="):
        load_images(folder)
    resized = load_images(f"{folder}?size=5")
    assert resized.train_images.shape[1:] == (1, 5, 5) and resized.train_images.min() == 1


def test_names_what_a_folder_lacks(save, tmp_path):
    with pytest.raises(ZooError, match="no split named 'train' among test"):
        load_images(save(test=[(grey(0), 0), (grey(0), 1)]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"empty: datasets\.load_dataset cannot open it"):
        load_images(str(tmp_path / "empty"))


def test_a_hub_out_of_reach_is_asked_once_for_all_datasets(monkeypatch, tmp_path):
    asked = []

    def away(url, **_):
        asked.append(url)
        raise httpx2.ConnectError("connection refused")

    monkeypatch.setattr("weightspace.data.images.get_session", lambda: SimpleNamespace(head=away))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    module._hub_answers.cache_clear()
    try:
        for number in range(24):
            with pytest.raises(ZooError, match=r"check the name and the connection \(without the Hub"):
                load_images(f"org/mnist-{number}")
    finally:
        module._hub_answers.cache_clear()
    assert len(asked) == 1 and not datasets.config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE
