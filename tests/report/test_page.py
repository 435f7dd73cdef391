from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, open_chromium
from PIL import Image

from weightspace.errors import ZooError
from weightspace.evaluation import comparison as proof
from weightspace.evaluation.criteria import Criterion, check
from weightspace.probes.explain import ACROSS, ALL, ClusterRow, Explanation, VarianceRow
from weightspace.probes.reconstruction import ALL_ARCHITECTURES, ReconstructionRow
from weightspace.probes.rows import ProbeRow, rows_to_records
from weightspace.report.page import (
    Curve,
    PredictedTrue,
    Report,
    RetrievalRow,
    ZooMap,
    write_report,
)
from weightspace.stats.clustering import MEASURES
from weightspace.stats.resampling import Estimate
from weightspace.stats.variance import VarianceShare

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '"><script>alert("$x_1$")</script>'


class Page(HTMLParser):
    """Reads a page and refuses one whose tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def probe(representation: str, target: str, r2: float | None, **changes: Any) -> dict[str, Any]:
    around = (None, None) if r2 is None else (r2 - 0.0312345, r2 + 0.0298765)
    (row,) = rows_to_records([ProbeRow("", "", "", (), 0, 0)])
    row |= {
        "representation": representation,
        "estimator": "ridge",
        "target": target,
        "r2": r2,
        "r2_low": around[0],
        "r2_high": around[1],
        "kendall_tau": 0.5123456,
        "tau_low": 0.4912345,
        "tau_high": 0.5312345,
        "permuted_r2": r2,
        "permuted_tau": 0.5023456,
        "seeds": [0, 1, 2],
        "dimensions": 4321,
        "models": 98765,
        "dropped": 17,
        "note": "",
    }
    return {**row, **changes}


def label_probe(representation: str, auc: float | None, **changes: Any) -> dict[str, Any]:
    around = (None, None) if auc is None else (auc - 0.0212345, auc + 0.0198765)
    row = {
        **dict.fromkeys(("kendall_tau", "tau_low", "tau_high", "permuted_tau")),
        "auc": auc,
        "auc_low": around[0],
        "auc_high": around[1],
        "permuted_auc": None if auc is None else auc - 0.0011111,
        "balanced_accuracy": 0.6712345,
        "balanced_accuracy_low": 0.6512345,
        "balanced_accuracy_high": 0.6912345,
        "permuted_balanced_accuracy": 0.6612345,
        "chance": 0.2512345,
        "labels": ["0", HOSTILE],
        "unseen_datasets": 7,
    }
    return probe(representation, "classes", None, **{**row, **changes})


def explanation() -> Explanation:
    """Numbers that differ from each other, so that none can stand for another."""
    rng = np.random.default_rng(5)

    def estimate(tested: bool = True) -> Estimate:
        null = rng.random(4).tolist() if tested else [None] * 4
        return Estimate(*rng.random(3).tolist(), *null)

    described = ("joint", HOSTILE)
    clusters = [
        ClusterRow(one, scope, label, 31, 171, measure, estimate())
        for one in described
        for scope in ("mlp", ACROSS)
        for label in ("dataset", "polarity")
        for measure in MEASURES
    ]
    shares = [
        ("learning_rate", "training", "factor", 2),
        ("classes", "data", "factor", 3),
        ("data x data", "data", "interactions", 20),
        ("all of data", "data", "together", 23),
        ("residual", "", "residual", 99),
    ]
    variance = [
        VarianceRow(one, scope, 181, VarianceShare(*share, estimate(share[2] != "residual")))  # type: ignore[arg-type]
        for one in described
        for scope in ("mlp", ALL)
        for share in shares
    ]
    return Explanation(tuple(clusters), (), tuple(variance), (f"A note {HOSTILE}.",))


CRITERIA = (
    Criterion(proof.accuracy_after(0), "at least", baseline=proof.ZOO, share=0.95),
    Criterion(proof.SPEARMAN, "at least", 0.8),
    Criterion(proof.accuracy_after(1), "above", baseline=proof.SCRATCH, everywhere=True),
    Criterion(proof.OVERLAP, "at most", baseline=proof.INDEPENDENT),
)


def proof_rows(sampler: str, zero_shot: float, datasets: proof.Group = "seen") -> list[dict[str, Any]]:
    """What a proof says of one sampler: the controls are those of every sampler but for the noise."""
    names = ("digits", "digits?rotation=90")

    def row(measure: str, subject: str, value: float) -> dict[str, Any]:
        values = tuple(zip(names, (value - 0.0101, value + 0.0101), strict=True))
        low, high = value - 0.0212345, value + 0.0312345
        return dataclasses.asdict(proof.ComparisonRow(sampler, datasets, measure, subject, value, low, high, values))

    subjects = {
        proof.SAMPLES: zero_shot,
        proof.SCRATCH: 0.1012345,
        proof.ZOO: 0.9312345,
        proof.BEST: 0.5012345,
        proof.NOISE: zero_shot - 0.3,
        proof.AVERAGE: 0.4012345,
    }
    return [
        *(
            row(proof.accuracy_after(epochs), subject, value + epochs / 1000)
            for epochs in (0, 1)
            for subject, value in subjects.items()
        ),
        row(proof.DISTANCE, proof.SAMPLES, 9.1012345),
        row(proof.DISTANCE, proof.HELD_OUT, 8.4012345),
        row(proof.OVERLAP, proof.SAMPLES, 0.5312345),
        row(proof.OVERLAP, proof.INDEPENDENT, 0.5112345),
        row(proof.SPEARMAN, proof.SAMPLES, 0.8712345),
        row(proof.ERROR, proof.SAMPLES, 0.0312345),
        row(proof.ERROR, proof.ANY, 0.0812345),
    ]


def reconstruction(method: str, architecture: str, kept: float) -> ReconstructionRow:
    return ReconstructionRow(
        method, architecture, 211, 2464.5, 616, 0.8712, 0.8123, kept, kept - 0.0111, kept + 0.0122, 0.8834, 0.0923
    )


@pytest.fixture(scope="module")
def report() -> Report:
    rng = np.random.default_rng(0)
    ids = ["digits", "digits?rotation=90", "digits?classes=0-1-2&rotation=90&polarity=inverted", HOSTILE, None]
    datasets = [ids[i % len(ids)] for i in range(60)]
    embeddings = rng.normal(size=(60, 8)) + np.arange(60)[:, None] % len(ids)
    embeddings[7, 2] = math.nan
    accuracies = rng.random(60)
    accuracies[3] = math.nan
    true = rng.random(30)
    return Report(
        title=f"A zoo {HOSTILE}",
        facts={"zoo": HOSTILE, "models": 98765, "compression": 4.00081, "training time": "2 min", "speed": math.nan},
        probes=[
            probe("s(W)", "test_accuracy", 0.5612345),
            probe("W", "test_accuracy", -123456.789, permuted_r2=None, permuted_tau=None, note=f"why {HOSTILE}"),
            probe("autoencoder", "test_accuracy", 0.7123456, permuted_r2=0.6912345),
            probe("autoencoder", "step", None, kendall_tau=math.nan, note="R2 and tau are undefined here"),
            label_probe("s(W)", 0.6123456),
            label_probe("autoencoder", 0.8123456),
        ],
        reconstruction=[
            reconstruction("autoencoder", ALL_ARCHITECTURES, 0.9324),
            dataclasses.replace(reconstruction("PCA", ALL_ARCHITECTURES, 0.6213), relative_mse=math.nan),
            reconstruction("autoencoder", HOSTILE, 0.9101),
        ],
        retrieval=[
            RetrievalRow("D → W", f"question {HOSTILE}", "R@1", 0.9612345, 0.9123456, 0.9812345, 0.0312345, 32, 540),
            RetrievalRow("R → W", "question", "Spearman", 0.8912345, 0.8123456, 0.9412345, 0.0, 41, 541),
        ],
        explanation=explanation(),
        samples=[
            *proof_rows("kde", 0.9012345),
            *proof_rows(HOSTILE, 0.8012345),
            *proof_rows("kde", 0.6012345, "unseen"),
        ],
        sample_criteria=[
            dataclasses.asdict(bar)
            for sampler in ("kde", HOSTILE)
            for bar in check([proof.ComparisonRow(**row) for row in proof_rows(sampler, 0.9012345)], CRITERIA)
        ],
        curves=[
            Curve("loss", [0, 10, 20], [1.0, 0.1, 0.01]),
            Curve("validation_loss", [0, 20], [1.0, 0.02]),
            Curve("test_loss", [0, 20], np.array([1.0, 0.03])),
            Curve("evaluations", [0, 20], [1, 2]),
            Curve(HOSTILE, [0, 10], [1.0, math.nan]),
            Curve("learning_rate", [], []),
        ],
        predictions=[
            PredictedTrue(f"test accuracy {HOSTILE}", true, true + np.where(np.arange(30) == 4, 1e6, 0.01)),
            PredictedTrue("nothing", np.array([math.nan]), np.array([1.0])),
        ],
        zoo_map=ZooMap(embeddings, datasets, accuracies),
        settings={"seed": 5, "zoo": {"rates": (0.25, 0.00125), "base": HOSTILE, "out": Path("zoo")}, "limit": None},
        commands=["weightspace demo --output demo", HOSTILE],
        notes=[HOSTILE],
    )


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("report") / "new" / "folder")


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def records(written: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    loaded: dict[str, Any] = json.loads(
        written.with_name("report.json").read_text(encoding="utf-8"), parse_constant=refuse
    )
    return loaded


def numbers(value: Any) -> list[int | float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_page_asks_for_nothing_and_runs_nothing(page: Page, written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "://" not in text and "@import" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    links = page.values("href") + page.values("src") + page.values("xlink:href")
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert any("default-src 'none'" in content for content in page.values("content"))


def test_ids_are_unique_and_every_reference_has_its_target(page: Page, written: Path) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [link[1:] for link in page.values("href") if link.startswith("#")] + page.values("aria-labelledby")
    references += re.findall(r"url\(#([^)]+)\)", written.read_text(encoding="utf-8"))
    assert set(references) <= set(ids)


def test_every_number_of_the_records_is_on_the_page_with_all_its_digits(page: Page, records: dict[str, Any]) -> None:
    shown = {attrs["value"] for tag, attrs in page.tags if tag == "data"}
    for part in ("facts", "probes", "reconstruction", "retrieval", "settings"):
        assert numbers(records[part])
        assert {repr(number) for number in numbers(records[part])} <= shown, part
    for row in (*records["samples"], *records["sample_criteria"]):
        assert {repr(row[name]) for name in ("value", "low", "high")} <= shown, row
    for row in records["explanation"]["clusters"]:
        if row["label"] == "dataset":
            kept = [value for name, value in row["estimate"].items() if name not in ("null_low", "null_high")]
            assert {repr(number) for number in (*kept, row["runs"], row["groups"])} <= shown, row
    for row in records["explanation"]["variance"]:
        if (row["models"], row["share"]["part"] != "residual") == (ALL, True):
            kept = [row["share"]["share"][name] for name in ("value", "low", "high", "p_value")]
            assert {repr(number) for number in (*kept, row["runs"])} <= shown, row
    for answers in records["explanation"]["answers"].values():
        assert answers and all(answer in page.text for answer in answers)
    assert {repr(len(records["map"]["x"])), repr(records["map"]["models"])} <= shown
    assert len(records["headlines"]) == 3 and all(sentence in page.text for sentence in records["headlines"])
    assert page.text.index(records["headlines"][0]) < page.text.index("Findings")
    for verdict in records["verdicts"]:
        assert verdict["text"] in page.text and verdict["outcome"] in page.text
    assert [row["outcome"] for row in records["sample_criteria"]] == ["met", "met", "met", "not met"] * 2
    assert records["sample_criteria"][0]["sampler"] == "kde"
    assert "differences taken dataset by dataset" in " ".join(page.text.split())


def test_the_json_has_the_numbers_that_were_given(report: Report, records: dict[str, Any]) -> None:
    assert records["probes"][2] == report.probes[2]
    assert records["reconstruction"][0] == {
        **dataclasses.asdict(report.reconstruction[0]),
        "compression": 2464.5 / 616,
    }
    assert records["retrieval"][0] == dataclasses.asdict(report.retrieval[0])
    assert records["samples"][0]["values"] == [list(pair) for pair in report.samples[0]["values"]]
    assert records["explanation"]["clusters"][0]["estimate"] == dataclasses.asdict(
        report.explanation.clusters[0].estimate  # type: ignore[union-attr]
    )
    assert records["predictions"][0]["true"] == report.predictions[0].true.tolist()
    assert records["settings"]["zoo"] == {"rates": [0.25, 0.00125], "base": HOSTILE, "out": "zoo"}
    assert records["map"]["left_out"] == 1 and len(records["map"]["x"]) == 59
    assert records["map"]["dataset"].count("unknown") == 12


def test_nan_is_null_and_reads_na_with_the_reason(page: Page, records: dict[str, Any]) -> None:
    assert records["facts"]["speed"] is None
    assert records["probes"][3]["kendall_tau"] is None
    assert records["reconstruction"][1]["relative_mse"] is None
    assert records["map"]["accuracy"][3] is None
    reasons = [attrs["title"] for tag, attrs in page.tags if tag == "abbr"]
    assert page.text.count("n/a") >= len(reasons) > 0
    assert {"not known", "not measured", f"why {HOSTILE}", "R2 and tau are undefined here"} <= set(reasons)
    assert "R2 and tau are undefined here (all rows)" in page.text
    assert "limit none" in page.text
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_what_zoos_say_is_escaped(page: Page, written: Path) -> None:
    assert "<script" not in written.read_text(encoding="utf-8")
    assert page.text.count(HOSTILE) >= 8
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    assert any(HOSTILE in label for label in labels)


def test_plots_and_tables_say_what_they_are(page: Page) -> None:
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") == "true" for attrs in drawings)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 3
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert tags.count("h1") == 1


def test_plots_take_the_colours_of_the_page(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "stroke: var(--accent)" in text and "fill: var(--muted)" in text
    assert not re.search(r"#0[1-5]0[2-6]0[3-7]", text)
    assert "DejaVu" not in text
    used, defined = set(re.findall(r"var\((--[a-z]+)\)", text)), re.findall(r"(--[a-z]+):", text)
    # Each once for light and once for dark; printing sets the page white.
    assert used <= set(defined) and all(defined.count(name) == 2 for name in used - {"--page"})


def test_a_point_far_outside_does_not_squeeze_the_others(page: Page) -> None:
    assert "30 test models, 1 outside the plot" in page.text
    assert "No model has both numbers." in page.text


def test_a_validation_curve_is_drawn_beside_its_counterpart(page: Page) -> None:
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    assert "Training curve of loss: loss ends at 0.01; validation loss ends at 0.02" in labels
    assert "Training curve of test loss: test loss ends at 0.03" in labels
    assert "Training curve of evaluations: evaluations ends at 2" in labels
    assert not any("learning rate" in label for label in labels)


def test_the_best_of_a_column_is_marked(report: Report, tmp_path: Path) -> None:
    rows = [probe("s(W)", "step", 0.5, kendall_tau=0.7), probe("W", "step", 0.50004), probe("PCA", "step", 0.4)]
    text = write_report(Report("best", probes=rows), tmp_path).read_text(encoding="utf-8")
    marked = re.findall(r'<td class="best"><data value="([^"]+)">', text)
    # Both print 0.500; the permuted R2 are the same numbers, and all permuted tau are equal, so none is best.
    assert marked == ["0.5", "0.7", "0.5", "0.50004", "0.50004"]
    rows = [reconstruction("a", "x", 0.9), dataclasses.replace(reconstruction("b", "x", 0.9), relative_mse=0.05)]
    text = write_report(Report("best", reconstruction=rows), tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<td class="best"><data value="([^"]+)">', text) == ["0.05"]


def test_labels_are_judged_by_auc_and_balanced_accuracy_with_chance_beside(page: Page) -> None:
    table = page.text[page.text.index("Classes 98,765 models") : page.text.index("Decoded models, judged")]
    assert "tested on 7 unseen datasets, 2 labels (0, " in table and HOSTILE in table
    assert "AUC from ½ to 1, ○ permuted AUC Balanced accuracy AUC permuted Balanced accuracy permuted" in table
    assert "0.812 (best) [ 0.791 , 0.832 ] 0.671 [ 0.651 , 0.691 ] 0.811 (best) 0.661" in table
    assert "by chance always one answer 0.500 0.251 0.500 0.251" in table
    assert "R²" not in table and "n/a" not in table


def test_a_bar_of_labels_begins_at_one_half(tmp_path: Path) -> None:
    rows = [label_probe("autoencoder", 0.75, auc_low=0.4, auc_high=1.0, permuted_auc=0.625)]
    text = write_report(Report("labels", probes=rows), tmp_path).read_text(encoding="utf-8")
    assert '<line x1="0.0" x2="100.0" y1="6"' in text
    assert '<circle cx="50.0" cy="6" r="2"' in text and '<circle cx="25.0" cy="6" r="3.6"' in text


def test_numbers_that_are_not_known_have_their_place_in_the_new_tables(tmp_path: Path) -> None:
    rows = [label_probe("autoencoder", None, note="the AUC is undefined here")]
    single = [{**row, "low": None, "high": None, "values": row["values"][:1]} for row in proof_rows("kde", 0.9)]
    text = write_report(Report("gaps", probes=rows, samples=single), tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "the AUC is undefined here" in page.values("title")
    assert "Test accuracy on seen datasets 1 dataset " in page.text
    # Spearman has no reference.
    assert page.text[page.text.index("Novelty and fidelity") :].count("n/a") == 2


def test_a_bare_report_has_no_empty_sections(tmp_path: Path) -> None:
    page = Page(write_report(Report("bare"), tmp_path).read_text(encoding="utf-8"))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "h2"] == ["glossary"]
    assert "table" not in {tag for tag, _ in page.tags}


def test_the_same_report_gives_the_same_bytes(report: Report, written: Path, tmp_path: Path) -> None:
    again = write_report(report, tmp_path)
    for name in ("report.html", "report.json"):
        assert again.with_name(name).read_bytes() == written.with_name(name).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_page_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ZooError, match=r"report\.html: cannot be written .*choose another folder"):
        write_report(Report("bare"), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("flag", "bright"), [("--disable-gpu", True), ("--force-dark-mode", False)])
def test_a_browser_shows_the_page_in_light_and_dark(written: Path, tmp_path: Path, flag: str, bright: bool) -> None:
    picture = tmp_path / "page.png"
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, flag, "--window-size=1200,3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", written.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    pixels = np.asarray(Image.open(picture).convert("L"))
    background = int(np.median(pixels))
    assert (background > 200) if bright else (background < 60)
    assert (np.abs(pixels.astype(int) - background) > 60).mean() > 0.005


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_nothing_overflows_and_nothing_is_asked_for(written: Path, tmp_path: Path) -> None:
    with open_chromium(tmp_path) as page:
        for width in (1280, 390):
            page.open(written.as_uri(), width)
            assert page.run("document.documentElement.scrollWidth") <= width
            # A table that is too wide scrolls within its frame.
            outside = "(one) => one.getBoundingClientRect().right > innerWidth && !one.closest('.scroll, pre')"
            assert (
                page.run(f"[...document.querySelectorAll('main *')].filter({outside}).map((one) => one.outerHTML)")
                == []
            )
            assert page.complaints == []
            assert [one for one in page.requests if not one.startswith("data:")] == [written.as_uri()]
        assert page.run("document.querySelectorAll('table.measures').length") == 7
