from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import DatasetCard
from loopback_hub import LoopbackHub

from weightspace.cards.facts import (
    ArchitectureCount,
    EncoderFacts,
    Facts,
    LicenceCount,
    Measurement,
    ModelFacts,
    ModelsFacts,
    ResultSummary,
    Score,
    TrainingZoo,
    ZooFacts,
)
from weightspace.cards.record import (
    BEGIN,
    END,
    card_digest,
    is_edited,
    known_facts,
    notes_of,
    read_record,
    render_card,
    write_card,
)
from weightspace.errors import WeightspaceError

HOSTILE = "a | b\n---\n<script>alert(1)</script> ``` *x*"
FACTS = EncoderFacts(
    name="digits-encoder",
    location="demo/encoder",
    licence="apache-2.0",
    parameters=3211264,
    embedding_size=192,
    zoo=TrainingZoo(
        "digits-zoo",
        digest="abc123",
        models=3200,
        runs=1600,
        architectures=("MLP 64-16-10",),
        datasets=("digits", "digits?rotation=90"),
        licences={"apache-2.0": 3000, "mit": 200},
    ),
    config={"hidden_size": 256},
    training={"max_steps": 4321},
    measurements=(
        Measurement(
            "test accuracy from the embedding",
            "r2",
            "R²",
            Score("autoencoder with ridge", 0.7123456, 0.66, 0.75),
            (Score("s(W) with ridge", 0.5612345, 0.52, 0.6), Score("W with ridge", None)),
        ),
    ),
    limits=("Language models are out of reach.",),
)
ZOO = ZooFacts(
    name="digits-zoo",
    location="org/digits-zoo",
    licence="cc-by-4.0",
    digest="abc123",
    models=3200,
    runs=1600,
    bytes=12345678,
    architectures=(ArchitectureCount("MLP", 1685, 3000),),
    other_architectures=3,
    datasets={"digits": 3200},
    results=(ResultSummary("test_accuracy", 3100, 0.1, 0.5, 0.95), ResultSummary("step", 3200, 100.0, 550.0, 1000.0)),
    licences=(LicenceCount(None, 2000, own=True), LicenceCount("mit", 1200)),
    left_out={"no licence known": 7},
    skipped=4,
    settings={"seed": 0},
)
MODELS = ModelsFacts(
    name="sampled",
    location="org/sampled",
    licence="mit",
    base_model="org/base",
    models=(ModelFacts("", "mlp", 1685, {"F32": 1685}, "digits", {"test_accuracy": 0.9}),),
    config={"family": "mlp"},
)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def test_the_card_says_what_was_measured_beside_the_baselines(tmp_path: Path) -> None:
    path = write_card(tmp_path / "new", FACTS)
    text = path.read_text(encoding="utf-8")
    assert path.name == "README.md"
    assert "| **autoencoder with ridge** | **0.712 [0.660, 0.750]** |" in text
    assert "| s(W) with ridge | 0.561 [0.520, 0.600] |" in text
    assert "| W with ridge | n/a |" in text
    assert "digest abc123): 3,200 models of 1,600 training runs." in text
    assert "apache-2.0 (3,000 models); mit (200 models)" in text
    assert "3,211,264 parameters" in text and "- Language models are out of reach." in text
    assert "\n\n\n" not in text


def test_the_metadata_are_read_back() -> None:
    data = ModelCard(render_card(FACTS)).data
    assert (data.library_name, data.license, data.model_name) == ("weightspace", "apache-2.0", "digits-encoder")
    assert "weightspace" in data.tags and data.metrics == ["r2"]
    (result,) = data.eval_results
    assert (result.metric_value, result.metric_type, result.dataset_name) == (0.7123456, "r2", "digits-zoo")
    assert data.datasets is None


def test_a_zoo_on_the_hub_is_linked_at_its_commit() -> None:
    zoo = TrainingZoo("digits-zoo", hub_id="org/digits-zoo", revision="f" * 40)
    card = ModelCard(render_card(replace(FACTS, zoo=zoo)))
    (result,) = card.data.eval_results
    assert card.data.datasets == ["org/digits-zoo"] == [result.dataset_type] and result.dataset_revision == "f" * 40
    assert f"[digits-zoo](https://huggingface.co/datasets/org/digits-zoo) at commit {'f' * 40}" in card.text


@pytest.mark.parametrize("facts", [FACTS, ZOO, MODELS], ids=lambda facts: type(facts).__name__)
def test_the_hub_accepts_every_card(hub: LoopbackHub, facts: Facts) -> None:
    card = (DatasetCard if isinstance(facts, ZooFacts) else ModelCard)(render_card(facts))
    card.validate()
    assert hub.seen("validate-yaml") and card.data.license


