"""Settings of every test: shapes and types are checked at run time, and nothing leaves this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch, transformers and datasets are imported, here and in the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TQDM_DISABLE="1",
)

import hypothesis
import pytest
from jaxtyping import install_import_hook

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
    try:
        inside = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        inside = False
    if not inside:
        raise RuntimeError(f"a test wants to reach {host!r}; tests stay on this machine")
