"""What the Hub derives from the files of a commit: card, tags, library, task, configuration, parameter counts.

Files come from tests of hostile repositories too: what cannot be read derives nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from loopback_hub.repositories import Blob

_CARD_AT_MOST = 2**20
_JSON_AT_MOST = 25_000_000
_ANCHOR, _ALIAS = re.compile(r"[\s:,\[{-]&\w"), re.compile(r"[\s:,\[{-]\*\w")
_SINGLE = "model.safetensors"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text-generation",
    "CLIPModel": "zero-shot-image-classification",
}
_CONFIG_SHOWN = ("architectures", "model_type", "auto_map", "quantization_config")
_ADAPTER_SHOWN = ("base_model_name_or_path", "task_type", "peft_type")
_PLAIN_TAGS = ("language", "tags")
_NAMED_TAGS = {"license": "license", "datasets": "dataset", "arxiv": "arxiv"}
_DATASET_TAGS = ("task_categories", "task_ids", "language", "license", "size_categories", "multilinguality")


@dataclass(frozen=True)
class Facts:
    """What is derived from one commit."""

    card: dict[str, Any]
    config: dict[str, Any] | None
    tags: list[str]
    library: str | None
    task: str | None
    safetensors: dict[str, Any] | None
    base_models: list[str]

    @property
    def parameters(self) -> int | None:
        """Parameters of the model's safetensors, or None without such."""
        return self.safetensors["total"] if self.safetensors else None


def derive(repo_type: str, files: Mapping[str, Blob]) -> Facts:
    """Facts about the files of one commit."""
    card = card_metadata(_text(files, "README.md", _CARD_AT_MOST))
    if repo_type != "model":
        tags = [f"{key}:{value}" for key in _DATASET_TAGS for value in _strings(card.get(key))]
        return Facts(card, None, _unique([*tags, *_strings(card.get("tags")), *_formats(files)]), None, None, None, [])
    config = _config(files)
    library = _library(card, files, config)
    task = _task(card, config)
    bases = _strings(card.get("base_model"))
    tags = [
        *([library] if library else []),
        *_formats(files),
        *([config["model_type"]] if config and isinstance(config.get("model_type"), str) else []),
        *([task] if task else []),
        *(value for key in _PLAIN_TAGS for value in _strings(card.get(key))),
        *(f"{name}:{value}" for key, name in _NAMED_TAGS.items() for value in _strings(card.get(key))),
        *_lineage(card, files, bases),
        *(["model-index"] if card.get("model-index") else []),
        "region:us",
    ]
    return Facts(card, config, _unique(tags), library, task, _safetensors(files), bases)


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata block at the head of a card; empty if there is none that can be read."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((row for row, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    block = "\n".join(lines[1:end])
    if _ANCHOR.search(block) and _ALIAS.search(block):
        return {}  # a few lines of aliases can stand for gigabytes
    try:
        metadata = yaml.load(block, _LOADER)
        # As the Hub answers in JSON: dates become text, keys become strings.
        return json.loads(json.dumps(metadata, default=str)) if isinstance(metadata, dict) else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}


def safetensors_header(blob: Blob) -> dict[str, Any] | None:
    """The header of a safetensors file, or None if it is no such file."""
    length = int.from_bytes(blob.read(0, 8), "little")
    if blob.size < 8 or length > min(blob.size - 8, _JSON_AT_MOST):
        return None
    header = _json(blob.read(8, 8 + length))
    return header if isinstance(header, dict) else None


def _safetensors(files: Mapping[str, Blob]) -> dict[str, Any] | None:
    """Parameters by dtype. The Hub counts a model's own file or shards, and so no adapters."""
    index = _json(_text(files, "model.safetensors.index.json"))
    names = [_SINGLE] if _SINGLE in files else shards(index)
    counts: dict[str, int] = {}
    for name in names:
        header = safetensors_header(files[name]) if name in files else None
        for tensor in (value for key, value in (header or {}).items() if key != "__metadata__"):
            try:
                dtype = str(tensor["dtype"])
                counts[dtype] = counts.get(dtype, 0) + math.prod(int(size) for size in tensor["shape"])
            except (KeyError, TypeError, ValueError, OverflowError):
                return None
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


def shards(index: Any) -> list[str]:
    """The files that an index names."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return _unique(_strings(list(weight_map.values()))) if isinstance(weight_map, dict) else []


def _config(files: Mapping[str, Blob]) -> dict[str, Any] | None:
    """The part of the configuration files that the Hub shows."""
    shown: dict[str, Any] = {}
    config = _json(_text(files, "config.json"))
    if isinstance(config, dict):
        shown.update({key: config[key] for key in _CONFIG_SHOWN if key in config})
    adapter = _json(_text(files, "adapter_config.json"))
    if isinstance(adapter, dict):
        shown["peft"] = {key: adapter[key] for key in _ADAPTER_SHOWN if key in adapter}
    pipeline = _json(_text(files, "model_index.json"))
    if isinstance(pipeline, dict):
        shown["diffusers"] = {"_class_name": pipeline.get("_class_name")}
    return shown or None


def _library(card: dict[str, Any], files: Mapping[str, Blob], config: dict[str, Any] | None) -> str | None:
    if isinstance(stated := card.get("library_name"), str):
        return stated
    if "adapter_config.json" in files:
        return "peft"
    if "model_index.json" in files:
        return "diffusers"
    return "transformers" if config and "model_type" in config else None


def _task(card: dict[str, Any], config: dict[str, Any] | None) -> str | None:
    if isinstance(stated := card.get("pipeline_tag"), str):
        return stated
    known = [tag for tag in _strings(card.get("tags")) if tag in _TASKS.values()]
    names = _strings((config or {}).get("architectures"))
    guessed = [task for ending, task in _TASKS.items() for name in names if name.endswith(ending)]
    return next(iter([*known, *guessed]), None)


def _lineage(card: dict[str, Any], files: Mapping[str, Blob], bases: list[str]) -> Iterator[str]:
    relation = card.get("base_model_relation")
    if not isinstance(relation, str):
        relation = "adapter" if "adapter_config.json" in files else "finetune" if len(bases) < 2 else "merge"
    for base in bases:
        yield f"base_model:{base}"
        yield f"base_model:{relation}:{base}"


def _formats(files: Mapping[str, Blob]) -> list[str]:
    endings = {".safetensors": "safetensors", ".gguf": "gguf", ".onnx": "onnx", ".parquet": "format:parquet"}
    tags = [tag for ending, tag in endings.items() if any(path.endswith(ending) for path in files)]
    return [*tags, *(["pytorch"] if "pytorch_model.bin" in files else [])]


def _text(files: Mapping[str, Blob], path: str, limit: int = _JSON_AT_MOST) -> str:
    return files[path].read(0, limit).decode(errors="replace") if path in files else ""


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]


def _unique(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))
