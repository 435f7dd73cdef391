"""One training loop on Accelerate: any model, any loss, one process or many.

A micro-batch is a pure function of (seed, number of the micro-batch, process), so that a run that was stopped and
started again sees the same batches and ends with the same weights, without saved random states of data loaders.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from weightspace.errors import SettingsError
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import save_checkpoint
from weightspace.training.settings import LoopSettings
from weightspace.zoo.storage import write_text

_CHECKPOINTS, _HISTORY = "checkpoints", "history.jsonl"
_BEST = "best.safetensors"


@runtime_checkable
class Batches(Protocol):
    """A source of micro-batches that can start anywhere."""

    def __call__(self, start: int, process: int, processes: int) -> Iterator[Any]:
        """Yields the micro-batches of one process from number ``start`` on, without end."""


class Objective:
    """What is minimised, and what is looked at on the validation split."""

    def losses(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Returns named scalars; ``"loss"`` is minimised, the others are logged beside it."""
        raise NotImplementedError

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        """Returns named validation figures."""
        return {}


def resolve_precision(name: str) -> str:
    """Says which precision ``"auto"`` means on this machine.

    bf16 pays where there are matrix units for it: a GPU with bf16, or a processor with AMX.

    Raises:
        SettingsError: fp16 on a processor, where Accelerate would train without a gradient scaler.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported() else "no"
        # A torch that cannot tell trains as one without matrix units.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_tile", False) else "no"
    if name == "fp16" and not torch.cuda.is_available():
        raise SettingsError("mixed_precision: fp16 needs a GPU; choose bf16 or no")
    return name


def fit(model: nn.Module, batches: Batches, objective: Objective, settings: LoopSettings, output: Path) -> nn.Module:
    """Trains ``model`` and returns it, unwrapped and on the CPU.

    Progress, history (``history.jsonl``) and checkpoints go to ``output``. A run that finds its own checkpoint there
    goes on from it and ends as the uninterrupted run would have. With ``settings.best`` the weights are those of the
    best validation, otherwise the last.

    Args:
        model: the model to train.
        batches: the training data.
        objective: losses and validation.
        settings: see `LoopSettings`.
        output: folder of this run alone.

    Raises:
        SettingsError: the settings do not fit this machine or the way the processes were started.
    """
    accelerator = _accelerator(settings, output)
    set_seed(settings.seed, device_specific=True)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    # The scheduler stays outside of `prepare`: Accelerate would step it once for every process.
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    done = _resume(accelerator, output)
    if accelerator.is_main_process:  # steps after the checkpoint are written anew
        kept = (row for row in read_history(output) if row["step"] <= done)
        write_text(output / _HISTORY, "".join(json.dumps(row) + "\n" for row in kept))
    best = _Best(accelerator, output / _CHECKPOINTS / _BEST, settings.best, done) if settings.best else None
    if accelerator.log_with:
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(settings).items()}
        accelerator.init_trackers("weightspace", config=values)
    micro_batches = settings.gradient_accumulation_steps
    stream = batches(done * micro_batches, accelerator.process_index, accelerator.num_processes)
    model.train()
    with tqdm(
        total=settings.steps, initial=done, desc="train", unit="step", disable=not accelerator.is_main_process
    ) as bar:
        for step in range(done + 1, settings.steps + 1):
            sums = _optimizer_step(accelerator, model, optimizer, objective, stream, settings)
            learning_rate = float(scheduler.get_last_lr()[0])
            scheduler.step()
            last = step == settings.steps
            saved = bool(settings.checkpoint_every) and step % settings.checkpoint_every == 0 and not last
            row: dict[str, float] = {}
            if last or saved or step % settings.log_every == 0:
                means = _means(accelerator, sums, step, settings)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
                if last or step % settings.log_every == 0:
                    row = {**means, "learning_rate": learning_rate}
            if last or (settings.validate_every and step % settings.validate_every == 0):
                row |= _validate(objective, accelerator.unwrap_model(model))
                if best:
                    best.offer(step, row, accelerator.unwrap_model(model))
            if row:
                accelerator.log(row, step=step)
                if accelerator.is_main_process:
                    with (output / _HISTORY).open("a") as file:
                        file.write(json.dumps({"step": step, **row}) + "\n")
            bar.update()
            if saved:
                _save(accelerator, output, step, settings.keep_checkpoints)
    accelerator.end_training()
    trained: nn.Module = accelerator.unwrap_model(model).cpu().eval()
    if best:
        best.restore(trained)
    return trained


def is_main_process() -> bool:
    """True for the one process of a run that writes what all of them share.

    Raises:
        SettingsError: several processes were started that do not know of each other.
    """
    # Whoever asks first decides how processes are connected, so that this has to ask just as `Accelerator` does.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and state.num_processes == 1:
        raise SettingsError(
            "WORLD_SIZE is set but Accelerate runs one process; start with `accelerate launch`, "
            "on processors with ACCELERATE_USE_CPU=true and --multi_gpu"
        )
    return bool(state.is_main_process)


def clear_checkpoints(output: Path) -> None:
    """Removes the checkpoints of a run that is complete."""
    shutil.rmtree(output / _CHECKPOINTS, ignore_errors=True)


def read_history(output: Path) -> list[dict[str, int | float]]:
    """Reads the history of a run: one mapping a logged step, with ``"step"`` in each; empty if there is none.

    A last line without its end is that of a step in which the run was killed, and is left out.
    """
    path = output / _HISTORY
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """Learning rate at ``step`` (from 0) as a share of its peak."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0 if settings.schedule == "constant" else max(0.0, 1 - progress)


