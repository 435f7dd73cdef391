"""The way in which this library loads models that `save_pretrained` wrote: whatever a folder holds may be anyone's."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from weightspace.errors import CheckpointError, SettingsError, WeightspaceError
from weightspace.io.folders import LocalFolder
from weightspace.io.header import shown
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.configuration import FIX, one_line
from weightspace.models.joint.feature_extraction_joint import JointFeatureExtractor
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.models.pretrained import WeightspaceModel

CONFIG, EXTRACTOR = "config.json", "preprocessor_config.json"

M = TypeVar("M", bound=WeightspaceModel)


def load_trained(folder: str | Path, *kinds: type[M]) -> tuple[M, WeightFeatureExtractor]:
    """Loads a model in evaluation mode, and its input side.

    Sizes in its files are compared with its weights before anything is allocated; nothing is executed or fetched.

    Args:
        folder: on this machine.
        *kinds: classes that the model may be of.

    Raises:
        WeightspaceError: the folder holds no such model, or not all of it, or what does not fit together.
    """
    source = LocalFolder(Path(folder))
    try:
        values = source.read_json(CONFIG)
        if values is None:
            raise CheckpointError(f"{folder}: no {CONFIG}; train a model or check the path")
        known = {str(kind.config_class.model_type): kind for kind in kinds if kind.config_class is not None}
        if (name := values.get("model_type")) not in list(known):
            raise SettingsError(
                f"{source.title(CONFIG)}: model_type {shown(name)} is not what is needed here, {' or '.join(known)}"
            )
        config_class = known[name].config_class
        assert config_class is not None
        config = config_class.from_dict(values, name_or_path=str(folder))
        model = known[name].from_pretrained(folder, config=config, complete=True)
        kind = JointFeatureExtractor if isinstance(model, JointModel) else WeightFeatureExtractor
        extractor = _extractor(source, kind)
    except WeightspaceError:
        raise
    except Exception as error:  # damaged files fail in any way inside of transformers and torch
        raise CheckpointError(f"{folder}: cannot be loaded ({one_line(error)}); {FIX}") from error
    if (size := autoencoder_of(model).config.token_size) != extractor.token_size:
        raise SettingsError(
            f"{source.title(EXTRACTOR)}: token_size {extractor.token_size} is not that of the model, {size}; {FIX}"
        )
    return model, extractor


def _extractor(source: LocalFolder, kind: type[WeightFeatureExtractor]) -> WeightFeatureExtractor:
    """Builds the input side from the file that describes it."""
    if (values := source.read_json(EXTRACTOR)) is None:
        raise CheckpointError(f"{source.where}: no {EXTRACTOR}; {FIX}")
    try:
        extractor = kind.from_dict(values)
    except WeightspaceError as error:
        raise type(error)(f"{source.title(EXTRACTOR)}: {error}") from error
    assert isinstance(extractor, WeightFeatureExtractor)
    return extractor


def autoencoder_of(model: WeightspaceModel) -> WeightAutoencoderModel:
    """Returns the model, or the part of it that encodes to latents and decodes them."""
    if isinstance(model, WeightAutoencoderModel):
        return model
    inner = model.weight_model.encoder if isinstance(model, JointModel) else model.autoencoder
    assert isinstance(inner, WeightAutoencoderModel)
    return inner
