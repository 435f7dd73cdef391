"""Networks of the library's own families that were saved with the names of modules around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.families import family_config, initialize, run_flat, run_models
from weightspace.schema import ModelRef, ZooEntry
from weightspace.zoo.dataset import load_zoo
from weightspace.zoo.writer import ZooWriter

CONFIG = {"family": "mlp", "image_shape": [1, 8, 8], "classes": 3, "hidden": [4], "activation": "relu"}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrapped_network_of_a_zoo_computes_the_same(tmp_path: Path, prefix: str) -> None:
    config = family_config(CONFIG)
    assert config is not None
    parameters = initialize(config, ["kaiming_uniform"], torch.Generator().manual_seed(0))
    writer = ZooWriter(tmp_path / "zoo", settings={})
    blob = checkpoint_bytes({prefix + name: value[0] for name, value in parameters.items()})
    writer.write_shard("0", [ZooEntry("m", "r", ModelRef("m"), config=CONFIG)], [blob])
    writer.finish()
    zoo = load_zoo(tmp_path / "zoo")
    assert zoo.usable() is zoo and zoo.families == [config]
    [batch] = zoo.batches()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = run_flat(config, batch.architecture, batch.flat, images)
    assert torch.equal(logits, run_models(config, parameters, images))
