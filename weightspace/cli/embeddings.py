"""Commands that embed models and read what embeddings say: embed, probe, explain, atlas and search."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightspace.cli.options import COUNT, PATH, USER_ERROR, Amount, Result, command, encoder_option, output_option
from weightspace.errors import SettingsError
from weightspace.printing import listing, reasons, table

if TYPE_CHECKING:
    import pandas as pd

    from weightspace.encoder import Encoder
    from weightspace.io.hub import HubOptions
    from weightspace.probes.explain import Explanation
    from weightspace.stats.resampling import Estimate
    from weightspace.zoo.dataset import Zoo

_RESULTS = ("test_accuracy", "test_loss", "generalization_gap")
_PINNED = re.compile(r"[^@:]+/[^@:]+@[0-9a-f]{40}(?::.+)?")


@command("pickle", "hub")
@click.argument("locations", nargs=-1, required=True)
@encoder_option
@output_option("Parquet file to write.")
@click.option(
    "--max-bytes",
    type=Amount("B"),
    show_default="all of them",
    help="Read at most so many bytes of a model's weights, e.g. 64MB, and estimate the embedding.",
)
@click.option("--seed", type=int, default=0, help="Seed of the sample that --max-bytes draws.")
def embed(locations: tuple[str, ...], encoder: str, output: Path, **reading: Any) -> Result:
    """Embed the models of zoos, files or folders, or of the Hub.

    LOCATIONS are paths or org/name[@revision][:path].

    The file has one row a model: its id, what else is known of it, and its embedding. Models that cannot be embedded
    are left out and listed with the reason; the exit code is 2 then, though the file holds all others.
    """
    from weightspace.encoder import embed as embed_locations
    from weightspace.encoder import save_embeddings

    frame = embed_locations(locations, encoder, **reading)
    save_embeddings(frame, output)
    size = len(frame["embedding"].iloc[0])
    sampled = frame[frame["share"] < 1]
    shares = {str(model): float(share) for model, share in zip(sampled["model_id"], sampled["share"], strict=True)}
    lines = [f"{output}: {len(frame):,} embeddings of {size} numbers"]
    if shares:
        estimated = [f"{model}: {share:.3%} of it" for model, share in shares.items()]
        lines += listing("read in part", estimated)
    left_out = [(location, reason) for location, reason in frame.attrs.get("left_out", ())]
    if left_out:
        lines += listing("left out", left_out)
    record = {"output": str(output), "models": len(frame), "size": size, "sampled": shares}
    return {**record, "left_out": reasons(left_out)}, lines, USER_ERROR if left_out else 0


@command()
@click.argument("zoo", type=PATH)
@click.option("--encoder", "encoders", multiple=True, help="Trained encoder to compare with the baselines; repeatable.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("test_accuracy",),
    help="What to predict: a result, a hyper-parameter (log10:NAME for its logarithm), or classes; repeatable.",
)
@click.option("--unseen-datasets", is_flag=True, help="Test on models of datasets that no training model has.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), help="Seed of a split; repeatable.")
def probe(
    zoo: Path, encoders: tuple[str, ...], targets: tuple[str, ...], unseen_datasets: bool, seeds: tuple[int, ...]
) -> Result:
    """Predict what is known of a zoo's models from their weights.

    Baselines and, where given, encoders stand side by side.

    Numbers are judged by R2 and Kendall's tau; names, and the classes that a model was trained on, by balanced accuracy
    and AUC. Splits keep the checkpoints of a run together. Every number stands once more for neuron-permuted test
    models.
    """
    from weightspace.probes.rows import format_table, rows_to_records
    from weightspace.probes.zoo import probe_zoo

    rows = probe_zoo(zoo, encoders, targets, seeds=seeds, unseen_datasets=unseen_datasets)
    return rows_to_records(rows), format_table(rows).splitlines()


@command()
@click.argument("zoo", type=PATH)
@encoder_option
@click.option("--held-out", is_flag=True, help="Take only the runs that the encoder's training kept for tests.")
@click.option("--draws", type=click.IntRange(min=100), default=1000, help="Permutations and bootstrap replicates.")
@click.option("--seed", type=int, default=0, help="Seed of the draws.")
def explain(zoo: Path, encoder: str, held_out: bool, draws: int, seed: int) -> Result:
    """Say what the weights of a zoo's models reveal about their data.

    Do models of similar datasets cluster, within an architecture and between them? Which characteristics of the data,
    and which hyper-parameters, determine the weights most? The encoder's embedding stands beside s(W), the statistics
    of the raw weights.

    Every run counts once, by its last checkpoint. P-values come from permutations and are not corrected for their
    number; intervals hold 95 % and are about these datasets. An encoder that saw the datasets of its training runs
    groups these runs by them: judge such a one by --held-out.
    """
    from weightspace.encoder import load_encoder
    from weightspace.probes.explain import explain as explain_runs
    from weightspace.probes.runs import run_table
    from weightspace.probes.zoo import describe_runs
    from weightspace.zoo.dataset import load_zoo

    opened, loaded = load_zoo(zoo).usable(), load_encoder(encoder)
    runs = run_table(opened, _held_out(opened, loaded) if held_out else None)
    answer = explain_runs(runs, describe_runs(opened, runs, {"embedding": loaded}), draws=draws, seed=seed)
    record = {"zoo": str(zoo), "encoder": encoder, "runs": len(runs), **dataclasses.asdict(answer)}
    return record, _explained(answer)


def _held_out(zoo: Zoo, encoder: Encoder) -> list[str]:
    """Returns the runs that the encoder's training kept for tests."""
    from weightspace.training.run import read_training

    state = read_training(encoder.path)
    if state is None or state.zoo_digest != zoo.digest:
        raise SettingsError(f"--held-out: {encoder.path} was not trained on {zoo.location}; leave the option out")
    return list(state.test_runs)


