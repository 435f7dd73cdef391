from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from weightspace.cli.main import main
from weightspace.encoder import load_encoder
from weightspace.errors import SettingsError, WeightspaceError, ZooError
from weightspace.evaluation.accuracy import FineTuning
from weightspace.evaluation.comparison import (
    DISAGREEMENT,
    ERROR,
    REFINED_SCRATCH,
    SAMPLES,
    SCRATCH,
    SPEARMAN,
    ComparisonRow,
    ComparisonSettings,
    accuracy_after,
)
from weightspace.networks.families import FamilyConfig
from weightspace.sampling.base import Sources, training_rows
from weightspace.sampling.evaluate import (
    EvaluationSettings,
    bin_middles,
    evaluate_samplers,
    plan_evaluation,
)
from weightspace.sampling.factory import open_sampler
from weightspace.search.queries import described_dataset
from weightspace.training.run import read_training
from weightspace.zoo.dataset import Zoo, load_zoo

QUICK = ComparisonSettings(FineTuning(epochs=(0,)), checkpoints=2)


@pytest.fixture(scope="module")
def unseen_joint(tmp_path_factory: pytest.TempPathFactory, tiny_zoo: Zoo, tiny_clip_joint: Path) -> Path:
    """A joint model that held out one of the zoo's datasets."""
    from weightspace.settings import settings_from_mapping
    from weightspace.training.joint import JointSettings, train_joint

    record = read_training(tiny_clip_joint)
    assert record is not None
    held_out = sorted(set(tiny_zoo.index["dataset"]))[:1]
    settings = settings_from_mapping(JointSettings, dict(record.settings) | {"held_out_datasets": held_out}, where="it")
    return train_joint(tiny_zoo.path, tmp_path_factory.mktemp("unseen") / "joint", settings)


def test_training_rows_are_neither_tested_nor_validated_on(tiny_zoo: Zoo, unseen_joint: Path) -> None:
    rows = training_rows(tiny_zoo, load_encoder(unseen_joint))
    record = read_training(unseen_joint)
    assert record is not None
    seen = tiny_zoo.index.iloc[rows]
    assert len(seen)
    assert not set(seen["run_id"]) & {*record.test_runs, *record.validation_runs}
    assert not set(seen["dataset"]) & set(record.held_out_datasets)


def test_another_zoo_is_refused(tiny_clip_joint: Path, tiny_zoo: Zoo, tmp_path: Path) -> None:
    from weightspace.zoo.importing import import_folder
    from weightspace.zoo.transfer import export_folder

    export_folder(tiny_zoo, tmp_path / "files", range(3))
    import_folder(tmp_path / "files", tmp_path / "zoo")
    other = load_zoo(tmp_path / "zoo")
    named = f"digest {other.digest}.*on one of digest {tiny_zoo.digest}; give that zoo"
    with pytest.raises(SettingsError, match=named):
        training_rows(other, load_encoder(tiny_clip_joint))


def test_the_top_request_lies_in_the_top_bin(tiny_clip_joint: Path) -> None:
    joint = load_encoder(tiny_clip_joint)
    edges = joint.model.result_model.edges[joint.model.result_model.config.results.index("test_accuracy")]
    for count in (1, 2, 4, 100):
        requests = bin_middles(joint, count)
        assert list(requests) == sorted(requests)
        assert edges[-2] <= requests[-1] <= edges[-1]
    assert len(bin_middles(joint, 100)) <= len(edges) - 1


def test_conditions_are_those_of_the_zoo(tiny_zoo: Zoo, unseen_joint: Path) -> None:
    joint = load_encoder(unseen_joint)
    plan = plan_evaluation(tiny_zoo, joint, EvaluationSettings(datasets=2, unseen=True, requests=(0.5,)))
    conditions, nearest = plan.conditions, plan.nearest
    assert not plan.left_out
    held_out = sorted(set(tiny_zoo.index["dataset"]))[0]
    families: dict[str, list[FamilyConfig | None]] = {}
    for condition in conditions:
        assert condition.dataset is not None
        assert condition.requested == {"test_accuracy": 0.5}
        families.setdefault(condition.dataset.dataset_id, []).append(condition.family)
    names = list(families)
    assert len(names) == 3
    assert names[-1] == held_out
    assert set(nearest) == {held_out}
    assert nearest[held_out] in set(tiny_zoo.index["dataset"].iloc[training_rows(tiny_zoo, joint)])
    for name, found in families.items():
        own = {tiny_zoo.families[row] for row in np.flatnonzero(tiny_zoo.index["dataset"] == name)}
        assert set(found) <= own
    settings = EvaluationSettings(datasets=2, requests=(0.5,), activations=1)
    conditions = plan_evaluation(tiny_zoo, joint, settings).conditions
    kinds = [(one.dataset.dataset_id, one.family.family) for one in conditions if one.dataset and one.family]
    assert len(set(kinds)) == len(kinds) == len(conditions)


