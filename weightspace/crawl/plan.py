"""The plan of a crawl: one listing of the Hub, filtered before anything is downloaded, and saved as a file."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from weightspace.crawl.card_facts import MAX_METRICS, CardFacts, as_list, as_object, card_facts, metrics_left_out
from weightspace.dtypes import DTYPES
from weightspace.errors import HubError, SettingsError, WeightspaceError, ZooError
from weightspace.io.catalogue import INDEX
from weightspace.io.checkpoint import ADAPTER_CONFIG
from weightspace.io.folders import is_visible
from weightspace.io.header import load_json_object, shown
from weightspace.io.hub import LIBRARY, HubOptions, call_hub
from weightspace.io.locations import is_inside, is_repo_id
from weightspace.io.pickles import PICKLES
from weightspace.settings import PositiveInt, Settings, settings_from_mapping
from weightspace.zoo.storage import write_text

Sort = Literal["downloads", "likes", "createdAt", "lastModified", "trendingScore"]

PLAN = "plan.jsonl"
"""Name of the plan in the folder of the zoo."""

MAX_CHECKPOINTS = 1000
"""Most checkpoints of one repository."""

TRAINER_STATE = "trainer_state.json"
CARD = "README.md"

_BESIDE = ("config.json", ADAPTER_CONFIG, TRAINER_STATE)

_VERSION = 1
_FIELDS = (
    *("sha", "siblings", "tags", "cardData", "config", "safetensors", "library_name", "pipeline_tag"),
    *("gated", "disabled"),
)
_PAGE = 1000
_TIMEOUT = 60.0
_LONGEST_LINEAGE = 20
_MAX_FILES = 50_000
_SHA = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"\d{1,6}[-_]?of[-_]?\d{1,6}[^/]*\.safetensors", re.IGNORECASE)
_ADAPTERS = ("adapter_model", "pytorch_lora_weights")
_FAMOUS = ("model", "diffusion_pytorch_model", *_ADAPTERS)
"""Names that libraries give to the weights of a folder. Beside one of them, other files are variants of it."""


@dataclass(frozen=True)
class CrawlSettings(Settings):
    """Which models of the Hub to crawl. None and empty values do not filter.

    Attributes:
        task: pipeline tag.
        author: user or organisation.
        library: library that models are for.
        licences: any of these licence ids.
        tags: all of these tags of the Hub.
        search: text within the names of repositories.
        base_model: model that they were derived from.
        adapters: only adapters, or only other models.
        max_params: maximum number of tensor entries of a model.
        limit: maximum number of repositories.
        sort: order of the listing, descending.
        shard: ``(i, n)`` crawls the i-th of n parts, counted from 1, on one of several machines. A repository's part
            follows from its name.
        reference: leave the weights on the Hub.
    """

    task: str | None = None
    author: str | None = None
    library: str | None = None
    licences: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    search: str | None = None
    base_model: str | None = None
    adapters: bool | None = None
    max_params: PositiveInt | None = None
    limit: PositiveInt = 1000
    sort: Sort = "downloads"
    shard: tuple[int, int] = (1, 1)
    reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        part, parts = self.shard
        if not 1 <= part <= parts:
            raise SettingsError(f"shard: {part}/{parts} is no part; count from 1/{parts} to {parts}/{parts}")


@dataclass(frozen=True)
class PlannedRepo:
    """A repository of a plan.

    Attributes:
        repo_id: ``org/name``; the escaped name if it has another form.
        sha: the commit.
        checkpoints: paths to fetch.
        files: these paths and those of files that are read beside them.
        adapters: checkpoints that are adapters, by their file names.
        facts: metadata in the listing.
        lineage: ancestors that the listing names, nearest first.
        size: bytes of the weights, or None if the listing does not say.
        problems: ``(what, reason)`` of everything that cannot be fetched.
    """

    repo_id: str
    sha: str = ""
    checkpoints: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    facts: CardFacts = field(default_factory=CardFacts)
    lineage: tuple[str, ...] = ()
    size: int | None = None
    problems: tuple[tuple[str, str], ...] = ()

    def model_id(self, path: str) -> str:
        """Returns the name of a checkpoint in the zoo: as short as it is unique."""
        parent = path.rpartition("/")[0]
        beside = [other for other in self.checkpoints if other.rpartition("/")[0] == parent]
        place = parent if len(beside) == 1 else path
        return f"{self.repo_id}:{place}" if place and len(self.checkpoints) > 1 else self.repo_id


@dataclass(frozen=True)
class Item:
    """One checkpoint of a plan.

    Attributes:
        number: position in the plan; rows of the zoo follow this order.
        repo: its repository.
        path: inside the repository.
        problem: ``(what, reason)`` if the plan already says that it cannot be fetched.
    """

    number: int
    repo: PlannedRepo
    path: str = ""
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """What a crawl will fetch.

    Attributes:
        settings: of the crawl.
        repos: in the order of the rows of the zoo.
        excluded: number of repositories of the listing that do not match the settings, by reason.
    """

    settings: CrawlSettings
    repos: tuple[PlannedRepo, ...]
    excluded: Mapping[str, int]

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of everything in it."""
        return hashlib.sha256("".join(_lines(self)).encode()).hexdigest()[:16]

    @property
    def models(self) -> int:
        """Number of checkpoints to fetch."""
        return sum(len(repo.checkpoints) for repo in self.repos)

    @property
    def problems(self) -> tuple[tuple[str, str], ...]:
        """``(what, reason)`` of everything that matches the settings and cannot be fetched."""
        return tuple(problem for repo in self.repos for problem in repo.problems)

    def items(self) -> Iterator[Item]:
        """Yields all checkpoints and problems, numbered."""
        numbers = itertools.count()
        for repo in self.repos:
            yield from (Item(next(numbers), repo, problem=problem) for problem in repo.problems)
            yield from (Item(next(numbers), repo, path) for path in repo.checkpoints)


