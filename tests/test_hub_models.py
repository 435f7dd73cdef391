"""Models on the Hub, inspected and embedded as local ones are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from loopback_hub import LoopbackHub

from weightspace.cli.main import main
from weightspace.encoder import embed, load_encoder
from weightspace.errors import CheckpointError, HubError, SettingsError, TokenError, WeightspaceError
from weightspace.inspection import inspect_location
from weightspace.io.hub_repo import HubFile
from weightspace.io.writing import save_checkpoint
from weightspace.models.autoencoder import feature_extraction_autoencoder as extraction
from weightspace.zoo.dataset import Zoo

FILES = r"resolve/|^/cdn/"
FLOATS = 24 * 40_200 / (24 * 40_200 + 8 * 100_000)
"""Share of the bytes of `network` that are weights and not its steps."""


def network(seed: int = 0, layers: int = 6, width: int = 200) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        tensors[f"layers.{layer}.weight"] = torch.randn(width, width, generator=generator) * (1 + layer)
        tensors[f"layers.{layer}.bias"] = torch.randn(width, generator=generator)
    return {**tensors, "steps": torch.arange(100_000)}


@pytest.fixture
def published(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A local file, and the same as ``org/model``."""
    save_checkpoint(network(), tmp_path / "model.safetensors")
    hub.create("org/model", {"model.safetensors": tmp_path / "model.safetensors"})
    return tmp_path / "model.safetensors"


