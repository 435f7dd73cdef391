"""Configuration of the prior of weights."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig


@strict
class ConditionedPriorConfig(PreTrainedConfig):
    r"""What priors of weights share; see [`WeightPriorConfig`] and [`WeightCodePriorConfig`].

    Args:
        autoencoder_config: of the autoencoder whose latents or codes are modelled, which is a part of the model.
        class_size: numbers that the joint model describes each class of a dataset by.
        result_size: width of the joint space that results are given in.
        joint_identity: what identifies the joint model, from the record of its training; conditions of another one are
            refused.
        activations: activations that the model knows of; the weights do not tell, and the same weights do other things
            with another one.
        hidden_size: width of the transformer.
        num_layers: its layers.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width of the feed-forward networks.
        position_size: numbers that each of the three position columns is expanded to (sines and cosines), even.
        layer_norm_eps: epsilon of the layer norms.
    """

    sub_configs_defaults = {"autoencoder_config": SubConfigSpec(config_class=WeightAutoencoderConfig)}  # noqa: RUF012

    autoencoder_config: dict[str, Any] | WeightAutoencoderConfig | None = None
    class_size: int = 256
    result_size: int = 64
    joint_identity: str | None = None
    activations: list[str] = field(default_factory=list)
    hidden_size: int = 128
    num_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    position_size: int = 32
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        """Asks for written-out attention where the caller asks for nothing, as the autoencoder does."""
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = "eager"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that do not fit each other."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_size % 2 != 0:
            raise ValueError(f"position_size {self.position_size} is odd; sines and cosines come in pairs")
        for name in ("class_size", "result_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


@strict
class WeightPriorConfig(ConditionedPriorConfig):
    r"""Configures a [`WeightPriorModel`], besides what [`ConditionedPriorConfig`] does.

    Args:
        time_size: numbers that the time of the flow is expanded to, even.
    """

    model_type = "weight_prior"

    time_size: int = 32

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses sizes that do not fit each other."""
        super().validate_architecture()
        if self.time_size % 2 != 0:
            raise ValueError(f"time_size {self.time_size} is odd; sines and cosines come in pairs")


__all__ = ["WeightPriorConfig"]
