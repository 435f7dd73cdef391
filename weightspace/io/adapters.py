"""LoRA adapters: the pairs of factors among a checkpoint's names, and what config and scalars say of them.

An adapter adds ``scaling * B A`` to the weight of a module of its base model, with ``A (rank, inputs)`` and
``B (outputs, rank)`` (Hu et al., 2021, "LoRA"). Trainers name the two in their own ways:

- peft: ``base_model.model.MODULE.lora_A.weight`` and ``lora_B``; ``lora_embedding_A`` without ``.weight``;
- diffusers: ``unet.MODULE.lora_A.weight``, ``MODULE.lora.down.weight`` and ``up``,
  ``MODULE.processor.to_q_lora.down.weight``;
- kohya: ``lora_unet_MODULE.lora_down.weight``, ``lora_up`` and ``alpha``, with underscores for the dots of MODULE;
- cloneofsimo: ``unet:0:down`` and ``up``, numbered in the order in which the network's modules are gone through.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.io.adapter_config import (
    LoraConfig,
    belongs_to,
    match_patterns,
    metadata_configs,
    name_ends,
    parse_lora_config,
)
from weightspace.io.checkpoint import ADAPTER_CONFIG, Checkpoint
from weightspace.io.header import shown
from weightspace.schema import TensorSpec

Naming = Literal["peft", "diffusers", "kohya", "cloneofsimo"]

PEFT_ROOT = "base_model.model."
"""What PEFT puts before the names of the base model's tensors."""