@pytest.mark.parametrize("facts", [FACTS, ZOO, MODELS], ids=lambda facts: type(facts).__name__)
def test_the_loading_example_is_three_lines_of_python(facts: Facts) -> None:
    text = render_card(replace(facts, location='a"b`c'))
    (example,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    lines = [line for line in example.splitlines() if line and "import" not in line]
    assert len(lines) <= 3
    loaded: list[str] = []

    class Anything:
        def __call__(self, *arguments: str) -> Anything:
            loaded.extend(arguments)
            return self

        def __getattr__(self, name: str) -> Anything:
            return self

        def __iter__(self):
            return iter(())

        def keys(self) -> tuple[str, ...]:
            return ()

    names = ("AutoModel", "AutoFeatureExtractor", "load_zoo", "open_checkpoint")
    exec(compile("\n".join(lines), "card", "exec"), dict.fromkeys(names, Anything()))
    assert set(loaded) - {"org/model"} == {'a"b`c'}


def test_what_was_not_measured_is_said() -> None:
    text = render_card(replace(FACTS, measurements=()))
    assert "Nothing was measured of this encoder." in text and "|---" not in text and "model-index" not in text


def test_nothing_is_said_of_what_is_not_known() -> None:
    text = render_card(EncoderFacts("bare"))
    assert headings(text) == ["Measured", "Intended use"]
    assert "None" not in text and "model-index" not in text and "license" not in text
    card = ModelCard(render_card(replace(FACTS, zoo=None)))
    assert "Training data" not in headings(card.text) and card.data.eval_results is None
    unknown = replace(FACTS.measurements[0], score=Score("x", float("nan")))
    assert ModelCard(render_card(replace(FACTS, measurements=(unknown,)))).data.eval_results is None
    assert headings(render_card(ZooFacts("bare"))) == ["Licences", "Intended use", "Limits"]
    for facts in (ZooFacts("bare"), ModelsFacts("bare")):
        assert "None" not in render_card(facts) and "license:" not in render_card(facts)


def test_a_zoo_card_summarises_licences_and_results() -> None:
    card = DatasetCard(render_card(ZOO))
    assert card.data.license == ["cc-by-4.0", "mit"] and card.data.size_categories == ["1K<n<10K"]
    assert [config["config_name"] for config in card.data.configs] == ["index", "weights"]
    for line in (
        "| 2,000 | cc-by-4.0 (the publisher's own models) |",
        "| 1,200 | mit |",
        "- 7 models: no licence known",
        "| MLP | 1,685 | 3,000 |",
        "And 3 other architectures.",
        "| test\\_accuracy | 3,100 | 0.1 | 0.5 | 0.95 |",
        "| step | 3,200 | 100 | 550 | 1,000 |",
        "- 4 sources could not be used; `skips.jsonl` names each with the reason.",
    ):
        assert line in card.text.splitlines()


def test_a_reference_zoo_has_no_weights_to_load() -> None:
    card = DatasetCard(render_card(replace(ZOO, reference=True, architectures=(ArchitectureCount("x", None, 3),))))
    assert [config["config_name"] for config in card.data.configs] == ["index"]
    assert "The weights stay in the repositories that they come from" in card.text and "| x |  | 3 |" in card.text


def test_a_card_of_many_models_names_no_result_as_its_own() -> None:
    (model,) = MODELS.models
    many = replace(MODELS, models=(replace(model, file="a/model.safetensors"),), others=1)
    card = ModelCard(render_card(many))
    assert card.data.eval_results is None and "And 1 other." in card.text
    assert 'open_checkpoint("org/sampled:a/model.safetensors")' in card.text
    (result,) = ModelCard(render_card(MODELS)).data.eval_results
    assert (result.task_type, result.metric_value) == ("image-classification", 0.9)


def test_texts_cannot_break_out() -> None:
    zoo = TrainingZoo(HOSTILE, digest=HOSTILE, architectures=(HOSTILE,), datasets=(HOSTILE,), licences={HOSTILE: 1})
    scores = (Score(HOSTILE, 0.5),)
    measurement = Measurement(HOSTILE, "r2", HOSTILE, scores[0], scores)
    config = {"note": HOSTILE, "marker": f"{BEGIN}\n{END}"}
    facts: tuple[Facts, ...] = (
        EncoderFacts(HOSTILE, HOSTILE, zoo=zoo, config=config, measurements=(measurement,), limits=(HOSTILE,)),
        ZooFacts(
            HOSTILE,
            architectures=(ArchitectureCount(HOSTILE, 1, 1),),
            datasets={HOSTILE: 1},
            results=(ResultSummary(HOSTILE, 1, 0.0, 0.0, 0.0),),
            licences=(LicenceCount(HOSTILE, 1),),
            left_out={HOSTILE: 1},
            settings=config,
        ),
        ModelsFacts(HOSTILE, base_model=HOSTILE, models=(ModelFacts(HOSTILE, HOSTILE, 1, {HOSTILE: 1}, HOSTILE),)),
    )
    for one in facts:
        card = (DatasetCard if isinstance(one, ZooFacts) else ModelCard)(render_card(one, "NOTES"))
        assert notes_of(card.content) == "NOTES"
        outside = re.sub(r"```\w+\n.*?\n```", "", card.text, flags=re.DOTALL)
        assert "<script" not in outside
        rows = [line for line in outside.splitlines() if line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert rows and len(widths) <= 4 and not re.search(r"^---$", outside, flags=re.MULTILINE)
    card = ModelCard(render_card(facts[0]))
    assert headings(card.text) == ["Measured", "Training data", "Intended use", "Limits", "Configuration"]
    assert card.data.eval_results[0].dataset_name == HOSTILE


# Facts beside the card


@pytest.mark.parametrize("facts", [FACTS, ZOO, MODELS], ids=lambda facts: type(facts).__name__)
def test_the_facts_survive_beside_the_card(tmp_path: Path, facts: Facts) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    card = write_card(tmp_path, facts).read_text(encoding="utf-8")
    record = read_record(tmp_path)
    assert record is not None and record.facts == facts and known_facts(tmp_path) == facts
    assert render_card(record.facts) == card and record.rendered == card_digest(card)


def test_numbers_of_other_weights_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_card(tmp_path, FACTS)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert known_facts(tmp_path) == replace(FACTS, measurements=())
    assert "the weights have changed since they were measured" in caplog.text


def test_notes_survive_and_a_changed_card_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_card(tmp_path, FACTS)
    noted = path.read_text().replace(f"{BEGIN}\n{END}", f"{BEGIN}\n\n## Reviewed\n\n`x` \\1\n\n{END}")
    path.write_text(noted)
    write_card(tmp_path, replace(FACTS, name="another"))
    assert "# another" in path.read_text() and f"{BEGIN}\n## Reviewed\n\n`x` \\1\n{END}" in path.read_text()
    assert not caplog.text
    path.write_text(path.read_text() + "\nMine.\n")
    write_card(tmp_path, FACTS)
    assert "# another" in path.read_text() and path.read_text().endswith("\nMine.\n")
    assert f"{path}: changed by hand, left as it is; delete it" in caplog.text
    record = read_record(tmp_path)
    assert record is not None and record.facts == FACTS


def test_a_card_without_facts_is_a_persons_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text("Mine.\n")
    write_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text() == "Mine.\n" and "changed by hand" in caplog.text


def test_only_the_rendered_card_counts_as_untouched() -> None:
    card, other = render_card(FACTS), render_card(replace(FACTS, name="other"))
    record = f'{{"rendered": "{card_digest(card)}"}}'
    assert not is_edited(card, record)
    assert not is_edited(card.replace(f"{BEGIN}\n{END}", f"{BEGIN}\nnotes\n{END}"), record)
    assert is_edited(other, record)
    for broken in (None, "", "[]", "{", "[" * 100_000, '{"rendered": null}'):
        assert is_edited(card, broken)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"kind": "x", "rendered": "", "facts": {}}',
        '{"kind": "zoo", "rendered": "", "facts": {"a": 1}}',
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(WeightspaceError, match=r"card\.json: not the facts of a card .*delete it") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unwritable_folder_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightspaceError, match=r"file.*choose another folder"):
        write_card(tmp_path / "file", FACTS)
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    with pytest.raises(WeightspaceError, match=r"README\.md: cannot be written"):
        write_card(tmp_path / "folder", FACTS)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["README.md"]


def test_a_model_that_does_not_decode_promises_nothing_of_the_kind() -> None:
    assert "decoded back" in render_card(EncoderFacts(name="one")) and "reconstruct weights" in render_card(
        EncoderFacts(name="one")
    )
    card = render_card(EncoderFacts(name="one", decodes=False))
    assert "decoded back" not in card and "reconstruct weights" not in card
