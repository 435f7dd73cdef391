"""Folders of this library's own models that somebody changed: an encoder, a joint model and both priors.

Whatever a file says, loading ends with the model or with one line of the library's own error; nothing is executed,
fetched or asked, and no size is believed before the weights show it.
"""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel

from weightspace.encoder import load_encoder
from weightspace.errors import WeightspaceError
from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
from weightspace.models.joint.configuration_joint import (
    DatasetTowerConfig,
    JointConfig,
    ResultTowerConfig,
    WeightTowerConfig,
)
from weightspace.models.joint.feature_extraction_joint import JointFeatureExtractor
from weightspace.models.joint.modeling_joint import JointModel
from weightspace.models.loading import load_trained
from weightspace.models.prior.configuration_prior import WeightCodePriorConfig, WeightPriorConfig
from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
from weightspace.models.prior.modeling_prior import WeightPriorModel

CONFIG, EXTRACTOR, WEIGHTS, INDEX = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
MODELS: dict[str, type[Any]] = {
    "encoder": WeightAutoencoderModel,
    "joint": JointModel,
    "flow": WeightPriorModel,
    "codes": WeightCodePriorModel,
}
KINDS = tuple(MODELS)

TRANSFORMER = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "position_size": 4}
LAYERS = {"num_encoder_layers": 1, "num_decoder_layers": 1}
VALUES = ("x", 10**30, -1, None, math.nan, [[1]], 2**40, {"a": {"b": 1}}, True, 0, 1e308, [], 10**400, 0.5, "\x1b[31m")
"""What a field is changed to; each field gets a few of them, in turn."""

MOST_MEMORY = 2**28
LONGEST = 1000


class Tripwire:
    """Leaves a mark where a pickle is opened."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, bytes]]:
        return Path.write_bytes, (Path("executed"), b"")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untouched folder of each kind."""
    root = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    plain = WeightAutoencoderConfig(**TRANSFORMER, **LAYERS, token_size=6, latent_size=4, projection_size=3, window=8)
    coded = WeightAutoencoderConfig(**{**plain.to_dict(), "code_levels": [3, 4]})
    towers = {"hidden_size": 8, "pooling_heads": 2, "position_size": 4}
    joint = JointConfig(
        dataset_config=DatasetTowerConfig(**towers, feature_size=5, components=3),
        weight_config=WeightTowerConfig(**towers, encoder_config=plain),
        result_config=ResultTowerConfig(bins=4, hidden_size=8),
        projection_dim=8,
    )
    sizes = {**TRANSFORMER, "num_layers": 1, "class_size": 16, "result_size": 8, "activations": ["relu"]}
    models: dict[str, Any] = {
        "encoder": WeightAutoencoderModel(plain),
        "joint": JointModel(joint),
        "flow": WeightPriorModel(WeightPriorConfig(**sizes, autoencoder_config=plain, time_size=4)),
        "codes": WeightCodePriorModel(WeightCodePriorConfig(**sizes, autoencoder_config=coded, number_size=4)),
    }
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        extractor = JointFeatureExtractor if kind == "joint" else WeightFeatureExtractor
        extractor("channel", 6, 0.0, 0.1).save_pretrained(root / kind)
    return {kind: root / kind for kind in models}


def load(kind: str, folder: Path) -> Any:
    return load_encoder(folder) if kind in ("encoder", "joint") else load_trained(folder, MODELS[kind])


