from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from weightspace.errors import SettingsError
from weightspace.training import loop
from weightspace.training.loop import (
    Objective,
    clear_checkpoints,
    fit,
    learning_rate_factor,
    read_history,
    resolve_precision,
)
from weightspace.training.settings import LoopSettings

ROOT = Path(__file__).parents[2]
SETTINGS = LoopSettings(
    steps=12,
    batch_size=4,
    learning_rate=0.01,
    mixed_precision="no",
    checkpoint_every=5,
    log_every=2,
    validate_every=4,
    tracker="none",
)


class Lines:
    """Batches of a line with noise. Number i of all processes together holds the same rows however they are split."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, start: int, process: int, processes: int) -> Iterator[Tensor]:
        number = start
        while True:
            rows = torch.arange(number * self.size * processes, (number + 1) * self.size * processes)[
                process::processes
            ]
            inputs = torch.stack([torch.sin(rows * 0.7), torch.cos(rows * 1.3), torch.sin(rows * 2.9)], 1)
            yield torch.cat([inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + torch.sin(rows * 5.1)[:, None]], 1)
            number += 1


class Regression(Objective):
    def __init__(self, dies_at: int | None = None, bad_at: int | None = None) -> None:
        self.calls, self.dies_at, self.bad_at = 0, dies_at, bad_at

    def losses(self, model: nn.Module, batch: Tensor) -> Mapping[str, Tensor]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        error = model(batch[:, :3]) - batch[:, 3:]
        loss = error.square().mean() * (math.nan if self.calls == self.bad_at else 1.0)
        return {"loss": loss, "magnitude": error.abs().mean()}

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        assert not model.training
        return {"loss": float(self.losses(model, next(Lines(8)(1000, 0, 1)))["loss"])}


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def train(
    output: Path, settings: LoopSettings = SETTINGS, objective: Regression | None = None, dropout: float = 0.0
) -> dict[str, Tensor]:
    return fit(network(dropout), Lines(settings.batch_size), objective or Regression(), settings, output).state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class TestResume:
    @pytest.mark.parametrize("dies_at", range(1, 13))
    def test_a_killed_run_ends_as_the_uninterrupted_one(self, dies_at: int, tmp_path: Path) -> None:
        # Dropout draws from the global generator, whose state has to come back too.
        settings = replace(SETTINGS, validate_every=0)
        whole = train(tmp_path / "whole", settings, dropout=0.5)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", settings, Regression(dies_at), dropout=0.5)
        with (tmp_path / "killed" / "history.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')  # in the middle of a line
        again = Regression()
        assert equal(train(tmp_path / "killed", settings, again, dropout=0.5), whole)
        assert again.calls == 12 - (dies_at - 1) // 5 * 5 + 1  # the steps since the checkpoint, and the validation
        assert read_history(tmp_path / "killed") == read_history(tmp_path / "whole")

    def test_in_the_middle_of_an_accumulated_step(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, gradient_accumulation_steps=3, validate_every=0)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", settings, Regression(dies_at=23))
        assert equal(train(tmp_path / "killed", settings), train(tmp_path / "whole", settings))

    def test_history_after_the_checkpoint_is_written_anew(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, objective=Regression(dies_at=11))  # two validations were calls too: this is step 9
        assert [row["step"] for row in read_history(tmp_path)] == [2, 4, 6, 8]
        train(tmp_path)
        assert [row["step"] for row in read_history(tmp_path)] == [2, 4, 6, 8, 10, 12]

    def test_an_unfinished_checkpoint_is_no_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = train(tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "killed")
        assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000005.partial"]
        assert equal(train(tmp_path / "killed"), whole)

    def test_a_finished_run_is_not_trained_further(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, steps=10)
        train(tmp_path, settings)
        again = Regression()
        train(tmp_path, settings, again)
        assert again.calls == 5 + 2  # from the checkpoint at step 5, with validations at 8 and 10


class TestCheckpoints:
    def test_as_many_are_kept_as_asked(self, tmp_path: Path) -> None:
        train(tmp_path, replace(SETTINGS, checkpoint_every=2, keep_checkpoints=2))
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
        clear_checkpoints(tmp_path)
        assert not (tmp_path / "checkpoints").exists()

    def test_none_are_written_unless_asked_for(self, tmp_path: Path) -> None:
        train(tmp_path, replace(SETTINGS, checkpoint_every=0))
        assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


class Worsening(Regression):
    """Finds the weights of the second validation best, whatever they are."""

    def __init__(self, figures: tuple[float, ...] = (3.0, 1.0, 2.0), dies_at: int | None = None) -> None:
        super().__init__(dies_at)
        self.figures, self.seen = list(figures), []

    def validate(self, model: nn.Module) -> Mapping[str, float]:
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"error": self.figures.pop(0)}


class TestBest:
    SETTINGS = replace(SETTINGS, best="validation_error")  # validations at steps 4, 8 and 12

    def test_the_weights_of_the_lowest_figure_are_kept(self, tmp_path: Path) -> None:
        objective = Worsening()
        kept = train(tmp_path, self.SETTINGS, objective)
        assert equal(kept, objective.seen[1])
        assert not equal(kept, objective.seen[2])
        clear_checkpoints(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]

    def test_without_it_the_last_are(self, tmp_path: Path) -> None:
        objective = Worsening()
        assert equal(train(tmp_path, SETTINGS, objective), objective.seen[2])

    @pytest.mark.parametrize(("dies_at", "left"), [(7, (1.0, 2.0)), (10, (1.0, 2.0)), (12, (2.0,))])
    def test_a_killed_run_keeps_the_same(self, dies_at: int, left: tuple[float, ...], tmp_path: Path) -> None:
        whole = train(tmp_path / "whole", self.SETTINGS, Worsening())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", self.SETTINGS, Worsening(dies_at=dies_at))
        assert equal(train(tmp_path / "killed", self.SETTINGS, Worsening(left)), whole)

    def test_an_unknown_figure_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"best: there is no figure 'x'; choose one of validation_error"):
            train(tmp_path, replace(SETTINGS, best="x"), Worsening())


class TestSteps:
    def test_accumulated_batches_are_one_large_batch(self, tmp_path: Path) -> None:
        large = train(tmp_path / "large", replace(SETTINGS, batch_size=8))
        small = train(tmp_path / "small", replace(SETTINGS, batch_size=4, gradient_accumulation_steps=2))
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)
        for one, other in zip(read_history(tmp_path / "small"), read_history(tmp_path / "large"), strict=True):
            assert one == pytest.approx(other, rel=1e-4)

    def test_is_adamw_with_a_schedule(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, weight_decay=0.5)
        module, batches = network(), Lines(4)(0, 0, 1)
        optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.5, betas=(0.9, 0.95))
        for step in range(12):
            optimizer.param_groups[0]["lr"] = 0.01 * learning_rate_factor(step, settings)
            optimizer.zero_grad()
            Regression().losses(module, next(batches))["loss"].backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        for name, value in train(tmp_path, settings).items():
            torch.testing.assert_close(value, module.state_dict()[name])

    def test_gradients_are_clipped(self, tmp_path: Path) -> None:
        norms: list[float] = []

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))

        handle = register_optimizer_step_pre_hook(note)
        try:
            train(tmp_path / "free", replace(SETTINGS, max_grad_norm=100.0))
            free = norms.copy()
            norms.clear()
            train(tmp_path / "clipped", replace(SETTINGS, max_grad_norm=0.25))
        finally:
            handle.remove()
        assert max(free) > 0.5
        assert max(norms) <= 0.2501

    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"learning_rate: the loss became nan at step 4 with 0\.01"):
            train(tmp_path, objective=Regression(bad_at=4))

    def test_a_checkpoint_never_holds_a_loss_that_is_not_finite(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="learning_rate"):
            train(tmp_path, replace(SETTINGS, log_every=12, validate_every=0), Regression(bad_at=4))
        assert not list(tmp_path.glob("checkpoints/step-*"))

    def test_the_model_comes_back_ready_for_use(self, tmp_path: Path) -> None:
        module = fit(network(), Lines(4), Regression(), replace(SETTINGS, mixed_precision="bf16"), tmp_path)
        assert not module.training
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


class TestHistory:
    def test_has_every_figure_of_its_step(self, tmp_path: Path) -> None:
        train(tmp_path)
        rows = {int(row["step"]): row for row in read_history(tmp_path)}
        assert sorted(rows) == [2, 4, 6, 8, 10, 12]
        assert set(rows[2]) == {"step", "loss", "magnitude", "learning_rate"}
        assert set(rows[4]) == {*rows[2], "validation_loss"}
        assert rows[12]["validation_loss"] < rows[4]["validation_loss"]
        for step, row in rows.items():
            assert row["learning_rate"] == pytest.approx(0.01 * learning_rate_factor(step - 1, SETTINGS))

    def test_is_empty_where_there_is_none(self, tmp_path: Path) -> None:
        assert read_history(tmp_path) == []

    def test_goes_to_a_tracker_too(self, tmp_path: Path) -> None:
        train(tmp_path, replace(SETTINGS, tracker="tensorboard", steps=2))
        assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


class TestSchedule:
    @given(
        steps=st.integers(1, 400),
        warmup=st.floats(0, 0.9),
        schedule=st.sampled_from(["cosine", "linear", "constant"]),
    )
    def test_rises_and_then_never_rises_again(self, steps: int, warmup: float, schedule: Any) -> None:
        settings = LoopSettings(steps=steps, warmup=warmup, schedule=schedule)
        factors = [learning_rate_factor(step, settings) for step in range(steps)]
        peak = max(1, round(warmup * steps)) - 1
        assert all(0 < factor <= 1 for factor in factors)
        assert factors[: peak + 1] == pytest.approx([(i + 1) / (peak + 1) for i in range(peak + 1)])
        assert all(b <= a for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))

    @pytest.mark.parametrize(
        ("schedule", "middle", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)]
    )
    def test_ends_as_its_name_says(self, schedule: Any, middle: float, end: float) -> None:
        settings = LoopSettings(steps=1000, warmup=0.0, schedule=schedule)
        assert learning_rate_factor(500, settings) == pytest.approx(middle, abs=0.01)
        assert learning_rate_factor(1000, settings) == pytest.approx(end, abs=0.01)


class TestPrecision:
    def test_auto_is_bf16_only_where_it_pays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for amx in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_tile": amx})
            assert resolve_precision("auto") == ("bf16" if amx else "no")

    def test_fp16_needs_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SettingsError, match="mixed_precision: fp16 needs a GPU"):
            resolve_precision("fp16")

    def test_runs_of_two_precisions_can_follow_each_other(self, tmp_path: Path) -> None:
        plain = train(tmp_path / "no")
        half = train(tmp_path / "bf16", replace(SETTINGS, mixed_precision="bf16"))
        assert not equal(half, plain)
        assert equal(train(tmp_path / "again"), plain)


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            *(({name: 0}, name) for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every")),
            ({"keep_checkpoints": 0}, "keep_checkpoints"),
            *(({name: -1}, name) for name in ("checkpoint_every", "validate_every")),
            *(({name: 0.0}, name) for name in ("learning_rate", "max_grad_norm")),
            ({"weight_decay": -1.0}, "weight_decay"),
            ({"learning_rate": math.nan}, "learning_rate"),
            ({"warmup": 1.0}, "warmup"),
        ],
    )
    def test_impossible_values_name_their_key(self, change: dict[str, Any], named: str) -> None:
        with pytest.raises(SettingsError, match=named):
            LoopSettings(**change)


class TestProcesses:
    def test_processes_that_do_not_know_each_other_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SettingsError, match=r"WORLD_SIZE.*accelerate launch"):
            train(tmp_path)

    @pytest.mark.slow
    def test_two_processes_train_and_resume_as_one_with_twice_the_batch(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            f"""
import importlib.util, sys
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("loops", {str(Path(__file__))!r})
loops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loops)
from accelerate import PartialState
folder = Path(sys.argv[1])
try:
    loops.train(folder / "two", objective=loops.Regression(dies_at=11))
except KeyboardInterrupt:
    pass
state = loops.train(folder / "two")
torch.save(state, folder / f"state-{{PartialState().process_index}}.pt")
"""
        )
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, "--main_process_port=0", str(script), str(tmp_path)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
        alone = train(tmp_path / "alone", replace(SETTINGS, batch_size=8))
        states = [torch.load(tmp_path / f"state-{number}.pt") for number in range(2)]
        assert equal(*states)
        for name, value in alone.items():
            torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6)
        for row, expected in zip(read_history(tmp_path / "two"), read_history(tmp_path / "alone"), strict=True):
            assert row == pytest.approx(expected, rel=1e-3)


def test_batches_are_known_by_what_they_do() -> None:
    assert isinstance(Lines(4), loop.Batches)
