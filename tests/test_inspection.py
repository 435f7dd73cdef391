from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from weightspace.cli.main import main
from weightspace.errors import CheckpointError, SettingsError, WeightspaceError
from weightspace.inspection import inspect_location
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import save_checkpoint
from weightspace.networks.families import MLPConfig, Network
from weightspace.tokenizers import TOKENIZERS, get_tokenizer


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(tensors, path)
    return path


def network() -> dict[str, torch.Tensor]:
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    return {**layers.state_dict(), "half": torch.ones(5, dtype=torch.float16)}


def test_counts_are_those_of_the_tokens_themselves(tmp_path: Path) -> None:
    path = save(network(), tmp_path / "net.safetensors")
    (inspection,) = inspect_location(path, token_size=8).inspections
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors()
    assert inspection.location == str(path)
    assert inspection.parameters == sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert inspection.dtypes == {"F32": inspection.parameters - 5, "F16": 5}
    assert inspection.left_out == {"1.num_batches_tracked": 1}
    accepting = {name for name in TOKENIZERS if get_tokenizer(name, 8).applies_to(inspection.architecture)}
    assert set(inspection.token_counts) == accepting >= {"channel", "dense"}
    for name, count in inspection.token_counts.items():
        assert count == len(get_tokenizer(name, 8).tokenize(tensors, inspection.architecture).tokens)


def test_the_record_is_json(tmp_path: Path) -> None:
    (inspection,) = inspect_location(save(network(), tmp_path / "net.safetensors")).inspections
    record = json.loads(json.dumps(inspection.to_record()))
    assert sum(layer["parameters"] for layer in record["layers"]) == record["parameters"] == inspection.parameters
    assert [tensor["shape"] for tensor in record["layers"][0]["tensors"]] == [
        list(tensor.shape) for tensor in inspection.architecture.layers[0].tensors
    ]
    assert record["left_out"][0]["tensor"] == "1.num_batches_tracked"
    assert record["left_out"][0]["entries"] == 1
    assert record["not_finite"] is None


def test_a_config_beside_the_weights_gives_order_and_groups(tmp_path: Path) -> None:
    family = MLPConfig(hidden=(4, 4), image_shape=(1, 2, 2), classes=2)
    module = Network(family)
    save(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(family.to_dict()))
    (inspection,) = inspect_location(tmp_path).inspections
    assert inspection.architecture.ordered
    assert [group.size for group in inspection.architecture.groups] == [4, 4]


def test_tied_tensors_are_told(tmp_path: Path) -> None:
    weight = torch.ones(3, 2)
    path = save({"a.weight": weight, "b.weight": weight}, tmp_path / "tied.safetensors")
    (inspection,) = inspect_location(path).inspections
    assert inspection.parameters == 6
    assert inspection.to_record()["aliases"] == {"b.weight": "a.weight"}
    assert inspection.architecture.notes


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_read_on_request_only(tmp_path: Path, dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]).to(dtype)
    path = save({"bad": bad, "good": torch.ones(4, dtype=dtype)}, tmp_path / "net.safetensors")
    assert inspect_location(path).inspections[0].not_finite is None
    assert inspect_location(path, check_values=True).inspections[0].not_finite == {"bad": 3}


def test_a_tree_lists_every_checkpoint_and_what_cannot_be_read(tmp_path: Path) -> None:
    save(network(), tmp_path / "b" / "model.safetensors")
    save(network(), tmp_path / "a.safetensors")
    save(network(), tmp_path / ".cache" / "hidden.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    (tmp_path / "notes.txt").write_text("")
    survey = inspect_location(tmp_path)
    assert [i.location for i in survey.inspections] == [
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b" / "model.safetensors"),
    ]
    assert survey.inspections[0].architecture is survey.inspections[1].architecture
    ((file, reason),) = survey.unreadable
    assert file == str(tmp_path / "broken.safetensors")
    assert reason


def test_shards_count_as_one_checkpoint(tmp_path: Path) -> None:
    save({"a.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save({"b.weight": torch.ones(2, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    save({"c.weight": torch.ones(2, 4)}, tmp_path / "other.safetensors")
    index = {f"{letter}.weight": f"model-0000{i}-of-00002.safetensors" for i, letter in ((1, "a"), (2, "b"))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    survey = inspect_location(tmp_path)
    assert [(Path(i.location).name, i.parameters) for i in survey.inspections] == [
        ("model.safetensors.index.json", 10),
        ("other.safetensors", 8),
    ]
    assert survey.unreadable == ()


@pytest.mark.parametrize("name", ["", "none.safetensors", "broken.safetensors", "pickle"])
def test_a_lone_location_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    if name == "pickle":
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"")
    elif name == "broken.safetensors":
        (tmp_path / name).write_bytes(b"\xff" * 9)
    with pytest.raises(WeightspaceError) as caught:
        inspect_location(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_zoo_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "zoo.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weightspace zoo info"):
        inspect_location(tmp_path)


def test_an_impossible_token_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="token_size"):
        inspect_location(save(network(), tmp_path / "net.safetensors"), token_size=0)


class TestAdapters:
    def save(self, folder: Path, config: dict[str, object], *, trained: bool = True) -> Path:
        module = "base_model.model.encoder.query"
        factors = {
            f"{module}.lora_A.weight": torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),
            f"{module}.lora_B.weight": torch.full((8, 4), float(trained)),
        }
        save(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def config(self, **changes: object) -> dict[str, object]:
        return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base", **changes}

    def test_what_is_known_of_one(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path, self.config(target_modules=["query"]))
        (inspection,) = inspect_location(folder).inspections
        adapter = inspection.adapter
        assert adapter is not None
        assert (adapter.base_model, adapter.modules, adapter.ranks, adapter.scalings) == ("org/base", 1, (4,), (2.0,))
        assert (adapter.problems, adapter.untrained) == ((), None)
        assert "lora" in inspection.token_counts

    @pytest.mark.parametrize("trained", [True, False])
    def test_untrained_ones_are_flagged_where_values_are_read(
        self, tmp_path: Path, trained: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = self.save(tmp_path, self.config(), trained=trained)
        (inspection,) = inspect_location(folder, check_values=True).inspections
        assert inspection.adapter is not None
        assert inspection.adapter.untrained is not trained
        assert main(["inspect", str(folder), "--values"]) == 0
        out = capsys.readouterr().out
        assert "LoRA adapter of org/base\n1 modules, rank 4, scaling 2\nnamed as by peft\n" in out
        assert ("untrained: no module has an update" in out) is not trained

    def test_a_config_that_does_not_fit(self, tmp_path: Path) -> None:
        (inspection,) = inspect_location(self.save(tmp_path, self.config(r=16))).inspections
        assert inspection.adapter is not None
        assert len(inspection.adapter.problems) == 1
        assert "16" in inspection.adapter.problems[0]

    def test_another_kind_of_adapter_is_named(self, tmp_path: Path) -> None:
        (inspection,) = inspect_location(self.save(tmp_path, self.config(peft_type="LOHA"))).inspections
        assert inspection.adapter is not None
        assert "LOHA" in inspection.adapter.problems[0]

    def test_other_models_have_none(self, tmp_path: Path) -> None:
        (inspection,) = inspect_location(save(network(), tmp_path / "net.safetensors")).inspections
        assert inspection.adapter is None
