"""Frozen pretrained image encoders, which compute the features of a dataset's images.

An encoder is chosen by name and never replaced silently: one of ``IMAGE_ENCODERS``, such as ``"efficientnet-lite0"``
from a package (the extra ``offline``), or a CLIP, SigLIP, DINO or other image model of transformers, as
``org/name[@revision]`` on the Hub or a folder. Encoders with equal `ImageEncoder.digest` give the same features.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from weightspace.errors import HubError, SettingsError, first_line, install_command
from weightspace.io.folders import Folder
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions, is_transient
from weightspace.io.locations import locate
from weightspace.networks.bounded import FREE_NUMBERS, LARGEST_PICTURE, build_on_meta, check_numbers

DEFAULT_ENCODER = "openai/clip-vit-base-patch32"
"""The default, on the Hub."""

OFFLINE_ENCODER = "efficientnet-lite0"
"""The encoder that needs no Hub."""

_VERSION = 1  # of how images are prepared here; a part of every digest
_MOST_TENSORS, _BUFFERS = 2**12, 2**20  # of a model: weights, and numbers beside them
_BATCH = 16  # images: their maps still fit the processor's cache
_FIX_KIND = "choose a CLIP, SigLIP or DINO model, or another image encoder of transformers"
_FIX_OFFLINE = f"{OFFLINE_ENCODER} needs no Hub: choose it ({install_command('offline')})"

_CONFIG = "config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TEXT_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class ImageEncoder(ABC):
    """A frozen image encoder.

    Attributes:
        name: what opens the same encoder again; pinned to a commit if it lies on the Hub.
        digest: sha256 of its weights and of how it prepares images. Equal digests give equal features, up
            to the rounding of machines.
    """

    name: str
    digest: str

    def encode(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Returns the features of images, on the CPU.

        The same call gives the same bits on the same machine.

        Args:
            images: intensities in [0, 1]; one channel (grey) or three.
        """
        with torch.inference_mode():
            parts = [self._encode(part.expand(-1, 3, -1, -1)) for part in images.split(_BATCH)]
        return torch.cat(parts).float().cpu().clone()

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "n features"]:
        """Returns features of texts, to be compared with those of images by their cosine.

        Raises:
            SettingsError: the encoder has no text tower.
        """
        raise SettingsError(f"{self.name} has no text tower; choose a CLIP or SigLIP model, e.g. {DEFAULT_ENCODER}")

    def ensure(self, name: str, digest: str) -> None:
        """Refuses to stand in for another encoder than the recorded one.

        Args:
            name: the recorded name, for the error.
            digest: the recorded digest.

        Raises:
            SettingsError: this is another encoder.
        """
        if digest != self.digest:
            raise SettingsError(
                f"image encoder {self.name} ({self.digest[:12]}) is not {name} ({digest[:12]}), which the model was "
                "trained with; open that one"
            )

    @abstractmethod
    def _encode(self, images: Float[Tensor, "n 3 height width"]) -> Tensor:
        """Returns the features of a few images."""


IMAGE_ENCODERS: dict[str, Callable[[torch.device], ImageEncoder]] = {}
"""Image encoders beside those of transformers: name -> what opens it on a device. Add one of your own here."""


def open_image_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    options: HubOptions | None = None,
    allow_pickle: bool = False,
    device: str | torch.device = "cpu",
) -> ImageEncoder:
    """Opens an image encoder by name; its files are fetched, and its weights loaded when they are first used.

    Args:
        name: one of ``IMAGE_ENCODERS``, or a folder or ``org/name[@revision]`` of a transformers image model.
        options: how the Hub is reached.
        allow_pickle: read weights from ``pytorch_model.bin`` (as plain tensors) where there is no safetensors file.
        device: where it computes.

    Raises:
        SettingsError: the name is unknown, the package is missing, or the model is no image encoder.
        HubError: the Hub cannot deliver it.
        CheckpointError: the name or a file is malformed.
    """
    import weightspace.data.efficientnet  # noqa: F401  it registers itself

    if name in IMAGE_ENCODERS:
        return IMAGE_ENCODERS[name](torch.device(device))
    options = options or HubOptions()
    try:
        folder, file = locate(name, options) or (None, None)
        if folder is None or file is not None:
            close = difflib.get_close_matches(name, [*IMAGE_ENCODERS, DEFAULT_ENCODER], n=1)
            names = ", ".join(IMAGE_ENCODERS)
            fix = f"did you mean {close[0]!r}?" if close else f"choose {names}, a folder or org/name"
            raise SettingsError(f"image encoder {name!r} is unknown; {fix}")
        return _TransformersEncoder(folder, allow_pickle, torch.device(device))
    except HubError as error:
        if is_transient(error) or options.offline:
            raise HubError(f"{error}; {_FIX_OFFLINE}") from error.__cause__
        raise