def make_plan(settings: CrawlSettings, options: HubOptions | None = None) -> Plan:
    """Lists the Hub once, page by page, until there are enough repositories.

    Raises:
        HubError: access is refused, or the Hub is out of reach.
    """
    options = options or HubOptions()
    excluded: Counter[str] = Counter()
    parents: dict[str, tuple[str, ...]] = {}
    repos: list[PlannedRepo] = []
    usable = 0
    signed_in = options.token is not False and bool(options.token or get_token())
    for row in list_models(_query(settings), options):
        repo = _planned(row, signed_in=signed_in)
        if repo.repo_id in parents:
            continue  # pages shift while a listing is read
        parents[repo.repo_id] = repo.facts.base_models
        if settings.adapters is not None:
            kept = tuple(path for path in repo.checkpoints if (path in repo.adapters) == settings.adapters)
            repo = replace(repo, checkpoints=kept)
        if reason := _mismatch(repo, row, settings):
            excluded[reason] += 1
            continue
        usable += bool(repo.checkpoints)
        part, parts = settings.shard
        if 1 + int.from_bytes(hashlib.sha256(repo.repo_id.encode()).digest()[:8], "big") % parts == part:
            repos.append(repo)
        else:
            excluded["part of another shard"] += 1
        if usable == settings.limit:
            break
    repos = [replace(repo, lineage=_lineage(repo.repo_id, parents)) for repo in repos]
    return Plan(settings, tuple(repos), excluded)


def _query(settings: CrawlSettings) -> dict[str, Any]:
    tags = [settings.library, *settings.tags]
    tags += [f"license:{settings.licences[0]}" if len(settings.licences) == 1 else None]
    tags += [f"base_model:{settings.base_model}" if settings.base_model else None]
    parameters: dict[str, Any] = {
        "filter": [tag for tag in tags if tag],
        "author": settings.author,
        "pipeline_tag": settings.task,
        "search": settings.search,
        "sort": settings.sort,
        "limit": min(settings.limit, _PAGE),
        "expand": list(_FIELDS),
    }
    return {name: value for name, value in parameters.items() if value}


