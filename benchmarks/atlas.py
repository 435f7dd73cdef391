"""How long an atlas takes to make, to open and to move in a headless Chromium, which draws on the processor.

    python benchmarks/atlas.py [--models 20000] [--json FILE]

The models are points around 24 centres in 150 dimensions, with 15 columns. Needs Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from weightspace.report.atlas import build_atlas, write_atlas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Moves the map for two seconds as a hand would: every frame is asked for and waited for.
PANS = """new Promise((done) => {
  const gaps = [], begun = performance.now();
  let last = null;
  const step = (now) => {
    if (last !== null) gaps.push(now - last);
    last = now;
    if (now - begun > 2000) return done(gaps);
    atlas.pan(gaps.length % 40 < 20 ? 4 : -4, 0);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""
DRAWS = """(() => {
  const times = [];
  for (let i = 0; i < 50; i++) { const begun = performance.now(); atlas.draw(); times.push(performance.now() - begun); }
  return times;
})()"""
SEARCH = """(() => {
  const search = document.getElementById("search"), begun = performance.now();
  search.value = "0-1";
  search.dispatchEvent(new Event("input"));
  return performance.now() - begun;
})()"""


def embedded(models: int) -> pd.DataFrame:
    """Returns models of 24 datasets with their embeddings and 15 columns."""
    rng = np.random.default_rng(0)
    dataset, accuracy = rng.integers(24, size=models), rng.beta(6, 2, size=models)
    embeddings = rng.normal(size=(24, 150))[dataset] + rng.normal(size=(models, 150))
    numbers = {f"number_{i}": rng.normal(size=models) for i in range(8)}
    texts = {f"text_{i}": rng.choice(["relu", "tanh", "gelu"], models) for i in range(4)}
    names = [f"run-{i // 4:06d}-step-{i % 4:06d}" for i in range(models)]
    return pd.DataFrame(
        {
            "model_id": names,
            "run_id": [name[:10] for name in names],
            "dataset": [f"images?classes=0-{one % 6}&rotation={one // 6 * 90}" for one in dataset],
            "test_accuracy": accuracy,
            "embedding": list(embeddings.astype(np.float32)),
        }
        | numbers
        | texts
    )


def measure(models: int) -> dict[str, float]:
    """Returns seconds, megabytes and milliseconds by what was measured."""
    from chromium import open_chromium

    frame = embedded(models)
    begun = time.perf_counter()
    atlas = build_atlas(frame, "benchmark")
    built = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open_chromium(Path(folder) / "profile") as browser:
        page = write_atlas(atlas, Path(folder) / "atlas.html")
        written = time.perf_counter()
        browser.open(page.as_uri())
        ready = browser.run("performance.getEntriesByName('drawn')[0].startTime")
        drawn = int(browser.run("document.getElementById('map').dataset.drawn"))
        gaps, draws, search = browser.run(PANS), browser.run(DRAWS), browser.run(SEARCH)
        size = page.stat().st_size / 1e6
    assert drawn == models, f"{drawn} of {models} models are drawn"
    return {
        "models": models,
        "place and find neighbours (s)": built - begun,
        "write (s)": written - built,
        "page (MB)": size,
        "load to drawn (ms)": ready,
        "frame while moving, median (ms)": float(np.median(gaps)),
        "frame while moving, 95 % below (ms)": float(np.quantile(gaps, 0.95)),
        "script a frame, median (ms)": float(np.median(draws)),
        "search (ms)": search,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = measure(options.models)
    for name, value in measured.items():
        print(f"{name:<38}{value:>12,.4g}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
