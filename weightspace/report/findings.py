"""What the measured numbers support, and no more: outcomes are decided here, ``templates/findings.txt`` words them.

All functions read records: fields of rows by their names, None for NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from weightspace.evaluation.comparison import REFINED_SCRATCH, SAMPLES, accuracy_after
from weightspace.probes.explain import ACROSS, ALL
from weightspace.probes.reconstruction import ALL_ARCHITECTURES
from weightspace.probes.rows import AUC, R2, Measure
from weightspace.probes.zoo import ENCODER, JOINT
from weightspace.report.numbers import decimals, environment, percent, readable
from weightspace.stats.clustering import NEAREST
from weightspace.stats.resampling import Estimate

STATISTICS = "s(W)"
_LEARNED = {ENCODER: ENCODER, JOINT: "joint model"}
_SHOWN_FACTORS = 3
# What a probe that has learned nothing reaches, and what above it is too little for a share: a ratio of two noises.
_FLOORS = {R2: (0.0, 0.05), AUC: (0.5, 0.025)}

Record = Mapping[str, Any]
Outcome = Literal["ahead", "level", "behind", "unclear", "met", "not met", "undecided"]
# What comes first decides about all criteria of a sampler.
_CRITERIA: tuple[Outcome, ...] = ("not met", "undecided", "met")


@dataclass(frozen=True)
class Verdict:
    """A comparison of the autoencoder or the joint model with a baseline or with chance, or of samples with criteria.

    Attributes:
        subject: what was predicted, reconstructed, found or sampled.
        outcome: of ours; ``"level"`` where the intervals overlap, ``"unclear"`` where something is missing. Of samples,
            that of all their criteria: ``"not met"`` where one is not met.
        text: sentences with the numbers.
    """

    subject: str
    outcome: Outcome
    text: str


def is_learned(representation: str) -> bool:
    """Tells the learned descriptions of weights from the baselines."""
    return representation in _LEARNED


def headlines(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Puts the main results into one sentence each, as far as they were measured.

    How well accuracy is read from weights beside the best baseline; what decoded models keep beside the best other
    method; and what samplers do beside untrained models refined alike, or beside the zoo's models, or else what a joint
    model finds beside chance.

    Args:
        records: of ``probes``, ``reconstruction``, ``retrieval`` and ``samples``.
    """
    probes = [row for row in records["probes"] if row["target"] == "test_accuracy" and row[R2.name] is not None]
    ours, others = ([row for row in probes if is_learned(row["representation"]) == side] for side in (True, False))
    found = []
    if ours and others:
        sides = _side(R2, _best(R2, ours)), _side(R2, _best(R2, others))
        outcome = _compared(*(side["score"] for side in sides))
        found.append(_worded("read", best=sides[0], other=sides[1], outcome=outcome))
    # Rows of all architectures come first, where there are several.
    rows = records["reconstruction"]
    kept = [row for row in rows if row["architecture"] == rows[0]["architecture"] and row["kept"] is not None]
    decoded = next((row for row in kept if row["method"] == ENCODER), None)
    if decoded is not None:
        other = _most_kept([row for row in kept if row is not decoded])
        outcome = "unclear" if other is None else _compared(_estimate(decoded, "kept"), _estimate(other, "kept"))
        found.append(_worded("decoded", ours=decoded, other=other, outcome=outcome))
    at_once = [row for row in records["samples"] if row["measure"] == accuracy_after(0)]
    samples = [row for row in at_once if row["subject"] == SAMPLES]
    if samples:
        best = max(samples, key=lambda row: (row["datasets"] == "seen", float(row["value"])))
        beside = [row for row in at_once if all(row[name] == best[name] for name in ("sampler", "datasets"))]
        controls = {row["subject"]: row for row in beside if row["subject"] != SAMPLES}
        control = controls.get(REFINED_SCRATCH) or next(iter(controls.values()), None)
        found.append(_worded("sampled", ours=best, control=control))
    elif records["retrieval"]:
        found.append(_worded("found", row=records["retrieval"][0]))
    return found


