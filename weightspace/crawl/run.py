"""A crawl: models of the Hub become a zoo.

The listing is taken once and kept as ``plan.jsonl`` in the folder of the zoo, with the commit of every repository. Each
checkpoint of the plan is fetched once, into ``fetched/``; as soon as enough of them stand there without a gap, they
become a shard. A crawl that was killed at any moment goes on from these files, and ends in the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from weightspace.crawl.card_facts import metric_columns
from weightspace.crawl.fetch import Fetched, Room, fetch_model
from weightspace.crawl.plan import (
    PLAN,
    CrawlSettings,
    Plan,
    PlannedRepo,
    list_models,
    make_plan,
    read_plan,
    write_plan,
)
from weightspace.crawl.spool import SPOOL, Spool
from weightspace.errors import HubError, SettingsError, ZooError, install_command
from weightspace.io.hub import HubOptions
from weightspace.schema import ZooEntry
from weightspace.zoo.storage import RESULTS, is_partial, unwritable
from weightspace.zoo.writer import RemoteWeights, ZooWriter

MAX_UNREACHABLE = 10
"""Checkpoints that fail one after another because the Hub is out of reach, before a crawl stops."""

_SHARD_ITEMS, _SHARD_BYTES = 1024, 256 * 2**20
_ROOM_BYTES = 2 * 2**30

Outcomes = Generator[tuple["Item", "Outcome"]]
Fetch = Callable[[Iterable["Item"], Spool], Outcomes]
"""Fetches checkpoints into the spool, many at once, and tells of each one when it is done, in any order."""


@dataclass(frozen=True)
class Item:
    """One checkpoint of a plan.

    Attributes:
        number: place in the plan; rows of the zoo stand in this order.
        repo: its repository.
        path: inside the repository.
        problem: ``(what, reason)`` where the plan already says that there is none to fetch.
    """

    number: int
    repo: PlannedRepo
    path: str = ""
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class CrawlSummary:
    """What a crawl did.

    Attributes:
        models: models in the zoo.
        skipped: ``(what, reason)`` of everything that was asked for and is not in the zoo.
        fetched: bytes of files that came over the network in this run.
    """

    models: int
    skipped: tuple[tuple[str, str], ...]
    fetched: int


def prepare_crawl(settings: CrawlSettings, output: str | Path, options: HubOptions | None = None) -> Plan:
    """Returns the plan of a crawl that was begun in ``output``, or makes a new one and keeps it there.

    Raises:
        ZooError: the folder holds something else or a crawl of other settings, or cannot be written.
        HubError: the Hub refuses or is out of reach.
    """
    folder = Path(output)
    plan = read_plan(folder)
    if plan is not None:
        if plan.settings != settings:
            old, new = asdict(plan.settings), asdict(settings)
            keys = ", ".join(key for key in sorted(new) if old[key] != new[key])
            raise ZooError(
                f"{output}: holds a crawl of other settings (they differ in {keys}); choose another folder or delete "
                "this one"
            )
        return plan
    strangers = [file.name for file in folder.iterdir() if not is_partial(file)] if folder.is_dir() else []
    if strangers:
        raise ZooError(f"{output}: holds {min(strangers)!r} and no crawl; choose an empty or a new folder")
    plan = make_plan(settings, options)
    write_plan(plan, folder)
    return plan


def crawl(
    plan: Plan, output: str | Path, *, jobs: int = 8, options: HubOptions | None = None, ray: bool = False
) -> CrawlSummary:
    """Fetches what a plan says into the zoo in ``output``, or goes on with it.

    Weights with NaN or infinite values, quantised ones, adapters that are not LoRA, and whatever cannot be read are
    left out with the reason. Of models with the same tensors the first one of the plan is kept. Nothing that is fetched
    is executed, and no pickle is opened.

    Args:
        plan: of `prepare_crawl` with the same folder.
        output: folder of the zoo.
        jobs: checkpoints fetched at once.
        options: how the Hub is reached.
        ray: fetch by tasks on a Ray cluster; this process writes.

    Raises:
        HubError: the Hub is out of reach; the same call goes on later.
        ZooError: no model is left, or the folder cannot be written.
        SettingsError: ``ray`` is not installed.
    """
    options = replace(options or HubOptions(), keep=plan.settings.reference, quiet=True)
    writer = ZooWriter(
        output,
        settings={"crawl": asdict(plan.settings), "plan": plan.digest},
        results=(*RESULTS, *metric_columns(repo.facts.metrics for repo in plan.repos)),
        reference=plan.settings.reference,
        beside=(PLAN, SPOOL),
    )
    fetch = (_ray_fetch if ray else _thread_fetch)(plan.settings, options, jobs)
    items = tuple(_items(plan))
    with tqdm(total=len(items), desc="crawl", unit="model", disable=None) as progress:
        return _Crawl(writer, items, options, progress).run(fetch)


@dataclass(frozen=True)
class Outcome:
    """What is told of a checkpoint that was fetched.

    Attributes:
        size: bytes of its weights in the spool; None if nothing is there because the Hub was out of reach.
        fetched: bytes that came over the network.
        skipped: whether it is no model.
        unreachable: why the Hub was out of reach.
    """

    size: int | None
    fetched: int = 0
    skipped: bool = False
    unreachable: str | None = None


def keep(spool: Spool, item: Item, fetched: Fetched) -> Outcome:
    """Puts what was fetched into the spool, and tells of it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    if fetched.unreachable is not None:
        return Outcome(None, fetched.bytes, unreachable=fetched.unreachable)
    return Outcome(spool.put(item.number, fetched), fetched.bytes, fetched.skipped is not None)


