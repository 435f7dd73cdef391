"""A zoo as one value: its index in memory, its weights read when they are asked for, in bounded pieces."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.errors import UNFORESEEN, WeightspaceError, ZooError
from weightspace.io.checkpoint import Checkpoint, open_checkpoint_bytes
from weightspace.io.flat import flat_from_bytes
from weightspace.io.header import Header, parse_header, shown
from weightspace.io.hub import HubOptions
from weightspace.io.hub_repo import CONNECTIONS, HubRepo
from weightspace.io.reader import ByteSource
from weightspace.networks.families import FamilyConfig, family_config
from weightspace.schema import Architecture, ZooEntry
from weightspace.zoo.remote import fetch_zoo, open_input, open_zoo_repo, remote_blobs
from weightspace.zoo.storage import (
    check_index,
    check_usable,
    entry_of,
    header_digest,
    packed,
    parse_json,
    read_state,
    read_table,
    reading,
)

_PASS_BYTES = 64 * 2**20
_CACHED_GROUPS = 2
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ZooBatch:
    """Some models of a zoo that share one header.

    Attributes:
        rows: their row numbers in the zoo, ascending.
        header: digest of the header that they share.
        architecture: their architecture.
        flat: one flat weight vector a model, in the order of ``architecture.tensors``.
    """

    rows: np.ndarray
    header: str
    architecture: Architecture
    flat: Float[Tensor, "models params"]


class Zoo:
    """A complete zoo: its index is in memory, weights are read row group by row group when asked for.

    Attributes:
        path: folder of the zoo; in the cache for one from the Hub, where a streamed zoo has all but its weights.
        location: what `load_zoo` opens it by, pinned to a commit if it lies on the Hub.
        repo: where on the Hub it comes from, or None.
        settings: what its content follows from.
        digest: of the settings.
        result_names: the columns of the index that hold results.
        reference: whether the weights lie on the Hub, each model's in the repository that it comes from.
        left_out: ``(model id, reason)`` of the models that `usable` has taken out.
    """

    def __init__(self, path: str | Path, repo: HubRepo | None = None, *, streaming: bool = False) -> None:
        """Opens the zoo in the folder ``path``; see ``load_zoo``.

        Args:
            path: folder of the zoo.
            repo: where on the Hub it comes from, if it does.
            streaming: read weights from ``repo`` by ranges instead of from the folder.
        """
        self.path = Path(path)
        self.repo = repo
        self.location = str(path) if repo is None else f"{repo.repo_id}@{repo.sha}"
        state = read_state(self.path)
        if state is None:
            raise ZooError(f"{path}: no zoo (there is no zoo.json); give the folder of a zoo or import one")
        if not state["complete"] or not state["shards"]:
            raise ZooError(
                f"{self.location}: the zoo is incomplete; run the command that writes it again and it goes on"
            )
        self.settings: Mapping[str, Any] = state["settings"]
        self.digest: str = state["digest"]
        shards = [self.path / "index" / f"{name}.parquet" for name in state["shards"]]
        tables = [read_table(shard) for shard in shards]
        for shard, table in zip(shards, tables, strict=True):
            if not table.schema.equals(tables[0].schema):
                raise ZooError(f"{shard}: other columns than {shards[0].name}; write the zoo again")
        table = pa.concat_tables(tables)
        check_index(table, self.path)
        self.result_names = tuple(field.name for field in table.schema if pa.types.is_float64(field.type))
        self.reference: bool = state["reference"]
        files = [] if self.reference else [f"weights/{name}.parquet" for name in state["shards"]]
        self._groups = _row_groups([repo.open(file) if repo and streaming else self.path / file for file in files])
        rows = [group.footer.row_group(group.number).num_rows for group in self._groups]
        self._group_ends = np.cumsum(rows)
        if not len(table) or (not self.reference and sum(rows) != len(table)):
            raise ZooError(
                f"{self.location}: {len(table)} models in index and another number in weights; write the zoo again"
            )
        self._layouts: dict[str, _Layout] = {}
        self._read_group = lru_cache(maxsize=_CACHED_GROUPS)(lambda number: self._groups[number].read())
        self.left_out: tuple[tuple[str, str], ...] = ()
        self._take(table, np.arange(len(table)))

    def _take(self, table: pa.Table, stored: np.ndarray) -> None:
        """Takes the models of ``table``, whose weights stand in the rows ``stored`` of the files."""
        self._table, self._stored = table, stored
        self._header_numbers, headers = pd.factorize(table["header"].to_numpy())
        self._headers: list[str] = list(headers)
        self._sizes = table["size"].to_numpy()

    def __len__(self) -> int:
        """Number of models."""
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        """Returns where it is and how many models and headers it has."""
        return f"Zoo({self.location!r}, {len(self)} models of {len(self._headers)} headers)"

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row a model: ids, results, JSON texts, header digest and size in bytes; no weights."""
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    @cached_property
    def families(self) -> list[FamilyConfig | None]:
        """Config of each model that the library can run, in row order; None for all others."""
        texts = self.index["config"]
        where = f"{self.location}: config"
        read = {text: family_config(parse_json(text, dict, where)) for text in texts.dropna().unique()}
        return [read.get(text) for text in texts]

    @property
    def architectures(self) -> Mapping[str, Architecture]:
        """Architecture by header digest, in the order of first appearance.

        Where models of one header come with different configs, only the permutation groups that all of them imply are
        kept.

        Raises:
            ZooError: no model of a header can be used; it is named. `usable` leaves such models out.
        """
        self._read_layouts()
        _, firsts = np.unique(self._header_numbers, return_index=True)
        return {self._header_of(row): self._architecture(row) for row in firsts}

    def usable(self) -> Zoo:
        """Returns this zoo without the models that cannot be embedded or trained on, and says which those are.

        They are the models without floating point entries, and those whose config describes other tensors. New zoos
        have none: they are refused on entry.

        Raises:
            ZooError: no model is left.
        """
        self._read_layouts()
        configs = self._table["config"].to_pylist()
        found = {
            row: reason
            for row, (number, config) in enumerate(zip(self._header_numbers, configs, strict=True))
            if (reason := self._layouts[self._headers[number]].problems.get(config)) is not None
        }
        if not found:
            return self
        ids = self._table["model_id"].to_pylist()
        left_out = tuple((ids[row], reason) for row, reason in found.items())
        first = f"{shown(left_out[0][0])}: {left_out[0][1]}"
        if len(found) == len(self):
            raise ZooError(f"{self.location}: none of its {len(self)} models can be used ({first}); write it again")
        _LOG.warning("%s: %d models cannot be used and are left out: %s", self.location, len(found), first)
        kept = np.delete(np.arange(len(self)), list(found))
        part = copy.copy(self)
        for cached in ("index", "families"):
            part.__dict__.pop(cached, None)
        part._take(self._table.take(kept), self._stored[kept])
        part.left_out = self.left_out + left_out
        return part

    def _read_layouts(self) -> None:
        # Headers are numbered by first appearance, so these rows ascend.
        _, firsts = np.unique(self._header_numbers, return_index=True)
        missing = firsts[[self._header_of(row) not in self._layouts for row in firsts]]
        for row, blob in zip(missing, self._blobs(missing), strict=True):
            self._layout(row, blob)

    def entries(self) -> Iterator[ZooEntry]:
        """Yields what is known of each model, in row order."""
        for batch in self._table.to_batches(max_chunksize=1024):
            for values in batch.to_pylist():
                yield entry_of(values, self.result_names)

    def entry(self, row: SupportsIndex) -> ZooEntry:
        """Returns what is known of the model in ``row``."""
        self._check_rows(np.array([operator.index(row)]))
        return entry_of(self._table.slice(operator.index(row), 1).to_pylist()[0], self.result_names)

    def blob(self, row: SupportsIndex) -> bytes:
        """Returns the complete safetensors bytes of the model in ``row``."""
        chosen = np.array([operator.index(row)])
        self._check_rows(chosen)
        return next(self._blobs(chosen))

    def checkpoint(self, row: SupportsIndex) -> Checkpoint:
        """Opens the model in ``row`` like a file, with its config."""
        entry = self.entry(row)
        return open_checkpoint_bytes(self.blob(row), where=f"{self.location}: {entry.model_id}", config=entry.config)

    def batches(self, rows: Sequence[int] | np.ndarray | None = None, chunk: int = 1024) -> Iterator[ZooBatch]:
        """Yields the models of ``rows`` (all by default), each once, header by header.

        Headers stand in the order of first appearance and their models in ascending row order. Headers may interleave
        on disk: small ones are collected together in one pass over the row groups. Memory is bounded by ``chunk`` and a
        fixed number of bytes, whichever is less; a batch has at least one model.
        """
        chosen = np.arange(len(self)) if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
        self._check_rows(chosen)
        headers = _grouped(chosen, self._header_numbers[chosen])
        # Headers that fit into memory together share one pass over the row groups.
        for members in packed(headers, lambda rows: int(self._sizes[rows].sum()), len(headers), _PASS_BYTES):
            if len(members) == 1:
                for part in self._parts(members[0], chunk):
                    yield self._batch(part, list(self._blobs(part)))
                continue
            together = np.sort(np.concatenate(members))
            held = dict(zip(together.tolist(), self._blobs(together), strict=True))
            for one in members:
                for part in self._parts(one, chunk):
                    yield self._batch(part, [held.pop(row) for row in part.tolist()])

    def flat(self, rows: Sequence[int] | np.ndarray) -> Float[Tensor, "models params"]:
        """Returns the flat weight vectors of ``rows``, in this order; all must share one header.

        Raises:
            ZooError: the models have different headers, or there are none.
        """
        chosen, inverse = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        self._check_rows(chosen)
        headers = {self._header_of(row) for row in chosen}
        if len(headers) != 1:
            raise ZooError(f"{self.location}: flat() needs models of one header, got {len(headers)}; use batches()")
        flat = torch.cat([batch.flat for batch in self.batches(chosen)])
        return flat if np.array_equal(inverse, np.arange(len(flat))) else flat[torch.from_numpy(inverse)]

    def _check_rows(self, rows: np.ndarray) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = int(rows.min() if rows.min() < 0 else rows.max())
            raise IndexError(f"{self.location}: no row {wrong} in a zoo of {len(self)} models")

    def _header_of(self, row: SupportsIndex) -> str:
        number: int = self._header_numbers[row]
        return self._headers[number]

    def _parts(self, rows: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        step = max(1, min(chunk, _PASS_BYTES // max(1, int(self._sizes[rows[0]]))))
        return (rows[start : start + step] for start in range(0, len(rows), step))

    def _blobs(self, rows: np.ndarray) -> Iterator[bytes]:
        if self.reference:
            yield from remote_blobs((self.entry(row), int(self._sizes[row])) for row in rows)
            return
        for row in self._stored[rows]:
            group = int(np.searchsorted(self._group_ends, row, side="right"))
            column = self._read_group(group)
            yield column[int(row) - int(self._group_ends[group]) + len(column)].as_py()

    def _batch(self, rows: np.ndarray, blobs: list[bytes]) -> ZooBatch:
        layout, architecture = self._layout(rows[0], blobs[0]), self._architecture(rows[0])
        return ZooBatch(
            rows, self._header_of(rows[0]), architecture, flat_from_bytes(blobs, layout.header, architecture)
        )

    def _architecture(self, row: SupportsIndex) -> Architecture:
        layout = self._layouts[self._header_of(row)]
        if layout.architecture is None:
            reason = next(iter(layout.problems.values()))
            raise ZooError(f"{self._where(row)}: {reason}; take the model out, Zoo.usable() does")
        return layout.architecture

    def _where(self, row: SupportsIndex) -> str:
        return f"{self.location}: {shown(self._table['model_id'][operator.index(row)].as_py())}"

    def _layout(self, row: SupportsIndex, blob: bytes) -> _Layout:
        """Returns how models with the header of a row are laid out; ``blob`` is that of the row."""
        digest, where = self._header_of(row), self._where(row)
        if digest not in self._layouts:
            header = parse_header(blob, file_size=len(blob), where=where)
            configs = self._table["config"].filter(pc.equal(self._table["header"], digest)).unique().to_pylist()
            inferred, problems = [], {}
            for config in configs:
                try:
                    checkpoint = open_checkpoint_bytes(blob, where=where, config=parse_json(config, dict, where))
                    check_usable(checkpoint)
                    inferred.append(checkpoint.architecture)
                except (WeightspaceError, *UNFORESEEN) as error:
                    problems[config] = str(error).removeprefix(f"{where}: ") or type(error).__name__
            self._layouts[digest] = _Layout(header, _agreed(inferred) if inferred else None, problems)
        layout = self._layouts[digest]
        if header_digest(blob, layout.header) != digest:
            raise ZooError(f"{where}: header {digest}: the index names it but the weights have another; write it again")
        return layout


@dataclass(frozen=True)
class _Layout:
    """How the models of one header are laid out.

    Attributes:
        header: their header.
        architecture: their architecture; None if no model of this header can be used.
        problems: by the text of a config, why the models that come with it cannot be used.
    """

    header: Header
    architecture: Architecture | None
    problems: Mapping[str | None, str]


def load_zoo(
    path: str | Path,
    *,
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Zoo:
    """Opens a zoo that is complete.

    What exists on this machine is never looked for on the Hub. A zoo on the Hub is pinned to a commit and fetched into
    huggingface_hub's own cache once.

    Args:
        path: folder of the zoo, or ``org/name[@revision]`` of a dataset on the Hub.
        revision: branch, tag or commit on the Hub.
        streaming: fetch only what is known of the models, and read weights from the Hub by ranges whenever they are
            asked for; they are not kept on disk.
        token: for private and gated zoos; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        local_files_only: use the cache and ask nobody.

    Raises:
        ZooError: there is no zoo, it is incomplete or damaged, or a newer version wrote it.
        HubError: the Hub lacks it, refuses, or is out of reach.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Zoo(folder)
    options = HubOptions(token=token, local_files_only=local_files_only, keep=not streaming)
    repo = open_zoo_repo(str(path), revision, options)
    return Zoo(fetch_zoo(repo, weights=not streaming), repo, streaming=streaming)


@dataclass(frozen=True)
class _Group:
    """A row group of a weights shard on disk or on the Hub, whose footer was read already."""

    file: Path | ByteSource
    footer: pq.FileMetaData
    number: int

    def read(self) -> pa.ChunkedArray:
        where = _name(self.file)
        with (
            reading(where),
            open_input(self.file) as source,
            pq.ParquetFile(source, metadata=self.footer, page_checksum_verification=True) as parquet,
        ):
            column = parquet.read_row_group(self.number, columns=["weights"])["weights"]
        if not pa.types.is_large_binary(column.type) or column.null_count:
            raise ZooError(f"{where}: weights are not bytes in every row; write the zoo again")
        return column


def _row_groups(files: Sequence[Path | ByteSource]) -> list[_Group]:
    def footer(file: Path | ByteSource) -> pq.FileMetaData:
        with reading(_name(file)), open_input(file) as source:
            return pq.read_metadata(source)

    with ThreadPoolExecutor(CONNECTIONS) as pool:  # on the Hub, a footer costs a round trip
        footers = list(pool.map(footer, files))
    return [
        _Group(file, footer, number)
        for file, footer in zip(files, footers, strict=True)
        for number in range(footer.num_row_groups)
    ]


def _name(file: Path | ByteSource) -> str:
    return file.where if isinstance(file, ByteSource) else str(file)


def _grouped(rows: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Splits ``rows`` into arrays of equal keys, by first appearance, each in the order of ``rows``."""
    _, firsts, numbers = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(numbers))[:-1])
    return [parts[number] for number in np.argsort(firsts)]


def _agreed(inferred: Sequence[Architecture]) -> Architecture:
    """The first architecture with the permutation groups that all of them have."""
    first, *others = inferred
    axes = [{frozenset(group.axes) for group in other.groups} for other in others]
    kept = tuple(group for group in first.groups if all(frozenset(group.axes) in known for known in axes))
    if len(kept) == len(first.groups):
        return first
    note = f"{len(first.groups) - len(kept)} permutation groups left out: configs of models with this header disagree"
    return replace(first, groups=kept, notes=(*first.notes, note))