def probe_verdicts(probes: Sequence[Record]) -> list[Verdict]:
    """Compares the autoencoder, and the joint model where it was probed, with the baselines, target by target.

    First like with like: ridge on the embedding against ridge on the weight statistics s(W), by R2 for numbers and by
    AUC for labels, and what a neuron permutation of the test models leaves of it. Then the best estimator on the
    embedding against the best baseline, where that is another pair. A lead counts where the 95 % intervals do not
    overlap.

    Args:
        probes: records of probe rows.
    """
    verdicts = []
    for target in dict.fromkeys(str(row["target"]) for row in probes):
        rows = [row for row in probes if row["target"] == target]
        baselines = [row for row in rows if not is_learned(row["representation"])]
        for name in _LEARNED:
            ours = [row for row in rows if row["representation"] == name]
            if ours or name == ENCODER:
                verdicts += _target_verdicts(target, name, ours, baselines)
    return verdicts


def _target_verdicts(target: str, name: str, rows: Sequence[Record], baselines: Sequence[Record]) -> list[Verdict]:
    who, subject = _LEARNED[name], readable(target).capitalize()
    subject = subject if name == ENCODER else f"{subject}, {who}"
    measure = AUC if any(row["labels"] for row in (*rows, *baselines)) else R2
    ours, others = ([row for row in side if row[measure.name] is not None] for side in (rows, baselines))
    facts: dict[str, Any] = {"who": who, "measure": measure}
    if not ours or not others:
        facts |= {"best": _side(measure, _best(measure, ours)) if ours else None, "probed": bool(rows)}
        facts |= {"other": _side(measure, _best(measure, others)) if others else None}
        facts |= {"left": _left(measure, _best(measure, ours)) if ours else None}
        return [Verdict(subject, "unclear", _worded("alone", **facts))]
    ridge = next((row for row in ours if row["estimator"] == "ridge"), None)
    like = next((row for row in others if (row["representation"], row["estimator"]) == (STATISTICS, "ridge")), None)
    pairs = [] if ridge is None or like is None else [("like", ridge, like)]
    best, other = _best(measure, ours), _best(measure, others)
    if best is not ridge or other is not like:
        pairs.append(("best", best, other))
    verdicts: list[Verdict] = []
    for kind, one, two in pairs:
        outcome = _compared(_score(measure, one), _score(measure, two))
        left = None if kind == "best" and verdicts and one is ridge else _left(measure, one)
        sides = {"best": _side(measure, one), "other": _side(measure, two)}
        text = _worded("compared", **facts, **sides, like=kind == "like", outcome=outcome, left=left)
        verdicts.append(Verdict(subject, outcome, text))
    return verdicts


def _left(measure: Measure, row: Record) -> dict[str, Any]:
    """Decides what is left of a probe on neuron-permuted models."""
    floor, least = _FLOORS[measure]
    after = _number(row[measure.permuted])
    before, left = _score(measure, row).value - floor, after - floor
    states = {
        "no better": before <= 0,
        "unknown": math.isnan(left),
        "nothing": left <= 0,
        "too little": before < least,
        "share": True,
    }
    state = next(name for name, applies in states.items() if applies)
    share = f"{100 * left / before:.0f} %" if state == "share" else ""
    return {"state": state, "after": after, "share": share, "floor": floor}


def reconstruction_verdicts(rows: Sequence[Record]) -> list[Verdict]:
    """Compares the accuracy that decoded models keep with the best other method.

    Args:
        rows: records of reconstruction rows. Those of ``ALL_ARCHITECTURES`` decide; where there are none, each
            architecture gets its verdict.
    """
    architectures = list(dict.fromkeys(str(row["architecture"]) for row in rows))
    verdicts = []
    for architecture in [ALL_ARCHITECTURES] if ALL_ARCHITECTURES in architectures else architectures:
        known = [row for row in rows if row["architecture"] == architecture and row["kept"] is not None]
        ours = next((row for row in known if row["method"] == ENCODER), None)
        other = max(
            (row for row in known if row["method"] != ENCODER), key=lambda row: float(row["kept"]), default=None
        )
        outcome: Outcome = "unclear"
        if ours is not None and other is not None:
            outcome = _compared(_estimate(ours, "kept"), _estimate(other, "kept"))
        subject = "Decoded models" if architecture == ALL_ARCHITECTURES else f"Decoded models, {architecture}"
        text = _worded("kept", who=ENCODER, ours=ours, other=other, outcome=outcome)
        verdicts.append(Verdict(subject, outcome, text))
    return verdicts


