"""The safety net itself: without these, the suite could pass with its checks switched off."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from jaxtyping import TypeCheckError

from weightspace.tokenizers.rows import ChannelTokenizer


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        ChannelTokenizer(4).detokenize_batch(torch.zeros(2, 3), None)


def test_nothing_leaves_this_machine() -> None:
    assert os.environ["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    with pytest.raises(RuntimeError, match=r"192\.0\.2\.1"), socket.socket() as outside:
        outside.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match=r"example\.org"):
        socket.getaddrinfo("example.org", 80)


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