def test_without_held_out_datasets_nothing_is_unseen(tiny_zoo: Zoo, tiny_clip_joint: Path) -> None:
    with pytest.raises(SettingsError, match=r"held out no dataset.*train one with held_out_datasets"):
        plan_evaluation(tiny_zoo, load_encoder(tiny_clip_joint), EvaluationSettings(unseen=True))


def test_samplers_stand_beside_controls(
    tiny_zoo: Zoo, tiny_clip_joint: Path, tiny_prior: Path, tiny_encoder: Path
) -> None:
    joint = load_encoder(tiny_clip_joint)
    sources = Sources(joint, (str(tiny_prior),), tiny_zoo, str(tiny_encoder))
    samplers = {name: open_sampler(name, sources).sampler for name in ("kde", "flow")}
    settings = EvaluationSettings(datasets=2, count=2, activations=1, requests=(0.2, 0.35), comparison=QUICK)
    rows = evaluate_samplers(samplers, tiny_zoo, joint, settings)
    found = {(row.measure, row.subject) for row in rows}
    assert {(accuracy_after(0), SAMPLES), (accuracy_after(0), SCRATCH)} <= found
    assert list(dict.fromkeys(row.sampler for row in rows)) == ["kde", "flow"]
    assert {row.datasets for row in rows} == {"seen"}
    again = evaluate_samplers(samplers, tiny_zoo, joint, settings)
    assert rows == again


@pytest.mark.slow
def test_refined_samplers_stand_beside_untrained_weights_refined_alike(
    tiny_zoo: Zoo, tiny_clip_joint: Path, tiny_encoder: Path
) -> None:
    joint = load_encoder(tiny_clip_joint)
    sources = Sources(joint, zoo=tiny_zoo, encoder=str(tiny_encoder))
    samplers = {name: open_sampler(name, sources).sampler for name in ("kde", "kde+selected+refined")}
    settings = EvaluationSettings(datasets=1, count=2, activations=1, requests=(0.35,), comparison=QUICK)
    rows = evaluate_samplers(samplers, tiny_zoo, joint, settings)
    assert {row.sampler for row in rows if row.subject == REFINED_SCRATCH} == {"kde+selected+refined"}


def test_a_description_of_a_dataset_is_refused_before_anything_is_sampled(
    tiny_zoo: Zoo, tiny_clip_joint: Path, tiny_encoder: Path
) -> None:
    joint = load_encoder(tiny_clip_joint)
    settings = EvaluationSettings(datasets=1, count=1, activations=1, requests=(0.35,), comparison=QUICK)
    plan = plan_evaluation(tiny_zoo, joint, settings)
    described = replace(plan.conditions[0], dataset=described_dataset(joint, ["a zero", "a one"]))
    with pytest.raises(ZooError, match=r"a zero; a one: is neither a folder nor .* no images"):
        evaluate_samplers(
            {"it": Untouched()}, tiny_zoo, joint, settings, replace(plan, conditions=[*plan.conditions, described])
        )


