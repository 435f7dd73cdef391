"""What the configurations of all models share: the attention implementation, and checks of sizes and names."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

_LEAST = {
    **dict.fromkeys(("class_size", "components", "depth_bins", "feature_size", "hidden_size", "hops", "num_layers"), 1),
    **dict.fromkeys(("number_size", "pooling_heads", "projection_dim", "result_size", "sample", "window"), 1),
    **{"bins": 2, "reconstruction_weight": 0, "smoothing": 0},
}
_EVEN = ("position_size", "time_size")
_CHOICES = {"kind": ("bins", "regression"), "loss": ("nt_xent", "sigmoid"), "positives": ("all", "diagonal")}


@strict
class ModelConfig(PreTrainedConfig):
    """Base of all configurations; a field of the same name means the same in each, and has the same bounds."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Selects eager attention unless the caller selects another.

        Models are trained with it, so that a loaded one gives the same embeddings to the last bit.
        """
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = "eager"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses values out of bounds."""
        for name, least in _LEAST.items():
            if (value := getattr(self, name, least)) < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        for name in _EVEN:
            if (value := getattr(self, name, 0)) % 2 != 0:
                raise ValueError(f"{name} {value} is odd; sines and cosines come in pairs")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name, choices[0])) not in choices:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
        if not 0 <= (dropout := getattr(self, "dropout", 0)) < 1:
            raise ValueError(f"dropout {dropout} is not between 0 and below 1")


@strict
class TransformerConfig(ModelConfig):
    r"""Configures the transformer layers of a model.

    Args:
        hidden_size: width of the transformer.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width of the feed-forward networks.
        hidden_act: their activation.
        layer_norm_eps: epsilon of the layer norms.
        position_size: numbers that each of the three position columns is expanded to (sines and cosines), even.
    """

    hidden_size: int = 128
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    position_size: int = 32

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses heads that do not divide the width."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
