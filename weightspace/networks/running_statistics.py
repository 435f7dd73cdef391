"""Estimates the running statistics of normalisation layers again, which sampled weights come without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from weightspace.errors import SettingsError, first_line
from weightspace.networks.bounded import FREE_NUMBERS, LARGEST_PICTURE, build_on_meta, check_numbers

# What a network registers beside the tensors that it is stored with: tied and missing ones, positions, statistics.
_TIED, _BUFFERS = 64, 2**20
PREPROCESSOR = "preprocessor_config.json"


def running_statistics(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], images: Iterable[Float[Tensor, "_batch c h w"]]
) -> dict[str, Tensor]:
    """Runs images through an image classifier of transformers and returns the statistics that it needs.

    Args:
        config: content of its ``config.json``; code that it names is never run.
        weights: its parameters by name. Statistics among them are not looked at.
        images: batches, as the classifier expects them; every batch counts the same.

    Returns:
        The buffers of its batch normalisations by name: means, variances and the number of batches.

    Raises:
        SettingsError: transformers knows no such classifier, the weights are not its parameters, there is no batch
            normalisation, or there are no images.
    """
    # Without memory for its weights first: a config may ask for more than there is.
    entries = sum(value.numel() for value in weights.values())
    check_numbers(config, entries + FREE_NUMBERS)
    bare = build_on_meta(lambda: _classifier(config), 2 * len(weights) + _TIED, 2 * entries + _BUFFERS)
    expected = {name: tuple(value.shape) for name, value in bare.named_parameters()}
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != shape:
            raise SettingsError(
                f"{name}: the config asks for shape {shape}, the weights have {found or 'no such tensor'}; give the "
                "config that the weights are of"
            )
    model = _classifier(config)
    names = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers()
    ]
    if not names:
        raise SettingsError(
            f"{config['model_type']}: has no running statistics to estimate; use the weights as they are"
        )
    model.load_state_dict({name: weights[name].float() for name in expected}, strict=False)
    with torch.no_grad():
        update_bn(images, model)
    state = model.state_dict()
    if not all(state[name].isfinite().all() and (not name.endswith("tracked") or state[name] > 0) for name in names):
        raise SettingsError("images: none, or the network gives NaN or infinity on them; give other images or weights")
    return {name: state[name] for name in names}


def preprocessed(folder: Path, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c height width"]:
    """Prepares images as the image processor of a classifier does: resized and normalised.

    Args:
        folder: holds ``preprocessor_config.json``; code that it names is never run.
        images: intensities in [0, 1].

    Raises:
        SettingsError: transformers cannot read the file, or the images do not fit it.
    """
    try:
        check_numbers(json.loads((folder / PREPROCESSOR).read_bytes()), LARGEST_PICTURE)
        processor = AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, backend="pil"
        )
        pictures = list((images * 255).round().clamp(0, 255).byte().numpy())
        pixels: Tensor = processor(images=pictures, input_data_format="channels_first", return_tensors="pt")[
            "pixel_values"
        ]
    except Exception as error:  # untrusted files fail in any way inside of transformers
        raise SettingsError(
            f"{folder / PREPROCESSOR}: cannot prepare the images ({first_line(error)[:120]}); correct it"
        ) from error
    return pixels


def _classifier(config: Mapping[str, Any]) -> PreTrainedModel:
    try:
        parsed = AutoConfig.for_model(**config)
        model: PreTrainedModel = AutoModelForImageClassification.from_config(
            parsed, trust_remote_code=False, attn_implementation="eager"
        )
    except SettingsError:
        raise
    except Exception as error:  # an untrusted config meets the code of any model here: each raises what it likes
        raise SettingsError(
            f"config: transformers builds no image classifier of it ({first_line(error)[:120]!a}); "
            "give one with the model_type of an image classifier"
        ) from error
    return model