_NAMES: tuple[tuple[Naming, re.Pattern[str]], ...] = (
    ("peft", re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.default)?\.weight")),
    ("peft", re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B)(\.default)?")),
    ("peft", re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.(?P<part>bias)")),
    ("peft", re.compile(r"(?P<module>.+)\.lora_(?P<part>magnitude_vector)(\.default)?(\.weight)?")),
    ("kohya", re.compile(r"(?P<module>.+)\.lora_(?P<part>down|up)\.weight")),
    ("diffusers", re.compile(r"(?P<module>.+)\.processor\.(?P<projection>\w+)_lora\.(?P<part>down|up)\.weight")),
    ("diffusers", re.compile(r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<part>down|up)\.weight")),
    ("cloneofsimo", re.compile(r"(?P<module>\w+:\d+):(?P<part>down|up)")),
    ("kohya", re.compile(r"(?P<module>.+?)(\.lora|\.lora_linear_layer)?\.(?P<part>alpha)")),
    # A third factor, as AdaLoRA, KaSA, LyCORIS and others have it, makes the update another one than B A.
    ("kohya", re.compile(r"(?P<module>.+?)\.(?P<part>lora_\w+|hada_\w+|lokr_\w+|dora_scale)(\..*)?")),
)
_ROLES = {"A": "a", "embedding_A": "a", "down": "a", "B": "b", "embedding_B": "b", "up": "b"}
_COMPONENT = re.compile(r"(unet|text_encoder(?:_\d)?|transformer(?:_\d)?|prior|controlnet)[.:]")
_WRAPPERS = re.compile(r"^(module\.)+|(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module)\.")
"""What DDP, torch.compile and FSDP put before the names of a module that they wrap."""

FLAT_COMPONENT = re.compile(r"lora_(unet|te\d?|transformer|prior)_")
"""How kohya's names begin that stand for a path without dots."""
# PEFT keeps one pair for several experts, and B A would mix them. Only the module's name gives it away.
_STACKED = re.compile(r"(^|\.)(base_layer|experts)$")


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module's update, ``A (rank, inputs)`` and ``B (outputs, rank)``.

    Attributes:
        module: unique name of the module: its path in the base model where the naming tells it, as stored otherwise.
        naming: how the tensors are named.
        component: the network of a pipeline that it belongs to (``"unet"``, ``"text_encoder"``), or ``""``.
        kind: what the module is; an embedding's update is the transpose of ``B A``.
        a: spec of A; for a convolution ``(rank, inputs, *kernel)``.
        b: spec of B; for a convolution ``(outputs, rank / groups, 1, ...)``.
        bias: name of the bias of B, or None.
        magnitude: name of DoRA's vector, or None.
        alpha: name of the scalar tensor that holds alpha, or None.
    """

    module: str
    naming: Naming
    component: str
    kind: Literal["linear", "conv", "embedding"]
    a: TensorSpec
    b: TensorSpec
    bias: str | None = None
    magnitude: str | None = None
    alpha: str | None = None

    @property
    def rank(self) -> int:
        """Rows of A: the rank-one components of the update."""
        return self.a.shape[0]

    @property
    def groups(self) -> int:
        """In how many equal parts outputs and components are cut: a part of the outputs reads its own components."""
        return self.rank // self.b.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that belong to the pair."""
        optional = (self.bias, self.magnitude, self.alpha)
        return (self.a.name, self.b.name, *(name for name in optional if name is not None))


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint holds of a LoRA adapter, from its names, shapes and config; no factor has been read.

    Attributes:
        where: path or other name of the checkpoint.
        base_model: the model that it was trained on, as config or metadata name it, or None.
        config: content of ``adapter_config.json``, or None.
        pairs: the factors, in the order of the checkpoint.
        alpha: by module; NaN where neither config, tensors nor metadata state one that can be used.
        scaling: by module, what ``B A`` is multiplied with: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rslora
            (Kalajdzievski, 2023); NaN where it is unknown.
        saved: tensors of whole modules that were trained beside the pairs (``modules_to_save``).
        other: all other tensors.
        mismatches: where config and tensors do not fit, so that PEFT would load something else than what is stored.
        notes: what could not be known, and what is unusual and does no harm.
    """

    where: str
    base_model: str | None
    config: Mapping[str, Any] | None
    pairs: tuple[LoraPair, ...]
    alpha: Mapping[str, float]
    scaling: Mapping[str, float]
    saved: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def namings(self) -> tuple[Naming, ...]:
        """The namings found, most frequent first; mostly one."""
        return tuple(naming for naming, _ in Counter(pair.naming for pair in self.pairs).most_common())

    @property
    def unknown(self) -> tuple[str, ...]:
        """The modules whose scaling is not known."""
        return tuple(module for module, scaling in self.scaling.items() if not math.isfinite(scaling))

    @property
    def components(self) -> tuple[str, ...]:
        """The networks of a pipeline that pairs belong to, sorted; ``("",)`` where there is but one model."""
        return tuple(sorted({pair.component for pair in self.pairs}))


@dataclass(frozen=True)
class _Part:
    """A tensor's name, taken apart."""

    naming: Naming
    component: str
    module: str
    part: str


def find_pairs(specs: Iterable[TensorSpec]) -> tuple[tuple[LoraPair, ...], dict[str, str]]:
    """Finds the pairs of factors among tensors, from names and shapes alone.

    Returns:
        The pairs in the order of their first tensors; and by module why its factors, if it has any, are no pair.
    """
    modules: dict[str, dict[str, tuple[_Part, TensorSpec]]] = defaultdict(dict)
    doubled: dict[str, str] = {}
    for spec in specs:
        if (parsed := _parse(spec.name)) is None:
            continue
        roles, role = modules[parsed.module], _ROLES.get(parsed.part, parsed.part)
        if role in roles:
            doubled[parsed.module] = f"has two of a kind, {shown(roles[role][1].name)} and {shown(spec.name)}"
        roles.setdefault(role, (parsed, spec))
    pairs: list[LoraPair] = []
    problems: dict[str, str] = {}
    for module, roles in modules.items():
        if not roles.keys() & {"a", "b"}:
            continue
        found = {role: spec for role, (_, spec) in roles.items()}
        problem = doubled.get(module) or _problem(module, found)
        if problem is None:
            pairs.append(_pair(roles["a"][0], found))
        else:
            problems[module] = problem
    return tuple(pairs), problems


def read_adapter(checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, scaling: float | None = None) -> Adapter:
    """Reads what a checkpoint holds of a LoRA adapter; of its tensors only scalars named ``alpha``.

    Args:
        checkpoint: opened adapter weights, of any of the namings above.
        config: content of the ``adapter_config.json`` beside them; None for namings that have none.
        scaling: what ``B A`` is multiplied with where nothing states it.

    Raises:
        CheckpointError: the config is of another kind of adapter or has impossible values, or no pair was found.
    """
    pairs, _ = find_pairs(checkpoint.specs.values())
    scalars = [pair.alpha for pair in pairs if pair.alpha and _is_scalar(checkpoint.specs[pair.alpha])]
    alphas = {name: float(value) for name, value in checkpoint.tensors(scalars).items()}
    base_model = checkpoint.metadata.get("ss_sd_model_name")  # kohya's
    return describe_adapter(
        checkpoint.specs,
        config,
        alphas=alphas,
        metadata=checkpoint.metadata,
        scaling=scaling,
        base_model=base_model,
        where=checkpoint.where,
    )


def describe_adapter(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
    *,
    where: str,
    alphas: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
    scaling: float | None = None,
    base_model: str | None = None,
) -> Adapter:
    """Puts together what names, shapes and config say of an adapter, without a checkpoint.

    Args:
        specs: all tensors by name.
        config: content of the ``adapter_config.json``, or None.
        where: what the adapter is called in errors.
        alphas: values of scalars named ``alpha``, by their names; only used where there is no config.
        metadata: of the header; only used where there is neither a config nor such a scalar.
        scaling: as in `read_adapter`.
        base_model: the base model's name where there is no config.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    known = None if config is None else parse_lora_config(config, f"{where}: {ADAPTER_CONFIG}")
    pairs, problems = find_pairs(specs.values())
    if not pairs:
        found = [f"{shown(module)} {problem}" for module, problem in problems.items()]
        reason = found[0] if found else f"none of its {len(specs)} tensors is named as one"
        raise CheckpointError(f"{where}: no pair of LoRA factors: {reason}; read it as a model")
    findings = [(problem, module) for module, problem in problems.items()]
    notes: list[str] = []
    if known is None:
        stated = _scaling_of(pairs, alphas or {}, metadata or {}, scaling, findings, notes)
    else:
        base_model = known.base_model
        stated = _alpha_and_scaling(pairs, known, findings)
        findings += _unlike_config(pairs, known)
        notes += _absent(pairs, known, specs)
    if base_model is not None and not base_model.isprintable():
        notes.append(f"the base model's name {shown(base_model)} is left out: it is not printable")
        base_model = None
    used = {name for pair in pairs for name in pair.names}
    beside = [name for name in specs if name not in used]
    kept = () if known is None else known.saved
    saved = tuple(name for name in beside if belongs_to(name.removeprefix(PEFT_ROOT), kept))
    whole = set(saved)
    other = tuple(name for name in beside if name not in whole)
    return Adapter(where, base_model, config, pairs, *stated, saved, other, _grouped(findings), tuple(notes))


def peft_names(pair: LoraPair, path: str) -> dict[str, str]:
    """Returns PEFT's names of the tensors of a pair, by their present ones; alpha has none, it goes into the config."""
    factors = ("embedding_A", "embedding_B") if pair.kind == "embedding" else ("A.weight", "B.weight")
    parts = {pair.a.name: factors[0], pair.b.name: factors[1]}
    parts |= {pair.bias: "B.bias"} if pair.bias else {}
    parts |= {pair.magnitude: "magnitude_vector"} if pair.magnitude else {}
    return {name: f"{PEFT_ROOT}{path}.lora_{part}" for name, part in parts.items()}


def is_untrained(adapter: Adapter, tensors: Mapping[str, Tensor] | Checkpoint) -> bool:
    """Says whether every update is zero, because all of its B is (as initialised) or all of its A.

    Reading stops at the first module with an update. Initialisations that are not zero (PiSSA, OLoRA, ...) cannot be
    told from training.
    """
    read = tensors.tensor if isinstance(tensors, Checkpoint) else tensors.__getitem__
    # In float32, for narrow floats have no comparison of their own.
    return all(not read(p.b.name).float().any() or not read(p.a.name).float().any() for p in adapter.pairs)


def _is_scalar(spec: TensorSpec) -> bool:
    return spec.numel == 1 and spec.dtype in ("F64", "F32", "F16", "BF16", "I64", "I32")


def _parse(name: str) -> _Part | None:
    name = _WRAPPERS.sub("", name)
    path = name.removeprefix(PEFT_ROOT)
    for naming, pattern in _NAMES:
        if match := pattern.fullmatch(path):
            module, projection = match["module"], match.groupdict().get("projection")
            if projection:
                # An attention processor's layers stand for the attention's own projections.
                module = f"{module}.{'to_out.0' if projection == 'to_out' else projection}"
            component = _component(module) if path == name else ""
            return _Part("diffusers" if naming == "peft" and component else naming, component, module, match["part"])
    return None


def _component(module: str) -> str:
    match = _COMPONENT.match(module) or FLAT_COMPONENT.match(module)
    return match[1] if match else ""


def _problem(module: str, roles: Mapping[str, TensorSpec]) -> str | None:
    """Says why the factors of a module are no pair, or None if they are."""
    if missing := {"a", "b"} - roles.keys():
        return f"has no {missing.pop().upper()}"
    if extra := roles.keys() - {"a", "b", "bias", "magnitude_vector", "alpha"}:
        return f"has {shown(roles[min(extra)].name)} beside its factors: its update is not B A"
    if _STACKED.search(module):
        return "holds the factors of several parameters or experts, which B A would mix"
    a, b = roles["a"], roles["b"]
    for spec in (a, b):
        if not spec.dtype.startswith(("F", "BF")) or not spec.numel or len(spec.shape) < 2:
            return f"has a factor of shape {spec.shape} and dtype {spec.dtype}"
    groups, rest = divmod(a.shape[0], b.shape[1])
    grouped = len(b.shape) > 2 and groups > 1 and not b.shape[0] % groups
    if rest or math.prod(b.shape[2:]) != 1 or not (groups == 1 or grouped):
        return f"has factors A {a.shape} and B {b.shape}, which have no product"
    return None


def _pair(part: _Part, roles: Mapping[str, TensorSpec]) -> LoraPair:
    kind: Literal["linear", "conv", "embedding"] = "conv" if len(roles["a"].shape) > 2 else "linear"
    return LoraPair(
        module=part.module,
        naming=part.naming,
        component=part.component,
        kind="embedding" if part.part == "embedding_A" else kind,
        a=roles["a"],
        b=roles["b"],
        bias=roles["bias"].name if "bias" in roles else None,
        magnitude=roles["magnitude_vector"].name if "magnitude_vector" in roles else None,
        alpha=roles["alpha"].name if "alpha" in roles else None,
    )


def _scaling_of(
    pairs: tuple[LoraPair, ...],
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
    given: float | None,
    findings: list[tuple[str, str]],
    notes: list[str],
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns alpha and scaling by module for an adapter without a config."""
    if any(pair.alpha for pair in pairs):
        # Kohya's own rule: a module without the scalar has the rank.
        values = {p.module: alphas.get(p.alpha, math.nan) if p.alpha else float(p.rank) for p in pairs}
        broken = [pair.module for pair in pairs if not math.isfinite(values[pair.module])]
        findings += [("has an alpha that is no finite number", module) for module in broken]
        return values, {pair.module: values[pair.module] / pair.rank for pair in pairs}
    alpha, scaling = ({pair.module: math.nan for pair in pairs} for _ in range(2))
    configs = metadata_configs(metadata)
    notes += [f"alpha is not read: {problem}" for problem in configs.values() if isinstance(problem, str)]
    for component, config in configs.items():
        if isinstance(config, str):
            continue
        # A network's own statement goes before one for all of them; kohya's convolutions have an alpha of their own.
        own = tuple(
            pair
            for pair in pairs
            if component == _stated_for(pair, configs) and not (pair.kind == "conv" and "conv_alpha" in str(metadata))
        )
        contradicted = len(findings)
        alphas_of, scaling_of = _alpha_and_scaling(own, config, findings, component)
        wrong = {module for _, module in findings[contradicted:]}
        alpha |= {module: value for module, value in alphas_of.items() if module not in wrong}
        scaling |= {module: value for module, value in scaling_of.items() if module not in wrong}
    unknown = [pair for pair in pairs if not math.isfinite(scaling[pair.module])]
    if unknown and given is not None:
        alpha |= {pair.module: given * pair.rank for pair in unknown}
        scaling |= {pair.module: given for pair in unknown}
        notes.append(f"nothing states the scaling of {len(unknown)} modules: it is taken to be {given:g}")
    elif unknown:
        notes.append(f"no config, tensor or metadata states alpha of {len(unknown)} modules: their scaling is unknown")
    return alpha, scaling


def _stated_for(pair: LoraPair, configs: Mapping[str, object]) -> str:
    """Returns which of the networks with a statement a pair belongs to."""
    named = [name for name in configs if name and (pair.module.startswith(f"{name}.") or pair.component == name)]
    if named or "" in configs:
        return max(named, key=len) if named else ""
    return next(iter(configs)) if len(configs) == 1 and not pair.component else ""


def _alpha_and_scaling(
    pairs: tuple[LoraPair, ...], config: LoraConfig, findings: list[tuple[str, str]], component: str = ""
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns alpha and scaling by module, and adds to ``findings`` where ranks are others than the config says."""
    paths = {pair.module: pair.module.removeprefix(f"{component or pair.component}.") for pair in pairs}
    ranks, refused_ranks = match_patterns(config.rank_pattern, list(paths.values()))
    alphas, refused_alphas = match_patterns(config.alpha_pattern, list(paths.values()))
    findings += [("is a pattern that could take too long to evaluate", text) for text in refused_ranks + refused_alphas]
    alpha = {module: float(alphas.get(path, config.alpha)) for module, path in paths.items()}
    scaling = {}
    for pair in pairs:
        rank = ranks.get(paths[pair.module], pair.rank if config.rank is None else config.rank)
        scaling[pair.module] = alpha[pair.module] / (math.sqrt(rank) if config.rslora else rank)
        # PEFT before 0.3 gave every part of a merged projection the whole rank.
        if pair.rank not in (rank, rank * pair.groups):
            findings.append((f"has rank {pair.rank} where the config says {rank:g}", pair.module))
    return alpha, scaling


def _unlike_config(pairs: tuple[LoraPair, ...], config: LoraConfig) -> list[tuple[str, str]]:
    found = []
    for pair in pairs:
        if any(name != expected for name, expected in peft_names(pair, pair.module).items()):
            found.append((f"is stored as {shown(pair.a.name)}, a name that PEFT does not look for", pair.module))
    targets = None if config.targets is None else set(config.targets)
    for pair in pairs:
        if config.dora != (pair.magnitude is not None):
            found.append((f"has {'no' if config.dora else 'a'} magnitude where use_dora is {config.dora}", pair.module))
        if config.bias != (pair.bias is not None) and pair.kind != "embedding":
            found.append((f"has {'no' if config.bias else 'a'} bias where lora_bias is {config.bias}", pair.module))
        if targets is not None and targets.isdisjoint(name_ends(pair.module)):
            found.append(("is not among target_modules", pair.module))
    return found


def _absent(pairs: tuple[LoraPair, ...], config: LoraConfig, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Modules that the config names and no tensor belongs to; PEFT takes them as the base model has them."""
    ends = {end for pair in pairs for end in name_ends(pair.module)}
    targets = [target for target in config.targets or () if target not in ends]
    paths = [name.removeprefix(PEFT_ROOT) for name in specs]
    saved = [module for module in config.saved if not any(belongs_to(path, (module,)) for path in paths)]
    return [
        *(f"target_modules names {shown(module)}, but it has no factors" for module in targets),
        *(f"modules_to_save names {shown(module)}, but it has no tensors" for module in saved),
    ]


def _grouped(findings: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """One line for each kind of finding, however many modules have it."""
    modules: dict[str, list[str]] = defaultdict(list)
    for what, module in findings:
        modules[what].append(module)
    more = {what: f" (and {len(names) - 1} more)" if len(names) > 1 else "" for what, names in modules.items()}
    return tuple(f"{shown(names[0])}{more[what]} {what}" for what, names in modules.items())