class _TransformersEncoder(ImageEncoder):
    """An image model of transformers, which sees images as its own image processor prepares them."""

    def __init__(self, folder: Folder, allow_pickle: bool, device: torch.device) -> None:
        self.name, self._folder, self._device = str(folder.ref()), folder, device
        settings = [file for file in (_CONFIG, *_PROCESSORS) if folder.has(file)]
        if _CONFIG not in settings or len(settings) < 2:
            missing = _PROCESSORS[0] if settings else _CONFIG
            raise SettingsError(f"{folder.where}: no {missing}; choose an image model of transformers")
        weights = _weight_files(folder, allow_pickle)
        self._size = sum(folder.open(file).size for file in weights)  # in bytes, each of which is a weight at most
        for file in settings:
            largest = self._size + FREE_NUMBERS if file == _CONFIG else LARGEST_PICTURE
            check_numbers(folder.read_json(file) or {}, largest)
        self._directory = self._fetch(settings)[0].parent
        self._config, self._is_contrastive = self._image_config()  # before the weights, which may be large
        files = self._fetch([*settings, *weights])
        self.digest = encoder_digest({path.name: file_sha256(path) for path in files})

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "n features"]:
        """Returns features of texts; see `ImageEncoder.text_features`."""
        if not self._is_contrastive:
            return super().text_features(texts)
        # SigLIP knows texts of full length only; CLIP's mask makes padding count for nothing.
        longest = self._config.text_config.max_position_embeddings
        inputs = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            output = self._loaded[0].get_text_features(**inputs.to(self._device))
        return output.pooler_output.float().cpu().clone()

    def _encode(self, images: Float[Tensor, "n 3 height width"]) -> Tensor:
        pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._device)
        model, is_without_pooler = self._loaded
        read = model.get_image_features if self._is_contrastive else model
        try:
            output = read(pixel_values=inputs["pixel_values"])
            pooled = output.last_hidden_state[:, 0] if is_without_pooler else output.pooler_output
            return pooled.flatten(1)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise SettingsError(
                f"{self.name}: {type(model).__name__} has no features of single images ({first_line(error)}); "
                f"{_FIX_KIND}"
            ) from error

    def _image_config(self) -> tuple[Any, bool]:
        """Reads the config and whether the model is contrastive (images and texts); refuses models without images."""
        from transformers import MODEL_MAPPING, AutoConfig

        config = self._from_pretrained(AutoConfig)
        model = MODEL_MAPPING.get(type(config), None)
        is_contrastive = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        if not is_contrastive and getattr(model, "main_input_name", None) != "pixel_values":
            raise SettingsError(f"{self._folder.where}: {config.model_type} is no image encoder; {_FIX_KIND}")
        return config, is_contrastive

    @cached_property
    def _loaded(self) -> tuple[Any, bool]:
        """The model, and whether it comes without a trained pooler, as DINO does: its class token is the feature."""
        from transformers import AutoModel

        build = partial(AutoModel.from_config, self._config, trust_remote_code=False, attn_implementation="eager")
        build_on_meta(build, _MOST_TENSORS, self._size + _BUFFERS)
        model, report = self._from_pretrained(
            AutoModel,
            config=self._config,
            dtype=torch.float32,
            attn_implementation="eager",  # a config does not choose a kernel
            output_loading_info=True,
        )
        missing = sorted(report["missing_keys"])
        untrained = [key for key in missing if not key.startswith("pooler.")]
        if untrained:
            raise SettingsError(f"{self._folder.where}: no weights for {untrained[0]}; choose a complete model")
        return model.eval().requires_grad_(False).to(self._device), bool(missing)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._from_pretrained(AutoImageProcessor, backend="pil")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        self._fetch([file for file in _TEXT_FILES if self._folder.has(file)])
        return self._from_pretrained(AutoTokenizer)

    def _fetch(self, files: Iterable[str]) -> list[Path]:
        return [self._folder.local_path(file) for file in files]

    def _from_pretrained(self, auto: Any, **options: Any) -> Any:
        """Loads the fetched files with transformers; makes no request and runs no code of the folder."""
        try:
            return auto.from_pretrained(self._directory, trust_remote_code=False, local_files_only=True, **options)
        except Exception as error:  # untrusted files fail in any way inside of transformers
            raise SettingsError(
                f"{self._folder.where}: {auto.__name__} cannot read it ({first_line(error)}); {_FIX_KIND}"
            ) from error


def _weight_files(folder: Folder, allow_pickle: bool) -> list[str]:
    found = next((file for file in (*_WEIGHTS, *_PICKLES) if folder.has(file)), None)
    if found is None:
        raise SettingsError(f"{folder.where}: no {_WEIGHTS[0]}; choose a model with weights for PyTorch")
    if found in _PICKLES and not allow_pickle:
        raise SettingsError(
            f"{folder.where}: its weights are a pickle; name a revision with {_WEIGHTS[0]}, or consent to have plain "
            "tensors read from it with --allow-pickle (allow_pickle=True)"
        )
    if not found.endswith(".index.json"):
        return [found]
    places = (folder.read_json(found) or {}).get("weight_map")
    shards = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    strange = [shard for shard in shards if "/" in shard or not folder.has(shard)]
    if strange or not shards:
        raise SettingsError(f"{folder.where}: {found} names {shown(strange or shards)}; fetch or export it again")
    return [found, *shards]


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoder_digest(files: Mapping[str, str]) -> str:
    """Returns the digest of an encoder from the sha256 of its files, by name."""
    return hashlib.sha256(json.dumps([_VERSION, sorted(files.items())]).encode()).hexdigest()
