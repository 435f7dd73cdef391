"""Quantised checkpoints, recognised from what a header and a config say.

Quantisation stores integers, codes or small floats in place of the weights, and beside them the scales, zero points or
codebooks that turn one into the other. Read as plain tensors, such numbers are no point in weight space. Tensors in
fp8 or integers without anything beside them are not quantised in this sense: their values are what they say.

A config alone proves nothing: merged and dequantised models often keep the ``quantization_config`` they were trained
with. It counts only where a tensor is stored in few bits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightspace.io.header import shown
from weightspace.schema import TensorSpec


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised.

    Attributes:
        method: its name, as transformers writes it where transformers knows it: ``"gptq"``, ``"mxfp4"``, ...;
            ``"bitsandbytes-4bit"`` and ``"bitsandbytes-8bit"`` apart; ``"fp8"`` and ``"int8"`` for values with scales.
        evidence: the setting or the tensors that give it away.
        reason: one line: why the stored numbers are not the weights, and what to do.
    """

    method: str
    evidence: str
    reason: str


@dataclass(frozen=True)
class _Sign:
    """Tensors that stand together in checkpoints of one method, named by what follows a common stem.

    Attributes:
        method: as in `Quantization`.
        dtypes: what the packed tensor may be stored as.
        packed: end of the packed tensor's name.
        beside: ends of the names that stand beside it, all of them.
    """

    method: str
    dtypes: tuple[str, ...]
    packed: str
    beside: tuple[str, ...]

    def found(self, name: str, specs: Mapping[str, TensorSpec]) -> tuple[str, ...] | None:
        """Returns the names of the packed tensor and those beside it."""
        if not name.endswith(self.packed):
            return None
        stem = name.removesuffix(self.packed)
        names = (name, *(stem + end for end in self.beside))
        if not all(other in specs for other in names):
            return None
        # A checkpoint that was cast to fp8 as a whole has fp8 in every parameter; scales are stored wider, or as E8M0.
        cast = specs[name].dtype in _FP8 and all(specs[other].dtype == specs[name].dtype for other in names)
        return None if cast else names


_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_FP4 = ("F4", "F6_E2M3", "F6_E3M2")
_BYTES = ("I8", "U8")
_WORDS = ("I32", "U32")
_INTEGERS = (*_BYTES, "I16", "U16", *_WORDS)
_FLOATS = ("F16", "BF16", "F32")
_FEW_BITS = (*_INTEGERS, *_FP8, *_FP4)

_SCALED = (("fp8", _FP8), ("fp4", _FP4), ("int8", ("I8",)), ("packed integers", ("U8", *_WORDS)))
_SCALES = (
    ("", ("_scale",)),
    ("", ("_scale_inv",)),
    ("", ("_scales",)),
    ("_quantized", ("_scale",)),
    ("weight", ("scale",)),
    ("weight", ("scales",)),
    ("weight", ("scale_weight",)),
    ("weight", ("qscale_weight",)),
    ("qweight", ("scales",)),
)
_SIGNS = (  # of those that fit, the first counts
    _Sign("gptq", _WORDS, "qweight", ("qzeros", "scales", "g_idx")),
    _Sign("awq", _WORDS, "qweight", ("qzeros", "scales")),
    _Sign("awq", ("I16", "U16"), "qweight", ("qzeros", "scales")),
    _Sign("awq", ("I16", "U16"), "qweight", ("scaled_zeros", "scales")),
    _Sign("marlin", _WORDS, "B", ("s", "workspace")),
    _Sign("marlin", _WORDS, "B", ("s", "meta")),
    _Sign("bitsandbytes-4bit", (*_BYTES, *_FLOATS), "weight", ("weight.absmax", "weight.quant_map")),
    _Sign("bitsandbytes-8bit", ("I8",), "weight", ("SCB",)),
    _Sign("compressed-tensors", _INTEGERS, "weight_packed", ("weight_scale",)),
    _Sign("nvfp4", ("U8",), "weight", ("weight_scale", "weight_scale_2")),
    _Sign("mxfp4", ("U8",), "_blocks", ("_scales",)),
    _Sign("hqq", (*_INTEGERS, *_FLOATS), "W_q", ("scale", "zero")),
    _Sign("hqq", (*_INTEGERS, *_FLOATS), "W_q", ("meta",)),
    _Sign("aqlm", _INTEGERS, "codes", ("codebooks", "scales")),
    _Sign("vptq", _INTEGERS, "indices", ("centroids.weight",)),
    _Sign("quanto", (*_INTEGERS, *_FP8), "_data", ("_scale",)),
    _Sign("torchao", (*_INTEGERS, *_FP8), "_qdata", ("_scale",)),
    _Sign("torchao", (*_INTEGERS, *_FP8), "_qdata", ("_scale_and_zero",)),
    _Sign("eetq", ("I8",), "weight", ("weight_scales",)),
    _Sign("higgs", _INTEGERS, "weight", ("scales", "tables", "tables2")),
    _Sign("metal", _WORDS, "weight", ("scales", "qbiases")),
    _Sign("mlx", _WORDS, "weight", ("scales", "biases")),
    _Sign("mlx", _WORDS, "weight", ("scales",)),
    _Sign("spqr", _INTEGERS, "dense_weights", ("row_offsets", "col_vals")),
    _Sign("fp_quant", ("U8",), "qweight", ("scales", "forward_hadamard_matrix")),
    _Sign("fp_quant", _FLOATS, "dqweight", ("forward_hadamard_matrix",)),
    _Sign("exl2", _WORDS, "q_weight", ("q_scale",)),
    _Sign("exl3", ("I16", "U16"), "trellis", ("suh", "svh")),
    _Sign("quip", (*_INTEGERS, "I64"), "Qidxs", ("SU", "SV")),
    _Sign("svdquant", ("I8",), "qweight", ("wscales",)),
    *(_Sign(method, dtypes, *ends) for method, dtypes in _SCALED for ends in _SCALES),
)


