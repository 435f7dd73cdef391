from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weightspace.cards.facts import EncoderFacts
from weightspace.cards.record import read_record
from weightspace.data.image_encoders import OFFLINE_ENCODER
from weightspace.demo import DemoSettings, run_demo
from weightspace.errors import SettingsError
from weightspace.evaluation.accuracy import FineTuning
from weightspace.evaluation.comparison import SAMPLES, ComparisonSettings, accuracy_after
from weightspace.sampling.evaluate import EvaluationSettings
from weightspace.training.autoencoder import AutoencoderSettings, EncoderSettings
from weightspace.training.joint import JointSettings, TowerSettings
from weightspace.training.run import read_training
from weightspace.training.settings import LoopSettings
from weightspace.zoo.training import ZooSettings

LOOP = LoopSettings(steps=4, batch_size=8, mixed_precision="no", tracker="none", validate_every=4)
TARGET = "test_accuracy"


@pytest.fixture(scope="module")
def settings(tiny_zoo_settings: ZooSettings, tiny_encoder_settings: AutoencoderSettings, tiny_clip: Path) -> Any:
    towers = TowerSettings(encoder=EncoderSettings(hidden_size=16, layers=1, heads=2, window=16), hidden_size=16)
    joint = JointSettings(towers=towers, image_encoder=str(tiny_clip), sample=20, images=20, loop=LOOP)
    comparison = ComparisonSettings(FineTuning(epochs=(0, 1)), checkpoints=2)
    samples = EvaluationSettings(datasets=2, count=2, activations=1, bins=2, comparison=comparison)
    return DemoSettings(
        tiny_zoo_settings,
        tiny_encoder_settings,
        joint,
        ("kde", "kde+selected"),
        samples,
        targets=(TARGET,),
        seeds=(0,),
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, settings: DemoSettings) -> Path:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", settings).parent


@pytest.fixture(scope="module")
def report(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.slow
class TestJointModel:
    def test_is_probed_beside_the_autoencoder_and_the_baselines(self, report: dict[str, Any]) -> None:
        rows = {(row["representation"], row["estimator"]): row for row in report["probes"]}
        assert {name for name, _ in rows} >= {"s(W)", "autoencoder", "joint"}
        assert {estimator for name, estimator in rows if name == "joint"} == {"ridge", "boosting", "extra-trees"}
        assert all(row["permuted_r2"] is not None for (name, _), row in rows.items() if name == "joint")

    def test_holds_out_the_runs_of_the_autoencoder(self, output: Path) -> None:
        states = [read_training(output / name) for name in ("encoder", "joint")]
        assert states[0] is not None and states[1] is not None
        assert states[0].test_runs == states[1].test_runs

    def test_is_asked_about_the_test_models_alone(self, output: Path, report: dict[str, Any]) -> None:
        state = read_training(output / "joint")
        assert state is not None
        tested = 2 * len(state.test_runs)
        rows = {row["pair"]: row for row in report["retrieval"]}
        assert list(rows) == ["D → W", "W → D", "R → W"]
        assert rows["D → W"]["candidates"] == rows["W → D"]["queries"] == rows["R → W"]["candidates"] == tested
        assert rows["W → D"]["chance"] == pytest.approx(1 / rows["W → D"]["candidates"])
        assert rows["R → W"]["chance"] == 0.0
        assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())

    def test_has_a_card_with_what_was_measured(self, output: Path, report: dict[str, Any]) -> None:
        record = read_record(output / "joint")
        assert record is not None and isinstance(record.facts, EncoderFacts)
        measured = {one.task: one.score.value for one in record.facts.measurements}
        for row in report["retrieval"]:
            assert measured.pop(f"retrieval {row['pair']} ({row['question']})") == row["value"]
        (ridge,) = (row for row in report["probes"] if (row["representation"], row["estimator"]) == ("joint", "ridge"))
        assert measured == {f"{TARGET} from the embedding (ridge)": ridge["r2"]}

    def test_and_report_are_reused(self, output: Path, settings: DemoSettings) -> None:
        files = [output / name for name in ("joint/model.safetensors", "joint/card.json", "report.html")]
        before = [file.stat().st_mtime_ns for file in files]
        run_demo(output, settings)
        assert [file.stat().st_mtime_ns for file in files] == before


def test_the_demo_needs_no_hub() -> None:
    assert DemoSettings().joint.image_encoder == OFFLINE_ENCODER


def test_an_image_encoder_that_is_not_there_is_missed_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=OFFLINE_ENCODER):
        run_demo(tmp_path / "out", DemoSettings(joint=JointSettings(image_encoder="efficientnet-lite9")))
    assert not (tmp_path / "out").exists()


def test_encoders_that_hold_out_other_runs_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"split_seed 1 holds out other runs than the 0 .*give both the same"):
        DemoSettings(joint=JointSettings(split_seed=1))


@pytest.mark.slow
class TestSamples:
    def test_of_every_sampler_stand_beside_controls(self, report: dict[str, Any], settings: DemoSettings) -> None:
        rows = [row for row in report["samples"] if row["measure"] == accuracy_after(0)]
        assert {row["sampler"] for row in rows} == set(settings.samplers)
        assert {row["subject"] for row in rows} > {SAMPLES, "from scratch"}
        assert all(0 <= row["value"] <= 1 for row in rows)
        told = [verdict for verdict in report["verdicts"] if verdict["subject"].startswith("Samples of ")]
        assert [verdict["subject"] for verdict in told] == [
            f"Samples of {it}, seen datasets" for it in settings.samplers
        ]
        assert {row["sampler"] for row in report["sample_criteria"]} == set(settings.samplers)
