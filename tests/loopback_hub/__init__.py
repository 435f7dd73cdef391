"""A Hugging Face Hub on 127.0.0.1, for the real clients: what the tests of everything that touches the Hub talk to.

``LoopbackHub`` holds repositories in memory and answers over HTTP/1.1 as huggingface.co does, as far as
``huggingface_hub``, transformers, datasets and PEFT ask. ``python -m loopback_hub`` serves a folder of repositories.
"""

from loopback_hub.messages import Request
from loopback_hub.server import LoopbackHub

__all__ = ["LoopbackHub", "Request"]