def _by_dtype() -> Mapping[str, tuple[_Sign, ...]]:
    signs: dict[str, list[_Sign]] = defaultdict(list)
    for sign in _SIGNS:
        for dtype in sign.dtypes:
            signs[dtype].append(sign)
    return {dtype: tuple(found) for dtype, found in signs.items()}


_SIGNS_BY_DTYPE = _by_dtype()

_BUFFERS = frozenset({"bias", "masked_bias", "mask", "attn_mask", "position_ids", "relative_position_index"})
"""Last parts of the names of integer tables that unquantised models store."""

_GROUPS = "integers packed into words, beside scales and zero points by group"
_CODES = "codes that point into codebooks"
_FP8_SCALES = "fp8 values that were divided by scales stored beside them"
_FP4_SCALES = "4-bit floats packed into bytes, beside scales by block"
_INT_SCALES = "integers, beside the scales that they must be multiplied by"
_UNKNOWN = ("numbers in a layout of its own", "the library that wrote it")

_METHODS: Mapping[str, tuple[str, str]] = {
    "gptq": (_GROUPS, "gptqmodel"),
    "awq": (_GROUPS, "gptqmodel"),
    "marlin": (_GROUPS, "gptqmodel"),
    "auto-round": (_GROUPS, "auto-round"),
    "bitsandbytes": ("integers or 4-bit codes, beside scales by block", "bitsandbytes"),
    "bitsandbytes-4bit": ("two 4-bit codes a byte, beside scales by block", "bitsandbytes"),
    "bitsandbytes-8bit": (_INT_SCALES, "bitsandbytes"),
    "compressed-tensors": ("packed or scaled values, beside their scales", "compressed-tensors"),
    "modelopt": ("packed or scaled values, beside their scales", "nvidia-modelopt"),
    "quark": ("packed or scaled values, beside their scales", "amd-quark"),
    "fp8": (_FP8_SCALES, "transformers (dequantize=True)"),
    "fbgemm_fp8": (_FP8_SCALES, "fbgemm-gpu"),
    "mxfp8": (_FP8_SCALES, "transformers (dequantize=True)"),
    "fp4": (_FP4_SCALES, "the library that wrote it"),
    "mxfp4": (_FP4_SCALES, "transformers (dequantize=True)"),
    "nvfp4": (_FP4_SCALES, "nvidia-modelopt"),
    "fouroversix": (_FP4_SCALES, "fouroversix"),
    "fp_quant": ("4-bit floats of rotated weights, beside scales by block", "fp_quant"),
    "int8": (_INT_SCALES, "the library that wrote it"),
    "packed integers": (_INT_SCALES, "the library that wrote it"),
    "hqq": (_GROUPS, "hqq"),
    "sinq": (_GROUPS, "sinq"),
    "quanto": (_INT_SCALES, "optimum-quanto"),
    "torchao": (_INT_SCALES, "torchao"),
    "eetq": (_INT_SCALES, "eetq"),
    "gemma": (_INT_SCALES, "transformers"),
    "bitnet": ("ternary weights, four to a byte, beside their scales", "transformers"),
    "metal": (_GROUPS, "transformers (dequantize=True)"),
    "mlx": (_GROUPS, "mlx"),
    "aqlm": (_CODES, "aqlm"),
    "vptq": (_CODES, "vptq"),
    "quip": (_CODES, "quip-sharp"),
    "higgs": (_CODES, "transformers"),
    "exl2": (_GROUPS, "exllamav2"),
    "exl3": (_CODES, "exllamav3"),
    "spqr": ("packed integers and sparse outliers", "spqr_quant"),
    "svdquant": ("packed residuals of a low-rank part", "nunchaku"),
    "gguf": ("blocks of packed integers with their scales", "transformers (gguf_file=...)"),
}
"""What each method stores in place of weights, and what turns it back."""

