"""Fetching one checkpoint of a crawl: its weights and metadata, or why it cannot be used. Nothing is written here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from weightspace.crawl.card_facts import (
    MAX_CARD_BYTES,
    TrainerFacts,
    card_results,
    card_text_facts,
    column_of,
    trainer_facts,
)
from weightspace.crawl.plan import CARD, TRAINER_STATE, CrawlSettings, Item
from weightspace.crawl.spool import Fetched
from weightspace.errors import UNFORESEEN, HubError, WeightspaceError, ZooError
from weightspace.io.adapters import is_untrained, read_adapter
from weightspace.io.catalogue import INDEX
from weightspace.io.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    open_in,
)
from weightspace.io.folders import Folder
from weightspace.io.header import byte_count, header_of, parse_header, shown
from weightspace.io.hub import HubEntry, HubOptions, is_transient
from weightspace.io.hub_repo import HubFile, HubRepo
from weightspace.io.reader import ByteSource, MemorySource
from weightspace.schema import ZooEntry
from weightspace.zoo.storage import MAX_BLOB_BYTES, check_entry, check_finite, content_digest, header_digest
from weightspace.zoo.writer import RemoteWeights, Skip

T = TypeVar("T")

_AT_ONCE = 8 * 2**20
"""Largest file that is read whole before its header is looked at, which saves a request."""

_MOST_MISMATCHES = 10
_NOTHING = TrainerFacts({}, {}, ())


class Room:
    """Bounds the bytes that are held in memory at once, over all threads."""

    def __init__(self, limit: int) -> None:
        """Admits up to ``limit`` bytes, or a single larger piece."""
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
    item: Item, settings: CrawlSettings, options: HubOptions, room: Room, keep: Callable[[Fetched], T]
) -> T:
    """Fetches a checkpoint at the commit of its repository. Whatever is wrong with it becomes a reason.

    Args:
        item: of the plan.
        settings: of the crawl.
        options: how the Hub is reached.
        room: for the weights, while they are in use.
        keep: takes what was fetched, while there is room for it.

    Returns:
        What ``keep`` returns.
    """
    repo = item.repo
    hub = HubRepo(repo.repo_id, repo.sha, [HubEntry(file) for file in repo.files], options)
    with ExitStack() as stack:
        try:
            loaded = stack.enter_context(_loaded(hub, item.path, settings, room))
            model = _entry(hub, item, loaded), loaded.weights
        except WeightspaceError as error:
            if isinstance(error, HubError) and is_transient(error):
                return keep(Fetched(unreachable=str(error), bytes=hub.fetched_bytes))
            reason = str(error)
        except UNFORESEEN as error:
            reason = f"{type(error).__name__}: {shown(str(error))}"
        else:
            return keep(Fetched(model, bytes=hub.fetched_bytes))
    return keep(Fetched(Skip(f"{repo.repo_id}@{repo.sha}:{item.path}", reason), bytes=hub.fetched_bytes))


def _entry(hub: HubRepo, item: Item, loaded: _Loaded) -> ZooEntry:
    repo, path = item.repo, item.path
    facts, checkpoint = repo.facts, loaded.checkpoint
    notes = list(checkpoint.notes)
    state = hub.read_side_file(_beside(path, TRAINER_STATE), notes)
    trainer = trainer_facts(state) if state is not None else _NOTHING
    has_text = facts.trained_by_trainer and CARD in repo.files
    text = _card_text(hub.repo_id, hub.sha, hub.options) if has_text else _NOTHING
    hyperparameters: dict[str, Any] = {} if facts.library is None else {"library": facts.library}
    hyperparameters |= {**text.hyperparameters, **trainer.hyperparameters}
    bases, config = facts.base_models, checkpoint.config
    if path in repo.adapters:
        config = checkpoint.adapter_config if config is None else config
        adapter = read_adapter(checkpoint, checkpoint.adapter_config)
        # These names are used by no trainer.
        hyperparameters["adapter_rank"] = max(pair.rank for pair in adapter.pairs)
        if not adapter.unknown:
            hyperparameters["adapter_scaling"] = max(adapter.scaling.values())
        hyperparameters["adapter_untrained"] = is_untrained(adapter, checkpoint)
        if adapter.mismatches:
            hyperparameters["adapter_mismatches"] = list(adapter.mismatches[:_MOST_MISMATCHES])
        bases = bases or ((adapter.base_model,) if adapter.base_model else ())
    if notes:
        hyperparameters["notes"] = notes
    results, metrics = dict(trainer.results), facts.metrics
    if len(repo.checkpoints) == 1:  # with several, the card does not say which one it describes
        results |= {**text.results, **card_results(facts.metrics)}
        stated = {column_of(metric.name) for metric in metrics}
        metrics += tuple(metric for metric in text.metrics if column_of(metric.name) not in stated)
    return ZooEntry(
        model_id=repo.model_id(path),
        run_id=repo.repo_id,
        ref=hub.ref(path),
        dataset=facts.datasets[0] if len(facts.datasets) == 1 else None,
        results=results,
        hyperparameters=hyperparameters,
        config=config,
        licence=facts.licence,
        base_model=bases[0] if bases else None,
        lineage=repo.lineage or bases,
        task=facts.task,
        datasets=facts.datasets,
        metrics=metrics + trainer.metrics,
        content=loaded.content,
    )


@dataclass(frozen=True)
class _Loaded:
    """A checked checkpoint, its weights as the zoo stores them, and the digest of their content."""

    checkpoint: Checkpoint
    weights: bytes | RemoteWeights
    content: str | None


@contextmanager
def _loaded(folder: Folder, path: str, settings: CrawlSettings, room: Room) -> Iterator[_Loaded]:
    """Opens and checks a checkpoint, and reserves room for its weights while it is in use."""
    sharded = path.endswith(INDEX)
    files: Sequence[ByteSource] = () if sharded else (folder.open(path),)
    if sharded or settings.reference or files[0].size > _AT_ONCE:
        remote = open_in(folder, path)
        _check(remote, settings)
        files = remote.sources
        if settings.reference:
            weights = _remote_weights(remote, sharded)
            _check_size(weights.size)
            tags = [file.etag for file in files if isinstance(file, HubFile)]
            content = tags[0] if len(tags) == 1 else None
            if len(tags) > 1 and None not in tags:
                content = hashlib.sha256("\n".join(map(str, tags)).encode()).hexdigest()
            yield _Loaded(remote, weights, content)
            return
    size = sum(file.size for file in files)
    _check_size(size)
    with room.for_bytes(2 * size):
        # The parts of a sharded checkpoint are each checked against their hash, and become one file.
        parts = [MemorySource(_read_whole(file), where=file.where) for file in files]
        joined = Checkpoint("the checkpoint", [(part, header_of(part)) for part in parts]) if sharded else None
        blob = bytes(parts[0].read(0, size)) if joined is None else joined.to_bytes()
        notes: list[str] = []
        config, adapter_config = (
            folder.read_side_file(_beside(path, name), notes) for name in ("config.json", ADAPTER_CONFIG)
        )
        source = MemorySource(blob, where=path)
        header = header_of(source)
        checkpoint = Checkpoint(path, [(source, header)], config, adapter_config=adapter_config, notes=notes)
        _check(checkpoint, settings)
        check_finite(blob, header)
        yield _Loaded(checkpoint, blob, content_digest(blob, header))


def _check(checkpoint: Checkpoint, settings: CrawlSettings) -> None:
    """Refuses what is no model, and models above the limit."""
    check_entry(checkpoint)
    count = sum(spec.numel for spec in checkpoint.specs.values())
    if settings.max_params is not None and count > settings.max_params:
        raise ZooError(f"{count:,} parameters are above the limit of {settings.max_params:,} that was asked for")


def _check_size(size: int) -> None:
    if size > MAX_BLOB_BYTES:
        raise ZooError(f"{size} bytes do not fit a zoo row; the limit is {MAX_BLOB_BYTES}")


def _read_whole(file: ByteSource) -> memoryview:
    try:
        return file.read(0, file.size)
    except HubError as error:
        if error.__cause__ is not None:
            raise
        return file.read(0, file.size)  # a hash mismatch: try once more


def _remote_weights(remote: Checkpoint, sharded: bool) -> RemoteWeights:
    """Describes weights that stay on the Hub; shards count as one file."""
    if sharded:
        first = remote.header_bytes()
        size = len(first) + sum(byte_count(spec, remote.where) for spec in remote.specs.values())
        return RemoteWeights(header_digest(first, parse_header(first, file_size=size, where=remote.where)), size)
    (file,) = remote.sources
    header = header_of(file)
    return RemoteWeights(header_digest(file.read(0, header.size), header), file.size)


@lru_cache(maxsize=64)
def _card_text(repo_id: str, sha: str, options: HubOptions) -> TrainerFacts:
    """Facts in the text of a card, which the checkpoints of a repository share."""
    card = HubRepo(repo_id, sha, [HubEntry(CARD)], options).open(CARD)
    if card.size > MAX_CARD_BYTES:
        raise ZooError(f"its card has {card.size} bytes; the limit is {MAX_CARD_BYTES}")
    return card_text_facts(bytes(card.read(0, card.size)).decode("utf-8", "replace"))


def _beside(path: str, name: str) -> str:
    parent = path.rpartition("/")[0]
    return f"{parent}/{name}" if parent else name
