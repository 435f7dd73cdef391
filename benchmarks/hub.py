"""What reading part of a model on the Hub costs, beside the ways that huggingface_hub offers.

    python benchmarks/hub.py [--latency 0.03] [--repetitions 5] [--json FILE]

A loopback Hub in a process of its own serves a checkpoint of 403 MB in 7 shards, with redirected downloads and a delay
before every answer. Bytes and requests are counted at the server; every measurement starts with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LAYERS, WIDTH, SHARDS = 24, 1024, 7
REPO = "benchmark/model"
TARGETS = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)]


@dataclass(frozen=True)
class Row:
    """One way of doing one thing: median seconds, and what the server saw."""

    work: str
    way: str
    seconds: float
    requests: int
    megabytes: float


def serve(folder: str, latency: float, connection: Connection) -> None:
    """Runs a Hub with one model; answers "count" with the requests and bytes since the last time."""
    from loopback_hub import LoopbackHub

    write_model(Path(folder) / REPO)
    hub = LoopbackHub()
    hub.mode = "cdn"
    hub.add_folder(Path(folder))
    hub.delay(".*", latency)
    hub.start()
    connection.send((hub.url, hub.token))
    while connection.recv() == "count":
        connection.send((len(hub.requests), hub.bytes_served()))
        hub.requests.clear()
    hub.stop()


def write_model(folder: Path) -> None:
    """Writes a checkpoint in the shape of a language model, with its index."""
    import torch

    from weightspace.io.writing import save_checkpoint

    shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, WIDTH), "v_proj": (WIDTH, WIDTH), "o_proj": (WIDTH, WIDTH)}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    layers: list[dict[str, torch.Tensor]] = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.self_attn.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"{prefix}.mlp.{name}.weight": (4 * WIDTH, WIDTH) for name in ("up_proj",)}
        tensors |= {f"{prefix}.input_layernorm.weight": (WIDTH,)}
        layers.append({name: torch.randn(s, generator=generator).to(torch.bfloat16) for name, s in tensors.items()})
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        own = [layer for place, layer in enumerate(layers) if place * SHARDS // LAYERS == shard]
        content = {name: tensor for layer in own for name, tensor in layer.items()}
        save_checkpoint(content, folder / file)
        weight_map |= dict.fromkeys(content, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextmanager
def empty_caches() -> Iterator[None]:
    from huggingface_hub import constants

    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HUB_CACHE, constants.HF_ASSETS_CACHE = f"{folder}/hub", f"{folder}/assets"
        yield


def measure(work: str, way: str, run: Callable[[], object], repetitions: int, server: Connection) -> Row:
    seconds, requests, size = [], 0, 0
    for _ in range(repetitions):
        server.send("count")
        server.recv()
        with empty_caches():
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        server.send("count")
        requests, size = server.recv()
    return Row(work, way, statistics.median(seconds), requests, size / 1e6)


def ways() -> dict[str, dict[str, Callable[[], Any]]]:
    """Works, and the ways to do each; all ways of a work give the same result."""
    import torch
    from huggingface_hub import HfFileSystem, get_safetensors_metadata, snapshot_download
    from safetensors import safe_open

    from weightspace.io.checkpoint import open_checkpoint
    from weightspace.tokenizers import get_tokenizer
    from weightspace.tokenizers.sampling import sample_windows

    def by_snapshot() -> dict[str, torch.Tensor]:
        folder, found = Path(snapshot_download(REPO)), {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if name in TARGETS}  # noqa: SIM118
        return found

    def by_file_system() -> dict[str, torch.Tensor]:
        files = HfFileSystem(skip_instance_cache=True)
        found = {}
        for file, metadata in get_safetensors_metadata(REPO).files_metadata.items():
            with files.open(f"{REPO}/{file}", block_size=2**16, cache_type="none") as stream:
                length = 8 + int.from_bytes(stream.read(8), "little")
            for name in set(metadata.tensors) & set(TARGETS):
                start, stop = metadata.tensors[name].data_offsets
                raw = files.cat_file(f"{REPO}/{file}", start=length + start, end=length + stop)
                found[name] = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(WIDTH, WIDTH)
        return found

    def sampled() -> object:

        checkpoint = open_checkpoint(REPO)
        architecture = checkpoint.architecture
        tokenizer = get_tokenizer("channel", 256)
        sample = sample_windows(tokenizer, architecture, window=64, max_bytes=8_000_000)
        return tokenizer.tokenize_windows(checkpoint.entries, architecture, sample.runs)

    return {
        "headers": {
            "weightspace": lambda: open_checkpoint(REPO),
            "get_safetensors_metadata": lambda: get_safetensors_metadata(REPO),
        },
        f"{len(TARGETS)} tensors of 2.1 MB": {
            "weightspace": lambda: open_checkpoint(REPO).tensors(TARGETS),
            "HfFileSystem, one by one": by_file_system,
            "snapshot_download": by_snapshot,
        },
        "a sample of 8 MB": {"weightspace": sampled, "snapshot_download": lambda: snapshot_download(REPO)},
    }


def check(works: dict[str, dict[str, Callable[[], Any]]]) -> None:
    import torch

    (own, *others) = works[f"{len(TARGETS)} tensors of 2.1 MB"].values()
    expected = own()
    for other in others:
        found = other()
        if any(not torch.equal(found[name], expected[name]) for name in TARGETS):
            sys.exit("two ways of reading give different tensors; nothing was timed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before every answer")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        server = context.Process(target=serve, args=(folder, options.latency, theirs), daemon=True)
        server.start()
        url, token = ours.recv()
        os.environ.update(HF_ENDPOINT=url, HF_TOKEN=token, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
        works = ways()
        with empty_caches():
            check(works)
        rows = [
            measure(work, way, run, options.repetitions, ours)
            for work, own in works.items()
            for way, run in own.items()
        ]
        ours.send("stop")
        server.join()
    print(f"{'work':<24} {'way':<26} {'seconds':>8} {'ratio':>6} {'requests':>9} {'MB':>8}")
    for row in rows:
        first = next(other for other in rows if other.work == row.work)
        ratio = row.seconds / first.seconds
        print(f"{row.work:<24} {row.way:<26} {row.seconds:8.2f} {ratio:6.1f} {row.requests:9} {row.megabytes:8.2f}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