def list_models(parameters: Mapping[str, Any], options: HubOptions) -> Iterator[Any]:
    """Yields rows of the Hub's listing of models as they come, page by page.

    ``HfApi.list_models`` sends the same requests, but fails on the whole listing at one malformed card.

    Raises:
        HubError: access is refused, or the Hub is out of reach.
    """
    where = "the listing of models"
    headers = build_hf_headers(token=options.token, library_name=LIBRARY)

    def get(url: str, parameters: Mapping[str, Any]) -> httpx2.Response:
        # An empty mapping of parameters would remove those of the URL.
        response = get_session().get(url, params=parameters or None, headers=headers, timeout=_TIMEOUT)
        hf_raise_for_status(response)
        return response

    url, parameters = f"{constants.ENDPOINT}/api/models", dict(parameters)
    while url:
        page = call_hub(where, get, url, parameters)
        try:
            rows = page.json()
        except ValueError:
            rows = None
        if not isinstance(rows, list):
            raise HubError(f"{where}: the answer is no list; is {constants.ENDPOINT} a Hub?")
        yield from rows
        url, parameters = page.links.get("next", {}).get("url", ""), {}
        if url and not url.startswith(f"{constants.ENDPOINT}/"):  # the token must go nowhere else
            raise HubError(f"{where}: it goes on at {shown(url)}, which is not {constants.ENDPOINT}")


def write_plan(plan: Plan, folder: Path) -> None:
    """Writes a plan into the folder of its zoo.

    Raises:
        ZooError: the disk is full or the folder cannot be written.
    """
    write_text(folder / PLAN, "".join(_lines(plan)))


def read_plan(folder: Path) -> Plan | None:
    """Reads the plan in the folder of a zoo, or returns None where there is none.

    Raises:
        ZooError: it is damaged or of another version.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        head, *rows = (load_json_object(line, where=str(path)) for line in path.read_bytes().splitlines())
        if head.get("version") != _VERSION or head.get("repos") != len(rows):
            raise ValueError(f"version {head.get('version')!r}, {len(rows)} of {head.get('repos')!r} repositories")
        settings = settings_from_mapping(CrawlSettings, head["settings"])
        repos = tuple(settings_from_mapping(PlannedRepo, row) for row in rows)
        return Plan(settings, repos, dict(head["excluded"]))
    except (WeightspaceError, ValueError, TypeError, KeyError) as error:
        raise ZooError(f"{path}: damaged ({error}); delete the folder and crawl again") from error


def _lines(plan: Plan) -> Iterator[str]:
    settings, excluded = asdict(plan.settings), dict(sorted(plan.excluded.items()))
    head = {"version": _VERSION, "settings": settings, "excluded": excluded, "repos": len(plan.repos)}
    for record in (head, *map(asdict, plan.repos)):
        yield json.dumps(record) + "\n"


def _planned(row: Any, *, signed_in: bool) -> PlannedRepo:
    """Reads a row of the listing; what cannot be fetched becomes a problem."""
    repo_id, sha = (row.get("id"), row.get("sha")) if isinstance(row, dict) else (None, None)
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        return _refused(shown(repo_id), "its name is no org/name of letters, digits, '-', '_' and '.'")
    if not isinstance(sha, str) or not _SHA.fullmatch(sha):
        return _refused(repo_id, f"the Hub names no commit ({shown(sha)})")
    facts = card_facts(row)
    if row.get("disabled") is True:
        return _refused(repo_id, "the Hub has disabled it", facts=facts)
    if row.get("gated") and not signed_in:
        reason = "it is gated; ask for access on its page, then `hf auth login` or give a token"
        return _refused(repo_id, reason, facts=facts)
    names = [as_object(file).get("rfilename") for file in as_list(row.get("siblings"))]
    repo = _with_files(
        repo_id, sha, [name for name in names if isinstance(name, str)], "lora" in as_list(row.get("tags"))
    )
    counts = as_object(row.get("safetensors")).get("parameters")
    size = None  # adapters have no counts in the listing
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        size = sum(count * (DTYPES[dtype].itemsize if dtype in DTYPES else 4) for dtype, count in counts.items())
    if count := metrics_left_out(row):
        reason = f"{count:,} of its metrics are left out; the limit is {MAX_METRICS:,}"
        repo = replace(repo, problems=(*repo.problems, (f"{repo_id}:{CARD}", reason)))
    return replace(repo, facts=facts, size=size)


def _refused(name: str, reason: str, **known: Any) -> PlannedRepo:
    return PlannedRepo(name, problems=((name, reason),), **known)


def _with_files(repo_id: str, sha: str, names: Sequence[str], lora: bool) -> PlannedRepo:
    """Chooses a repository's checkpoints; its other weights become problems."""
    problems = []
    kept = []
    for name in names:
        weights = name.endswith((".safetensors", INDEX))
        if not weights and name.rpartition("/")[2] not in _BESIDE and name != CARD:
            continue
        if not name.isprintable() or not is_inside(name):
            problems += [(f"{repo_id}:{shown(name)}", "the path is not a plain one inside the repository")] * weights
        elif is_visible(name):
            kept.append(name)
    kept = sorted(set(kept))
    if len(kept) > _MAX_FILES:
        return _refused(repo_id, f"{len(kept)} files are above the limit of {_MAX_FILES}")
    checkpoints, lone = _choose(kept)
    problems += [(f"{repo_id}:{name}", "a part of a checkpoint whose index is missing") for name in lone]
    if len(checkpoints) > MAX_CHECKPOINTS:
        return _refused(repo_id, f"{len(checkpoints)} checkpoints are above the limit of {MAX_CHECKPOINTS}")
    if not checkpoints and not problems:
        pickle = next((name for name in sorted(names) if name.lower().endswith(PICKLES)), None)
        reason = f"only {shown(pickle)}: pickles can run any code and are never opened in a crawl; " if pickle else ""
        return _refused(repo_id, f"{reason}it has no safetensors file", sha=sha, files=tuple(kept))
    folders = {name.removesuffix(ADAPTER_CONFIG) for name in kept if name.rpartition("/")[2] == ADAPTER_CONFIG}
    adapters = [path for path in checkpoints if _is_adapter(path, folders, lora)]
    return PlannedRepo(repo_id, sha, tuple(checkpoints), tuple(kept), tuple(adapters), problems=tuple(problems))