class TestInspect:
    def test_as_a_local_file_from_its_header(self, hub: LoopbackHub, published: Path) -> None:
        (remote,) = inspect_location("org/model").inspections
        (local,) = inspect_location(published).inspections
        assert remote.architecture == local.architecture
        assert remote.token_counts == local.token_counts
        assert remote.location.startswith("org/model@")
        assert hub.bytes_served(FILES) < 20_000

    def test_a_quantised_checkpoint_is_named(
        self, hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = {"fc.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)}
        save_checkpoint(content, tmp_path / "model.safetensors")
        hub.create("org/model", {"model.safetensors": tmp_path / "model.safetensors"})
        assert main(["inspect", "org/model"]) == 0
        assert "quantised: 1\n  quantised with fp8" in capsys.readouterr().out
        assert main(["inspect", "org/model", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["models"][0]["quantization"]["method"] == "fp8"

    def test_a_repository_that_is_missing_is_one_line(
        self, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["inspect", "org/none"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: org/none: no such repository on the Hub")
        assert error.count("\n") == 1


class TestEmbed:
    def test_as_a_local_file(self, hub: LoopbackHub, published: Path, tiny_encoder: Path) -> None:
        frame = embed(["org/model", str(published)], tiny_encoder)
        assert np.array_equal(*frame["embedding"])
        assert frame["model_id"].tolist() == ["org/model", published.parent.name]
        assert frame["location"][0].startswith("org/model@")
        assert frame["share"].tolist() == [FLOATS, FLOATS]

    def test_only_what_becomes_tokens_is_fetched(self, hub: LoopbackHub, published: Path, tiny_encoder: Path) -> None:
        embed(["org/model"], tiny_encoder)
        needed = 4 * 6 * (200 * 200 + 200)
        assert needed <= hub.bytes_served(FILES) <= 1.1 * needed + HubFile.first_read

    def test_the_command(
        self, hub: LoopbackHub, published: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "e.parquet"
        words = ["embed", "org/model", "--encoder", str(tiny_encoder), "--output", str(output), "--max-bytes", "100kB"]
        assert main(words) == 0
        assert "org/model: 5." in capsys.readouterr().out
        assert 0.09 * FLOATS < pd.read_parquet(output)["share"][0] < 100_000 / (24 * 40_200) * FLOATS

    def test_an_adapter_folder_and_a_pipeline_of_parts(
        self, hub: LoopbackHub, published: Path, tiny_encoder: Path
    ) -> None:
        hub.create("org/pipe", {"unet/model.safetensors": published, "vae/model.safetensors": published})
        assert embed(["org/pipe"], tiny_encoder)["model_id"].tolist() == ["org/pipe:unet", "org/pipe:vae"]
        assert embed(["org/pipe:vae"], tiny_encoder)["model_id"].tolist() == ["org/pipe:vae"]

    def test_a_quantised_checkpoint_is_refused(self, hub: LoopbackHub, tmp_path: Path, tiny_encoder: Path) -> None:
        content = {"fc.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)}
        save_checkpoint(content, tmp_path / "model.safetensors")
        hub.create("org/model", {"model.safetensors": tmp_path / "model.safetensors"})
        with pytest.raises(CheckpointError, match=r"org/model@.*quantised with fp8"):
            embed(["org/model"], tiny_encoder)

    def test_a_zoo_on_the_hub(self, hub: LoopbackHub, tiny_zoo: Zoo, tiny_encoder: Path) -> None:
        files = {
            path.relative_to(tiny_zoo.path).as_posix(): path for path in tiny_zoo.path.rglob("*") if path.is_file()
        }
        hub.create("org/zoo", files, repo_type="dataset")
        remote, local = (embed([location], tiny_encoder) for location in ("org/zoo", str(tiny_zoo.path)))
        assert np.array_equal(np.stack(remote["embedding"]), np.stack(local["embedding"]))
        assert remote["location"][0].startswith("org/zoo@")

    def test_an_encoder_on_the_hub(self, hub: LoopbackHub, published: Path, tiny_encoder: Path) -> None:
        files = {path.name: path for path in tiny_encoder.iterdir() if path.is_file()}
        hub.create("org/encoder", files)
        assert np.array_equal(
            embed([str(published)], "org/encoder")["embedding"][0],
            embed([str(published)], tiny_encoder)["embedding"][0],
        )

    def test_an_encoder_that_is_missing(self, hub: LoopbackHub) -> None:
        with pytest.raises(WeightspaceError, match="org/none: no such repository on the Hub"):
            load_encoder("org/none")


class TestSampling:
    def test_a_budget_above_the_model_changes_nothing(self, published: Path, tiny_encoder: Path) -> None:
        encoder = load_encoder(tiny_encoder)
        whole = encoder.embed_checkpoint(published)
        estimate, share = encoder.estimate(published, 10**9)
        assert share == 1.0
        assert torch.allclose(whole, estimate, rtol=1e-4, atol=1e-5)

    def test_an_estimate_is_near_the_embedding_and_nearer_with_more_bytes(
        self, published: Path, tiny_encoder: Path, tmp_path: Path
    ) -> None:
        encoder = load_encoder(tiny_encoder)
        whole = encoder.embed_checkpoint(published)
        save_checkpoint(network(1, width=150), tmp_path / "other.safetensors")
        between = (encoder.embed_checkpoint(tmp_path / "other.safetensors") - whole).norm()

        def error(budget: int) -> float:
            estimates = [encoder.estimate(published, budget, seed)[0] for seed in range(5)]
            return float(np.mean([(estimate - whole).norm() for estimate in estimates]))

        assert error(300_000) < error(20_000)
        assert error(300_000) < between

    def test_the_seed_decides(self, published: Path, tiny_encoder: Path) -> None:
        encoder = load_encoder(tiny_encoder)
        first, again, other = (encoder.estimate(published, 100_000, seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_large_model_needs_a_budget(
        self, published: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(extraction, "LARGEST_WHOLE", 900_000)
        with pytest.raises(TokenError, match=r"964,800 bytes of weights are too many to read whole.*--max-bytes 64MB"):
            embed([str(published)], tiny_encoder)
        assert embed([str(published)], tiny_encoder, max_bytes=500_000)["share"][0] < 1

    def test_a_budget_of_nothing(self, published: Path, tiny_encoder: Path) -> None:
        with pytest.raises(SettingsError, match="max_bytes: 10 bytes hold no window"):
            embed([str(published)], tiny_encoder, max_bytes=10)


LLAMA_70B = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
    "input_layernorm": (8192,),
    "post_attention_layernorm": (8192,),
}


def sparse_llama(hub: LoopbackHub, folder: Path) -> int:
    """Publishes a checkpoint of 70 billion bf16 parameters in 80 shards whose data takes no room; returns its bytes."""
    shapes = {f"model.layers.{layer}.{name}.weight": shape for layer in range(80) for name, shape in LLAMA_70B.items()}
    shapes |= {
        "model.embed_tokens.weight": (128256, 8192),
        "lm_head.weight": (128256, 8192),
        "model.norm.weight": (8192,),
    }
    shards: dict[int, dict[str, tuple[int, ...]]] = {number: {} for number in range(80)}
    for place, (name, shape) in enumerate(sorted(shapes.items())):
        shards[place * 80 // len(shapes)][name] = shape
    weight_map, total = {}, 0
    hub.create("org/llama-70b", {"config.json": '{"model_type": "llama"}'})
    for number, own in shards.items():
        file, end, entries = f"model-{number + 1:05d}-of-00080.safetensors", 0, {}
        for name, shape in own.items():
            start, end = end, end + 2 * int(np.prod(shape))
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        raw = json.dumps(entries).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + end)
        hub.add_file("org/llama-70b", file, folder / file, sha256=f"{number:064x}")
        total += end
    hub.commit("org/llama-70b", {"model.safetensors.index.json": json.dumps({"weight_map": weight_map})})
    return total


class TestSeventyBillion:
    @pytest.fixture
    def total(self, hub: LoopbackHub, tmp_path: Path) -> int:
        return sparse_llama(hub, tmp_path)

    def test_inspect(self, hub: LoopbackHub, total: int) -> None:
        (inspection,) = inspect_location("org/llama-70b").inspections
        assert 2 * inspection.parameters == total
        assert inspection.parameters > 70e9
        assert hub.bytes_served(FILES) < 2_000_000

    @pytest.mark.slow
    def test_embed_within_a_budget_and_in_constant_memory(
        self, hub: LoopbackHub, total: int, tiny_encoder: Path, tmp_path: Path
    ) -> None:
        save_checkpoint({"fc.weight": torch.zeros(2000, 2000)}, tmp_path / "small.safetensors")
        small = peak_memory(str(tmp_path / "small.safetensors"), tiny_encoder, tmp_path)
        before = hub.bytes_served(FILES)
        large = peak_memory("org/llama-70b", tiny_encoder, tmp_path)
        headers = 80 * HubFile.first_read
        assert hub.bytes_served(FILES) - before <= 8_000_000 + headers
        read = pd.read_parquet(tmp_path / "e.parquet")["share"][0] * total
        assert hub.bytes_served(FILES) - before <= 1.1 * read + headers
        assert 0.9 * 8e6 / total < pd.read_parquet(tmp_path / "e.parquet")["share"][0] <= 8e6 / total
        # 8 MB of weights are 16 MB of float32 tokens, whatever they come from.
        assert large - small < 300e6


def peak_memory(location: str, encoder: Path, folder: Path) -> int:
    """Embeds in a process of its own; returns the most bytes that it held."""
    code = (
        "import resource, sys; from weightspace.cli.main import main; code = main(sys.argv[1:]); "
        "print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    words = ["embed", location, "--encoder", str(encoder), "--output", str(folder / "e.parquet"), "--max-bytes", "8MB"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


def test_the_hub_goes_away_while_embedding(
    hub: LoopbackHub, published: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightspace.io.hub.FIRST_WAIT", 0.01)
    monkeypatch.setattr("weightspace.io.hub.ATTEMPTS", 2)
    hub.call(FILES, hub.stop, skip=2)
    with pytest.raises(HubError, match=r"org/model@.*: the Hub at .* is out of reach"):
        embed(["org/model"], tiny_encoder)
    hub.start()
    assert len(embed(["org/model"], tiny_encoder)) == 1
