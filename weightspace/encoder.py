"""Embeds models with a trained encoder, and keeps the embeddings as a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from weightspace.data.features import DatasetFeatures
from weightspace.errors import UNFORESEEN, HubError, SettingsError, WeightspaceError, ZooError
from weightspace.io.catalogue import Weights
from weightspace.io.checkpoint import FAMOUS_STEMS, Checkpoint, find_checkpoints, open_in
from weightspace.io.folders import Folder, LocalFolder
from weightspace.io.header import shown
from weightspace.io.hub import HubOptions
from weightspace.io.locations import locate
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.codec import LatentCodec
from weightspace.models.joint.modeling_joint import JointModel, unit
from weightspace.models.loading import CONFIG, EXTRACTOR, autoencoder_of, load_trained
from weightspace.models.pretrained import weight_files
from weightspace.schema import Architecture
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.storage import check_usable, replacing

_CHUNK = 256
_DESCRIPTIONS = (CONFIG, EXTRACTOR)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A trained encoder of weights with its input side: a weight autoencoder, or a joint model.

    Attributes:
        path: folder it was loaded from.
        model: the encoder, in evaluation mode.
        extractor: turns weights into its inputs.
        name: what opens it again, pinned to a commit if it lies on the Hub.
    """

    path: Path
    model: WeightAutoencoderModel | JointModel
    extractor: WeightFeatureExtractor
    name: str = ""

    @cached_property
    def digest(self) -> str:
        """Sha256 of the files that its embeddings depend on; equal digests embed alike."""
        digest = hashlib.sha256()
        for file in (*_DESCRIPTIONS, *weight_files(LocalFolder(self.path))):
            with (self.path / file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models features"]:
        """Embeds models of one architecture from their flat weight vectors."""
        return torch.cat([self._features(self.extractor.batch(part, architecture)) for part in flat.split(_CHUNK)])

    @torch.no_grad()
    def embed_checkpoint(self, model: str | Path | Checkpoint) -> Float[Tensor, " features"]:
        """Embeds one checkpoint, given as its location on disk or on the Hub, or opened.

        Raises:
            WeightspaceError: it cannot be read, is too large to read whole, or holds entries that are not finite.
        """
        return self._features(self.extractor(model))[0]

    @torch.no_grad()
    def estimate(
        self, model: str | Path | Checkpoint, max_bytes: int, seed: int = 0
    ) -> tuple[Float[Tensor, " features"], float]:
        """Estimates the embedding of a model of any size from a stratified sample of its token windows.

        Args:
            model: as in `embed_checkpoint`.
            max_bytes: most bytes of weights to read; the estimate is the embedding itself for a smaller model.
            seed: draws the sample.

        Returns:
            The embedding, and the share of the model's bytes that was read.

        Raises:
            WeightspaceError: the model cannot be read, or ``max_bytes`` is less than a window.
        """
        window = self.autoencoder.config.window
        inputs, share = self.extractor.sample(model, window=window, max_bytes=max_bytes, seed=seed)
        return self._features(inputs)[0], share

    def _features(self, inputs: BatchFeature) -> Tensor:
        features = self.model.get_weight_features(**inputs).pooler_output
        assert features is not None
        return features

    @property
    def autoencoder(self) -> WeightAutoencoderModel:
        """The model, or the part of a joint model that encodes to latents and decodes them."""
        return autoencoder_of(self.model)

    @property
    def joint(self) -> JointModel:
        """The model, if it is a joint model.

        Raises:
            SettingsError: it is an autoencoder.
        """
        if not isinstance(self.model, JointModel):
            raise SettingsError(
                f"{self.name}: a {type(self.model).__name__} knows weights only; search for a dataset or a result "
                "with a joint model (weightspace train joint), or for a model"
            )
        return self.model

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with the input side, between weights and latents."""
        return LatentCodec(self.autoencoder, self.extractor)

    @torch.no_grad()
    def reconstruct(
        self, flat: Float[Tensor, "models params"], architecture: Architecture
    ) -> Float[Tensor, "models params"]:
        """Encodes models to latents and decodes them again, which a joint model learns only if it is asked to."""
        return self.codec.decode(self.codec.encode(flat, architecture), architecture)

    @property
    def embedding_size(self) -> int:
        """Length of the embedding of one model."""
        return self.model.embedding_size

    def latent_size(self, architecture: Architecture) -> int:
        """Numbers that a whole model of this architecture is compressed to."""
        return self.extractor.token_count(architecture) * self.autoencoder.config.latent_size


def load_encoder(location: str | Path, options: HubOptions | None = None) -> Encoder:
    """Loads an encoder that `save_pretrained` wrote.

    Args:
        location: its folder, or ``org/name[@revision]`` on the Hub.
        options: how the Hub is reached.

    Raises:
        WeightspaceError: there is no encoder, or it cannot be loaded.
    """
    path, name = saved_folder(location, options, kind="encoder")
    kinds: tuple[type[WeightAutoencoderModel | JointModel], ...] = (WeightAutoencoderModel, JointModel)
    try:
        return Encoder(path, *load_trained(path, *kinds), name)
    except WeightspaceError as error:
        raise type(error)(f"{location}: the encoder cannot be loaded: {error}") from error


def saved_folder(location: str | Path, options: HubOptions | None = None, *, kind: str) -> tuple[Path, str]:
    """Finds the folder that `save_pretrained` wrote; from the Hub, it is fetched into huggingface_hub's cache.

    Args:
        location: the folder, or ``org/name[@revision]`` on the Hub.
        options: how the Hub is reached.
        kind: what is looked for, e.g. ``"encoder"``, used in errors.

    Returns:
        The folder, and what opens it again: an absolute path, or the name on the Hub with the commit.

    Raises:
        WeightspaceError: there is no model.
    """
    folder, file = locate(str(location), options) or (None, None)
    if folder is None or file is not None or not folder.has("config.json"):
        raise WeightspaceError(f"{location}: no {kind} (there is no config.json); train one or check the path")
    is_local = isinstance(folder, LocalFolder)
    names = [name for name in (*_DESCRIPTIONS, "training.json") if folder.has(name)]
    paths = [folder.local_path(name) for name in (*names, *(() if is_local else weight_files(folder)))]
    path = paths[0].parent
    return path, str(path.absolute() if is_local else folder.ref())


@torch.no_grad()
def embed_dataset(model: JointModel, dataset: DatasetFeatures) -> Float[Tensor, "1 size"]:
    """Embeds a dataset to a vector of length 1, on the CPU.

    Raises:
        SettingsError: its features come from another image encoder than the model was trained with.
    """
    return unit(dataset_outputs(model, dataset)).cpu()


@torch.no_grad()
def dataset_outputs(model: JointModel, dataset: DatasetFeatures) -> BaseModelOutputWithPooling:
    """Runs the tower of datasets: ``last_hidden_state (1, classes, class_size)`` and ``pooler_output (1, size)``.

    Raises:
        SettingsError: as `embed_dataset`.
    """
    model.ensure_image_encoder(dataset.encoder, dataset.encoder_digest)
    inputs = (dataset.features.unsqueeze(0).to(model.device), dataset.labels.unsqueeze(0).to(model.device))
    return model.get_dataset_features(*inputs)


def embed_zoo(
    encoder: Encoder,
    zoo: Zoo,
    rows: Int[np.ndarray, "models"] | None = None,
    *,
    problems: dict[int, str] | None = None,
) -> Float[np.ndarray, "models features"]:
    """Embeds the models of a zoo, in the order of ``rows`` (all by default, ascending).

    Args:
        encoder: what embeds them.
        zoo: the models.
        rows: their rows.
        problems: takes the reason of each row that cannot be embedded, whose embedding is NaN; without it, such a row
            is an error.

    Raises:
        ZooError: there is no row, or the first one that cannot be embedded, by name.
    """
    chosen, places = np.unique(np.arange(len(zoo)) if rows is None else np.asarray(rows), return_inverse=True)
    embeddings: np.ndarray | None = None
    with tqdm(total=len(chosen), desc="embed", unit="model", leave=False) as bar:
        for batch in zoo.batches(chosen, chunk=_CHUNK):
            if embeddings is None:
                embeddings = np.full((len(chosen), encoder.embedding_size), np.nan, dtype=np.float32)
            try:
                values = encoder.embed(batch.flat, batch.architecture).numpy()
            except (WeightspaceError, *UNFORESEEN) as error:
                if problems is None:
                    name = zoo.index["model_id"].iloc[int(batch.rows[0])]
                    raise ZooError(f"{zoo.location}: {shown(name)}: cannot be embedded: {error}") from error
                problems |= {int(row): str(error) for row in batch.rows}
            else:
                embeddings[np.searchsorted(chosen, batch.rows)] = values
            bar.update(len(batch.rows))
    if embeddings is None:
        raise ZooError(f"{zoo.location}: no rows to embed; choose at least one")
    return embeddings[places]


def embed(
    locations: Sequence[str],
    encoder: str | Path | Encoder,
    *,
    max_bytes: int | None = None,
    seed: int = 0,
    options: HubOptions | None = None,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """Embeds zoos, checkpoint files and folders, and models on the Hub.

    Args:
        locations: a folder with a ``zoo.json`` is a zoo, and so is a dataset on the Hub where there is no model of that
            name; any other file or folder, or ``org/name[@revision][:path]`` on the Hub, is a checkpoint, and a folder
            that is no checkpoint itself stands for all those below it.
        encoder: folder of the encoder, or ``org/name`` on the Hub, or the loaded one.
        max_bytes: most bytes of weights to read of a model; a larger one is estimated from a stratified sample of its
            token windows. None reads everything.
        seed: draws the samples.
        options: how the Hub is reached.
        allow_pickle: also read plain tensors from pickled checkpoints.

    Returns:
        One row a model: ``model_id``, ``location`` (pinned to a commit on the Hub), ``share`` of its bytes and tensors
        that was read, the zoo's metadata where there is any, and ``embedding``. ``attrs["left_out"]`` lists what
        cannot be embedded, as ``[location, reason]``.

    Raises:
        WeightspaceError: the encoder cannot be read, or no model.
    """
    loaded = encoder if isinstance(encoder, Encoder) else load_encoder(encoder, options)
    frames: list[pd.DataFrame] = []
    left_out: list[list[str]] = []
    for location in locations:
        try:
            opened = _opened(location, options, allow_pickle)
            if isinstance(opened, Zoo):
                frames.append(_embedded_zoo(loaded, opened, left_out))
                continue
        except WeightspaceError as error:
            if len(locations) == 1:
                raise
            left_out.append([location, str(error)])
            continue
        folder, names = opened
        rows = []
        for name in tqdm(names, desc="embed", unit="model", leave=False, disable=len(names) < 2):
            try:
                rows.append(_embedded(loaded, open_in(folder, name, allow_pickle=allow_pickle), max_bytes, seed))
            except (WeightspaceError, OSError, *UNFORESEEN) as error:
                if len(locations) == len(names) == 1:
                    raise
                left_out.append([folder.title(name), str(error).removeprefix(f"{folder.title(name)}: ")])
        frames += [pd.DataFrame(rows)] if rows else []
    if not frames:
        raise WeightspaceError(f"none of {len(left_out)} models can be embedded: {': '.join(left_out[0])}")
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["left_out"] = left_out
    return frame


def _opened(location: str, options: HubOptions | None, allow_pickle: bool) -> Zoo | tuple[Folder, list[str]]:
    """Opens a zoo, or else finds the checkpoints that a location stands for."""
    if (Path(location) / "zoo.json").exists():
        return load_zoo(location)
    try:
        return find_checkpoints(location, options=options, allow_pickle=allow_pickle)
    except HubError:
        if (zoo := _zoo_on_hub(location, options or HubOptions())) is None:
            raise
        return zoo


def _embedded_zoo(encoder: Encoder, zoo: Zoo, left_out: list[list[str]]) -> pd.DataFrame:
    """Makes the rows of a zoo's models, and adds those that cannot be embedded to ``left_out``."""
    usable, problems = zoo.usable(), dict[int, str]()
    embeddings = embed_zoo(encoder, usable, problems=problems)
    frame = usable.index.assign(location=zoo.location, share=1.0, embedding=list(embeddings))
    found = [*usable.left_out, *((str(frame["model_id"].iloc[row]), reason) for row, reason in problems.items())]
    if len(problems) == len(frame):
        raise ZooError(f"{zoo.location}: none of its {len(zoo)} models can be embedded: {': '.join(found[0])}")
    left_out += [[f"{zoo.location}: {model}", reason] for model, reason in found]
    return frame.drop(index=list(problems))


def _zoo_on_hub(location: str, options: HubOptions) -> Zoo | None:
    """Opens a zoo that is a dataset on the Hub, to be read by ranges; None if there is none."""
    try:
        return load_zoo(location, streaming=True, token=options.token, local_files_only=options.local_files_only)
    except WeightspaceError:
        return None


def _embedded(encoder: Encoder, checkpoint: Checkpoint, max_bytes: int | None, seed: int) -> dict[str, Any]:
    """Makes the row of one model."""
    check_usable(checkpoint)
    if max_bytes is None:
        embedding, share = encoder.embed_checkpoint(checkpoint), 1.0
    else:
        embedding, share = encoder.estimate(checkpoint, max_bytes, seed)
    return {
        "model_id": _model_id(checkpoint),
        "location": str(checkpoint.ref),
        "share": share * checkpoint.coverage,
        "embedding": embedding.numpy(),
    }


def _model_id(checkpoint: Checkpoint) -> str:
    """Names a checkpoint by its repository, its file, or its folder where the file has a name that many have."""
    assert checkpoint.ref is not None
    path = PurePosixPath(checkpoint.ref.subfolder or Path(checkpoint.ref.location).absolute().as_posix())
    stem = Weights(path.name, ()).stem
    name = path.parent.name if stem in FAMOUS_STEMS else stem
    if checkpoint.ref.subfolder is None:
        return name
    return f"{checkpoint.ref.location}:{name}" if name else checkpoint.ref.location


def save_embeddings(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes embeddings as one parquet file, whole or not at all.

    Raises:
        ZooError: the file cannot be written.
    """
    path = Path(path)
    with replacing(path) as partial:
        frame.to_parquet(partial)