def _choose(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the checkpoints among files, those of a folder before those of folders below it; and lone shards."""
    present = set(files)
    weights: dict[str, list[str]] = {}
    for name in files:
        if name.endswith((".safetensors", INDEX)):
            weights.setdefault(name.rpartition("/")[0], []).append(name)
    checkpoints, lone = [], []
    for folder in sorted(weights):
        prefix = f"{folder}/" if folder else ""
        famous = [[prefix + stem + ending for ending in (".safetensors", INDEX)] for stem in _FAMOUS]
        found = [next((name for name in names if name in present), None) for names in famous]
        stems = tuple(name.removesuffix(INDEX) + "-" for name in weights[folder] if name.endswith(INDEX))
        others = [name for name in weights[folder] if name.endswith(INDEX) or not name.startswith(stems)]
        shards = [name for name in others if _SHARD.search(name)]
        lone += [] if stems else shards  # an index may name files of any name
        checkpoints += sorted(name for name in found if name) or [name for name in others if name not in shards]
    return checkpoints, lone


def _is_adapter(path: str, folders: Iterable[str], lora: bool) -> bool:
    parent, _, name = path.rpartition("/")
    stem = name.removesuffix(INDEX).removesuffix(".safetensors")
    if stem in _FAMOUS:
        return stem in _ADAPTERS
    return lora or (f"{parent}/" if parent else "") in folders


def _mismatch(repo: PlannedRepo, row: Any, settings: CrawlSettings) -> str | None:
    """Says why a repository does not match the settings, or returns None if it does."""
    if settings.licences and not set((repo.facts.licence or "").split(", ")) & set(settings.licences):
        return "another licence"
    total = as_object(as_object(row).get("safetensors")).get("total")
    if settings.max_params is not None and isinstance(total, int) and total > settings.max_params:
        return f"more than {settings.max_params:,} parameters"
    if not repo.sha or repo.checkpoints:
        return None
    if settings.adapters is True and not any(name.endswith(ADAPTER_CONFIG) for name in repo.files):
        return "no adapter"
    return "an adapter" if settings.adapters is False and repo.adapters else None


def _lineage(repo_id: str, parents: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    queue = deque(parents.get(repo_id, ()))
    while queue and len(found) < _LONGEST_LINEAGE:
        name = queue.popleft()
        if name != repo_id and name not in found:
            found[name] = None
            queue.extend(itertools.islice(parents.get(name, ()), _LONGEST_LINEAGE))
    return tuple(found)
