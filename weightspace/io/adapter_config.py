"""How to read LoRA factors: what PEFT's ``adapter_config.json`` or the metadata of a header says."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from weightspace.errors import CheckpointError
from weightspace.io.header import shown

# Regular expressions of a config are untrusted: only those are run whose number of steps is known to be small.
_ATOM = r"(?:\\[.\-dwDW]|\[[\w.\-^]+\]|[\w.\-])"
_CHOICE = r"\((?:\?:)?[\w.\-|]+\)"
_SIMPLE = re.compile(rf"\^?(?:{_ATOM}[*+?]?|{_CHOICE})*\$?")
_PLAIN = re.compile(r"[\w.]+")
_LONGEST_PATTERN = 1000
_MOST_STEPS = 5e8
_RANK_KEYS = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_LARGEST = sys.float_info.max
_LONGEST_METADATA = 2**20
# Each is looked for in every tensor's name.
_MOST_SAVED = 100


@dataclass(frozen=True)
class LoraConfig:
    """Checked fields of an ``adapter_config.json``.

    Attributes:
        rank: of modules that no pattern names; None where nothing states it, as some metadata does not.
        alpha: of modules that no pattern names.
        rank_pattern: ranks by plain name or regular expression, as PEFT matches them.
        alpha_pattern: alphas by plain name or regular expression.
        targets: names of the modules with factors, or None where the config gives a pattern or nothing.
        saved: names of modules that are stored whole.
        rslora: whether the scaling is ``alpha / sqrt(rank)`` and not ``alpha / rank``.
        dora: whether each module has a magnitude vector.
        bias: whether each B has a bias.
        base_model: the model that was trained, or None.
    """

    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None
    saved: tuple[str, ...]
    rslora: bool
    dora: bool
    bias: bool
    base_model: str | None


def parse_lora_config(config: Mapping[str, Any], where: str) -> LoraConfig:
    """Checks the fields of an ``adapter_config.json``.

    Args:
        config: its content.
        where: its name in errors.

    Raises:
        CheckpointError: another kind of adapter, or impossible values.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {shown(kind)}; only LORA adapters have factors B and A")
    if config.get("use_bdlora"):
        raise CheckpointError(f"{where}: use_bdlora makes the factors block-diagonal; only plain B and A are read")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(rank) is not int or not 1 <= rank <= _LARGEST:
        raise CheckpointError(f"{where}: r is {shown(rank)}; it must be a whole number of 1 or more")
    if not _is_number(alpha):
        raise CheckpointError(f"{where}: lora_alpha is {shown(alpha)}; it must be a finite number")
    saved = _texts(config, "modules_to_save", where) or ()
    if len(saved) > _MOST_SAVED:
        raise CheckpointError(f"{where}: modules_to_save names {len(saved)} modules, above the limit of {_MOST_SAVED}")
    base_model = config.get("base_model_name_or_path")
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=_numbers(config, "rank_pattern", where, least=1.0),
        alpha_pattern=_numbers(config, "alpha_pattern", where),
        targets=None if isinstance(config.get("target_modules"), str) else _texts(config, "target_modules", where),
        saved=saved,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=bool(config.get("lora_bias")),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )


def metadata_configs(metadata: Mapping[str, str]) -> dict[str, LoraConfig | str]:
    """Reads what a header's metadata says of rank and alpha, as trainers without an ``adapter_config.json`` write it.

    Known are numbers under their usual keys (kohya's ``ss_network_alpha``, ``lora_alpha``), and JSON with the fields of
    PEFT's config (diffusers' ``lora_adapter_metadata``); either with the network of a pipeline before the key.

    Returns:
        By network, empty for all of them: the config, or why what is stated cannot be used.
    """
    fields: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, text in metadata.items():
        component, _, last = key.rpartition(".")
        if last in _RANK_KEYS or last in _ALPHA_KEYS:
            number = _number_in(text)
            name = "r" if last in _RANK_KEYS else "lora_alpha"
            # "Dynamic" and the like are no rank; an alpha that is no number is one that nobody knows.
            if name == "lora_alpha" or isinstance(number, int):
                fields[component].setdefault(name, number)
        elif "lora_alpha" in text and len(text) <= _LONGEST_METADATA:
            for name, value in _json_object(text).items():
                component, _, last = name.rpartition(".")
                fields[component][last] = value
    found: dict[str, LoraConfig | str] = {}
    for component, stated in fields.items():
        if "lora_alpha" in stated:
            try:
                config = parse_lora_config({**stated, "peft_type": "LORA"}, "the header's metadata")
                found[component] = config if "r" in stated else replace(config, rank=None)
            except CheckpointError as error:
                found[component] = str(error)
    return found


def _number_in(text: str) -> int | float | str:
    for kind in (int, float) if len(text) < 64 else ():
        with suppress(ValueError):
            return kind(text)
    return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def name_ends(module: str) -> list[str]:
    """Returns a module's name and all that follows one of its dots: what a plain name in PEFT's configs matches."""
    return [module, *(module[match.end() :] for match in re.finditer(r"\.", module))]


def match_patterns(patterns: Mapping[str, float], modules: Sequence[str]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Gives modules the value of the first pattern that matches them, as PEFT does.

    Returns:
        Values by module, and the patterns that could take too long to evaluate and were passed over.
    """
    plain, compiled, refused = {}, [], []
    for number, (text, value) in enumerate(patterns.items()):
        if _PLAIN.fullmatch(text):
            plain[text] = (number, value)
        elif (pattern := _compiled(text, modules, len(patterns))) is not None:
            compiled.append((pattern, (number, value)))
        else:
            refused.append(text)
    found: dict[str, float] = {}
    for module in modules:
        hits = [plain[end] for end in name_ends(module) if end in plain]
        hits += [hit for pattern, hit in compiled if pattern.match(module)]
        if hits:
            found[module] = min(hits)[1]
    return found, tuple(refused)


def belongs_to(tensor: str, modules: Iterable[str]) -> bool:
    """Says whether a tensor, by its path in the base model, is part of one of ``modules``, named by ends of theirs."""
    return any(f".{module}." in f".{tensor}" for module in modules)


def _compiled(text: str, modules: Sequence[str], count: int) -> re.Pattern[str] | None:
    """Compiles one of ``count`` patterns as PEFT matches it, or returns None where that could take long."""
    if len(text) > _LONGEST_PATTERN or not _SIMPLE.fullmatch(text):
        return None
    longest = max((len(module) for module in modules), default=1)
    repeats = len(re.findall(r"[*+?]", text))
    choices = math.prod(1 + choice.count("|") for choice in re.findall(_CHOICE, text))
    # Each repetition may end at every letter, and each choice may be gone through again.
    log_steps = (1 + repeats) * math.log(longest) + math.log(choices * max(1, len(modules)) * count)
    try:
        return re.compile(rf"(.*\.)?({text})$") if log_steps < math.log(_MOST_STEPS) else None
    except re.error:
        return None


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST <= value <= _LARGEST  # false for NaN, and exact for integers that are too large for a float


def _numbers(config: Mapping[str, Any], key: str, where: str, least: float = -math.inf) -> Mapping[str, float]:
    values = config.get(key) or {}
    if not isinstance(values, Mapping) or not all(_is_number(v) and v >= least for v in values.values()):
        raise CheckpointError(f"{where}: {key} is {shown(values)}; it must map module names to numbers")
    return {name: float(value) for name, value in values.items()}


def _texts(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | None:
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list | tuple | set) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{where}: {key} is {shown(values)}; it must be a list of module names")
    return tuple(values)
