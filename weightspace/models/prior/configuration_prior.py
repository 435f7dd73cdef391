"""Configurations of the priors of weights."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import SubConfigSpec

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.configuration import TransformerConfig


@strict
class ConditionedPriorConfig(TransformerConfig):
    r"""What the configurations of priors share, in addition to [`TransformerConfig`].

    Args:
        autoencoder_config: of the autoencoder whose latents or codes are modelled, which is a part of the model.
        class_size: numbers that the joint model describes each class of a dataset by.
        result_size: width of the joint space that results are given in.
        joint_identity: identity of the joint model, from the record of its training; conditions of another one are
            refused.
        activations: activations that the model can be conditioned on; weights alone do not determine them.
        num_layers: layers of the transformer.
    """

    sub_configs_defaults = {"autoencoder_config": SubConfigSpec(config_class=WeightAutoencoderConfig)}  # noqa: RUF012

    autoencoder_config: dict[str, Any] | WeightAutoencoderConfig | None = None
    class_size: int = 256
    result_size: int = 64
    joint_identity: str | None = None
    activations: list[str] = field(default_factory=list)
    num_layers: int = 4


@strict
class WeightPriorConfig(ConditionedPriorConfig):
    r"""Configures a [`WeightPriorModel`], in addition to [`ConditionedPriorConfig`].

    Args:
        time_size: numbers that the time of the flow is expanded to (sines and cosines), even.
    """

    model_type = "weight_prior"

    time_size: int = 32


@strict
class WeightCodePriorConfig(ConditionedPriorConfig):
    r"""Configures a [`WeightCodePriorModel`], in addition to [`ConditionedPriorConfig`].

    Its autoencoder has `code_levels`.

    Args:
        number_size: width of what each number of a token's latent is predicted from.
    """

    model_type = "weight_code_prior"

    number_size: int = 32
