"""Crawls the Hub into a zoo.

The listing is taken once and kept as ``plan.jsonl`` in the folder of the zoo, with the commit of every repository. Each
checkpoint of the plan is fetched once, into ``fetched/``; as soon as enough consecutive ones are there, they become a
shard. A crawl that was killed at any moment continues from these files, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from weightspace.crawl.card_facts import metric_columns
from weightspace.crawl.fetch import Room, fetch_model
from weightspace.crawl.plan import PLAN, CrawlSettings, Item, Plan, list_models, make_plan, read_plan, write_plan
from weightspace.crawl.spool import SPOOL, Fetched, Outcome, Spool
from weightspace.errors import HubError, SettingsError, ZooError, install_command
from weightspace.io.hub import HubOptions
from weightspace.zoo.storage import RESULTS, check_empty, unwritable
from weightspace.zoo.writer import Candidate, Skip, ZooSummary, ZooWriter, cut_shards

MAX_UNREACHABLE = 10
"""Number of consecutive checkpoints that fail because the Hub is out of reach, before a crawl stops."""

_ROOM_BYTES = 2 * 2**30


def prepare_crawl(settings: CrawlSettings, output: str | Path, options: HubOptions | None = None) -> Plan:
    """Returns the plan of the crawl in ``output``, or makes a new one and saves it there.

    Raises:
        ZooError: the folder holds something else or a crawl of other settings, or cannot be written.
        HubError: access is refused, or the Hub is out of reach.
    """
    folder = Path(output)
    plan = read_plan(folder)
    if plan is None:
        check_empty(folder, " and no crawl; choose an empty or a new folder")
        plan = make_plan(settings, options)
        write_plan(plan, folder)
    elif plan.settings != settings:
        old, new = asdict(plan.settings), asdict(settings)
        keys = ", ".join(key for key in sorted(new) if old[key] != new[key])
        raise ZooError(
            f"{output}: holds a crawl of other settings (they differ in {keys}); choose another folder or delete "
            "this one"
        )
    return plan


def crawl(
    plan: Plan, output: str | Path, *, jobs: int = 8, options: HubOptions | None = None, ray: bool = False
) -> ZooSummary:
    """Fetches the models of a plan into the zoo in ``output``, or continues.

    Weights with NaN or infinite values, quantised ones, adapters that are not LoRA, and whatever cannot be read are
    left out with the reason. Of models with the same tensors the first one of the plan is kept. Nothing that is fetched
    is executed, and no pickle is opened.

    Args:
        plan: of `prepare_crawl` with the same folder.
        output: folder of the zoo.
        jobs: number of checkpoints fetched at once.
        options: how the Hub is reached.
        ray: fetch by tasks on a Ray cluster; this process writes.

    Raises:
        HubError: the Hub is out of reach; the same call continues later.
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
    room = Room(_ROOM_BYTES)

    def fetch_here(item: Item, spool: Spool) -> Outcome:
        return fetch_model(item, plan.settings, options, room, partial(spool.put, item.number))

    fetch: Callable[[Item, Spool], Outcome] = fetch_here
    if ray:
        try:
            from weightspace.crawl.ray import ray_fetch
        except ModuleNotFoundError as error:
            raise SettingsError(f"ray: not installed ({error}); {install_command('ray')}") from error
        fetch = ray_fetch(plan.settings, options)
    items = tuple(plan.items())
    with tqdm(total=len(items), desc="crawl", unit="model", disable=None) as progress:
        run = _Crawl(writer, items, partial(_fetched, fetch, jobs), options, progress)
        with closing(run.arrivals):
            summary = writer.write_all(
                run.shards(),
                lambda _, numbers: map(run.candidate, numbers),
                name=lambda _, numbers: f"{numbers[0]:07d}-{numbers[-1] + 1:07d}",
                distinct=True,
            )
    return replace(summary, fetched=run.fetched)


