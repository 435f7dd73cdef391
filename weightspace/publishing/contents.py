"""What of a folder is published, and what its card can say.

A folder is a zoo (``zoo.json``), a model that this library registers with transformers (a `save_pretrained` folder), or
plain models (safetensors files, with ``config.json`` and ``metadata.jsonl`` where there are any). What is published is
an allow-list: safetensors weights, parquet, and the small text files that belong to them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from weightspace.cards.facts import EncoderFacts, Facts, ModelFacts, ModelsFacts, TrainingZoo
from weightspace.cards.record import CARD, RECORD, known_facts
from weightspace.cards.rendering import count
from weightspace.errors import WeightspaceError
from weightspace.io.catalogue import INDEX
from weightspace.io.checkpoint import Checkpoint, find_checkpoints, open_in
from weightspace.io.folders import LocalFolder
from weightspace.io.header import header_of, load_json_object, shown
from weightspace.io.hub import HubOptions, RepoType
from weightspace.io.locations import is_repo_id
from weightspace.io.pickles import PICKLES
from weightspace.io.reader import open_file
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.facts import architecture_name, obstacle, zoo_facts
from weightspace.zoo.remote import open_zoo_repo
from weightspace.zoo.storage import COPY_OF, read_state
from weightspace.zoo.transfer import copy_zoo, without_folders

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

_INPUTS = ("zoo", "encoder", "autoencoder", "joint")
_TRAINING, _METADATA = "training.json", "metadata.jsonl"
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "CITATION.cff")
_ENCODER = (*_WEIGHTS, *_TEXTS, "config.json", "preprocessor_config.json", "processor_config.json")
_MODELS = (
    *(*_ENCODER, "adapter_config.json", "generation_config.json", _METADATA, "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
)
_REASONS = {
    "checkpoints": "state of the training",
    "logs": "log of the training",
    "history.jsonl": "log of the training",
    "ledger.jsonl": "only needed to go on writing",
}
_STATE, _SHARDS = ("zoo.json", "skips.jsonl"), ("index", "weights")
_LISTED_MODELS = 50
_NO_LICENCE = "no licence is named, and without one nobody may use it; name one with --license"


Kind = Literal["encoder", "zoo", "models"]


@dataclass(frozen=True)
class PushSettings:
    """How something is published.

    Attributes:
        private: make a new repository private.
        revision: branch to push to, made if it is not there; the default branch if None.
        create_pr: open a pull request instead of changing a branch.
        licence: licence id of what is published, as the Hub writes it.
        zoo: ``org/name`` where the zoo that an encoder was trained on lies on the Hub.
        replace_card: replace a card that people have changed outside of its notes.
        message: first line of the commit.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    licence: str | None = None
    zoo: str | None = None
    replace_card: bool = False
    message: str | None = None


@dataclass(frozen=True)
class PlannedFile:
    """A file to be published: its path in the repository, its bytes or where they lie, and their number."""

    path: str
    content: Path | bytes
    size: int


