"""Files of strangers: weights, indexes, configs, adapters, pickles, folders to import, and their names.

Every command ends with one of its documented exit codes and at most one line of error, reads and writes nothing
outside of what it was given, and takes no memory for a number that a file merely states. With ``WEIGHTSPACE_HOSTILE``
the same holds for every file and folder in the folder it names.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from weightspace.cli.main import main
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel

CORPUS = os.environ.get("WEIGHTSPACE_HOSTILE")
MARKER = "CANARY-5e1f"
MOST_MEMORY = 2**30
LONGEST = 2010
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
VALUES = (
    None,
    True,
    -1,
    0,
    2**31,
    10**30,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    "../" * 8,
    "y" * 5000,
    [],
    [[1]],
    [8_000_000],
    [1] * 5000,
    {},
    {"a": {"b": [None]}},
)
TEXTS: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"1e999",
    b'{"a": 1, "a": 2}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b'{"a": "\xff"}',
    b'{"a": 1,}',
    b"\0",
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"\x1b[2J": 1}',
)

Files = Mapping[str, bytes]
Case = tuple[str, Files]


class Tripwire:
    """Leaves a mark in the working folder where a pickle is run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("executed",)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "net.0.weight": torch.arange(12.0).reshape(4, 3),
        "net.0.bias": torch.ones(4),
        "net.2.weight": torch.ones(2, 4),
        "net.2.bias": torch.zeros(2),
    }


GOOD = save(tensors())


