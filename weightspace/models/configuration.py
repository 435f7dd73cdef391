"""What the configurations of all models share: the attention implementation, and checks of sizes and names."""

import math
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from weightspace.errors import SettingsError
from weightspace.io.header import shown

FIX = "fetch the whole folder, or train it again"
_LONGEST = 300

_LEAST = {
    **dict.fromkeys(("class_size", "components", "depth_bins", "feature_size", "hidden_size", "hops", "num_layers"), 1),
    **dict.fromkeys(("intermediate_size", "latent_size", "num_attention_heads", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_encoder_layers", "number_size", "pooling_heads", "position_size", "projection_dim"), 1),
    **dict.fromkeys(("projection_size", "result_size", "sample", "time_size", "token_size", "window"), 1),
    **{"bins": 2, "reconstruction_weight": 0, "smoothing": 0},
}
_MOST = {"hops": 64, "window": 4096, **dict.fromkeys(("num_layers", "num_encoder_layers", "num_decoder_layers"), 1024)}
LARGEST = 2**20
"""Most that any other number of a configuration can be. What of it the weights show is compared with them, too."""

_EVEN = ("position_size", "time_size")
_POSITIVE = ("layer_norm_eps", "temperature")

_STATED = ("architectures", "dtype", "transformers_version")
"""Fields of transformers that a file decides."""
_IGNORED = (
    *(one.name for one in fields(PreTrainedConfig)),
    *("_name_or_path", "model_type", "num_labels", "output_attentions"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
)
"""Fields of transformers that mean nothing here, and attention, which is for the caller to choose."""
_FIXED = {"interpolate": True, "kind": "bins", "loss": "nt_xent", "positives": "all"}
"""Fields of joint models that have but one value; files may state it."""
_DTYPES = ("bfloat16", "float16", "float32", "float64")


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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from what a file holds, which may be anyone's.

        Raises:
            SettingsError: a field is unknown, or has a wrong type or an impossible value.
        """
        where = f"{kwargs.get('name_or_path') or cls.model_type}: config.json"
        stated = _stated(cls, config_dict, where)
        try:
            return super().from_dict(stated, **kwargs)
        except Exception as error:  # transformers and strict dataclasses raise their own families of errors
            raise SettingsError(f"{where}: {one_line(error)}; {FIX}") from error

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: refuses values out of bounds."""
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} {value} is not finite")
            if value < _LEAST.get(name, value):
                raise ValueError(f"{name} {shown(value)} must be at least {_LEAST[name]}")
            if value > _MOST.get(name, LARGEST):
                raise ValueError(f"{name} {shown(value)} is above the limit of {_MOST.get(name, LARGEST):,}")
            if name in _EVEN and value % 2 != 0:
                raise ValueError(f"{name} {value} is odd; sines and cosines come in pairs")
            if name in _POSITIVE and value <= 0:
                raise ValueError(f"{name} {value} is not positive")
        if not 0 <= (dropout := getattr(self, "dropout", 0)) < 1:
            raise ValueError(f"dropout {dropout} is not between 0 and below 1")


def _stated(cls: type[PreTrainedConfig], values: Any, where: str) -> dict[str, Any]:
    """Takes what a file states and a model of this library has a use for; refuses what nobody knows."""
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected fields and values, got {shown(values)}; {FIX}")
    if "auto_map" in values:
        raise SettingsError(f"{where}: auto_map {shown(values['auto_map'])} names code, which is never run; remove it")
    if values.get("model_type", cls.model_type) != cls.model_type:
        raise SettingsError(f"{where}: model_type {shown(values['model_type'])} is not {cls.model_type}; {FIX}")
    own = {one.name for one in fields(cls)} - set(_IGNORED) | set(_STATED)
    stated: dict[str, Any] = {}
    for name, value in values.items():
        if name == "torch_dtype":
            stated.setdefault("dtype", value)
        elif name in own:
            part = cls.sub_configs_defaults.get(name) if isinstance(value, dict) else None
            stated[name] = value if part is None else _stated(part.config_class, value, f"{where}: {name}")
        elif name not in _IGNORED and _FIXED.get(name) != value:
            raise SettingsError(f"{where}: unknown field {shown(name)}; remove it, or update weightspace")
    if (kind := stated.get("dtype")) is not None and str(kind).removeprefix("torch.") not in _DTYPES:
        raise SettingsError(f"{where}: dtype {shown(kind)}: choose one of {', '.join(_DTYPES)}")
    return stated


def one_line(error: BaseException) -> str:
    """Returns what an error of another library says, on one line of bearable length."""
    text = " ".join(str(error.__cause__ or error).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}" or type(error).__name__


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
        from transformers.activations import ACT2FN  # takes seconds to import, which input sides need not wait for

        super().validate_architecture()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {shown(self.hidden_act)} is unknown; transformers has {', '.join(ACT2FN)}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
