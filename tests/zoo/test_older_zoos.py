from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from weightspace.errors import ZooError
from weightspace.io.writing import checkpoint_bytes
from weightspace.schema import ModelRef, ReportedMetric, ZooEntry
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.storage import LATER
from weightspace.zoo.writer import RemoteWeights, ZooWriter


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    metrics = (ReportedMetric("f1", 0.5, "d", "test", verified=True),)
    entry = ZooEntry("a", "a", ModelRef("a"), task="t", datasets=("d", "e"), metrics=metrics, content="c")
    writer = ZooWriter(tmp_path / "zoo", settings={})
    writer.write_shard("0", [entry], [checkpoint_bytes({"w": torch.ones(3)})])
    writer.finish()
    assert load_zoo(tmp_path / "zoo").entry(0) == entry
    return tmp_path / "zoo"


def test_zoos_without_the_later_columns_open(zoo: Path) -> None:
    index = zoo / "index" / "0.parquet"
    pq.write_table(pq.read_table(index).drop_columns(list(LATER)), index)
    entry = load_zoo(zoo).entry(0)
    assert (entry.task, entry.datasets, entry.metrics, entry.content) == (None, (), (), None)


@pytest.mark.parametrize("metrics", ['[{"name": "f1"}]', '[{"strange": 1}]', "[3]", "{}"])
def test_damaged_metrics_are_named(zoo: Path, metrics: str) -> None:
    index = zoo / "index" / "0.parquet"
    table = pq.read_table(index)
    place = table.schema.get_field_index("metrics")
    pq.write_table(table.set_column(place, table.schema.field(place), [[metrics]]), index)
    with pytest.raises(ZooError, match=r"a: the index holds .* belongs; write the zoo again"):
        load_zoo(zoo).entry(0)


def test_a_zoo_stores_all_weights_or_none(tmp_path: Path) -> None:
    entry = ZooEntry("a", "a", ModelRef("a"))
    for reference, weights in ((False, RemoteWeights("0" * 16, 8)), (True, checkpoint_bytes({"w": torch.ones(3)}))):
        writer = ZooWriter(tmp_path / str(reference), settings={}, reference=reference)
        with pytest.raises(ZooError, match="stores the weights of all its models or of none"):
            writer.write_shard("0", [entry], [weights])