def _thread_fetch(settings: CrawlSettings, options: HubOptions, jobs: int) -> Fetch:
    room = Room(_ROOM_BYTES)

    def fetch_one(item: Item, spool: Spool) -> Outcome:
        return fetch_model(item.repo, item.path, settings, options, room, lambda fetched: keep(spool, item, fetched))

    def fetch(items: Iterable[Item], spool: Spool) -> Outcomes:
        coming = iter(items)
        running: dict[Future[Outcome], Item] = {}
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="weightspace-crawl")
        try:
            while True:
                for item in islice(coming, 2 * jobs - len(running)):
                    running[pool.submit(fetch_one, item, spool)] = item
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return fetch


def _ray_fetch(settings: CrawlSettings, options: HubOptions, jobs: int) -> Fetch:
    try:
        from weightspace.crawl.ray import ray_fetch
    except ModuleNotFoundError as error:
        raise SettingsError(f"ray: not installed ({error}); {install_command('ray')}") from error
    return ray_fetch(settings, options, jobs)


def _items(plan: Plan) -> Iterator[Item]:
    numbers = itertools.count()
    for repo in plan.repos:
        for problem in repo.problems:
            yield Item(next(numbers), repo, problem=problem)
        for path in repo.checkpoints:
            yield Item(next(numbers), repo, path)


