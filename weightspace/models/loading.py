"""Loading models with nothing left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_whole(kind: Any, folder: str | Path) -> Any:
    """Loads a model, in evaluation mode, all of whose weights are in its file.

    transformers only warns of weights that a file lacks and draws them at random: a model that is then used as if it
    had been trained.

    Args:
        kind: the class whose ``from_pretrained`` loads it, a model's own or ``AutoModel``.
        folder: what ``save_pretrained`` wrote.

    Raises:
        OSError: there is no model.
        ValueError: its file lacks weights, or the model cannot be made of its config.
    """
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its file lacks {len(missing)} of the tensors that its config asks for, e.g. {missing[0]}")
    return model.eval()
