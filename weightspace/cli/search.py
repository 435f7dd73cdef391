"""``weightspace search``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import hub_options, json_option, pickle_option
from weightspace.cli.output import print_json, print_list, print_table

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.io.hub import HubOptions
    from weightspace.search.finding import Answer
    from weightspace.search.index import EmbeddingIndex

_RESULTS = ("test_accuracy", "test_loss", "generalization_gap")
_PINNED = re.compile(r"[^@:]+/[^@:]+@[0-9a-f]{40}(?::.+)?")


@click.command()
@click.argument("zoo")
@click.option(
    "--encoder", "--joint", "encoder", show_default="that of an index", help="Joint model; for --model any encoder."
)
@click.option("--dataset", help="Rank models by how likely they were trained on it: a folder or an id.")
@click.option("--text", "texts", multiple=True, help="A class of the dataset in words, in place of --dataset.")
@click.option("--result", help='Rank models by how likely they have it, e.g. ">=0.9" or "test_loss<0.3".')
@click.option("--model", help="Find relatives of a model: its id in the zoo, a path or org/name on the Hub.")
@click.option("--same-run", is_flag=True, help="Count other checkpoints of the model's own run as relatives.")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, help="Models to find.")
@click.option("--save-index", type=click.Path(path_type=Path), help="Folder to keep the embeddings in, as an index.")
@hub_options
@pickle_option
@json_option
def search(
    zoo: str,
    encoder: str | None,
    dataset: str | None,
    texts: tuple[str, ...],
    result: str | None,
    model: str | None,
    same_run: bool,
    count: int,
    save_index: Path | None,
    options: HubOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Find models by a dataset, a wanted result or a relative, without running any.

    ZOO is a zoo, models as `weightspace embed` takes them, or an index.

    Models are ranked by their weights alone; the results beside them are what is known, and are not used. Scores are
    nats for datasets and results, and cosines for relatives.
    """
    from weightspace.search.finding import Question, find_models, open_index

    question = Question(dataset, texts, result, model, same_run)
    index, loaded = open_index(zoo, encoder, options, allow_pickle=allow_pickle)
    if save_index is not None:
        index.save(save_index)
    answer = find_models(index, loaded, question, count, options, allow_pickle=allow_pickle)
    found = _described(index, answer)
    itself = [str(index.models["model_id"].iloc[row]) for row in answer.itself]
    if as_json:
        record = {"encoder": index.encoder, "models": len(index), "left_out": index.left_out}
        print_json({**record, "found": found, "itself": itself})
    else:
        _print(found, itself, index.left_out)


def _described(index: EmbeddingIndex, answer: Answer) -> list[dict[str, Any]]:
    columns = [name for name in _RESULTS if name in index.models]
    found = []
    for rank, (score, row) in enumerate(zip(answer.scores, answer.rows, strict=True), start=1):
        model = index.models.iloc[int(row)]
        known = {name: float(model[name]) for name in columns if model.notna()[name]}
        record = {"rank": rank, "score": float(score), "model_id": str(model["model_id"])}
        found.append({**record, "dataset": _known_text(model, "dataset"), "results": known, "ref": _hub_ref(model)})
    return found


def _known_text(model: pd.Series, column: str) -> str | None:
    return str(model[column]) if column in model and model.notna()[column] else None


def _hub_ref(model: pd.Series) -> str | None:
    """Where on the Hub the model itself lies, or the zoo that it is a part of."""
    places = (_known_text(model, column) for column in ("ref", "location"))
    return next((place for place in places if place is not None and _PINNED.fullmatch(place)), None)


def _print(found: list[dict[str, Any]], itself: list[str], left_out: int) -> None:
    shown = [name for name in _RESULTS if any(name in one["results"] for one in found)]
    optional = [column for column in ("dataset", "ref") if any(one[column] is not None for one in found)]
    head = ["rank", "score", "model", *(["dataset"] if "dataset" in optional else []), *shown]
    rows = []
    for one in found:
        cells = [one["rank"], f"{one['score']:.3f}", one["model_id"]]
        cells += [one["dataset"] or ""] if "dataset" in optional else []
        cells += [f"{one['results'][name]:.3f}" if name in one["results"] else "" for name in shown]
        rows.append([*cells, one["ref"] or ""] if "ref" in optional else cells)
    print_table([*head, *(["on the Hub"] if "ref" in optional else [])], rows)
    if itself:
        print_list("the model itself, left out", itself)
    if left_out:
        click.echo(f"left out for an embedding without direction: {left_out:,}")
