"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weightspace.errors import SettingsError


@dataclass(frozen=True)
class LoopSettings:
    """How a model is trained, whatever it is.

    Attributes:
        steps: optimizer steps.
        batch_size: zoo models a process and micro-batch.
        gradient_accumulation_steps: micro-batches an optimizer step.
        learning_rate: peak of AdamW's learning rate.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises linearly from 0.
        schedule: after the warm-up: ``"cosine"`` to 0, ``"linear"`` to 0, or ``"constant"``.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: ``"auto"`` is bf16 where the processor computes it faster than float32, else ``"no"``.
        seed: draws initial weights, batches and augmentations.
        checkpoint_every: steps between checkpoints; 0 for none.
        keep_checkpoints: how many of them stay on disk.
        log_every: steps between rows of the history.
        validate_every: steps between validations; 0 for none but the last.
        best: validation figure whose lowest value says which weights are kept, e.g. ``"validation_loss"``; None keeps
            the last.
        tracker: where the history goes besides ``history.jsonl``; any name that Accelerate knows, or ``"none"``.
    """

    steps: int = 1000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    log_every: int = 10
    validate_every: int = 100
    best: str | None = None
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        """Refuses values that cannot be trained with."""
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: {getattr(self, name)} is too small, give 1 or more")
        for name in ("checkpoint_every", "validate_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name}: {getattr(self, name)} is negative, give 0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name}: {getattr(self, name)} is not positive, give e.g. 0.001")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup: {self.warmup} is no share of the steps, give 0 to below 1")
