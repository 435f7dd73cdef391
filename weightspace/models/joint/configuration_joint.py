"""Configuration of the joint model of datasets, weights and results."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig

PAIRS = ("dataset_weight", "weight_result", "dataset_result")
LOSSES = ("nt_xent", "sigmoid")
POSITIVES = ("all", "diagonal")
RESULT_KINDS = ("bins", "regression")


@strict
class DatasetTowerConfig(PreTrainedConfig):
    r"""Configures the tower of datasets, a set encoder on features of a frozen image encoder.

    Args:
        feature_size: features an image.
        components: principal components of the features that are looked at; see [`PrincipalAxes`].
        image_encoder: name of the image encoder that the features come from.
        image_encoder_digest: what identifies it; features of another one are refused.
        sample: images of a dataset whose features training computed; a question about a dataset takes as many.
        hidden_size: width.
        pooling_heads: weighted means that the classes are pooled to.
        position_size: numbers that the number of a class is expanded to (sines and cosines), even.
        dropout: share of numbers that are dropped in training.
    """

    model_type = "joint_dataset_tower"
    base_config_key = "dataset_config"

    feature_size: int = 64
    components: int = 32
    image_encoder: str | None = None
    image_encoder_digest: str | None = None
    sample: int = 64
    hidden_size: int = 128
    pooling_heads: int = 8
    position_size: int = 32
    dropout: float | int = 0.1

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that cannot be."""
        _check(self)
        if min(self.feature_size, self.components, self.sample) < 1:
            raise ValueError(
                f"feature_size {self.feature_size}, components {self.components} and sample {self.sample} must be at "
                "least 1"
            )


@strict
class WeightTowerConfig(PreTrainedConfig):
    r"""Configures the tower of weights: the encoder of a weight autoencoder, and what pools its tokens.

    Args:
        encoder_config: of the autoencoder, which is a part of the model.
        hops: layers back that weights are followed to; see [`linked_paths`].
        last_layer: whether the last layer's tokens are looked at. Classifiers with one order of outputs tell their
            classes by it; a tower without it has to find them elsewhere.
        depth_bins: parts of a network, from input to output, whose weights get statistics of their own.
        hidden_size: width.
        pooling_heads: weighted means that the tokens are pooled to.
        position_size: numbers that the number of a channel is expanded to (sines and cosines), even.
        dropout: share of numbers that are dropped in training.
    """

    model_type = "joint_weight_tower"
    base_config_key = "weight_config"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=WeightAutoencoderConfig)}  # noqa: RUF012

    encoder_config: dict[str, Any] | WeightAutoencoderConfig | None = None
    hops: int = 2
    last_layer: bool = True
    depth_bins: int = 3
    hidden_size: int = 128
    pooling_heads: int = 8
    position_size: int = 32
    dropout: float | int = 0.1

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that cannot be."""
        _check(self)
        if self.hops < 1 or self.depth_bins < 1:
            raise ValueError(f"hops {self.hops} and depth_bins {self.depth_bins} must be at least 1")


@strict
class ResultTowerConfig(PreTrainedConfig):
    r"""Configures the tower of results, an embedding table of bins whose edges the model owns.

    Args:
        results: names of the results, e.g. `test_accuracy`.
        kind: `bins` for the table; `regression` for a small network on standardised values instead. Which results are
            alike is a question of bins in both.
        bins: bins a result, of about equally many training models each.
        interpolate: embed a value between the bins around it; otherwise all values of a bin are one.
        smoothing: standard deviation, in bins, of how far from its result a model still is a positive; 0 asks for the
            same bin.
        hidden_size: width of the embeddings.
    """

    model_type = "joint_result_tower"
    base_config_key = "result_config"

    results: list[str] = field(default_factory=lambda: ["test_accuracy"])
    kind: str = "bins"
    bins: int = 12
    interpolate: bool = True
    smoothing: float | int = 1.0
    hidden_size: int = 64

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that cannot be."""
        if not self.results or len(set(self.results)) != len(self.results):
            raise ValueError(f"results {self.results} must be one or more different names")
        if self.kind not in RESULT_KINDS:
            raise ValueError(f"kind {self.kind!r}: choose one of {', '.join(RESULT_KINDS)}")
        if self.bins < 2 or self.hidden_size < 1 or self.smoothing < 0:
            raise ValueError(
                f"bins {self.bins} must be at least 2, hidden_size {self.hidden_size} at least 1, "
                f"smoothing {self.smoothing} at least 0"
            )


@strict
class JointConfig(PreTrainedConfig):
    r"""Configures a [`JointModel`].

    Args:
        dataset_config: tower of datasets.
        weight_config: tower of weights.
        result_config: tower of results.
        projection_dim: width of the joint space.
        logit_scale_init_value: logarithm of the inverse temperature that training starts from, for each pair of towers.
        pairs: pairs of towers that are contrasted.
        loss: `nt_xent` or `sigmoid`.
        positives: `all` that belong to a row, or the `diagonal`: row i belongs to row i only, as in CLIP.
        reconstruction_weight: weight of the autoencoder's loss beside those of the pairs; keeps latents decodable.
    """

    model_type = "weightspace_joint"
    sub_configs_defaults = {  # noqa: RUF012
        "dataset_config": SubConfigSpec(config_class=DatasetTowerConfig),
        "weight_config": SubConfigSpec(config_class=WeightTowerConfig),
        "result_config": SubConfigSpec(config_class=ResultTowerConfig),
    }

    dataset_config: dict[str, Any] | DatasetTowerConfig | None = None
    weight_config: dict[str, Any] | WeightTowerConfig | None = None
    result_config: dict[str, Any] | ResultTowerConfig | None = None
    projection_dim: int = 64
    logit_scale_init_value: float | int = 2.6592
    pairs: list[str] = field(default_factory=lambda: list(PAIRS))
    loss: str = "nt_xent"
    positives: str = "all"
    reconstruction_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Asks for written-out attention where the caller asks for nothing, as the autoencoder does."""
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = "eager"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses unknown names and impossible numbers."""
        unknown = [pair for pair in self.pairs if pair not in PAIRS]
        if unknown or not self.pairs:
            raise ValueError(f"pairs {self.pairs}: choose one or more of {', '.join(PAIRS)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.positives not in POSITIVES:
            raise ValueError(f"positives {self.positives!r}: choose one of {', '.join(POSITIVES)}")
        if self.projection_dim < 1 or self.reconstruction_weight < 0:
            raise ValueError(
                f"projection_dim {self.projection_dim} must be at least 1 and reconstruction_weight "
                f"{self.reconstruction_weight} at least 0"
            )
        assert isinstance(self.weight_config, WeightTowerConfig)
        if self.reconstruction_weight and not self.weight_config.last_layer:
            raise ValueError("last_layer False: what is not encoded cannot be decoded; set reconstruction_weight to 0")


def _check(config: Any) -> None:
    if config.position_size % 2 != 0:
        raise ValueError(f"position_size {config.position_size} is odd; sines and cosines come in pairs")
    if config.hidden_size < 1 or config.pooling_heads < 1:
        raise ValueError(
            f"hidden_size {config.hidden_size} and pooling_heads {config.pooling_heads} must be at least 1"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout {config.dropout} is not between 0 and below 1")


__all__ = ["DatasetTowerConfig", "JointConfig", "ResultTowerConfig", "WeightTowerConfig"]
