"""``weightspace sample``: models from the request to the folder that imports and goes up to the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from weightspace.cli.main import main
from weightspace.data.features import balanced_sample
from weightspace.data.images import load_images
from weightspace.evaluation.accuracy import ModelSet, accuracies
from weightspace.evaluation.baselines import from_scratch
from weightspace.io.checkpoint import open_checkpoint
from weightspace.io.writing import save_checkpoint
from weightspace.networks.flat import flatten, unflatten
from weightspace.publishing import PushPlan, push_folder
from weightspace.sampling import request
from weightspace.sampling.base import Condition
from weightspace.zoo.dataset import Zoo, load_zoo
from weightspace.zoo.importing import import_folder


@pytest.fixture
def config(tiny_zoo: Zoo, tmp_path: Path) -> Path:
    """A config of the zoo: a small perceptron for the digits."""
    family = next(family for family in tiny_zoo.families if family is not None and family.family == "mlp")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(family.to_dict()))
    return path


@pytest.fixture
def words(tiny_clip_joint: Path, tiny_prior: Path, config: Path, tiny_zoo: Zoo) -> list[str]:
    """A command without its output."""
    dataset = ["--dataset", tiny_zoo.index["dataset"][0], "--result", "0.3", "--architecture", config]
    return list(
        map(str, ["sample", "--model", tiny_clip_joint, "--prior", tiny_prior, *dataset, "-n", 3, "--steps", 2])
    )


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(list(map(str, words))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    return printed.err


def without(words: list[str], *options: str) -> list[str]:
    """The same command without some options."""
    places = {place for option in options for place in (words.index(option), words.index(option) + 1)}
    return [word for place, word in enumerate(words) if place not in places]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_models_are_written_and_evaluated(
    words: list[str], tiny_zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = answer(capsys, *words, "--output", tmp_path / "out")
    dataset = tiny_zoo.index["dataset"][0]
    assert record["sampler"] == "flow"
    assert (record["dataset"], record["result"], record["seed"]) == (dataset, "0.3", 0)
    assert record["settings"]["flow"]["steps"] == 2
    assert record["chance"] == pytest.approx(1 / load_images(dataset).classes)
    obtained = [model["results"]["test_accuracy"] for model in record["models"]]
    assert record["mean"] == pytest.approx(sum(obtained) / 3)
    for model, value in zip(record["models"], obtained, strict=True):
        opened = open_checkpoint((tmp_path / "out" / model["file"]).parent)
        assert opened.config is not None
        condition = Condition.from_config(opened.config)
        assert condition.family is not None
        flat = flatten(opened.tensors(), condition.architecture).unsqueeze(0)
        models = ModelSet(dataset, condition.family, condition.architecture, flat)
        assert float(accuracies(models)[0]) == pytest.approx(value)
    assert len({model["model_id"] for model in record["models"]}) == 3


def test_a_table_for_people(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 3 models by flow"
    assert lines[1].split() == ["model", "requested", "obtained", "test_accuracy"]
    assert [line.split()[0] for line in lines[2:]] == ["sample-0000", "sample-0001", "sample-0002", "mean", "chance"]
    assert lines[2].split()[1] == "0.3"


def test_the_seed_decides_every_byte(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        answer(capsys, *words, "--seed", seed, "--output", tmp_path / name / "out")
    one, same, other = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "same", "other")
    )
    assert one == same
    changed = {path.name for path in one if one[path] != other[path]}
    assert "model.safetensors" in changed
    assert "config.json" not in changed


def test_the_folder_is_a_zoo_to_import_and_models_to_push(
    words: list[str], tiny_zoo: Zoo, tmp_path: Path, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record = answer(capsys, *words, "--output", tmp_path / "out")
    summary = import_folder(tmp_path / "out", tmp_path / "zoo", on_problem="error")
    assert (summary.models, summary.skipped) == (3, ())
    zoo = load_zoo(tmp_path / "zoo")
    assert list(zoo.index["test_accuracy"]) == [model["results"]["test_accuracy"] for model in record["models"]]
    assert set(zoo.index["header"]) <= set(tiny_zoo.index["header"])
    assert set(zoo.families) <= set(tiny_zoo.families)
    entry = next(zoo.entries())
    assert entry.dataset == tiny_zoo.index["dataset"][0]
    assert entry.hyperparameters["sampler"] == "flow"
    assert entry.hyperparameters["requested"] == "0.3"

    plans: list[PushPlan] = []

    def look(plan: PushPlan) -> bool:
        plans.append(plan)
        return False

    push_folder(tmp_path / "out", "me/sampled", confirm=look)
    (plan,) = plans
    assert plan.kind == "models"
    assert {file.path for file in plan.files} >= {"README.md", "metadata.jsonl", "sample-0002/config.json"}
    assert "sampled and not trained" in plan.card
    assert "Requested result: 0.3" in plan.card
    assert "Sampler: flow, seed 0" in plan.card
    everything = plan.card + plan.record.to_json() + (tmp_path / "out" / "metadata.jsonl").read_text()
    assert str(tmp_path.parent) not in everything
    assert push_folder(tmp_path / "out", "me/sampled")[1] is not None
    assert hub.repository("me/sampled").private is False


def test_what_is_not_asked_for_is_left_open(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, list[str]] = {
        "result": without(words, "--dataset"),
        "dataset": without(words, "--result"),
        "nothing": without(words, "--dataset", "--result"),
    }
    weights = set()
    for name, command in asked.items():
        record = answer(capsys, *command, "--output", tmp_path / name)
        assert (record["dataset"] is None) == ("--dataset" not in command)
        assert (record["mean"] is None) == ("--dataset" not in command)
        assert (record["not_evaluated"] or "").startswith("no dataset") == ("--dataset" not in command)
        weights.add((tmp_path / name / record["models"][0]["file"]).read_bytes())
    assert len(weights) == 3


def test_editing_starts_from_a_model(
    words: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    condition = Condition.from_config(json.loads(config.read_text()))
    assert condition.family is not None
    (tmp_path / "mine").mkdir()
    flat = from_scratch(condition.family, condition.architecture, 1, torch.Generator().manual_seed(0))[0]
    save_checkpoint(unflatten(flat, condition.architecture), tmp_path / "mine" / "model.safetensors")
    shutil.copy(config, tmp_path / "mine" / "config.json")
    command = [*without(words, "--architecture"), "--edit", str(tmp_path / "mine")]

    def distance(strength: float) -> float:
        output = tmp_path / f"{strength}"
        record = answer(capsys, *command, "--strength", strength, "--output", output)
        assert record["edited"] == "./mine/model.safetensors"
        assert record["settings"]["strength"] == strength
        assert 0 <= record["before"] <= 1
        first = open_checkpoint((output / record["models"][0]["file"]).parent)
        return float((flatten(first.tensors(), condition.architecture) - flat).norm())

    assert distance(0.0) < distance(1.0)
    both = [*words, "--edit", str(tmp_path / "mine"), "--output", str(tmp_path / "both")]
    assert "give either an architecture to sample or a model to edit" in refusal(capsys, *both)
    chosen = [*command, "--candidates", "2", "--output", str(tmp_path / "chosen")]
    assert "sampler flow+selected: cannot edit a model" in refusal(capsys, *chosen)


def test_other_samplers(
    words: list[str], tiny_zoo: Zoo, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kde = [*without(words, "--prior"), "--zoo", tiny_zoo.path, "--encoder", tiny_encoder]
    record = answer(capsys, *kde, "--output", tmp_path / "kde")
    assert record["sampler"] == "kde"
    assert set(record["sources"]) == {"joint model", "zoo", "autoencoder"}
    chosen = ("--sampler", "kde+bootstrapped", "--candidates", 2, "--images", 8, "--refine", 1)
    record = answer(capsys, *kde, *chosen, "--output", tmp_path / "chosen")
    assert record["sampler"] == "kde+bootstrapped+refined"
    assert record["settings"]["bootstrapped"]["candidates"] == 2
    assert record["settings"]["bootstrapped"]["images"] == 8
    assert record["settings"]["refined"]["steps"] == 1
    record = answer(capsys, *words, "--candidates", 2, "--output", tmp_path / "selected")
    assert record["sampler"] == "flow+selected"


@pytest.mark.slow
def test_codes_are_drawn_at_a_temperature(
    words: list[str], tiny_code_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = without(words, "--steps")
    words[words.index("--prior") + 1] = str(tiny_code_prior)
    spread = {}
    for temperature in (0, 1):
        record = answer(capsys, *words, "--temperature", temperature, "--output", tmp_path / f"{temperature}")
        assert (record["sampler"], record["settings"]["codes"]["temperature"]) == ("codes", temperature)
        files = [tmp_path / f"{temperature}" / model["file"] for model in record["models"]]
        heads = torch.stack([open_checkpoint(file).tensor("head.weight") for file in files])
        spread[temperature] = float(heads.std(0).mean())
    assert spread[0] == pytest.approx(0, abs=1e-6) and spread[1] > 1e-3
    assert answer(capsys, *words, "--output", tmp_path / "else")["settings"]["codes"]["temperature"] == 0.25


def test_models_of_the_hub(
    words: list[str],
    tiny_clip_joint: Path,
    tiny_prior: Path,
    tmp_path: Path,
    hub: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, folder, option in (("joint", tiny_clip_joint, "--model"), ("prior", tiny_prior, "--prior")):
        files = ("config.json", "model.safetensors", "preprocessor_config.json", "training.json")
        hub.create(f"org/{name}", {file: folder / file for file in files})
        words[words.index(option) + 1] = f"org/{name}"
    record = answer(capsys, *words, "--output", tmp_path / "out")
    shas = {name: hub.repository(f"org/{name}").at("main").sha for name in ("joint", "prior")}
    assert record["sources"] == {"joint model": f"org/joint@{shas['joint']}", "prior": f"org/prior@{shas['prior']}"}


class TestRefusals:
    def test_a_folder_that_holds_something(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        said = refusal(capsys, *words, "--output", tmp_path / "out")
        assert f"{tmp_path / 'out'}: holds 'mine'; write models into a new or an empty folder" in said
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
        said = refusal(capsys, *words, "--output", tmp_path / "out" / "mine")
        assert "is no folder" in said

    @pytest.mark.parametrize(
        ("option", "value", "named"),
        [
            ("--dataset", "digits?classes=0-1-2", "in 3 classes do not fit"),
            ("--dataset", "./nowhere", "./nowhere: no such folder"),
            ("--result", "good", "'good' is no wanted result"),
            ("--result", "0.999", "the joint model knows models with"),
            ("--result", "beauty=1", "choose from these"),
            ("--architecture", "./nowhere", "./nowhere: no such file or folder"),
            ("--prior", "./nowhere", "./nowhere: no prior"),
            ("--model", "./nowhere", "./nowhere: no encoder"),
        ],
    )
    def test_what_does_not_fit(
        self,
        option: str,
        value: str,
        named: str,
        words: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words[words.index(option) + 1] = value
        assert named in refusal(capsys, *words, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"hidden": [9]}, "'head.weight': the config describes shape (5, 9), the checkpoint has (5, 6)"),
            ({"hidden": [6, 6]}, "'hidden.1.bias': the config describes shape (6,), the checkpoint has None"),
            ({"hidden": []}, "'head.weight': the config describes shape (5, 64), the checkpoint has (5, 6)"),
        ],
    )
    def test_a_config_beside_other_weights(
        self,
        changes: dict[str, Any],
        told: str,
        words: list[str],
        config: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        values = json.loads(config.read_text())
        condition = Condition.from_config(values)
        assert condition.family is not None
        flat = from_scratch(condition.family, condition.architecture, 1, torch.Generator().manual_seed(0))[0]
        mine = tmp_path / "mine"
        mine.mkdir()
        save_checkpoint(unflatten(flat, condition.architecture), mine / "model.safetensors")
        (mine / "config.json").write_text(json.dumps(values | changes))
        words[words.index("--architecture") + 1] = str(mine)
        said = refusal(capsys, *words, "--output", tmp_path / "out")
        assert (
            f"{mine}/model.safetensors: tensor {told}; put the config.json of this checkpoint beside it, or none"
            in said
        )

    @pytest.mark.parametrize("sampler", ["flow+selected", "kde"])
    def test_a_temperature_without_codes(
        self, sampler: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = refusal(capsys, *words, "--sampler", sampler, "--temperature", 0.5, "--output", tmp_path / "out")
        assert f"--temperature: 0.5 is for the sampler codes and not for {sampler}; leave it out, or give" in said
        assert not (tmp_path / "out").exists()

    def test_a_prior_of_another_joint_model(
        self, words: list[str], tiny_clip_joint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(tiny_clip_joint, tmp_path / "joint")
        record = json.loads((tmp_path / "joint" / "training.json").read_text())
        (tmp_path / "joint" / "training.json").write_text(json.dumps(record | {"identity": "0123456789abcdef"}))
        words[words.index("--model") + 1] = str(tmp_path / "joint")
        said = refusal(capsys, *words, "--output", tmp_path / "out")
        assert "was trained with another one" in said
        assert record["identity"] in said

    def test_nothing_half_written_stays(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written: list[Path] = []

        def full(path: Path, text: str) -> None:
            if path.name == "metadata.jsonl":
                assert (path.parent / "sample-0002" / "model.safetensors").is_file()
                assert (path.parent / "README.md").is_file()
                raise OSError(28, "No space left on device", str(path))
            written.append(path)

        monkeypatch.setattr(request, "write_text", full)
        (tmp_path / "there").mkdir()
        for name in ("there", "new"):
            assert "no room left on the disk" in refusal(capsys, *words, "--output", tmp_path / name)
        assert written
        assert list((tmp_path / "there").iterdir()) == []
        assert not (tmp_path / "new").exists()

    def test_weights_that_are_not_finite(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = refusal(capsys, *words, "--guidance-result", "1e38", "--output", tmp_path / "out")
        assert "3 of 3 sampled models have weights that are not finite; follow the condition less" in said
        assert not (tmp_path / "out").exists()


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """Folder of a classifier with running statistics, for images of one channel."""
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.num_labels = 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def statistics_images(dataset: str) -> torch.Tensor:
    images, _ = balanced_sample(load_images(dataset), 512, 0, "train")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def test_running_statistics_are_of_images_that_are_prepared_for_the_model(
    words: list[str], resnet: Path, tiny_zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    processor |= {"image_mean": [0.25], "image_std": [0.5], "rescale_factor": 1 / 255}
    (resnet / "preprocessor_config.json").write_text(json.dumps(processor))
    words = [*without(words, "--architecture"), "--architecture", str(resnet), "-n", "1"]
    answer(capsys, *words, "--output", tmp_path / "made")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "made/sample-0000")
    images = (statistics_images(str(tiny_zoo.index["dataset"][0])) * 255).round() / 255
    images = (torch.nn.functional.interpolate(images, (16, 16), mode="bilinear") - 0.25) / 0.5
    with torch.no_grad():
        maps = [model.resnet.embedder.embedder.convolution(part) for part in images.split(128)]
    means = torch.stack([value.mean((0, 2, 3)) for value in maps]).mean(0)
    torch.testing.assert_close(model.resnet.embedder.embedder.normalization.running_mean, means, rtol=1e-2, atol=1e-3)
    (resnet / "preprocessor_config.json").write_text(json.dumps({**processor, "size": {"height": 10**6, "width": 1}}))
    said = refusal(capsys, *words, "--output", tmp_path / "other")
    assert "preprocessor_config.json: cannot prepare the images (config: height 1e+06 is above 1,024" in said


def test_running_statistics_are_those_of_the_dataset(
    words: list[str], resnet: Path, tiny_zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*without(words, "--architecture"), "--architecture", str(resnet)]
    record = answer(capsys, *words, "--output", tmp_path / "made")
    assert record["mean"] is None and "cannot run models of this architecture" in record["not_evaluated"]
    images = statistics_images(str(tiny_zoo.index["dataset"][0]))
    for folder in sorted((tmp_path / "made").glob("sample-*")):
        model = ResNetForImageClassification.from_pretrained(folder)
        norm = model.resnet.embedder.embedder.normalization
        assert int(norm.num_batches_tracked) == len(images.split(128))
        with torch.no_grad():
            maps = [model.resnet.embedder.embedder.convolution(part) for part in images.split(128)]
            means = torch.stack([value.mean((0, 2, 3)) for value in maps]).mean(0)
            torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-5)
            assert model.eval()(images[:4]).logits.isfinite().all()


def test_running_statistics_need_images_that_fit(
    words: list[str], resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*without(words, "--architecture"), "--architecture", str(resnet), "--output", str(tmp_path / "made")]
    said = refusal(capsys, *without(words, "--dataset"))
    assert "running statistics" in said and "give a dataset" in said
    (resnet / "config.json").write_text(json.dumps({"model_type": "resnet", "num_channels": 3}))
    said = refusal(capsys, *words)
    assert "images have 1 channels, the architecture expects 3" in said
    assert not (tmp_path / "made").exists()