def _explained(answer: Explanation) -> list[str]:
    estimate = ("value", "95 % interval", "by chance", "p")
    return [
        "Do models of the same dataset cluster?",
        *table(
            ("description", "models", "runs", "of the same", "groups", "measure", *estimate),
            [
                (row.description, row.models, row.runs, row.label, row.groups, row.measure, *_cells(row.estimate))
                for row in answer.clusters
            ],
        ),
        "",
        "Are models of similar datasets similar? (Spearman's correlation over pairs of datasets)",
        *table(
            ("description", "weights of", "compared with", "datasets", *estimate),
            [(row.description, row.models, row.other, row.datasets, *_cells(row.estimate)) for row in answer.geometry],
        ),
        "",
        "What determines the weights? (share of variance, omega squared)",
        *table(
            ("description", "models", "runs", "factor", "kind", "df", *estimate),
            [
                (row.description, row.models, row.runs, share.name, share.kind, share.df, *_cells(share.share))
                for row in answer.variance
                for share in [row.share]
            ],
        ),
        "",
        *listing("notes", answer.notes),
    ]


def _cells(estimate: Estimate) -> tuple[str, str, str, str]:
    interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
    if estimate.p_value is None:
        return f"{estimate.value:.3f}", interval, "", ""
    chance = f"{estimate.null_low:.3f} to {estimate.null_high:.3f}"
    return f"{estimate.value:.3f}", interval, chance, f"{estimate.p_value:.4f}"


@command("hub")
@click.argument("zoo")
@click.option("--encoder", help="Folder of a trained encoder, or org/name on the Hub.")
@output_option("HTML file to write.")
@click.option("--columns", show_default="all", help="What to show of each model, e.g. dataset,test_accuracy.")
@click.option("--seed", type=int, default=0, help="Seed of the map.")
def atlas(zoo: str, encoder: str | None, output: Path, columns: str | None, seed: int, options: HubOptions) -> Result:
    """Draw a zoo as an interactive page: a map to search, colour and zoom.

    ZOO is a zoo, which needs an encoder, or the file that `weightspace embed` wrote.

    The page is one file that loads nothing from elsewhere.
    """
    from weightspace.report.atlas import build_atlas, embedded_models, write_atlas

    models = embedded_models(zoo, encoder, options)
    chosen = None if columns is None else [name.strip() for name in columns.split(",")]
    made = build_atlas(models, Path(zoo).name.removesuffix(".parquet"), chosen, seed)
    write_atlas(made, output)
    left_out = f", {made.left_out:,} without a finite embedding left out" if made.left_out else ""
    record = {"output": str(output), "models": len(made.names), "left_out": made.left_out, "columns": [*made.columns]}
    return record, [f"{output}: {len(made.names):,} models{left_out}"]


