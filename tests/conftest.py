"""Settings of every test: shapes and types are checked at run time, and nothing leaves this machine.

The Hub that tests talk to is `loopback_hub`, started here before anything imports ``huggingface_hub``, which reads its
address once.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook
from loopback_hub import LoopbackHub

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before tests/conftest.py could name the Hub that tests talk to")

_HUB = LoopbackHub().start()
_HF_HOME = tempfile.mkdtemp(prefix="weightspace-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)

# Before torch, transformers and datasets are imported, here and in the processes that tests start.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)
os.environ.update(
    DISABLE_SAFETENSORS_CONVERSION="1",
    HF_ENDPOINT=_HUB.url,
    HF_HOME=_HF_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",  # the client alone decides, and the loopback Hub has only LFS
    HF_TOKEN=_HUB.token,
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TQDM_DISABLE="1",
)

ROOT = Path(__file__).parent.parent


def _checked_modules() -> list[str]:
    """Every module with shapes to check.

    The hook takes a name for all that stands below it too, and breaks transformers' strict config dataclasses, so that
    modules are named one by one.
    """
    modules = [path for path in (ROOT / "weightspace").rglob("*.py") if not path.name.startswith("configuration_")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules if path.name != "__init__.py"]


install_import_hook(_checked_modules(), "beartype.beartype")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuses connections and look-ups that would leave this machine."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _expect_loopback(address[0])
        connect(self, address)

    def guarded_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host is not None:
            _expect_loopback(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


def _expect_loopback(host: str) -> None:
    if host == "localhost":
        return
    if host.startswith("datasets-server."):
        raise socket.gaierror(f"{host!r}: there is no dataset viewer here")  # datasets asks, and does without
    try:
        inside = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        inside = False
    if not inside:
        raise RuntimeError(f"a test wants to reach {host!r}; tests stay on this machine")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub, and clients with empty caches, here and in processes that the test starts."""
    import huggingface_hub.utils._cache_assets as assets
    import huggingface_hub.utils._cache_manager as manager
    from huggingface_hub import constants

    cache = tmp_path_factory.mktemp("hf")
    for name, modules in (("HF_HUB_CACHE", (constants, manager)), ("HF_ASSETS_CACHE", (constants, assets))):
        monkeypatch.setenv(name, str(cache / name.lower()))
        for module in modules:
            monkeypatch.setattr(module, name, str(cache / name.lower()))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    _HUB.clear()
    yield _HUB
    _HUB.start()  # a test may have stopped it
    assert not _HUB.errors, "\n".join(_HUB.errors)


# What follows imports the library in the fixtures: at the top it would be loaded before the hook is in place.


@pytest.fixture(scope="session")
def tiny_zoo_settings() -> Any:
    """Settings of ``tiny_zoo``: two architectures, each with two activations."""
    from weightspace.zoo.training import ZooSettings

    return ZooSettings(
        runs=24,
        architectures=({"family": "mlp", "hidden": [6]}, {"family": "cnn", "channels": [3, 4]}),
        activations=("relu", "tanh"),
        learning_rates=(3e-3, 1e-2),
        train_sizes=(40, 80),
        steps=(6, 12),
        checkpoints=(0.5, 1.0),
        batch_size=16,
        device="cpu",
    )


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory, tiny_zoo_settings: Any) -> Any:
    """48 models of 24 runs. Tests read it and write nothing into its folder."""
    from weightspace.zoo.training import train_zoo

    return train_zoo(tiny_zoo_settings, tmp_path_factory.mktemp("tiny") / "zoo")


