"""Several zoos become one: what machines crawled apart, or any others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from weightspace.errors import ZooError
from weightspace.io.header import parse_header, shown
from weightspace.schema import ZooEntry
from weightspace.zoo.content import content_digest
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.storage import RESULTS, read_skips
from weightspace.zoo.writer import RemoteWeights, ZooWriter

_SHARD_MODELS, _SHARD_BYTES = 1024, 256 * 2**20

Row = tuple[Zoo, int]


@dataclass(frozen=True)
class JoinSummary:
    """What a join did.

    Attributes:
        models: models in the new zoo.
        skipped: ``(file, reason)`` of what the zoos had left out, and of what is not in the new one.
    """

    models: int
    skipped: tuple[tuple[str, str], ...]


def join_zoos(paths: Sequence[str | Path], output: str | Path) -> JoinSummary:
    """Makes one zoo of several, or goes on with a join that was killed.

    Rows stand in the order of the zoos, and the result columns are those of all. Of models with the same tensors the
    first is kept, and so it is of models with the same name.

    Args:
        paths: folders of zoos, or ``org/name[@revision]`` of zoos on the Hub; weights are stored in all or in none.
        output: folder of the new zoo.

    Raises:
        ZooError: a zoo cannot be opened, only some of them store their weights, or the folder cannot be written.
    """
    zoos = [load_zoo(path) for path in paths]
    if len({zoo.reference for zoo in zoos}) != 1:
        raise ZooError(f"{output}: some of the zoos store their weights and others do not; join those of one kind")
    extra = {name for zoo in zoos for name in zoo.result_names} - set(RESULTS)
    writer = ZooWriter(
        output,
        settings={"joined": [zoo.digest for zoo in zoos]},
        results=(*RESULTS, *sorted(extra)),
        reference=zoos[0].reference,
    )
    kept = writer.contents()
    with tqdm(total=sum(map(len, zoos)), desc="join", unit="model", disable=None) as progress:
        for number, rows in enumerate(_shards(zoos)):
            if not writer.has_shard(name := f"{number:05d}"):
                known = [skip for zoo in zoos for skip in read_skips(zoo.path)] if number == 0 else []
                _join_shard(writer, name, rows, kept, known)
            progress.update(len(rows))
    writer.finish()
    return JoinSummary(writer.models, writer.skipped)


def _join_shard(
    writer: ZooWriter, name: str, rows: Sequence[Row], kept: dict[str, str], skipped: list[tuple[str, str]]
) -> None:
    entries: dict[str, ZooEntry] = {}
    weights: list[bytes | RemoteWeights] = []
    for zoo, row in rows:
        entry, own = zoo.entry(row), _weights(zoo, row)
        if entry.content is None and isinstance(own, bytes):
            header = parse_header(own, file_size=len(own), where=entry.model_id)
            entry = replace(entry, content=content_digest(own, header))
        if entry.content in kept:
            skipped.append((str(entry.ref), f"the same tensors as {kept[entry.content]}"))
        elif writer.has_model(entry.model_id) or entry.model_id in entries:
            skipped.append((str(entry.ref), f"another model has its name {shown(entry.model_id)}"))
        else:
            kept |= {} if entry.content is None else {entry.content: entry.model_id}
            entries[entry.model_id] = entry
            weights.append(own)
    writer.write_shard(name, list(entries.values()), weights, skipped=skipped)


def _weights(zoo: Zoo, row: int) -> bytes | RemoteWeights:
    if not zoo.reference:
        return zoo.blob(row)
    return RemoteWeights(zoo.index["header"].iloc[row], int(zoo.index["size"].iloc[row]))


def _shards(zoos: Sequence[Zoo]) -> Iterator[list[Row]]:
    """Cuts all rows, in order, into shards of bounded models and bytes."""
    part: list[Row] = []
    held = 0
    for zoo in zoos:
        for row, size in enumerate(zoo.index["size"] if not zoo.reference else [0] * len(zoo)):
            if part and (len(part) == _SHARD_MODELS or held + size > _SHARD_BYTES):
                yield part
                part, held = [], 0
            part.append((zoo, row))
            held += size
    yield part