def test_datasets_that_cannot_be_opened_are_named(
    tiny_zoo: Zoo, tiny_clip_joint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = load_encoder(tiny_clip_joint)
    settings = EvaluationSettings(datasets=100)
    names = [one.dataset.dataset_id for one in plan_evaluation(tiny_zoo, joint, settings).conditions if one.dataset]
    first, second, *others = dict.fromkeys(names)
    elsewhere = {first: "/nowhere/else", second: "digits"}
    index = tiny_zoo.index.assign(dataset=tiny_zoo.index["dataset"].replace(elsewhere))
    monkeypatch.setitem(tiny_zoo.__dict__, "index", index)
    plan = plan_evaluation(tiny_zoo, joint, settings)
    assert {one.dataset.dataset_id for one in plan.conditions if one.dataset} == set(others)
    assert set(plan.left_out) == {"/nowhere/else", "digits"}
    assert "/nowhere/else: no such folder" in plan.left_out["/nowhere/else"]
    assert "digits: no model of it is of a family of this library that takes its images" in plan.left_out["digits"]


class Untouched:
    """A sampler that must not be used."""

    codec: Any = None

    def latents(self, *asked: object) -> Any:
        raise AssertionError(asked)


class TestRefinedFromScratch:
    @pytest.fixture
    def rows(self, tiny_zoo: Zoo, tiny_clip_joint: Path, tiny_encoder: Path) -> Any:
        """Rows of a plain and of a refined sampler, with settings of the refinement and of the evaluation."""
        joint = load_encoder(tiny_clip_joint)
        sources = Sources(joint, zoo=tiny_zoo, encoder=str(tiny_encoder))
        base = EvaluationSettings(datasets=1, count=3, activations=1, requests=(0.2, 0.35), comparison=QUICK)

        def evaluated(steps: int = 2, images: int = 32, **changes: Any) -> dict[str, dict[Any, ComparisonRow]]:
            parts = {"refined": {"steps": steps, "images": images, "held_back": 32}}
            samplers = {name: open_sampler(name, sources, parts).sampler for name in ("kde", "kde+refined")}
            found = evaluate_samplers(samplers, tiny_zoo, joint, replace(base, **changes))
            return {
                name: {(row.measure, row.subject): row for row in found if row.sampler == name} for name in samplers
            }

        return evaluated

    def test_stands_beside_refined_samplers_and_no_others(self, rows: Any) -> None:
        found = rows()
        assert REFINED_SCRATCH not in {subject for _, subject in found["kde"]}
        measures = [measure for measure, subject in found["kde+refined"] if subject == REFINED_SCRATCH]
        assert measures == [accuracy_after(0), SPEARMAN, ERROR]
        assert list(found["kde"]) == [key for key in found["kde+refined"] if key[1] != REFINED_SCRATCH]
        assert found == rows()

    @pytest.mark.slow
    def test_is_worth_what_its_steps_and_images_are(self, rows: Any) -> None:
        def zero_shot(found: Any, subject: str) -> float:
            return float(found["kde+refined"][accuracy_after(0), subject].value)

        few, many = rows(), rows(steps=40, images=128)
        assert zero_shot(few, SCRATCH) < zero_shot(few, REFINED_SCRATCH) < zero_shot(many, REFINED_SCRATCH)
        none = rows(refined_learning_rate=1e-30)
        assert zero_shot(none, REFINED_SCRATCH) == pytest.approx(zero_shot(none, SCRATCH), abs=0.01)

    def test_steps_that_go_nowhere_are_refused(self) -> None:
        with pytest.raises(SettingsError, match=r"refined_learning_rate: 0.0 is not positive; give more than 0"):
            EvaluationSettings(refined_learning_rate=0.0)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "named"),
        [
            ("flows", "sampler 'flows': 'flows' is none; choose of flow, codes, kde"),
            ("flow+better", "'better' is no step; choose of selected, bootstrapped, refined"),
            ("flow+bootstrapped", "only kde can be bootstrapped; write flow.selected"),
            ("kde+refined+selected", "select once, then refine, e.g. kde.selected.refined"),
            ("kde+selected+bootstrapped", "select once"),
        ],
    )
    def test_that_mean_nothing(self, name: str, named: str, tiny_clip_joint: Path) -> None:
        with pytest.raises(SettingsError, match=named):
            open_sampler(name, Sources(load_encoder(tiny_clip_joint)))

    @pytest.mark.parametrize(
        ("name", "given", "named"),
        [
            ("flow", (), "sampler flow: needs a trained weight_prior"),
            ("kde", (), "sampler kde: needs a zoo"),
            ("kde", ("zoo",), r"sampler kde: needs a trained autoencoder .* or a prior, .*\(--encoder, --prior\)"),
        ],
    )
    def test_that_lack_something(
        self, name: str, given: tuple[str, ...], named: str, tiny_clip_joint: Path, tiny_zoo: Zoo
    ) -> None:
        sources: dict[str, Any] = {"zoo": tiny_zoo} if "zoo" in given else {}
        with pytest.raises(SettingsError, match=named):
            open_sampler(name, Sources(load_encoder(tiny_clip_joint), **sources))

    def test_a_model_that_is_no_prior(self, tiny_clip_joint: Path, tiny_encoder: Path) -> None:
        with pytest.raises(
            SettingsError, match="holds a model of type 'weight_autoencoder'; give what `train prior` wrote"
        ):
            open_sampler("flow", Sources(load_encoder(tiny_clip_joint), (str(tiny_encoder),)))

    def test_a_prior_that_lacks_weights(self, tiny_clip_joint: Path, tiny_prior: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_prior, tmp_path / "p")
        stored = load_file(tmp_path / "p" / "model.safetensors")
        del stored["result_in.weight"]
        save_file(stored, tmp_path / "p" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightspaceError, match=r"lacks 1 of the tensors .* result_in\.weight; .*train it again"):
            open_sampler("flow", Sources(load_encoder(tiny_clip_joint), (str(tmp_path / "p"),)))

    def test_of_sources_say_nothing_of_this_machine(
        self, tiny_clip_joint: Path, tiny_prior: Path, tiny_zoo: Zoo
    ) -> None:
        sources = Sources(load_encoder(tiny_clip_joint), (str(tiny_prior),), tiny_zoo)
        opened = open_sampler("kde+bootstrapped+refined", sources)
        assert set(opened.sources) == {"joint model", "zoo", "prior"}
        assert set(opened.settings) == {"kde", "bootstrapped", "refined"}
        assert not any("/" in name for name in opened.sources.values())