def _fetched(
    fetch: Callable[[Item, Spool], Outcome], jobs: int, items: Sequence[Item], spool: Spool
) -> Generator[tuple[Item, Outcome]]:
    """Fetches ``items`` into the spool, ``jobs`` at once, and yields each when it is done, in any order."""
    waiting = iter(items)
    running: dict[Future[Outcome], Item] = {}
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="weightspace-crawl")
    try:
        while True:
            for item in islice(waiting, 2 * jobs - len(running)):
                running[pool.submit(fetch, item, spool)] = item
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Crawl:
    """One run: fetches what is missing, and cuts consecutive checkpoints into shards."""

    def __init__(
        self,
        writer: ZooWriter,
        items: Sequence[Item],
        fetch: Callable[[Sequence[Item], Spool], Generator[tuple[Item, Outcome]]],
        options: HubOptions,
        progress: tqdm,
    ) -> None:
        self._writer, self._items, self._fetch, self._options = writer, items, fetch, options
        self._progress = progress
        self._spool = Spool(writer.path / SPOOL)
        self._finished = [range(*map(int, name.split("-"))) for name in writer.shards]
        for numbers in self._finished:
            self._spool.drop(numbers)
        self._sizes = self._spool.sizes()
        self._sizes |= {item.number: 0 for item in items if item.problem is not None}
        self.fetched = self._skips = self._failures = 0
        self.arrivals = self._arrive()

    def shards(self) -> Iterator[list[int]]:
        """Yields the numbers of each shard that is not finished, when its checkpoints are in the spool.

        Where a shard ends depends only on the sizes, and not on what was finished in which run.
        """
        start = 0
        for finished in (*self._finished, range(len(self._items), len(self._items))):
            for numbers in cut_shards(self._ready(range(start, finished.start)), self._sizes.__getitem__):
                yield numbers
                self._spool.drop(numbers)
            start = finished.stop
        self._spool.close()

    def candidate(self, number: int) -> Candidate:
        """Returns the model with this number, or why it is left out."""
        problem = self._items[number].problem
        candidate = self._spool.get(number) if problem is None else Skip(*problem)
        if isinstance(candidate, Skip):
            return candidate
        entry, weights = candidate
        known = {name: value for name, value in entry.results.items() if name in self._writer.results}
        return replace(entry, results=known), weights

    def _ready(self, numbers: range) -> Iterator[int]:
        for number in numbers:
            while number not in self._sizes:
                next(self.arrivals)
            yield number

    def _arrive(self) -> Generator[None]:
        """Fetches everything that is missing, and stops after each checkpoint whose size is known."""
        written = {number for numbers in self._finished for number in numbers}
        todo = [item for item in self._items if item.number not in written and item.number not in self._sizes]
        self._progress.update(len(self._items) - len(todo))
        # Checkpoints that the Hub could not deliver are tried again at the end.
        failed = yield from self._attempt(todo)
        failed = yield from self._attempt([item for item, _ in failed])
        if failed:
            next(list_models({"limit": 1}, self._options), None)  # raises if the Hub itself does not answer
        for item, reason in failed:
            what = f"{item.repo.repo_id}@{item.repo.sha}:{item.path}"
            skip = Skip(what, f"{reason} (twice; the Hub does answer)")
            self._record(item, self._spool.put(item.number, Fetched(skip)))
            yield

    def _attempt(self, items: Sequence[Item]) -> Generator[None, None, list[tuple[Item, str]]]:
        """Fetches ``items`` and returns those for which the Hub was out of reach, with the reason."""
        failed = []
        try:
            with closing(self._fetch(items, self._spool)) as outcomes:
                for item, outcome in outcomes:
                    if outcome.unreachable is None:
                        self._record(item, outcome)
                        yield
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

    def _record(self, item: Item, outcome: Outcome) -> None:
        assert outcome.size is not None
        self._failures = 0
        self._sizes[item.number] = outcome.size
        self.fetched += outcome.fetched
        self._skips += outcome.skipped
        rate = self.fetched / max(1e-3, self._progress.format_dict["elapsed"])
        read, speed = (tqdm.format_sizeof(count, "B") for count in (self.fetched, rate))
        self._progress.set_postfix_str(f"{read}, {speed}/s, {self._skips} skipped", refresh=False)
        self._progress.update(1)