class _Crawl:
    """One run: what is still to be fetched is fetched, and what stands without a gap is written."""

    def __init__(self, writer: ZooWriter, items: Sequence[Item], options: HubOptions, progress: tqdm) -> None:
        self._writer, self._items, self._options, self._progress = writer, items, options, progress
        self._spool = Spool(writer.path / SPOOL)
        self._finished = dict(map(_numbers_of, writer.shards))
        self._kept = writer.contents()
        for start, stop in self._finished.items():
            self._spool.drop(range(start, stop))
        self._sizes = self._spool.sizes()
        self._sizes |= {item.number: 0 for item in items if item.problem is not None}
        self._start = self._next = self._bytes = 0
        self._fetched = self._skips = self._failures = 0

    def run(self, fetch: Fetch) -> CrawlSummary:
        written = {number for start, stop in self._finished.items() for number in range(start, stop)}
        todo = [item for item in self._items if item.number not in written and item.number not in self._sizes]
        self._progress.update(len(self._items) - len(todo))
        self._write_full_shards()
        # What the Hub could not deliver comes once more at the end.
        failed = self._fetch(fetch, todo)
        failed = self._fetch(fetch, [item for item, _ in failed])
        if failed:
            next(list_models({"limit": 1}, self._options), None)  # raises where the Hub itself does not answer
        for item, reason in failed:
            what = f"{item.repo.repo_id}@{item.repo.sha}:{item.path}"
            self._told(item, keep(self._spool, item, Fetched(skipped=(what, f"{reason} (twice; the Hub does answer)"))))
        self._spool.close()
        self._writer.finish()
        return CrawlSummary(self._writer.models, self._writer.skipped, self._fetched)

    def _fetch(self, fetch: Fetch, items: Sequence[Item]) -> list[tuple[Item, str]]:
        """Fetches ``items`` and returns those for which the Hub was out of reach, with the reason."""
        failed = []
        try:
            with closing(fetch(items, self._spool)) as outcomes:
                for item, outcome in outcomes:
                    if outcome.unreachable is None:
                        self._told(item, outcome)
                        continue
                    failed.append((item, outcome.unreachable))
                    self._failures += 1
                    if self._failures == MAX_UNREACHABLE:
                        raise HubError(
                            f"{outcome.unreachable} ({MAX_UNREACHABLE} models one after another); what was fetched is "
                            "kept, run the same command again to go on"
                        )
        except OSError as error:
            raise unwritable(self._writer.path / SPOOL, error) from error
        return sorted(failed, key=lambda pair: pair[0].number)

    def _told(self, item: Item, outcome: Outcome) -> None:
        assert outcome.size is not None
        self._failures = 0
        self._sizes[item.number] = outcome.size
        self._fetched += outcome.fetched
        self._skips += outcome.skipped
        self._write_full_shards()
        rate = self._fetched / max(1e-3, self._progress.format_dict["elapsed"])
        read, speed = (tqdm.format_sizeof(count, "B") for count in (self._fetched, rate))
        self._progress.set_postfix_str(f"{read}, {speed}/s, {self._skips} skipped", refresh=False)
        self._progress.update(1)

    def _write_full_shards(self) -> None:
        """Writes every shard whose checkpoints are all there; where one ends follows from what they hold alone."""
        while True:
            at_end = self._next == len(self._items) or self._next in self._finished
            size = 0 if at_end else self._sizes.get(self._next)
            if size is None:
                return
            count = self._next - self._start
            full = count == _SHARD_ITEMS or (count > 0 and self._bytes + size > _SHARD_BYTES)
            if not at_end and not full:
                self._bytes += size
                self._next += 1
                continue
            if count:
                self._write_shard(range(self._start, self._next))
            if self._next == len(self._items):
                self._start = self._next
                return
            self._next = self._finished.get(self._next, self._next)
            self._start, self._bytes = self._next, 0

    def _write_shard(self, numbers: range) -> None:
        entries: list[ZooEntry] = []
        weights: list[bytes | RemoteWeights] = []
        skipped: list[tuple[str, str]] = []
        for number in numbers:
            problem = self._items[number].problem
            fetched = self._spool.get(number) if problem is None else Fetched(skipped=problem)
            if fetched.model is None:
                assert fetched.skipped is not None
                skipped.append(fetched.skipped)
                continue
            entry, blob = fetched.model
            first = self._kept.setdefault(entry.content or entry.model_id, entry.model_id)
            if first != entry.model_id:
                skipped.append((str(entry.ref), f"the same tensors as {first}"))
                continue
            known = {name: value for name, value in entry.results.items() if name in self._writer.results}
            entries.append(replace(entry, results=known))
            weights.append(blob)
        self._writer.write_shard(_shard_name(numbers), entries, weights, skipped=skipped)
        self._spool.drop(numbers)


def _shard_name(numbers: range) -> str:
    return f"{numbers.start:07d}-{numbers.stop:07d}"


def _numbers_of(shard: str) -> tuple[int, int]:
    start, _, stop = shard.partition("-")
    return int(start), int(stop)