def _accelerator(settings: LoopSettings, output: Path) -> Accelerator:
    # Accelerate keeps the precision of the first run of a process and refuses another. A version without this function
    # says so itself.
    getattr(AcceleratorState, "_reset_state", bool)()
    is_main_process()
    return Accelerator(
        mixed_precision=resolve_precision(settings.mixed_precision),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=None if settings.tracker == "none" else [settings.tracker],
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )


def _optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    stream: Iterator[Any],
    settings: LoopSettings,
) -> dict[str, Tensor]:
    """Accumulates gradients over the micro-batches of one step, clips and applies them; returns the mean losses."""
    micro_batches = settings.gradient_accumulation_steps
    sums: dict[str, Tensor] = {}
    for _ in range(micro_batches):
        with accelerator.accumulate(model):
            losses = objective.losses(model, next(stream))
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / micro_batches
    return sums


def _means(accelerator: Accelerator, sums: Mapping[str, Tensor], step: int, settings: LoopSettings) -> dict[str, float]:
    """Averages losses over processes, and stops a run that has diverged before anything of it is saved."""
    means = {name: accelerator.reduce(value, "mean").item() for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
        raise SettingsError(
            f"learning_rate: the loss became {means['loss']} at step {step} with {settings.learning_rate}; "
            "choose a smaller one"
        )
    return means


class _Best:
    """The weights of the best validation so far, in a file of their own."""

    def __init__(self, accelerator: Accelerator, path: Path, figure: str, done: int) -> None:
        self._accelerator, self._path, self._figure = accelerator, path, figure
        self._lowest = math.inf
        if path.exists():
            kept = open_checkpoint(path).metadata
            # Weights from after the checkpoint that is resumed from are found again, and beat what they replaced.
            if int(kept["step"]) <= done:
                self._lowest = float(kept["value"])

    def offer(self, step: int, row: Mapping[str, float], model: nn.Module) -> None:
        """Keeps the weights of ``model`` if they are better than those that are kept."""
        if self._figure not in row:
            figures = ", ".join(name for name in row if name.startswith("validation_"))
            raise SettingsError(f"best: there is no figure {self._figure!r}; choose one of {figures}")
        if row[self._figure] >= self._lowest:
            return
        self._lowest = row[self._figure]
        if self._accelerator.is_main_process:
            self._path.parent.mkdir(exist_ok=True)
            metadata = {"step": str(step), "value": repr(self._lowest)}
            save_checkpoint(model.state_dict(), self._path, metadata=metadata)

    def restore(self, model: nn.Module) -> None:
        """Gives ``model`` the weights that were kept."""
        self._accelerator.wait_for_everyone()
        if self._path.exists():
            model.load_state_dict(open_checkpoint(self._path).tensors())


@torch.no_grad()
def _validate(objective: Objective, model: nn.Module) -> dict[str, float]:
    model.eval()
    figures = {f"validation_{name}": value for name, value in objective.validate(model).items()}
    model.train()
    return figures


def _save(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    folder = output / _CHECKPOINTS / f"step-{step:08d}"
    partial = folder.with_suffix(".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # The rename makes the checkpoint whole: a folder without the suffix is complete.
        partial.rename(folder)
        for old in sorted(folder.parent.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, output: Path) -> int:
    if accelerator.is_main_process:
        for partial in (output / _CHECKPOINTS).glob("*.partial"):
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    found = sorted((output / _CHECKPOINTS).glob("step-????????"))
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step-"))
