"""Queries as vectors in the joint space: datasets and wanted results, ranked by inner products with models."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weightspace.data.features import DatasetFeatures, dataset_features
from weightspace.data.image_encoders import ImageEncoder, open_image_encoder
from weightspace.encoder import Encoder, dataset_outputs, embed_dataset
from weightspace.errors import SettingsError
from weightspace.io.hub import HubOptions

UNNAMED = "test_accuracy"
"""The result meant by a range without a name."""

_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_WANTED = re.compile(
    rf"(?P<name>[A-Za-z_]\w*)?\s*(?:(?P<sign>[<>]=?)\s*(?P<bound>{_NUMBER})"
    rf"|=?\s*(?P<low>{_NUMBER})(?:\s*\.\.\s*(?P<high>{_NUMBER}))?)",
    re.ASCII,
)
_LONGEST_TEXT = 1000
_EXAMPLES = 'write e.g. ">=0.9", "0.8..0.9" or "test_accuracy>=0.9,test_loss<0.3"'


@dataclass(frozen=True)
class WantedResult:
    """A result and the range of values that is wanted, bounds included."""

    name: str
    low: float = -math.inf
    high: float = math.inf


def parse_results(text: str) -> tuple[WantedResult, ...]:
    """Parses one or more wanted results, separated by commas.

    A result is ``name`` followed by ``>=x``, ``>x``, ``<=x``, ``<x``, ``=x`` or ``=x..y``; without a name it is the
    test accuracy, and ``=`` may be left out then. Results are continuous, so ``>`` and ``>=`` are the same.

    Raises:
        SettingsError: the text does not parse, names a result twice, or has an empty range.
    """
    if len(text) > _LONGEST_TEXT:
        raise SettingsError(f"result: {len(text):,} characters are too many; {_EXAMPLES}")
    wanted = tuple(_parsed(part.strip(), text) for part in text.split(","))
    names = [one.name for one in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"result {text!a}: wants {twice} twice; write a range, e.g. {twice}=0.8..0.9")
    return wanted


def _parsed(part: str, text: str) -> WantedResult:
    match = _WANTED.fullmatch(part)
    named_value = match is not None and match["name"] and match["low"] and "=" not in part
    if match is None or named_value:
        raise SettingsError(f"result {text!a}: {part!a} is no wanted result; {_EXAMPLES}")
    name = match["name"] or UNNAMED
    if match["sign"]:
        bound = float(match["bound"])
        wanted = WantedResult(name, low=bound) if match["sign"][0] == ">" else WantedResult(name, high=bound)
    else:
        low = float(match["low"])
        wanted = WantedResult(name, low, float(match["high"]) if match["high"] else low)
    numbers = [float(number) for number in (match["bound"], match["low"], match["high"]) if number]
    if not all(map(math.isfinite, numbers)):
        raise SettingsError(f"result {text!a}: {part!a} is too large a number; {_EXAMPLES}")
    if wanted.low > wanted.high:
        raise SettingsError(f"result {text!a}: {part!a} is an empty range; write the smaller number first")
    return wanted


def values_of(
    wanted: WantedResult, names: Sequence[str], edges: Float[np.ndarray, "results edges"]
) -> Float[np.ndarray, "values"]:
    """Replaces a range by values in it, each as likely as the others among the models that the edges were fitted on.

    The edges are quantiles, so that equal steps along the bins hold equally many models: a range becomes the middles of
    as many equal steps as it covers bins, one at least, cut off at the first and the last edge.

    Args:
        wanted: the range.
        names: of the results that there are edges for.
        edges: ascending edges of the bins of each result.

    Raises:
        SettingsError: there are no edges for the result, or no model had such values.
    """
    if wanted.name not in names:
        raise SettingsError(f"result {wanted.name!a}: the joint model knows {', '.join(names)}; choose from these")
    own = edges[list(names).index(wanted.name)].astype(np.float64)
    if wanted.low > own[-1] or wanted.high < own[0]:
        raise SettingsError(
            f"result {wanted.name}: wanted from {wanted.low:g} to {wanted.high:g}, but the joint model knows models "
            f"with {own[0]:.4g} to {own[-1]:.4g} only; ask for a part of that"
        )
    low, high = _edge_position(wanted.low, own, "left"), _edge_position(wanted.high, own, "right")
    steps = max(1, math.ceil(round(high - low, 6)))
    middles = low + (np.arange(steps) + 0.5) * (high - low) / steps
    return np.interp(middles, np.arange(len(own)), own)


def _edge_position(value: float, edges: Float[np.ndarray, "edges"], side: Literal["left", "right"]) -> float:
    """Position of a value among the edges, 0 to the number of bins; on equal edges the first or the last of them."""
    after = int(np.searchsorted(edges, value, side=side))
    if after == 0 or after == len(edges):
        return float(min(after, len(edges) - 1))
    return float(after - 1 + (value - edges[after - 1]) / (edges[after] - edges[after - 1]))


def joint_query(
    encoder: Encoder, dataset: DatasetFeatures | None = None, wanted: Sequence[WantedResult] = ()
) -> Float[np.ndarray, "size"]:
    r"""Builds the query for models that were trained on a dataset, have wanted results, or both.

    Trained to its optimum, NT-Xent makes the scaled similarity of a dataset D and weights w the logarithm of
    p(w | D) / p(w), up to a constant (van den Oord et al., 2018), and likewise for a result R. If D and R tell nothing
    of each other beyond what the weights tell, then the sum

    .. math:: s_{DW} \cos(d, w) + s_{WR} \cos(r, w)

    with the logit scales s of the two pairs ranks models as p(w | D, R) / p(w) does, in nats. It is the inner product
    of w with one vector, which is returned.

    A range of results is embedded as the mean of the values in it, each as likely as the others (`values_of`), as the
    tower itself embeds a value between two bins, and several results as their sum, as the tower adds up what is stated.
    On 1,080 unseen models of small digits networks, .66 of the first ten lay in single ranges (16 ranges) and .53 in
    ranges of several results (6); where a model scored by the soft maximum over the values instead, .63 and .45.

    Args:
        encoder: a joint model.
        dataset: features of the dataset, from the image encoder that the model was trained with.
        wanted: results to have.

    Returns:
        The vector whose inner products with embeddings of length 1 are the scores.

    Raises:
        SettingsError: neither is given, the encoder is no joint model or was not trained on the pair that the
            query needs, the features come from another image encoder, or the result is unknown.
    """
    if dataset is None and not wanted:
        raise SettingsError("nothing to search for; give a dataset, a text, a wanted result or a model")
    model = encoder.joint
    vector = torch.zeros(model.embedding_size)
    if dataset is not None:
        vector = vector + _scale(encoder, "dataset_weight") * embed_dataset(model, dataset)[0]
    if wanted:
        vector = vector + _scale(encoder, "weight_result") * result_query(encoder, wanted)
    return vector.numpy()


def dataset_classes(encoder: Encoder, dataset: DatasetFeatures) -> Float[Tensor, "classes features"]:
    """Describes the classes of a dataset as the tower of datasets does; see `dataset_outputs`.

    Raises:
        SettingsError: the encoder is no joint model, or the features come from another image encoder than its own.
    """
    moments = dataset_outputs(encoder.joint, dataset).last_hidden_state
    assert moments is not None
    return moments[0]


@torch.no_grad()
def result_query(encoder: Encoder, wanted: Sequence[WantedResult]) -> Float[Tensor, " size"]:
    """Embeds wanted results at length 1; see `joint_query`.

    Raises:
        SettingsError: the encoder is no joint model or does not know a result, or no model had such values.
    """
    model = encoder.joint
    tower, total = model.result_model, torch.zeros(model.embedding_size)
    for one in wanted:
        values = torch.from_numpy(values_of(one, tower.config.results, tower.edges.numpy())).float()
        results = torch.full((len(values), len(tower.config.results)), torch.nan)
        results[:, tower.config.results.index(one.name)] = values
        embedded = model.get_result_features(results).pooler_output
        assert embedded is not None
        total = total + embedded.mean(0)
    return F.normalize(total, dim=0)


def dataset_for(
    encoder: Encoder, dataset_id: str, options: HubOptions | None = None, *, allow_pickle: bool = False
) -> DatasetFeatures:
    """Computes the features of a dataset as the joint model was trained on them, from as many images.

    Args:
        encoder: a joint model.
        dataset_id: a folder or an id; see `weightspace.data.images.load_images`.
        options: how the Hub is reached for the image encoder.
        allow_pickle: read plain tensors from a pickle where the image encoder has no safetensors file.

    Raises:
        WeightspaceError: the dataset or the image encoder cannot be opened, or it is another one by now.
    """
    image_encoder = _image_encoder(encoder, options, allow_pickle)
    return dataset_features(dataset_id, image_encoder, images=encoder.joint.dataset_model.config.sample)


def described_dataset(
    encoder: Encoder, texts: Sequence[str], options: HubOptions | None = None, *, allow_pickle: bool = False
) -> DatasetFeatures:
    """Describes a dataset by texts, one a class: all images of a class have the features of its text.

    Contrastive image encoders put texts near images, but not among them (Liang et al., 2022): their features lie in a
    region of their own, which the joint model never saw in training, and a text has no spread. Ranks are hints.

    Args:
        encoder: a joint model.
        texts: descriptions of the classes, e.g. ``"a photo of a cat"``.
        options: how the Hub is reached for the image encoder.
        allow_pickle: as in `dataset_for`.

    Raises:
        WeightspaceError: the image encoder has no text tower or cannot be opened, or a text is empty or too long.
    """
    for text in texts:
        if not text.strip() or len(text) > _LONGEST_TEXT:
            raise SettingsError(f"text {text[:40]!a}: has {len(text):,} characters; give 1 to {_LONGEST_TEXT:,}")
    image_encoder = _image_encoder(encoder, options, allow_pickle)
    digest = hashlib.sha256(json.dumps([image_encoder.digest, *texts]).encode()).hexdigest()
    features = image_encoder.text_features(texts)
    return DatasetFeatures(
        "; ".join(texts),
        image_encoder.name,
        image_encoder.digest,
        features,
        torch.arange(len(texts)),
        len(texts),
        digest,
    )


def _image_encoder(encoder: Encoder, options: HubOptions | None, allow_pickle: bool) -> ImageEncoder:
    name = encoder.joint.dataset_model.config.image_encoder
    if name is None:
        raise SettingsError(f"{encoder.name}: names no image encoder; train it again with one to search for datasets")
    opened = open_image_encoder(name, options=options, allow_pickle=allow_pickle)
    encoder.joint.ensure_image_encoder(opened.name, opened.digest)
    return opened


def _scale(encoder: Encoder, pair: str) -> float:
    model = encoder.joint
    if pair not in model.config.pairs:
        raise SettingsError(
            f"{encoder.name}: trained on {', '.join(model.config.pairs)} only; search with a model trained on {pair}"
        )
    return model.scale(pair)