@pytest.fixture(scope="session")
def tiny_encoder_settings() -> Any:
    """Settings of ``tiny_encoder``: float32, so that results compare to the last bit on any processor."""
    from weightspace.training.autoencoder import AutoencoderSettings, EncoderSettings
    from weightspace.training.behaviour import BehaviourSettings
    from weightspace.training.settings import LoopSettings

    return AutoencoderSettings(
        encoder=EncoderSettings(hidden_size=32, layers=1, heads=2, window=16),
        behaviour=BehaviourSettings(weight=0.5, images=4),
        loop=LoopSettings(
            steps=20,
            batch_size=8,
            mixed_precision="no",
            tracker="none",
            log_every=5,
            validate_every=10,
            checkpoint_every=8,
        ),
    )


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_zoo: Any, tiny_encoder_settings: Any) -> Path:
    """Folder of an autoencoder that was trained on ``tiny_zoo``. Tests read it and write nothing into it."""
    from weightspace.training.autoencoder import train_autoencoder

    return train_autoencoder(tiny_zoo.path, tmp_path_factory.mktemp("tiny") / "encoder", tiny_encoder_settings)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP of random weights, with an image processor and a tokenizer of single bytes."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 514, "max_position_embeddings": 16, "bos_token_id": 512, "eos_token_id": 513}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=12))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_joint(tmp_path_factory: pytest.TempPathFactory, tiny_zoo: Any, tiny_clip: Path) -> Path:
    """Folder of a joint model that saw ``tiny_zoo`` for a few steps, and its datasets through ``tiny_clip``."""
    from weightspace.training.autoencoder import EncoderSettings
    from weightspace.training.joint import JointSettings, TowerSettings, train_joint
    from weightspace.training.settings import LoopSettings

    settings = JointSettings(
        towers=TowerSettings(
            encoder=EncoderSettings(hidden_size=16, layers=1, heads=2, window=16),
            hidden_size=16,
            pooling_heads=2,
            projection_dim=16,
            bins=4,
        ),
        image_encoder=str(tiny_clip),
        sample=20,
        images=20,
        loop=LoopSettings(steps=4, batch_size=8, mixed_precision="no", tracker="none", validate_every=4),
    )
    return train_joint(tiny_zoo.path, tmp_path_factory.mktemp("tiny") / "clip_joint", settings)


@pytest.fixture(scope="session")
def tiny_prior_settings() -> Any:
    """Settings of ``tiny_prior``."""
    from weightspace.training.prior import PriorSettings, PriorShape
    from weightspace.training.settings import LoopSettings

    loop = LoopSettings(
        steps=4,
        batch_size=8,
        mixed_precision="no",
        tracker="none",
        checkpoint_every=2,
        log_every=2,
        validate_every=2,
    )
    return PriorSettings(shape=PriorShape(hidden_size=16, layers=1, heads=2), loop=loop)


@pytest.fixture(scope="session")
def tiny_prior(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_zoo: Any,
    tiny_encoder: Path,
    tiny_clip_joint: Path,
    tiny_prior_settings: Any,
) -> Path:
    """Folder of a prior over the latents of ``tiny_encoder``, with ``tiny_clip_joint``. Tests write nothing into it."""
    from weightspace.training.prior import train_prior

    output = tmp_path_factory.mktemp("tiny") / "prior"
    return train_prior(tiny_zoo.path, output, tiny_prior_settings, autoencoder=tiny_encoder, joint=tiny_clip_joint)


@pytest.fixture(scope="session")
def tiny_code_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_zoo: Any, tiny_encoder_settings: Any) -> Path:
    """Folder of an autoencoder with codes that was trained on ``tiny_zoo``. Tests write nothing into it."""
    from dataclasses import replace

    from weightspace.training.autoencoder import train_autoencoder

    encoder = replace(tiny_encoder_settings.encoder, latent_size=8, code_levels=(5, 4))
    settings = replace(tiny_encoder_settings, encoder=encoder)
    return train_autoencoder(tiny_zoo.path, tmp_path_factory.mktemp("tiny") / "code_encoder", settings)


@pytest.fixture(scope="session")
def tiny_code_prior(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_zoo: Any,
    tiny_code_encoder: Path,
    tiny_clip_joint: Path,
    tiny_prior_settings: Any,
) -> Path:
    """Folder of a prior over the codes of ``tiny_code_encoder``. Tests write nothing into it."""
    from weightspace.training.prior import CodePriorSettings, train_prior

    settings = CodePriorSettings(shape=tiny_prior_settings.shape, loop=tiny_prior_settings.loop)
    output = tmp_path_factory.mktemp("tiny") / "code_prior"
    return train_prior(tiny_zoo.path, output, settings, autoencoder=tiny_code_encoder, joint=tiny_clip_joint)