def fields_of(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields where each field of a config stands, those of configs inside of it, too."""
    for name, value in values.items():
        yield (*path, name)
        if name.endswith("_config"):
            yield from fields_of(value, (*path, name))


def changed_configs(values: dict[str, Any], each: int) -> Iterator[tuple[str, str]]:
    """Yields texts of configs in which one field was changed, with a name."""
    for number, path in enumerate(fields_of(values)):
        for value in (VALUES[(each * number + turn) % len(VALUES)] for turn in range(each)):
            changed = json.loads(json.dumps(values))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value
            yield f"{'.'.join(path)}={str(value)[:20]!a}", json.dumps(changed)


def added_fields() -> Iterator[Mapping[str, Any]]:
    yield {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoFeatureExtractor": "evil.E"}}
    yield {"auto_map": "evil"}
    yield {"attn_implementation": "org/kernel"}
    yield {"_attn_implementation": "org/kernel", "_attn_implementation_internal": "org/kernel"}
    yield {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    yield {"transformers_weights": "../../other/model.safetensors"}
    yield {"configuration_files": ["config.5.0.0.json"]}
    yield {"num_labels": 10**12}
    yield {"id2label": {"x": 1}}
    yield {"label2id": 10**30, "problem_type": "none", "chunk_size_feed_forward": -3, "return_dict": "no"}
    yield {"per_layer_config": {"0": {}}}
    yield {"torch_dtype": "__dict__"}
    yield {"dtype": "int8"}
    yield {"model_type": "bert"}
    yield {"model_type": ["bert"]}
    yield {"fusion_config": {"a": 1}}
    yield {"distributed_config": {"tp_size": 10**9}}
    yield {"forward": 1}


TEXTS = (
    "",
    "{",
    "[]",
    "null",
    '{"a": 1, "a": 2}',
    "[" * 100_000,
    "\ufeff{}",
    '{"hidden_size": ' + "9" * 5000 + "}",
    "\x00",
)


def header(entries: Mapping[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def broken_weights(folder: Path) -> Iterator[tuple[str, bytes]]:
    whole = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entries, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in entries if name != "__metadata__"]
    for size in (0, 4, 8, 20, 8 + length, len(whole) // 2, len(whole) - 1):
        yield f"first {size} bytes", whole[:size]
    yield "longest header", struct.pack("<Q", 2**62) + whole[8:]
    yield "pickle", pickle.dumps(Tripwire())
    first, second = entries[names[0]], entries[names[1]]
    for change in ({"dtype": "I64"}, {"dtype": "F8_E4M3"}, {"dtype": 5}, {"shape": [2**40, 2**40]}, {"shape": [-1]}):
        yield f"first tensor {change}", header({**entries, names[0]: {**first, **change}}, data)
    yield "same bytes", header({**entries, names[0]: {**first, "data_offsets": second["data_offsets"]}}, data)
    yield "swapped", header({**entries, names[0]: second, names[1]: first}, data)
    yield "one is missing", header({name: entries[name] for name in names[1:]}, data)
    yield "renamed", header({name + ".x": entries[name] for name in names}, data)
    yield "nothing", header({})


TENSORS = ("nan", "strange name", "int8", "missing")


def change_tensors(file: Path, how: str) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if how == "nan":
        tensors[name] = torch.full_like(tensors[name], math.nan)
    elif how == "strange name":
        tensors["\x1b[31m" + "x" * 5000] = torch.zeros(1)
    elif how == "int8":
        tensors = {key: value.to(torch.int8) for key, value in tensors.items()}
    else:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def put_index(folder: Path, shards: Any) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Tripwire()))
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def shard_maps() -> Iterator[Any]:
    yield from (
        {},
        [],
        None,
        "x",
        {"a": 1},
        {"a": "../../other.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "b/c.safetensors"},
    )
    yield {"a": "missing.safetensors"}
    yield {"a": "pytorch_model.bin"}
    yield {str(number): f"{number}.safetensors" for number in range(5000)}


def extractor_texts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from changed_configs(values, 4)
    for added in ({"auto_map": {"AutoFeatureExtractor": "evil.E"}}, {"batch": 1}, {"_tokenizer": None}, {"links": "x"}):
        yield str(added), json.dumps({**values, **added})
    yield "other size", json.dumps({**values, "token_size": 7})
    yield from ((f"text {text[:9]!a}", text) for text in TEXTS)


def variants(folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yields what is changed in a copy of a folder, and what changes it."""
    config, extractor = (json.loads((folder / name).read_text()) for name in (CONFIG, EXTRACTOR))
    texts = [(CONFIG, *one) for one in changed_configs(config, 3)]
    texts += [(CONFIG, str(added)[:40], json.dumps({**config, **added})) for added in added_fields()]
    texts += [(CONFIG, f"text {text[:9]!a}", text) for text in TEXTS]
    texts += [(EXTRACTOR, *one) for one in extractor_texts(extractor)]
    for file, name, text in texts:
        yield f"{file}: {name}", lambda copy, file=file, text=text: (copy / file).write_text(text, encoding="utf-8")
    for name, content in broken_weights(folder):
        yield f"{WEIGHTS}: {name}", lambda copy, content=content: (copy / WEIGHTS).write_bytes(content)
    for name in TENSORS:
        yield f"{WEIGHTS}: {name}", lambda copy, name=name: change_tensors(copy / WEIGHTS, name)
    for shards in shard_maps():
        yield f"{INDEX}: {str(shards)[:30]}", lambda copy, shards=shards: put_index(copy, shards)
    for file in (CONFIG, EXTRACTOR, WEIGHTS):
        yield f"no {file}", lambda copy, file=file: (copy / file).unlink()


def check(kind: str, folder: Path, copy: Path, every: int) -> None:
    """Tries every n-th changed folder of a kind."""
    tried = refused = 0
    for name, change in islice(variants(folder), KINDS.index(kind), None, every):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        tried += 1
        try:
            load(kind, copy)
        except WeightspaceError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < LONGEST, f"{name}: {error!r}"
            assert str(copy) in str(error), f"{name}: {error}"
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
    assert tried > 150 / every and refused > 0.7 * tried


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Refuses questions, output, memory and what a pickle would do, in whatever a test loads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_MEMORY
    assert not (tmp_path / "executed").exists()
    output, errors = capfd.readouterr()
    assert not output
    assert not [line for line in errors.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("kind", KINDS)
class TestChangedFolders:
    def test_each_is_one_line_or_the_model(self, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
        check(kind, folders[kind], tmp_path / "changed", every=8)

    @pytest.mark.slow
    def test_all_are_one_line_or_the_model(self, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
        check(kind, folders[kind], tmp_path / "changed", every=1)

    def test_what_lies_beside_changes_nothing(self, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
        config = {**json.loads((copy / CONFIG).read_text()), "attn_implementation": "org/kernel"}
        (copy / CONFIG).write_text(json.dumps(config))
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/other", "auto_mapping": {"a": "b"}}
        (copy / "adapter_config.json").write_text(json.dumps(adapter))
        (copy / "processor_config.json").write_text(json.dumps({"feature_extractor": {"tokenizer": "dense"}}))
        (copy / "modeling_evil.py").write_text("raise SystemExit")
        for name in ("pytorch_model.bin", ".metadata", "shard-00000-model-00000-of-00001.safetensors"):
            (copy / name).write_bytes(pickle.dumps(Tripwire()))
        model, extractor = load_trained(copy, MODELS[kind])
        assert model.config._attn_implementation == "eager"
        assert (extractor.tokenizer, extractor.std) == ("channel", 0.1)
        expected = load_file(folders[kind] / WEIGHTS)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    def test_auto_classes_are_guarded_too(self, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
        stored = json.loads((copy / CONFIG).read_text())
        size = "projection_dim" if kind == "joint" else "intermediate_size"
        for change, words in (
            ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
            ({size: 2**30}, f"{size} .* is above the limit"),
            ({size: 2**19}, "has shape .* its config asks for"),
            ({size: "x"}, f"{size}.*expected int, got str"),
        ):
            (copy / CONFIG).write_text(json.dumps({**stored, **change}))
            with pytest.raises(WeightspaceError, match=words):
                AutoModel.from_pretrained(copy)
        for name, value in (("auto_map", {"AutoFeatureExtractor": "evil.E"}), ("token_size", 2**40), ("batch", 1)):
            values = json.loads((folders[kind] / EXTRACTOR).read_text())
            (copy / EXTRACTOR).write_text(json.dumps({**values, name: value}))
            with pytest.raises(WeightspaceError, match=name):
                AutoFeatureExtractor.from_pretrained(copy)

    def test_choices_of_earlier_versions_load_if_they_are_the_one_left(
        self, kind: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
        stored = json.loads((copy / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps({**stored, "loss": "nt_xent", "positives": "all"}))
        load(kind, copy)
        (copy / CONFIG).write_text(json.dumps({**stored, "loss": "sigmoid"}))
        with pytest.raises(WeightspaceError, match="unknown field 'loss'"):
            load(kind, copy)

    def test_shards_are_the_model(self, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
        whole, _ = load_trained(folders[kind], MODELS[kind])
        (tmp_path / "s").mkdir()
        save_torch_state_dict(whole.state_dict(), tmp_path / "s", max_shard_size="2KB", metadata={"format": "pt"})
        for name in (CONFIG, EXTRACTOR):
            shutil.copy(folders[kind] / name, tmp_path / "s" / name)
        assert not (tmp_path / "s" / WEIGHTS).exists()
        again, _ = load_trained(tmp_path / "s", MODELS[kind])
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
