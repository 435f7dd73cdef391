"""Fetching one checkpoint of a crawl: its weights, or why it has none that can be used. Nothing is written here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from weightspace.crawl.card_facts import (
    MAX_CARD_BYTES,
    TrainerFacts,
    card_results,
    trainer_facts,
    training_hyperparameters,
)
from weightspace.crawl.plan import CARD, TRAINER_STATE, CrawlSettings, PlannedRepo
from weightspace.errors import HubError, WeightspaceError, ZooError
from weightspace.io.adapters import Adapter, is_untrained, read_adapter
from weightspace.io.checkpoint import ADAPTER_CONFIG, INDEX, Checkpoint, open_in
from weightspace.io.folders import Folder
from weightspace.io.header import byte_count, header_of, parse_header, shown
from weightspace.io.hub import HubEntry, HubOptions, is_transient
from weightspace.io.hub_repo import HubFile, HubRepo
from weightspace.io.reader import ByteSource, MemorySource
from weightspace.schema import ZooEntry
from weightspace.zoo.content import check_finite, content_digest
from weightspace.zoo.storage import MAX_BLOB_BYTES, header_digest
from weightspace.zoo.writer import RemoteWeights

T = TypeVar("T")

_AT_ONCE = 8 * 2**20
"""Largest file that is read whole before its header is looked at, which saves a request."""

_MOST_MISMATCHES = 10


@dataclass(frozen=True)
class Fetched:
    """What became of one checkpoint of a plan; of the first three one is there, or none once it is in the spool.

    Attributes:
        model: what is known of it, and its weights.
        skipped: ``(what, reason)`` why it is no model.
        unreachable: why nothing is known yet: the Hub could not be asked.
        bytes: how many came over the network.
    """

    model: tuple[ZooEntry, bytes | RemoteWeights] | None = None
    skipped: tuple[str, str] | None = None
    unreachable: str | None = None
    bytes: int = 0


class Room:
    """Bounds the bytes that are held in memory at once, over all threads."""

    def __init__(self, limit: int) -> None:
        """Lets in up to ``limit`` bytes, or whatever comes alone."""
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def for_bytes(self, size: int) -> Iterator[None]:
        """Waits until there is room, and takes it for the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


def fetch_model(
    repo: PlannedRepo,
    path: str,
    settings: CrawlSettings,
    options: HubOptions,
    room: Room,
    keep: Callable[[Fetched], T],
) -> T:
    """Fetches a checkpoint of a repository at its commit. Whatever is wrong with it becomes a reason.

    Args:
        repo: from a plan.
        path: one of its checkpoints.
        settings: of the crawl.
        options: how the Hub is reached.
        room: for the weights, while they are worked on.
        keep: takes what was fetched, while there is room for it.

    Returns:
        What ``keep`` returns.
    """
    hub = HubRepo(repo.repo_id, repo.sha, [HubEntry(file) for file in repo.files], options)
    reason = None
    with ExitStack() as stack:
        try:
            loaded = stack.enter_context(_loaded(hub, path, settings, room))
            entry = _entry(hub, repo, path, loaded)
        except HubError as error:
            if is_transient(error):
                return keep(Fetched(unreachable=str(error), bytes=hub.fetched_bytes))
            reason = str(error)
        except WeightspaceError as error:
            reason = str(error)
        except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
            # What other people's files can do to code is not all foreseen; it must not end the crawl.
            reason = f"{type(error).__name__}: {shown(str(error))}"
        else:
            return keep(Fetched(model=(entry, loaded.weights), bytes=hub.fetched_bytes))
    return keep(Fetched(skipped=(f"{repo.repo_id}@{repo.sha}:{path}", reason), bytes=hub.fetched_bytes))


def _entry(hub: HubRepo, repo: PlannedRepo, path: str, loaded: _Loaded) -> ZooEntry:
    folder, facts, checkpoint = hub, repo.facts, loaded.checkpoint
    state = folder.read_json(_beside(path, TRAINER_STATE))
    trainer = trainer_facts(state) if state is not None else TrainerFacts({}, {}, ())
    hyperparameters: dict[str, Any] = {} if facts.library is None else {"library": facts.library}
    if facts.trained_by_trainer and CARD in repo.files:
        hyperparameters |= _card_settings(hub.repo_id, hub.sha, hub.options)
    hyperparameters |= trainer.hyperparameters
    bases, config = facts.base_models, checkpoint.config
    if path in repo.adapters:
        config = checkpoint.adapter_config if config is None else config
        adapter = read_adapter(checkpoint, checkpoint.adapter_config)
        hyperparameters |= _adapter_settings(adapter, checkpoint)
        bases = bases or ((adapter.base_model,) if adapter.base_model else ())
    # With several checkpoints, the card does not tell which of them it speaks of.
    results = card_results(facts.metrics) if len(repo.checkpoints) == 1 else {}
    return ZooEntry(
        model_id=repo.model_id(path),
        run_id=repo.repo_id,
        ref=folder.ref(path),
        dataset=facts.datasets[0] if len(facts.datasets) == 1 else None,
        results={**trainer.results, **results},
        hyperparameters=hyperparameters,
        config=config,
        licence=facts.licence,
        base_model=bases[0] if bases else None,
        lineage=repo.lineage or bases,
        task=facts.task,
        datasets=facts.datasets,
        metrics=facts.metrics + trainer.metrics,
        content=loaded.content,
    )


