"""A crawl on a Ray cluster: checkpoints are fetched by tasks on all machines, and the driver writes the zoo."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice

import ray

from weightspace.crawl.fetch import Fetched, Room, fetch_model
from weightspace.crawl.plan import CrawlSettings, PlannedRepo
from weightspace.crawl.run import Fetch, Item, Outcomes, keep
from weightspace.crawl.spool import Spool
from weightspace.io.hub import HubOptions
from weightspace.zoo.storage import MAX_BLOB_BYTES

_PASSED_ON = ("HF_ENDPOINT", "HF_TOKEN")


def ray_fetch(settings: CrawlSettings, options: HubOptions, jobs: int) -> Fetch:
    """Returns a function that fetches on the cluster of ``RAY_ADDRESS``, or else on this machine, ``jobs`` at once.

    Memory of the driver is bounded by one checkpoint; what is done waits in Ray's object store.
    """
    if not ray.is_initialized():
        variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, include_dashboard=False)

    def fetch(items: Iterable[Item], spool: Spool) -> Outcomes:
        coming = iter(items)
        running: dict[ray.ObjectRef, Item] = {}
        try:
            while True:
                for item in islice(coming, jobs - len(running)):
                    running[_fetch.remote(item.repo, item.path, settings, options)] = item
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                item = running.pop(done[0])
                yield item, keep(spool, item, _result(done[0]))
        finally:
            for task in running:
                ray.cancel(task)

    return fetch


@ray.remote
def _fetch(repo: PlannedRepo, path: str, settings: CrawlSettings, options: HubOptions) -> Fetched:
    return fetch_model(repo, path, settings, options, Room(MAX_BLOB_BYTES), lambda fetched: fetched)


def _result(task: ray.ObjectRef) -> Fetched:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # a machine that is gone says nothing about the checkpoint
        return Fetched(unreachable=f"a task on the Ray cluster was lost ({type(error).__name__})")
