"""What a crawl costs a model beside the network.

    python benchmarks/crawl.py [--models 1000] [--json FILE]

A loopback Hub in a process of its own serves small models. The same requests (HEAD and GET of weights and config, in as
many threads, by the same client) are sent by a plain loop that looks at nothing, and by a crawl into a zoo. The
difference of the two times, divided by the models, is the overhead; the limit is 10 ms. The two take turns, and the
medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BAR_MS = 10.0
JOBS = 8


def fill(folder: Path, models: int) -> None:
    """Writes models of 2,464 parameters, each with config and card, as ``org/name`` folders."""
    import torch
    from safetensors.torch import save_file

    shapes = {"0.weight": (8, 1, 5, 5), "3.weight": (6, 8, 5, 5), "6.weight": (4, 6, 2, 2), "9.weight": (20, 36)}
    shapes |= {"11.weight": (10, 20), "0.bias": (8,), "3.bias": (6,), "6.bias": (4,), "9.bias": (20,), "11.bias": (10,)}
    generator = torch.Generator().manual_seed(0)
    result = {"dataset": {"type": "mnist", "split": "test"}, "metrics": [{"type": "accuracy", "value": 0.9}]}
    card = {"license": "mit", "datasets": ["mnist"], "model-index": [{"name": "m", "results": [result]}]}
    for number in range(models):
        repository = folder / "org" / f"m{number:05d}"
        repository.mkdir(parents=True)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, repository / "model.safetensors")
        (repository / "config.json").write_text(json.dumps({"model_type": "cnn", "channels": [8, 6, 4]}))
        (repository / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# A model\n")


def plain_requests(models: int) -> float:
    """Sends what a crawl sends, and drops the answers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    from weightspace.crawl.plan import CrawlSettings, make_plan
    from weightspace.io.hub import HubOptions

    start = time.perf_counter()
    plan = make_plan(CrawlSettings(limit=models), HubOptions(token=False))

    def fetch(repo: Any) -> None:
        for file in ("model.safetensors", "config.json"):
            found = get_hf_file_metadata(hf_hub_url(repo.repo_id, file, revision=repo.sha), token=False)
            headers = build_hf_headers(token=False) | {"Range": f"bytes=0-{found.size - 1}"}
            get_session().get(found.location, headers=headers).raise_for_status()

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(fetch, plan.repos))
    return time.perf_counter() - start


def whole_crawl(models: int) -> float:
    """Crawls into a zoo, the listing included."""
    from weightspace.crawl.plan import CrawlSettings
    from weightspace.crawl.run import crawl, prepare_crawl
    from weightspace.io.hub import HubOptions

    with tempfile.TemporaryDirectory() as folder:
        options = HubOptions(token=False)
        start = time.perf_counter()
        plan = prepare_crawl(CrawlSettings(limit=models), Path(folder) / "zoo", options)
        summary = crawl(plan, Path(folder) / "zoo", jobs=JOBS, options=options)
        elapsed = time.perf_counter() - start
    if summary.models != models:
        raise RuntimeError(f"{summary.models} of {models} models came: {summary.skipped[:1]}")
    return elapsed


def measure(models: int, rounds: int) -> dict[str, Any]:
    """Times both in turns."""
    work: dict[str, Callable[[int], float]] = {"requests": plain_requests, "crawl": whole_crawl}
    times: dict[str, list[float]] = {name: [] for name in work}
    for run in work.values():
        run(models)  # imports, connections, and what the Hub derives from its files once
    for _ in range(rounds):
        for name, run in work.items():
            times[name].append(run(models))
    requests, crawl = (1000 * statistics.median(times[name]) / models for name in work)
    return {
        "models": models,
        "requests_ms_a_model": requests,
        "crawl_ms_a_model": crawl,
        "overhead_ms_a_model": crawl - requests,
        "bar_ms": BAR_MS,
        "met": crawl - requests < BAR_MS,
        "ratio": crawl / requests,
    }


def main() -> None:
    """Starts the Hub and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.models)
        # In a process of its own, so that the two do not share an interpreter.
        command = [sys.executable, "-m", "loopback_hub", "--port", "0", "--folder", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"}
        hub = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            os.environ |= _exports(hub)
            figures = measure(options.models, options.rounds)
        finally:
            hub.terminate()
            hub.wait()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name, value in figures.items():
        print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _exports(hub: subprocess.Popen[str]) -> dict[str, str]:
    """Reads the variables that the Hub prints when it is ready."""
    assert hub.stdout is not None
    first = hub.stdout.readline()
    return dict(word.split("=", 1) for word in first.removeprefix("export ").split())


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_DISABLE_TELEMETRY="1")
    main()
