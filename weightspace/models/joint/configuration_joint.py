"""Configuration of the joint model of datasets, weights and results."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import SubConfigSpec

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.configuration import ModelConfig

PAIRS = ("dataset_weight", "weight_result", "dataset_result")


@strict
class DatasetTowerConfig(ModelConfig):
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


@strict
class WeightTowerConfig(ModelConfig):
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


@strict
class ResultTowerConfig(ModelConfig):
    r"""Configures the tower of results, an embedding table of bins whose edges the model owns.

    Args:
        results: names of the results, e.g. `test_accuracy`.
        bins: bins a result, of about equally many training models each.
        smoothing: standard deviation, in bins, of how far from its result a model still is a positive; 0 asks for the
            same bin.
        hidden_size: width of the embeddings.
    """

    model_type = "joint_result_tower"
    base_config_key = "result_config"

    results: list[str] = field(default_factory=lambda: ["test_accuracy"])
    bins: int = 12
    smoothing: float | int = 1.0
    hidden_size: int = 64

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses values out of bounds."""
        super().validate_architecture()
        if not self.results or len(set(self.results)) != len(self.results):
            raise ValueError(f"results {self.results} must be one or more different names")


@strict
class JointConfig(ModelConfig):
    r"""Configures a [`JointModel`].

    Args:
        dataset_config: tower of datasets.
        weight_config: tower of weights.
        result_config: tower of results.
        projection_dim: width of the joint space.
        logit_scale_init_value: logarithm of the inverse temperature that training starts from, for each pair of towers.
        pairs: pairs of towers that are contrasted.
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
    reconstruction_weight: float | int = 0.0

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses values out of bounds."""
        super().validate_architecture()
        if not self.pairs or not set(self.pairs) <= set(PAIRS):
            raise ValueError(f"pairs {self.pairs}: choose one or more of {', '.join(PAIRS)}")
        assert isinstance(self.weight_config, WeightTowerConfig)
        if self.reconstruction_weight and not self.weight_config.last_layer:
            raise ValueError("last_layer False: what is not encoded cannot be decoded; set reconstruction_weight to 0")
