"""Facts into Markdown: the metadata of a card, a template, and other people's texts in it."""

from __future__ import annotations

import html
import json
import math
import re
from importlib import resources

from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData, RepoCard

from weightspace.cards.facts import EncoderFacts, Facts, ModelsFacts, Score, ZooFacts
from weightspace.errors import install_command

_MARKDOWN = re.compile(r"([\\`*_\[\]|#~$])")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def render(facts: Facts) -> str:
    """Renders the card of facts without notes. Texts in the facts are escaped."""
    template = resources.files("weightspace.cards").joinpath("templates", f"{facts.kind}.md")
    card = RepoCard.from_template(
        _metadata(facts),
        template_str=template.read_text(encoding="utf-8"),
        facts=facts,
        install=install_command(),
        text=text,
        code=code,
        count=count,
        score=score,
        decimals=decimals,
        thousands=thousands,
    )
    return str(card).rstrip() + "\n"


def _metadata(facts: Facts) -> CardData:
    if isinstance(facts, EncoderFacts):
        return _encoder_metadata(facts)
    if isinstance(facts, ZooFacts):
        return _zoo_metadata(facts)
    assert isinstance(facts, ModelsFacts)
    # The library's datasets are image datasets with labels, so that this accuracy is one of image classification.
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=one.dataset,
            dataset_name=one.dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=one.results["test_accuracy"],
        )
        for one in facts.models
        if len(facts.models) + facts.others == 1 and one.dataset is not None and "test_accuracy" in one.results
    ]
    return ModelCardData(
        model_name=facts.name,
        library_name="weightspace",
        license=facts.licence,
        tags=["weightspace"],
        base_model=facts.base_model,
        eval_results=results or None,
    )


def _encoder_metadata(facts: EncoderFacts) -> CardData:
    zoo = facts.zoo
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=zoo.hub_id or zoo.name,
            dataset_name=zoo.name,
            dataset_revision=zoo.revision,
            metric_type=one.metric,
            metric_name=f"{one.metric_name}, {one.task}",
            metric_value=one.score.known,
        )
        for one in facts.measurements
        if zoo is not None and one.score.known is not None
    ]
    return ModelCardData(
        model_name=facts.name,
        library_name="weightspace",
        pipeline_tag=None if facts.samples else "feature-extraction",
        license=facts.licence,
        tags=list(dict.fromkeys(("weightspace", "weight-space-learning", *facts.tags))),
        datasets=[zoo.hub_id] if zoo is not None and zoo.hub_id else None,
        metrics=list(dict.fromkeys(one.metric for one in facts.measurements)) or None,
        eval_results=results or None,
    )


def _zoo_metadata(facts: ZooFacts) -> CardData:
    """The metadata of a dataset, whose ``configs`` name the data files for ``datasets``."""
    known = [one.licence for one in facts.licences if one.licence is not None]
    licences = list(dict.fromkeys([*([facts.licence] if facts.licence else []), *known]))
    kinds = ("index",) if facts.reference else ("index", "weights")
    configs = [{"config_name": kind, "data_files": f"{kind}/*.parquet"} for kind in kinds]
    return DatasetCardData(
        pretty_name=facts.name,
        license=licences[0] if len(licences) == 1 else licences or None,
        tags=["weightspace", "model-zoo", "weight-space-learning"],
        size_categories=[next((name for limit, name in _SIZES if facts.models < limit), "n>10M")],
        configs=[{**configs[0], "default": True}, *configs[1:]],
    )


def text(value: object) -> str:
    """Makes one line of Markdown that shows the value as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def code(value: object) -> str:
    """Makes JSON (which Python reads as well where it is a text) that cannot end the code block it stands in."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str).replace("`", "\\u0060")


def count(number: int, noun: str) -> str:
    """Writes a number of things, e.g. ``"1 model"`` or ``"3,600 models"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def decimals(value: float | None) -> str:
    """Writes a measured number for a table."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def score(measured: Score) -> str:
    """Writes a measured number with its interval."""
    if measured.low is None or measured.high is None or not math.isfinite(measured.low + measured.high):
        return decimals(measured.value)
    return f"{decimals(measured.value)} [{measured.low:.3f}, {measured.high:.3f}]"


def thousands(value: float) -> str:
    """Writes a number that may be large: whole ones in full, all others with three significant digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