def safetensors(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changes(*fields: str) -> Iterator[tuple[str, Any]]:
    """Yields a third of the values for each field, in turn."""
    return itertools.islice(itertools.product(fields, VALUES), None, None, 3)


def headers() -> Iterator[Case]:
    """Damaged safetensors files."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    data = bytes(8)
    for key, value in itertools.product(("dtype", "shape", "data_offsets"), VALUES):
        yield f"{key}={str(value)[:20]!a}", {WEIGHTS: safetensors({"a": {**entry, key: value}}, data)}
    for shape in ([2**40, 2**40], [0, 2**62], [-2, -1], [1] * 2000 + [2], [2.0], ["2"], [True, 2]):
        yield f"shape={str(shape)[:30]}", {WEIGHTS: safetensors({"a": {**entry, "shape": shape}}, data)}
    for offsets in ([0, 2**62], [8, 0], [-8, 0], [4, 12], [0, 7], [0, 8, 8], [2**64, 2**64 + 8], [0.0, 8.0]):
        yield f"offsets={offsets}", {WEIGHTS: safetensors({"a": {**entry, "data_offsets": offsets}}, data)}
    for name in ("", "\x1b[2J\x07", "a\nb", "\ud800", "\u202e", "n" * 100_000, "__metadata__", "a.weight\0"):
        yield f"name={name[:9]!a}", {WEIGHTS: safetensors({name: entry}, data)}
    for value in VALUES:
        yield f"entry={str(value)[:20]!a}", {WEIGHTS: safetensors({"a": value}, data)}
        yield f"metadata={str(value)[:20]!a}", {WEIGHTS: safetensors({"__metadata__": value, "a": entry}, data)}
    for text in TEXTS:
        yield f"text={text[:12]!a}", {WEIGHTS: safetensors(text)}
    for length in (0, 1, 7, 2**31, 2**40, 2**62, 2**64 - 1):
        yield f"length={length}", {WEIGHTS: safetensors({"a": entry}, data, length=length)}
    yield "overlapping", {WEIGHTS: safetensors({"a": entry, "b": entry}, data)}
    yield "a gap", {WEIGHTS: safetensors({"a": entry, "b": {**entry, "data_offsets": [16, 24]}}, bytes(24))}
    yield "more data", {WEIGHTS: safetensors({"a": entry}, bytes(100))}
    yield (
        "many layers",
        {WEIGHTS: safetensors({f"l.{i}.weight": {**entry, "shape": [0], "data_offsets": [0, 0]} for i in range(3000)})},
    )


def mutated(seed: int, count: int) -> Iterator[Case]:
    """Whole files with a few bytes changed, cut out or repeated."""
    random_ = random.Random(seed)
    pickled = io.BytesIO()
    torch.save(tensors(), pickled)
    for number in range(count):
        raw = bytearray(GOOD if number % 3 else pickled.getvalue())
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(min(len(raw), 600))
            how = random_.randrange(3)
            if how == 0:
                raw[at] = random_.randrange(256)
            elif how == 1:
                del raw[at : at + random_.randint(1, 9)]
            else:
                raw[at:at] = raw[at : at + random_.randint(1, 9)]
        yield f"mutation {number}", {WEIGHTS if number % 3 else "pytorch_model.bin": bytes(raw)}


def indexes() -> Iterator[Case]:
    """Indexes that do not fit their shards."""
    names = list(tensors())
    other = safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    shard = {"a.safetensors": GOOD}
    for value in VALUES:
        yield f"map={str(value)[:20]!a}", {INDEX: json.dumps({"weight_map": value}).encode(), **shard}
        yield f"shard={str(value)[:20]!a}", {INDEX: json.dumps({"weight_map": {names[0]: value}}).encode(), **shard}
        whole = {"metadata": value, "weight_map": dict.fromkeys(names, "a.safetensors")}
        yield f"metadata={str(value)[:20]!a}", {INDEX: json.dumps(whole).encode(), **shard}
    for text in TEXTS:
        yield f"text={text[:12]!a}", {INDEX: text, **shard}
    leaving = ("../outside/secret.safetensors", "OUTSIDE/secret.safetensors", "a/../../outside/secret.safetensors")
    for path in (*leaving, INDEX, ".", "b", "a\\b", "\0", "C:x", "~/x", "//x", "a.safetensors/b", CONFIG, "/dev/zero"):
        yield f"to {path!a}", {INDEX: json.dumps({"weight_map": dict.fromkeys(names, path)}).encode(), **shard}
    yield (
        "one shard too few",
        {
            INDEX: json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "x": "b.safetensors"}}).encode(),
            **shard,
        },
    )
    yield (
        "same names twice",
        {
            INDEX: json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "x": "b.safetensors"}}).encode(),
            "a.safetensors": GOOD,
            "b.safetensors": GOOD,
        },
    )
    many = {str(i): f"{i}.safetensors" for i in range(5000)}
    yield "many shards", {INDEX: json.dumps({"weight_map": many}).encode(), "a.safetensors": other}


def configs() -> Iterator[Case]:
    """Configs beside whole weights."""
    fields = ("model_type", "architectures", "family", "hidden", "channels", "quantization_config", "torch_dtype")
    known = {"model_type": "mlp", "family": "mlp", "hidden": [4], "input_shape": [3], "classes": 2}
    for field, value in changes(*fields):
        yield f"{field}={str(value)[:20]!a}", {CONFIG: json.dumps({**known, field: value}).encode(), WEIGHTS: GOOD}
    for text in TEXTS:
        yield f"text={text[:12]!a}", {CONFIG: text, WEIGHTS: GOOD}


def adapters() -> Iterator[Case]:
    """Configs of adapters, and other types than they say."""
    low = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(3, 2)}
    weights = {"adapter_model.safetensors": save(low)}
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    fields = ("peft_type", "r", "lora_alpha", "target_modules", "alpha_pattern", "rank_pattern", "use_rslora", "bias")
    for field, value in changes(*fields):
        changed = json.dumps({**config, field: value}).encode()
        yield f"{field}={str(value)[:20]!a}", {"adapter_config.json": changed, **weights}
    for text in TEXTS:
        yield f"text={text[:12]!a}", {"adapter_config.json": text, **weights}
    for pattern in ("(a+)+$", "[", "q" * 5000, "(" * 2000):
        changed = json.dumps({**config, "target_modules": pattern, "alpha_pattern": {pattern: 3}}).encode()
        yield f"pattern={pattern[:9]!a}", {"adapter_config.json": changed, **weights}


def rows() -> Iterator[Case]:
    """Folders to import."""
    good = {"file": WEIGHTS, "dataset": "d", "run": "r"}
    fields = ("file", "dataset", "run", "results", "hyperparameters", "datasets", "config", "metrics", "base_model")
    for field, value in changes(*fields):
        lines = json.dumps(good) + "\n" + json.dumps({**good, "file": f"sub/{WEIGHTS}", field: value})
        yield f"{field}={str(value)[:20]!a}", {"metadata.jsonl": lines.encode(), WEIGHTS: GOOD, f"sub/{WEIGHTS}": GOOD}
    for text in (*TEXTS, b'{"file": "' + b"x" * 3_000_000 + b'"}', b"\n" * 100_000, b'{"file": "a"}\n' * 2000):
        yield f"text={text[:12]!a}", {"metadata.jsonl": text, WEIGHTS: GOOD}
    for path in ("../outside/secret.safetensors", "OUTSIDE/secret.safetensors", ".", "metadata.jsonl", "/dev/zero"):
        yield f"file {path}", {"metadata.jsonl": json.dumps({**good, "file": path}).encode(), WEIGHTS: GOOD}


class Bench:
    """Runs commands in one process, and collects what is wrong with how they end."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.inside, self.outside, self.output, self.working = (
            root / name for name in ("inside", "outside", "output", "working")
        )
        for folder in (self.inside, self.outside, self.output, self.working):
            folder.mkdir()
        entry = {MARKER: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        (self.outside / "secret.safetensors").write_bytes(safetensors(entry, bytes(4)))
        (self.outside / CONFIG).write_text(json.dumps({"model_type": MARKER}))
        self.before = self._outside()
        self.wrong: list[str] = []
        self.tried = 0

    def lay_out(self, files: Files) -> Path:
        shutil.rmtree(self.inside)
        self.inside.mkdir()
        for name, content in files.items():
            path = self.inside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.replace(b"OUTSIDE", os.fsencode(self.outside)))
        return self.inside

    def run(self, name: str, *words: str) -> int:
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        self.tried += 1
        code = main(words)
        out, err = self.capsys.readouterr()
        err = re.sub(r"[^\r\n]*\r", "", err)  # progress
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        problems = {
            f"exit code {code}": code not in (0, 2),
            f"{len(errors)} errors": len(errors) != (code == 2) and (words[0] != "embed" or len(errors) > 1),
            "a traceback": "Traceback" in err + out,
            "control characters": any(not one.isprintable() for one in (out + err).replace("\n", "")),
            "a long line": any(len(line) > LONGEST for line in err.splitlines()),
            "read outside": MARKER in out + err or self._marked(),
            "wrote outside": self._outside() != self.before,
            "left a mark": any(self.working.iterdir()),
        }
        if found := [problem for problem, holds in problems.items() if holds]:
            self.wrong.append(f"{words[0]} {name}: {', '.join(found)}: {err[-300:]!a}")
        return code

    def _outside(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.outside.iterdir()}

    def _marked(self) -> bool:
        files = (path for path in self.output.rglob("*") if path.is_file())
        return any(MARKER.encode() in path.read_bytes() for path in files)

    def finish(self, least: int) -> None:
        assert not self.wrong, f"{len(self.wrong)} of {self.tried}:\n" + "\n".join(self.wrong)
        assert self.tried >= least


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path, capsys)
    monkeypatch.chdir(bench.working)
    return bench


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder that nobody trained."""
    folder = tmp_path_factory.mktemp("files") / "encoder"
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "position_size": 4}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WeightAutoencoderConfig(**sizes, **layers, token_size=6, latent_size=4, projection_size=3, window=8)
        WeightAutoencoderModel(config).save_pretrained(folder)
    WeightFeatureExtractor("channel", 6, 0.0, 0.1).save_pretrained(folder)
    return folder


INSPECTED: dict[str, tuple[Callable[[], Iterator[Case]], int]] = {
    "headers": (headers, 100),
    "mutations": (lambda: mutated(3, 45), 45),
    "indexes": (indexes, 60),
    "configs": (configs, 50),
    "adapters": (adapters, 70),
}


@pytest.mark.parametrize("kind", INSPECTED)
def test_inspect(kind: str, bench: Bench) -> None:
    cases, least = INSPECTED[kind]
    for number, (name, files) in enumerate(cases()):
        bench.run(
            name, "inspect", str(bench.lay_out(files)), "--allow-pickle", *(["--json"] if number % 4 == 0 else [])
        )
    bench.finish(least)


def test_import_and_info(bench: Bench) -> None:
    for name, files in rows():
        zoo = str(bench.output / "zoo")
        if bench.run(name, "zoo", "import", str(bench.lay_out(files)), "--output", zoo) == 0:
            kept = bench.output.rename(bench.output.with_name("kept"))
            bench.run(name, "zoo", "info", str(kept / "zoo"))
            shutil.rmtree(kept)
    bench.finish(70)


@pytest.mark.skipif(not CORPUS, reason="WEIGHTSPACE_HOSTILE names no folder of hostile files")
def test_a_corpus(bench: Bench, encoder: Path) -> None:
    for path in sorted(Path(CORPUS or "").iterdir()):
        bench.run(path.name, "inspect", str(path), "--allow-pickle")
        output = str(bench.output / "e.parquet")
        bench.run(path.name, "embed", str(path), "--output", output, "--encoder", str(encoder), "--allow-pickle")
        if path.is_dir():
            bench.run(path.name, "zoo", "import", str(path), "--output", str(bench.output / "zoo"))
    bench.finish(1)