@dataclass(frozen=True)
class Contents:
    """What of a folder is published.

    Attributes:
        kind: what the folder holds.
        facts: what the card says.
        files: without the card and its facts.
        left_out: ``(file, reason)`` of what stays.
        notices: what the publisher should know, one sentence each.
    """

    kind: Kind
    facts: Facts
    files: tuple[PlannedFile, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def repo_type(self) -> RepoType:
        """The type of repository that it belongs in."""
        return "dataset" if self.kind == "zoo" else "model"

    @property
    def superseded(self) -> tuple[str, ...]:
        """Patterns of the files of a repository that are removed where the new files do not replace them."""
        return tuple(f"{kind}/*.parquet" for kind in _SHARDS) if self.kind == "zoo" else _WEIGHTS


def gather(folder: Path, repo_id: str, settings: PushSettings, options: HubOptions, workspace: Path) -> Contents:
    """Finds out what a folder holds, and what of it is published.

    Args:
        folder: of an encoder, a zoo or models.
        repo_id: where it goes.
        settings: how it is published.
        options: how the Hub is reached.
        workspace: an empty folder for a copy of a zoo that may not leave this machine as it is.

    Raises:
        WeightspaceError: there is nothing to publish, or it is unfinished, damaged or may not be published.
    """
    kind = _kind_of(folder)
    if kind == "zoo":
        return _zoo_contents(folder, repo_id, settings, workspace)
    return (_encoder_contents if kind == "encoder" else _models_contents)(folder, repo_id, settings, options)


def _kind_of(folder: Path) -> Kind:
    if not folder.is_dir():
        raise WeightspaceError(f"{folder}: no such folder; give the folder of an encoder, a zoo or models")
    if (folder / "zoo.json").is_file():
        return "zoo"
    training = LocalFolder(folder).read_json(_TRAINING)
    if training is not None and training.get("complete") is not True:
        raise WeightspaceError(f"{folder}: its training is not finished; run the command that trains it again")
    if not any(folder.rglob("*.safetensors")):
        pickled = next((path for path in sorted(folder.rglob("*")) if path.suffix in PICKLES), None)
        found = f"only pickles such as {pickled.name!r}" if pickled else "no zoo.json and no safetensors file"
        raise WeightspaceError(f"{folder}: nothing to publish ({found}); give the folder of an encoder, zoo or models")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = (LocalFolder(folder).read_json("config.json") or {}).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return "models"
    return "encoder" if CONFIG_MAPPING[model_type].__module__.startswith("weightspace.") else "models"


def _encoder_contents(folder: Path, repo_id: str, settings: PushSettings, options: HubOptions) -> Contents:
    """Gathers a model that this library registers with transformers."""
    local = LocalFolder(folder)
    name = next((name for name in ("model.safetensors", f"model{INDEX}") if local.has(name)), None)
    if name is None:
        raise WeightspaceError(f"{folder}: no model.safetensors beside config.json; save the model again")
    checkpoint = open_in(local, name)
    training = local.read_json(_TRAINING)
    facts = known_facts(folder)
    if not isinstance(facts, EncoderFacts):
        facts = _encoder_facts(checkpoint, training or {})
    zoo = facts.zoo if settings.zoo is None else _zoo_on_hub(facts.zoo, settings.zoo, options)
    facts = replace(facts, name=_name(repo_id), location=repo_id, licence=settings.licence or facts.licence, zoo=zoo)
    files, left_out = _selected(folder, folder.iterdir(), _ENCODER)
    if training is not None:
        files.append(text_file(_TRAINING, json.dumps(_without_folders(training), indent=2, sort_keys=True) + "\n"))
    notices = [] if facts.licence else [_NO_LICENCE]
    if not facts.measurements:
        noun = "prior" if facts.samples else "encoder"
        notices.append(f"nothing was measured of this {noun}, and its card says so")
    return Contents("encoder", facts, tuple(files), tuple(left_out), tuple(notices))


def _encoder_facts(checkpoint: Checkpoint, training: Mapping[str, Any]) -> EncoderFacts:
    zoo = str(training.get("zoo") or "")
    return EncoderFacts(
        name="",
        parameters=sum(spec.numel for spec in checkpoint.specs.values()),
        zoo=TrainingZoo(Path(zoo).name, digest=str(training["zoo_digest"])) if "zoo_digest" in training else None,
        config=checkpoint.config or {},
        training=training.get("settings") or {},
    )


def _zoo_on_hub(zoo: TrainingZoo | None, location: str, options: HubOptions) -> TrainingZoo:
    """Links the zoo that an encoder was trained on, after a look at whether it is that one."""
    repo = open_zoo_repo(location, None, options)
    state = read_state(repo.local_path("zoo.json").parent)
    assert state is not None
    if zoo is None or zoo.digest not in (state["digest"], state["settings"].get(COPY_OF)):
        raise WeightspaceError(
            f"{repo}: the encoder was trained on a zoo of digest {zoo.digest if zoo else 'unknown'}, not on this one "
            f"({state['digest']}); name another with --zoo"
        )
    return replace(zoo, hub_id=repo.repo_id, revision=repo.sha)


def _without_folders(training: Mapping[str, Any]) -> dict[str, Any]:
    """The training record without the folders of this machine that the zoo and other inputs lie in."""

    def published(location: str) -> str:
        return location if is_repo_id(location.partition("@")[0]) and "@" in location else Path(location).name

    return {name: published(str(value)) if name in _INPUTS and value else value for name, value in training.items()}


def _zoo_contents(folder: Path, repo_id: str, settings: PushSettings, workspace: Path) -> Contents:
    """Gathers a zoo; one that may not leave this machine as it is, is copied into ``workspace`` first."""
    zoo = load_zoo(folder)
    obstacles = _obstacles(zoo)
    reasons = Counter(reason for reason, _ in obstacles.values())
    examples = {reason: ref for reason, ref in reversed(obstacles.values())}
    if len(obstacles) == len(zoo):
        reason = next(iter(examples))
        raise WeightspaceError(
            f"{folder}: none of its models may be published ({reason}, e.g. {shown(examples[reason])}); "
            "state licences in the metadata of your own"
        )
    moved = sum(without_folders(entry.ref) != entry.ref for entry in zoo.entries())
    published = zoo
    if obstacles or moved:
        kept = [row for row in range(len(zoo)) if row not in obstacles]
        described = {**zoo.settings, COPY_OF: zoo.digest} if obstacles else zoo.settings
        published = copy_zoo(zoo, kept, workspace / "zoo", settings=described)
    facts = zoo_facts(published, name=_name(repo_id), location=repo_id, licence=settings.licence)
    notices = [f"{count(n, 'model')} left out: {why}, e.g. {shown(examples[why])}" for why, n in reasons.items()]
    if moved:
        notices.append(f"of where {count(moved, 'model')} lay on this machine, only folder and file are published")
    if settings.licence is None and any(one.own for one in facts.licences):
        notices.append(_NO_LICENCE)
    files, left_out = _selected(folder, (path for path in folder.iterdir() if path.name not in _SHARDS), _TEXTS)
    left_out = [(name, reason) for name, reason in left_out if name not in _STATE]
    state = [name for name in _STATE if (published.path / name).is_file()]
    files += [_planned(published.path, name) for name in (*state, *_shard_files(published))]
    return Contents("zoo", replace(facts, left_out=dict(reasons)), tuple(files), tuple(left_out), tuple(notices))


def _obstacles(zoo: Zoo) -> dict[int, tuple[str, str]]:
    """The rows that may not be published, with the reason and the source; weights left on the Hub are not copied."""
    if zoo.reference:
        return {}
    found = ((row, obstacle(one.ref.location, one.licence), str(one.ref)) for row, one in enumerate(zoo.entries()))
    return {row: (reason, ref) for row, reason, ref in found if reason is not None}


def _shard_files(zoo: Zoo) -> list[str]:
    state = read_state(zoo.path)
    assert state is not None
    kinds = _SHARDS[:1] if zoo.reference else _SHARDS
    return [f"{kind}/{shard}.parquet" for kind in kinds for shard in state["shards"]]


def _models_contents(folder: Path, repo_id: str, settings: PushSettings, options: HubOptions) -> Contents:
    """Gathers safetensors files of any models."""
    local, names = find_checkpoints(folder)
    opened = {name: open_in(local, name) for name in names}
    rows = _metadata(folder)
    single = len(names) == 1
    described = [_model_facts("" if single else name, one, rows.get(name, {})) for name, one in opened.items()]
    row, checkpoint = (rows.get(names[0], {}), opened[names[0]]) if single else ({}, None)
    config = (checkpoint.config if checkpoint else None) or {}
    adapter = (checkpoint.adapter_config if checkpoint else None) or {}
    bases = (row.get("base_model"), adapter.get("base_model_name_or_path"))
    facts = ModelsFacts(
        name=_name(repo_id),
        location=repo_id,
        licence=settings.licence or _text(row.get("licence") or row.get("license")),
        base_model=next((base for base in bases if isinstance(base, str) and is_repo_id(base)), None),
        models=tuple(described[:_LISTED_MODELS]),
        others=len(described[_LISTED_MODELS:]),
        config=config,
        sampling=known.sampling if isinstance(known := known_facts(folder), ModelsFacts) else None,
    )
    files, left_out = _selected(folder, folder.rglob("*"), _MODELS)
    notices = [] if facts.licence else [_NO_LICENCE]
    if "auto_map" in config:
        notices.append("config.json names code (auto_map), and code is not published")
    return Contents("models", facts, tuple(files), tuple(left_out), tuple(notices))


def _model_facts(name: str, checkpoint: Checkpoint, row: Mapping[str, Any]) -> ModelFacts:
    dtypes: Counter[str] = Counter()
    for spec in checkpoint.specs.values():
        dtypes[spec.dtype] += spec.numel
    return ModelFacts(
        file=name,
        architecture=architecture_name(checkpoint.config or {}),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        dataset=_text(row.get("dataset")),
        results={
            key: float(value)
            for key, value in row.items()
            if key.endswith(("_accuracy", "_loss")) and isinstance(value, int | float) and not isinstance(value, bool)
        },
    )


def _metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of ``metadata.jsonl`` by file; empty where there is none."""
    path = folder / _METADATA
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = [load_json_object(line, where=f"{path}: line {number}") for number, line in enumerate(lines, 1) if line]
    return {str(row.get("file")): row for row in rows}


def _selected(
    folder: Path, paths: Iterable[Path], patterns: Iterable[str]
) -> tuple[list[PlannedFile], list[tuple[str, str]]]:
    """Chooses the files that fit one of the patterns, and says of the others why they stay; hidden ones just stay.

    Raises:
        CheckpointError: a file is called safetensors and is none.
    """
    files: list[PlannedFile] = []
    left_out: dict[str, str] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        parts = PurePosixPath(name).parts
        if name in (CARD, RECORD, _TRAINING) or any(part.startswith(".") for part in parts):
            continue
        if parts[0] in _REASONS:
            left_out[parts[0]] = _REASONS[parts[0]]
        elif path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns):
            if path.suffix == ".safetensors":
                header_of(open_file(path))  # refuses what only bears the name
            files.append(_planned(folder, name))
        elif path.suffix in PICKLES:
            left_out[name] = "a pickle; only safetensors are published"
        elif path.is_file():
            left_out[name] = "not among the kinds of files that are published"
    return files, list(left_out.items())


def _planned(folder: Path, name: str) -> PlannedFile:
    path = folder / name
    return PlannedFile(name, path, path.stat().st_size)


def text_file(name: str, content: str) -> PlannedFile:
    """Plans a file that is written for the push."""
    return PlannedFile(name, content.encode(), len(content.encode()))


def _name(repo_id: str) -> str:
    return repo_id.partition("/")[2]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None
