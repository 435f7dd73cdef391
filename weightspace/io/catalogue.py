"""Which files of a folder are which checkpoint.

An index decides by its ``weight_map``, whatever it is called, and headers decide where there is none. File names only
say which headers to compare: those of parts numbered ``n-of-m``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightspace.errors import CheckpointError
from weightspace.io.folders import Folder
from weightspace.io.header import headers_of, shown
from weightspace.io.pickles import PICKLES

MAX_SHARDS = 4096
"""Most files of one checkpoint."""

INDEX = ".safetensors.index.json"
"""How the name of a sharded checkpoint's index mostly ends."""

SAFETENSORS = ".safetensors"

_FAMOUS_PICKLES = ("pytorch_model.bin", "adapter_model.bin")
_WEIGHTS = (SAFETENSORS, *PICKLES)
_INDEX = re.compile(r"\.(safetensors|bin)\.index\b.*\.json$")
_PERHAPS_INDEX = re.compile(r"index|safetensors|weight", re.IGNORECASE)
_PART = re.compile(r"(?P<stem>.*?)(?P<number>\d{1,6})[-_]?of[-_]?(?P<count>\d{1,6})(?P<end>\D.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Weights:
    """The files of one checkpoint.

    Attributes:
        name: the file that opens it: its only one, its index, or the first of its parts where it has no index.
        files: paths of the files with tensors.
        weight_map: path of the file that holds a tensor, for those that the index names.
        problem: why these are no whole checkpoint, or None.
        note: what is missing although they are one, or None.
    """

    name: str
    files: tuple[str, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    note: str | None = None

    @property
    def stem(self) -> str:
        """The name without folder, ending, and number of the part."""
        base = self.name.rpartition("/")[2].partition(SAFETENSORS)[0]
        part = _PART.fullmatch(f"{base}.")
        return part["stem"].rstrip("-_.") if part else base


@dataclass(frozen=True)
class Catalogue:
    """The checkpoints of one folder.

    Attributes:
        weights: by name, sorted.
        owners: name of the checkpoint that a file is a part of, or that an index of one file stands for.
    """

    weights: Mapping[str, Weights]
    owners: Mapping[str, str]

    def find(self, name: str) -> Weights | None:
        """Returns the checkpoint that a file opens, or None if the folder has no such weights.

        Raises:
            CheckpointError: the file is only a part of a checkpoint.
        """
        owner = self.owners.get(name, name)
        if owner != name and name.lower().endswith(_WEIGHTS):
            problem = self.weights[owner].problem
            raise CheckpointError(
                f"{name}: a part of the checkpoint {shown(owner)}; open that{f' ({problem})' if problem else ''}"
            )
        return self.weights.get(owner)


def catalogue(folder: Folder, parent: str = "") -> Catalogue:
    """Finds the checkpoints directly inside a folder; pickles only where there is nothing else.

    Indexes are read, and headers of parts that no index names. What does not make a whole checkpoint is in it all the
    same, with the problem.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    prefix = f"{parent}/" if parent else ""
    names = [prefix + name for name in folder.names(parent)]
    files = [name for name in names if name.endswith(SAFETENSORS)] or _pickles(names)
    indexes = list(_indexes(folder, names))
    parts = {file for index in indexes for file in index.files if file in files}
    sets = list(_sets(folder, [file for file in files if file not in parts]))
    found: dict[str, Weights] = {}
    owners: dict[str, str] = {}
    for index in indexes:
        if any(file not in files for file in index.files) and (proven := _proven(folder, index, sets)):
            # The index was written for files of other names, but its tensors are all here.
            sets.remove(proven)
            note = f"{folder.title(index.name)}: names files of other names, but all of its tensors are here"
            index = Weights(index.name, proven.files, note=note)
        if len(index.files) == 1 and index.problem is None and owners.get(index.files[0]) is None:
            owners[index.name] = index.files[0]
            found[index.files[0]] = Weights(index.files[0], index.files, index.weight_map)
            continue
        if index.files and any(other.files == index.files for other in found.values()):
            owners[index.name] = next(other.name for other in found.values() if other.files == index.files)
            continue
        found[index.name] = index
        owners |= {file: index.name for file in index.files if file not in found}
    for weights in sets:
        found[weights.name] = weights
        owners |= {file: weights.name for file in weights.files}
    return Catalogue(dict(sorted(found.items())), owners)


def _pickles(names: Sequence[str]) -> list[str]:
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    parts = [name for name in pickles if _PART.fullmatch(name.rpartition("/")[2])]
    return [name for name in pickles if name.rpartition("/")[2] in _FAMOUS_PICKLES] or parts or pickles


def _indexes(folder: Folder, names: Sequence[str]) -> Iterator[Weights]:
    for name in names:
        base = name.rpartition("/")[2]
        if base.endswith(".json") and _PERHAPS_INDEX.search(base):
            index = read_index(folder, name)
            if index.weight_map or _INDEX.search(base):
                yield index


def read_index(folder: Folder, name: str) -> Weights:
    """Reads which files an index names; what is wrong with it or them is the result's problem."""
    where, parent = folder.title(name), name[: name.rfind("/") + 1]
    try:
        weight_map = (folder.read_json(name) or {}).get("weight_map")
    except CheckpointError as error:
        return Weights(name, (), problem=str(error))
    if not isinstance(weight_map, dict) or not weight_map:
        wrong = f"{where}: weight_map must map tensor names to file names, got {shown(weight_map)}"
        return Weights(name, (), problem=wrong)
    pickled = all(str(file).lower().endswith(PICKLES) for file in weight_map.values())
    for tensor, file in weight_map.items():
        # Shards lie beside their index; any path could lead out of the folder.
        plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
        if not plain or not (pickled or file.endswith(SAFETENSORS)):
            wrong = f"{where}: tensor {shown(tensor)}: {shown(file)} is not the name of a file in this folder"
            return Weights(name, (), problem=wrong)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files[:MAX_SHARDS] if not folder.has(parent + file)]
    problem = None
    if len(files) > MAX_SHARDS:
        problem = f"{where}: {len(files)} files are above the limit of {MAX_SHARDS}"
    elif missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        problem = (
            f"{where}: shard {shown(missing[0])}{more} missing, of {len(files)}; fetch all of them into this folder"
        )
    paths = tuple(parent + file for file in files)
    return Weights(name, paths, {tensor: parent + file for tensor, file in weight_map.items()}, problem)


def _sets(folder: Folder, files: Sequence[str]) -> Iterator[Weights]:
    """Joins numbered parts; all other files are checkpoints of their own."""
    numbered: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    for file in files:
        match = _PART.fullmatch(file.rpartition("/")[2])
        if match and int(match["count"]) > 1:
            numbered[match["stem"], match["count"], match["end"]][int(match["number"])] = file
        else:
            yield Weights(file, (file,))
    for (_, count, _), parts in numbered.items():
        yield from _joined(folder, int(count), parts)


def _joined(folder: Folder, count: int, parts: Mapping[int, str]) -> Iterator[Weights]:
    """Decides by headers whether parts without an index are one whole checkpoint."""
    files = tuple(parts[number] for number in sorted(parts))
    where = folder.title(files[0])
    problem = note = None
    first = min(1, *parts) if len(parts) > 1 else min(1, next(iter(parts)))
    missing = [number for number in range(first, first + min(count, MAX_SHARDS)) if number not in parts]
    try:
        held = _tensors(folder, files)
    except CheckpointError as error:
        yield Weights(files[0], files, problem=str(error))
        return
    if len(held) > 1 and all(tensors == held[0] for tensors in held):
        # Each holds all tensors: copies or folds of one model, which only count like parts.
        yield from (Weights(file, (file,)) for file in files)
        return
    if missing or count > MAX_SHARDS:
        numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problem = (
            f"{where}: incomplete: {len(files)} of {count} parts, without {numbers}, and no index; fetch all parts and "
            "the index"
        )
    elif not all(held) or any(file.lower().endswith(PICKLES) for file in files):
        problem = f"{where}: {count} parts without an index, which nothing proves to be whole; fetch the index"
    else:
        note = f"{where}: {count} parts without an index, joined because each holds other tensors"
    yield Weights(files[0], files, problem=problem, note=note)


def _tensors(folder: Folder, files: Sequence[str]) -> list[frozenset[str]]:
    """Names of the tensors of each file; nothing for pickles, which are not opened for this."""
    if not files or not files[0].endswith(SAFETENSORS):
        return [frozenset({file}) for file in files]
    return [frozenset(header.tensors) for header in headers_of([folder.open(file) for file in files])]


def _proven(folder: Folder, index: Weights, sets: Sequence[Weights]) -> Weights | None:
    """Finds the files that hold exactly the tensors that an index names."""
    for weights in sets:
        try:
            held = _tensors(folder, weights.files)
        except CheckpointError:
            continue
        if sum(map(len, held)) == len(index.weight_map) and frozenset().union(*held) == index.weight_map.keys():
            return weights
    return None