@dataclass(frozen=True)
class _Loaded:
    """A checked checkpoint, what the zoo keeps of its weights, and what names their content."""

    checkpoint: Checkpoint
    weights: bytes | RemoteWeights
    content: str | None


@contextmanager
def _loaded(folder: Folder, path: str, settings: CrawlSettings, room: Room) -> Iterator[_Loaded]:
    """Opens and checks a checkpoint, and makes room for its weights while it is in use."""
    sharded = path.endswith(INDEX)
    files: Sequence[ByteSource] = () if sharded else (folder.open(path),)
    if sharded or settings.reference or files[0].size > _AT_ONCE:
        remote = open_in(folder, path)
        _check(remote, settings)
        files = remote.sources
        if settings.reference:
            weights = _weights_of(remote, sharded)
            _check_size(weights.size)
            yield _Loaded(remote, weights, _etag(files))
            return
    size = sum(file.size for file in files)
    _check_size(size)
    with room.for_bytes(2 * size):
        blob = _joined(files) if sharded else bytes(_read_whole(files[0]))
        config, adapter_config = (folder.read_json(_beside(path, name)) for name in ("config.json", ADAPTER_CONFIG))
        source = MemorySource(blob, where=path)
        header = header_of(source)
        checkpoint = Checkpoint(path, [(source, header)], config, adapter_config=adapter_config)
        _check(checkpoint, settings)
        check_finite(blob, header)
        yield _Loaded(checkpoint, blob, content_digest(blob, header))


def _check(checkpoint: Checkpoint, settings: CrawlSettings) -> None:
    """Refuses what is no model, or not one that was asked for."""
    checkpoint.ensure_weights()
    if not any(spec.dtype.startswith(("F", "BF")) and spec.numel for spec in checkpoint.specs.values()):
        raise ZooError(f"none of its {len(checkpoint.specs)} tensors has floating point entries")
    count = sum(spec.numel for spec in checkpoint.specs.values())
    if settings.max_params is not None and count > settings.max_params:
        raise ZooError(f"{count:,} parameters are above the limit of {settings.max_params:,} that was asked for")


def _check_size(size: int) -> None:
    if size > MAX_BLOB_BYTES:
        raise ZooError(f"{size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")


def _joined(files: Sequence[ByteSource]) -> bytes:
    """Reads the parts of a sharded checkpoint, each checked against its hash, as the bytes of one file."""
    read = [MemorySource(_read_whole(file), where=file.where) for file in files]
    return Checkpoint("the checkpoint", [(file, header_of(file)) for file in read]).to_bytes()


def _read_whole(file: ByteSource) -> memoryview:
    try:
        return file.read(0, file.size)
    except HubError as error:
        if error.__cause__ is not None:
            raise
        return file.read(0, file.size)  # other bytes than listed came: once can be chance


def _weights_of(remote: Checkpoint, sharded: bool) -> RemoteWeights:
    """Returns what the zoo keeps of weights that stay on the Hub; those of shards count as one file."""
    if sharded:
        first = remote.header_bytes()
        size = len(first) + sum(byte_count(spec, remote.where) for spec in remote.specs.values())
        return RemoteWeights(header_digest(first, parse_header(first, file_size=size, where=remote.where)), size)
    (file,) = remote.sources
    header = header_of(file)
    return RemoteWeights(header_digest(file.read(0, header.size), header), file.size)


def _etag(files: Sequence[ByteSource]) -> str | None:
    """What names the content of files on the Hub."""
    tags = [file.etag for file in files if isinstance(file, HubFile)]
    if None in tags or len(tags) == 1:
        return tags[0] if len(tags) == 1 else None
    return hashlib.sha256("\n".join(map(str, tags)).encode()).hexdigest()


def _adapter_settings(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells adapters apart, under names that no trainer uses."""
    found: dict[str, Any] = {
        "adapter_rank": max(pair.rank for pair in adapter.pairs),
        "adapter_scaling": max(adapter.scaling.values()),
        "adapter_untrained": is_untrained(adapter, checkpoint),
    }
    if adapter.mismatches:
        found["adapter_mismatches"] = list(adapter.mismatches[:_MOST_MISMATCHES])
    return found


@lru_cache(maxsize=64)
def _card_settings(repo_id: str, sha: str, options: HubOptions) -> Mapping[str, float | str]:
    """Hyper-parameters in the text of a card; checkpoints of one repository share it."""
    card = HubRepo(repo_id, sha, [HubEntry(CARD)], options).open(CARD)
    if card.size > MAX_CARD_BYTES:
        raise ZooError(f"its card has {card.size} bytes; the limit is {MAX_CARD_BYTES}")
    return training_hyperparameters(bytes(card.read(0, card.size)).decode("utf-8", "replace"))


def _beside(path: str, name: str) -> str:
    parent = path.rpartition("/")[0]
    return f"{parent}/{name}" if parent else name