def retrieval_verdicts(rows: Sequence[Record]) -> list[Verdict]:
    """Compares what the joint model finds with chance; one verdict for all rows.

    Args:
        rows: records of retrieval rows.
    """
    if not rows:
        return []
    chances = [_number(row["chance"]) for row in rows]
    missed = [row["pair"] for row, chance in zip(rows, chances, strict=True) if not _estimate(row).low > chance]
    below = any(_estimate(row).high < chance for row, chance in zip(rows, chances, strict=True))
    outcome: Outcome = "behind" if below else "level" if missed else "ahead"
    return [Verdict("Retrieval by the joint model", outcome, _worded("retrieved", rows=rows, missed=missed))]


def sample_verdicts(criteria: Sequence[Record]) -> list[Verdict]:
    """Says which criteria samplers meet; a verdict for each sampler and each kind of datasets.

    Args:
        criteria: records of criteria, sampler by sampler.
    """
    verdicts = []
    for sampler, group in dict.fromkeys((str(row["sampler"]), str(row["datasets"])) for row in criteria):
        own = [row for row in criteria if (row["sampler"], row["datasets"]) == (sampler, group)]
        by_outcome = {one: [row for row in own if row["outcome"] == one] for one in _CRITERIA}
        by_outcome = {outcome: rows for outcome, rows in by_outcome.items() if rows}
        text = _worded("criteria", by_outcome=by_outcome, samples=SAMPLES)
        verdicts.append(Verdict(f"Samples of {sampler}, {group} datasets", next(iter(by_outcome)), text))
    return verdicts


def clustering_answers(rows: Sequence[Record]) -> list[str]:
    """Says of each description whether the nearest run shares the dataset, across architectures where that is known.

    Args:
        rows: records of cluster rows.
    """
    own = [row for row in rows if (row["label"], row["measure"]) == ("dataset", NEAREST)]
    across = [row for row in own if row["models"] == ACROSS]
    return [_worded("clustered", row=row, across=row["models"] == ACROSS) for row in across or own]


def variance_answers(rows: Sequence[Record]) -> list[str]:
    """Names of each description the factors that determine it most, and what all of a kind do together.

    Args:
        rows: records of variance rows.
    """
    chosen = [row for row in rows if row["models"] == ALL] or rows
    answers = []
    for scope, description in dict.fromkeys((row["models"], row["description"]) for row in chosen):
        shares = [row["share"] for row in chosen if (row["models"], row["description"]) == (scope, description)]
        factors = sorted((one for one in shares if one["part"] == "factor"), key=lambda one: -one["share"]["value"])
        sums = [one for one in shares if one["part"] == "together"]
        name = description if scope == ALL else f"{description} ({scope})"
        answers.append(_worded("determined", name=name, factors=factors[:_SHOWN_FACTORS], sums=sums))
    return answers


def _most_kept(rows: Sequence[Record]) -> Record | None:
    return max(rows, key=lambda row: float(row["kept"]), default=None)


def _compared(ours: Estimate, theirs: Estimate) -> Outcome:
    if math.isnan(ours.low + ours.high + theirs.low + theirs.high):
        return "unclear"
    return "ahead" if ours.low > theirs.high else "behind" if theirs.low > ours.high else "level"


def _best(measure: Measure, rows: Sequence[Record]) -> Record:
    return max(rows, key=lambda row: float(row[measure.name]))


def _side(measure: Measure, row: Record) -> dict[str, Any]:
    who = _LEARNED.get(row["representation"])
    name = row["representation"] if who is None else f"the {who}'s embedding"
    return {"name": name, "estimator": row["estimator"], "score": _score(measure, row)}


def _score(measure: Measure, row: Record) -> Estimate:
    return Estimate(*(_number(row[name]) for name in (measure.name, measure.low, measure.high)))


def _estimate(row: Record, name: str = "") -> Estimate:
    keys = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    return Estimate(*(_number(row[key]) for key in keys))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _worded(macro: str, **facts: Any) -> str:
    """Renders a macro of the template as one line."""
    text = str(getattr(_template(), macro)(**facts))
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _with_interval(estimate: Estimate, style: Callable[[float], str] = decimals) -> str:
    value = style(estimate.value)
    if math.isnan(estimate.low + estimate.high):
        return value
    low, high = (style(end).removesuffix(" %") for end in (estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


@cache
def _template() -> Any:
    templates = environment(escape=False)
    templates.filters["estimate"] = lambda row: _with_interval(_estimate(row))
    templates.filters["kept"] = lambda row, name="kept": _with_interval(_estimate(row, name), percent)
    templates.filters["score"] = _with_interval
    templates.filters["decimals"] = lambda value: decimals(_number(value))
    return templates.get_template("findings.txt").module