@command("hub", "pickle")
@click.argument("zoo")
@click.option(
    "--encoder", "--joint", "encoder", show_default="that of an index", help="Joint model; for --model any encoder."
)
@click.option("--dataset", help="Rank models by how likely they were trained on it: a folder or an id.")
@click.option("--text", "texts", multiple=True, help="A class of the dataset in words, in place of --dataset.")
@click.option("--result", help='Rank models by how likely they have it, e.g. ">=0.9" or "test_loss<0.3".')
@click.option("--model", help="Find relatives of a model: its id in the zoo, a path or org/name on the Hub.")
@click.option("--same-run", is_flag=True, help="Count other checkpoints of the model's own run as relatives.")
@click.option("-k", "count", type=COUNT, default=10, help="Models to find.")
@click.option("--save-index", type=PATH, help="Folder to keep the embeddings in, as an index.")
def search(
    zoo: str,
    encoder: str | None,
    count: int,
    save_index: Path | None,
    options: HubOptions,
    allow_pickle: bool,
    **question: Any,
) -> Result:
    """Find models by a dataset, a wanted result or a relative, without running any.

    ZOO is a zoo, models as `weightspace embed` takes them, or an index.

    Models are ranked by their weights alone; the results beside them are what is known, and are not used. Scores are
    nats for datasets and results, and cosines for relatives.
    """
    from weightspace.search.finding import Query, find_models, open_index

    query = Query(**question)
    index, loaded = open_index(zoo, encoder, options, allow_pickle=allow_pickle)
    if save_index is not None:
        index.save(save_index)
    answer = find_models(index, loaded, query, count, options, allow_pickle=allow_pickle)
    found = [
        {"rank": rank, "score": float(score), **_known(index.models.iloc[int(row)])}
        for rank, (score, row) in enumerate(zip(answer.scores, answer.rows, strict=True), start=1)
    ]
    itself = [str(index.models["model_id"].iloc[row]) for row in answer.itself]
    record = {"encoder": index.encoder, "models": len(index), "left_out": index.left_out}
    lines = _found(found) + (listing("the model itself, left out", itself) if itself else [])
    if index.left_out:
        lines.append(f"left out for an embedding without direction: {index.left_out:,}")
    return {**record, "found": found, "itself": itself}, lines


def _known(model: pd.Series) -> dict[str, Any]:
    """What an index knows of a model; ``ref`` is where on the Hub it lies, or the zoo that it is a part of."""
    known = model.dropna()
    texts = {name: str(known[name]) for name in ("dataset", "ref", "location") if name in known}
    return {
        "model_id": str(model["model_id"]),
        "dataset": texts.get("dataset"),
        "results": {name: float(known[name]) for name in _RESULTS if name in known},
        "ref": next((texts[name] for name in ("ref", "location") if _PINNED.fullmatch(texts.get(name, ""))), None),
    }


def _found(found: list[dict[str, Any]]) -> list[str]:
    columns = {
        "rank": [one["rank"] for one in found],
        "score": [f"{one['score']:.3f}" for one in found],
        "model": [one["model_id"] for one in found],
        "dataset": [one["dataset"] or "" for one in found],
        **{
            name: [f"{one['results'][name]:.3f}" if name in one["results"] else "" for one in found]
            for name in _RESULTS
        },
        "on the Hub": [one["ref"] or "" for one in found],
    }
    shown = {name: cells for name, cells in columns.items() if name in ("rank", "score", "model") or any(cells)}
    return table(list(shown), zip(*shown.values(), strict=True), indent="")
