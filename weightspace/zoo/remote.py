"""The weights of reference zoos: each model is read from its own repository on the Hub when it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from weightspace.errors import HubError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.header import shown
from weightspace.io.hub import HubEntry
from weightspace.io.hub_repo import CONNECTIONS, HubRepo
from weightspace.schema import ZooEntry

_AHEAD_BYTES = 256 * 2**20


def remote_blobs(models: Iterable[tuple[ZooEntry, int]]) -> Iterator[bytes]:
    """Yields the complete safetensors bytes of models on the Hub, in order, while the next ones are on their way.

    What was read is kept in the cache, so that it is fetched once.

    Args:
        models: what is known of each model, and its bytes.

    Raises:
        HubError: one of them cannot be had.
        CheckpointError: it is no longer what the zoo was made of.
    """
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="weightspace-zoo") as pool:
        coming: deque[tuple[Future[bytes], int]] = deque()
        ahead = 0
        try:
            for entry, size in models:
                while coming and (len(coming) == CONNECTIONS or ahead + size > _AHEAD_BYTES):
                    blob, done = coming.popleft()
                    ahead -= done
                    yield blob.result()
                coming.append((pool.submit(_read, entry, size), size))
                ahead += size
            while coming:
                yield coming.popleft()[0].result()
        finally:
            for blob, _ in coming:
                blob.cancel()


def _read(entry: ZooEntry, size: int) -> bytes:
    ref = entry.ref
    if ref.revision is None or ref.subfolder is None:
        raise HubError(f"{entry.model_id}: {shown(str(ref))} names no file at a commit of the Hub; write the zoo again")
    if ref.subfolder.endswith(".json"):
        blob = open_checkpoint(ref).to_bytes()
    else:
        # The index says all that a listing of the repository would.
        file = HubRepo(ref.location, ref.revision, [HubEntry(ref.subfolder, size, entry.content)]).open(ref.subfolder)
        blob = bytes(file.read(0, size))
    if len(blob) != size:
        raise HubError(f"{entry.model_id}: {len(blob)} bytes where the zoo was made of {size}; write the zoo again")
    return blob
