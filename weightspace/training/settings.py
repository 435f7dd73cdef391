"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weightspace.settings import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)


@dataclass(frozen=True)
class LoopSettings(Settings):
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

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: FractionBelowOne = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0
    checkpoint_every: NonNegativeInt = 200
    keep_checkpoints: PositiveInt = 1
    log_every: PositiveInt = 10
    validate_every: NonNegativeInt = 100
    best: str | None = None
    tracker: str = "tensorboard"