class TestCommand:
    def test_prints_and_keeps_the_comparison(
        self,
        tiny_zoo: Zoo,
        tiny_clip_joint: Path,
        tiny_prior: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = ["evaluate-samples", tiny_zoo.path, "--model", tiny_clip_joint, "--prior", tiny_prior, "-n", 1]
        words += ["--sampler", "flow", "--datasets", 2, "--request", 0.3, "--epochs", 0]
        assert main([*map(str, words), "--output", str(tmp_path / "comparison.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "seen datasets: 2"
        assert lines[1].split() == ["measure", "of", "flow"]
        assert lines[2].split()[:5] == ["accuracy", "after", "0", "epochs", "samples"]
        assert lines[-1] == f"comparison: {tmp_path / 'comparison.json'}"
        kept = json.loads((tmp_path / "comparison.json").read_text())
        head = next(place for place, line in enumerate(lines) if line.split()[:2] == ["sampler", "criterion"])
        for line, row in zip(lines[head + 1 : -1], kept["criteria"], strict=True):
            assert line.split()[0] == "flow" and f" {row['outcome']} " in line
            assert f"  {row['measure']}  " in line and f"  {row['subject']}  " in line
            assert f"  {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in line
            assert line.endswith(f"{row['holds']} of {row['of']}")
        assert kept["rows"][0]["measure"] == accuracy_after(0)
        assert f"{kept['rows'][0]['value']:.3f}" in lines[2]
        assert kept["settings"]["requests"] == [0.3]
        assert main([*map(str, words), "--output", str(tmp_path / "comparison.json"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == kept["rows"]

    @pytest.mark.slow
    def test_codes_are_drawn_at_a_temperature(
        self,
        tiny_zoo: Zoo,
        tiny_clip_joint: Path,
        tiny_code_prior: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = ["evaluate-samples", tiny_zoo.path, "--model", tiny_clip_joint, "--prior", tiny_code_prior, "-n", 2]
        words += ["--datasets", 1, "--request", 0.3, "--epochs", 0, "--output", tmp_path / "comparison.json"]
        assert main([*map(str, words), "--sampler", "codes", "--temperature", "0", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["samplers"]["codes"]["settings"]["codes"]["temperature"] == 0
        (apart,) = (row for row in record["rows"] if (row["measure"], row["subject"]) == (DISAGREEMENT, SAMPLES))
        assert apart["value"] == 0
        assert main([*map(str, words), "--sampler", "kde", "--temperature", "0"]) == 2
        assert "--temperature: 0 is for the sampler codes and not for kde; leave it out" in capsys.readouterr().err

    def test_names_what_is_missing(
        self, tiny_zoo: Zoo, tiny_clip_joint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [
            "evaluate-samples",
            tiny_zoo.path,
            "--model",
            tiny_clip_joint,
            "--output",
            tmp_path / "comparison.json",
        ]
        assert main([str(word) for word in words]) == 2
        assert "sampler kde: needs a trained autoencoder" in capsys.readouterr().err
        assert not (tmp_path / "comparison.json").exists()
