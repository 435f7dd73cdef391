"""Fetching on a Ray cluster: tasks fetch on all machines, and the driver writes the zoo."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import ray

from weightspace.crawl.fetch import Room, fetch_model
from weightspace.crawl.plan import CrawlSettings, Item
from weightspace.crawl.spool import Fetched, Outcome, Spool
from weightspace.io.hub import HubOptions
from weightspace.zoo.storage import MAX_BLOB_BYTES

_PASSED_ON = ("HF_ENDPOINT", "HF_TOKEN")


def ray_fetch(settings: CrawlSettings, options: HubOptions) -> Callable[[Item, Spool], Outcome]:
    """Returns a function that fetches on the cluster of ``RAY_ADDRESS``, or else on this machine.

    The driver holds one checkpoint in memory at a time; the others wait in Ray's object store.
    """
    if not ray.is_initialized():
        variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, include_dashboard=False)
    one_at_a_time = threading.Lock()

    def fetch(item: Item, spool: Spool) -> Outcome:
        task = _fetch.remote(item, settings, options)
        ray.wait([task], fetch_local=False)
        with one_at_a_time:
            try:
                fetched = ray.get(task)
            except ray.exceptions.RayError as error:  # the loss of a machine says nothing about the checkpoint
                fetched = Fetched(unreachable=f"a task on the Ray cluster was lost ({type(error).__name__})")
            return spool.put(item.number, fetched)

    return fetch


@ray.remote
def _fetch(item: Item, settings: CrawlSettings, options: HubOptions) -> Fetched:
    return fetch_model(item, settings, options, Room(MAX_BLOB_BYTES), lambda fetched: fetched)