_SECTIONS = ("quantization_config", "compression_config", "quantization")
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_QUANTISED_NAME = re.compile(r"gptq|awq|aqlm|hqq|bnb|\dbit|\d-bit|int[48]|fp[48]|exl[23]|gguf|mlx|quant|w\d+a\d+", re.I)


def quantization_of(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None) -> Quantization | None:
    """Recognises a quantised checkpoint from its tensors' names and dtypes and from its config.

    Args:
        specs: all tensors of the checkpoint by name.
        config: content of its ``config.json``, or of the ``quantize_config.json``, ``quant_config.json`` or
            ``hf_quant_config.json`` that some libraries write instead.

    Returns:
        How it is quantised, or None: its tensors can be read as weights.
    """
    config = config or {}
    stated = _stated(config)
    found = next(_signs(specs), None) or (next(_in_few_bits(specs), None) if stated else None)
    if found is None:
        return None
    method, evidence = found
    if stated:
        method, evidence = stated[0], f"{stated[1]}, {evidence}"
    return Quantization(method, evidence, _reason(method, evidence, _origin(config)))


def _signs(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    for name, spec in specs.items():
        for sign in _SIGNS_BY_DTYPE.get(spec.dtype, ()):
            if names := sign.found(name, specs):
                yield sign.method, " beside ".join(shown(name) for name in names[:2])


def _in_few_bits(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    for name, spec in specs.items():
        if spec.dtype in _FEW_BITS and len(spec.shape) > 1 and name.rpartition(".")[2] not in _BUFFERS:
            yield "", f"{shown(name)} in {spec.dtype}"


def _stated(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Finds the method and the setting that states it; multimodal configs may have it one level down."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for section in _SECTIONS:
            settings = holder.get(section)
            if isinstance(settings, Mapping) and (found := _method(settings, section)):
                return found
    return _method(config, "")


def _method(settings: Mapping[str, Any], section: str) -> tuple[str, str] | None:
    named = settings.get("quant_method")
    if settings.get("load_in_4bit") is True or named == "bitsandbytes_4bit":
        method, key = "bitsandbytes-4bit", "load_in_4bit"
    elif settings.get("load_in_8bit") is True or named == "bitsandbytes_8bit":
        method, key = "bitsandbytes-8bit", "load_in_8bit"
    elif isinstance(named, str) and named:
        method, key = named.rpartition("/")[2].lower(), "quant_method"
    elif isinstance(settings.get("quant_algo"), str):
        method, key = "modelopt", "quant_algo"
    elif "w_bit" in settings:
        method, key = "awq", "w_bit"
    elif "bits" in settings and "group_size" in settings:
        method, key = "mlx" if section == "quantization" else "gptq", "bits"
    else:
        return None
    known = method in _METHODS or (method.isprintable() and len(method) <= 40)
    return method if known else shown(method), f"{section}.{key}".lstrip(".")


def _origin(config: Mapping[str, Any]) -> str | None:
    """Returns the repository that the config was made from, unless it is quantised itself by its name."""
    name = config.get("_name_or_path")
    if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not _QUANTISED_NAME.search(name):
        return name
    return None


def _reason(method: str, evidence: str, base_model: str | None) -> str:
    stores, library = _METHODS.get(method, _UNKNOWN)
    return (
        f"quantised with {method} ({evidence}): it stores {stores}, not the weights; read the unquantised "
        f"{'model' if base_model is None else shown(base_model)}, or dequantise it with {library} and save it as "
        "safetensors"
    )
