"""Sentences that say what the measured numbers support, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightspace.probes.explain import ACROSS, ALL

OURS = "autoencoder"
JOINT = "joint"
BAR = "s(W)"
_LEARNED = {OURS: OURS, JOINT: "joint model"}
SAMPLES = "samples"
REFINED_SCRATCH = "from scratch, refined alike"
ACCURACY = "accuracy after "
_CLOSEST = "nearest neighbour"
_SHOWN_FACTORS = 3
# From here on three decimals say nothing; a probe of raw weights can be off by powers of ten.
_MANY = 100
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Outcome = Literal["ahead", "level", "behind", "unclear", "met", "not met", "undecided"]
# What becomes of something that is asked for; what comes first decides about all of it.
_OUTCOMES: tuple[Outcome, ...] = ("not met", "undecided", "met")


@dataclass(frozen=True)
class Verdict:
    """One comparison of the autoencoder or the joint model with a baseline, or with chance; or what samples do.

    Attributes:
        subject: what was predicted, reconstructed, found or sampled.
        outcome: of ours; ``"level"`` where the intervals overlap, ``"unclear"`` where something is missing. Of samples,
            what became of all that is asked of them: ``"not met"`` where one thing is not met.
        text: sentences with the numbers.
    """

    subject: str
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class _Measure:
    """What a probe is judged by.

    Attributes:
        name: as sentences print it.
        column: its field in a record; ``_low``, ``_high`` and ``permuted_`` go with it.
        nothing: its value for a probe that has learned nothing.
        least: less above ``nothing`` is too little for a share: a ratio of two noises.
        idle: what such a probe does no better than.
    """

    name: str
    column: str
    nothing: float
    least: float
    idle: str

    @property
    def gain(self) -> str:
        """Names what a probe has above nothing."""
        return f"{self.name} above {self.nothing:g}" if self.nothing else self.name

    def of(self, row: Mapping[str, Any]) -> _Estimate:
        """Reads the measure of a probe."""
        value, low, high = (_number(row[f"{self.column}{end}"]) for end in ("", "_low", "_high"))
        return _Estimate(value, low, high)


_R2 = _Measure("R²", "r2", 0.0, 0.05, "predicting the mean")
_AUC = _Measure("AUC", "auc", 0.5, 0.025, "guessing")


@dataclass(frozen=True)
class _Estimate:
    """A measured number with its 95 % interval; NaN where something is not known."""

    value: float
    low: float
    high: float
    percent: bool = False

    def __str__(self) -> str:
        unit = " %" if self.percent else ""
        if math.isnan(self.low + self.high):
            return f"{self._text(self.value)}{unit}"
        return f"{self._text(self.value)}{unit} [{self._text(self.low)}, {self._text(self.high)}]"

    def _text(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else decimals(value)


def decimals(value: int | float) -> str:
    """Formats with three decimals, with a power of ten from 100 on."""
    if abs(value) < _MANY:
        return signed(f"{value:z.3f}")
    mantissa, exponent = f"{value:.1e}".split("e")
    return signed(f"{mantissa}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_RAISED)}")


def signed(text: str) -> str:
    """Sets true minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def readable(name: str) -> str:
    """Turns ``test_accuracy`` into ``test accuracy``."""
    return name.replace("_", " ")


def is_learned(representation: str) -> bool:
    """Tells the learned descriptions of weights from the baselines."""
    return representation in _LEARNED


def probe_verdicts(probes: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Compares the autoencoder, and the joint model where it was probed, with the baselines, target by target.

    First like with like: ridge on the embedding against ridge on the weight statistics s(W), by R2 for numbers and by
    AUC for labels, and what becomes of it on neuron-permuted test models. Then the best estimator on the embedding
    against the best baseline, where that is another pair. A lead counts where the 95 % intervals do not overlap.

    Args:
        probes: records with the fields of a probe row; None stands for NaN.
    """
    targets = dict.fromkeys(str(row["target"]) for row in probes)
    verdicts = []
    for target in targets:
        rows = [row for row in probes if row["target"] == target]
        baselines = [row for row in rows if row["representation"] not in _LEARNED]
        for name in _LEARNED:
            ours = [row for row in rows if row["representation"] == name]
            if ours or name == OURS:
                verdicts += _target_verdicts(target, name, ours, baselines)
    return verdicts


def reconstruction_verdicts(rows: Sequence[Mapping[str, Any]], overall: str) -> list[Verdict]:
    """Compares the accuracy that decoded models keep with the best other method.

    Args:
        rows: records with the fields of a reconstruction row; None stands for NaN.
        overall: name of the "architecture" that stands for all; where it is missing, each one gets its verdict.
    """
    architectures = list(dict.fromkeys(str(row["architecture"]) for row in rows))
    return [
        _kept_verdict(
            "Decoded models" if architecture == overall else f"Decoded models, {architecture}",
            [row for row in rows if row["architecture"] == architecture and row["kept"] is not None],
        )
        for architecture in ([overall] if overall in architectures else architectures)
    ]


def retrieval_verdicts(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Compares what the joint model finds with chance; one verdict for all rows.

    Args:
        rows: records with the fields of a retrieval row; None stands for NaN.
    """
    if not rows:
        return []
    found = [_Estimate(_number(row["value"]), _number(row["low"]), _number(row["high"])) for row in rows]
    pairs = list(zip(rows, found, strict=True))
    numbers = "; ".join(
        f"{row['pair']}: {row['measure']} is {one}, by chance {decimals(_number(row['chance']))}" for row, one in pairs
    )
    above = [row["pair"] for row, one in pairs if one.low > _number(row["chance"])]
    below = [row["pair"] for row, one in pairs if one.high < _number(row["chance"])]
    if len(above) == len(rows):
        outcome: Outcome = "ahead"
        finding = "The joint model finds more than chance in all of it; no other method was asked."
    else:
        outcome = "behind" if below else "level"
        missed = ", ".join(row["pair"] for row in rows if row["pair"] not in above)
        finding = f"For {missed} that is not shown to be more than chance."
    return [Verdict("Retrieval by the joint model", outcome, f"{numbers}. {finding}")]


def sample_verdicts(bars: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Says what samplers do of what is asked of them; a verdict for each sampler and each kind of datasets.

    Args:
        bars: records of bars, sampler by sampler.
    """
    places = dict.fromkeys((str(bar["sampler"]), str(bar["datasets"])) for bar in bars)
    return [
        _sample_verdict(*place, [bar for bar in bars if (bar["sampler"], bar["datasets"]) == place]) for place in places
    ]


def clustering_answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says of each description whether the nearest run shares the dataset, across architectures where that is known.

    Args:
        rows: records of cluster rows.
    """
    own = [row for row in rows if (row["label"], row["measure"]) == ("dataset", _CLOSEST)]
    across = [row for row in own if row["models"] == ACROSS]
    return [_clustering_answer(row) for row in across or own]


def variance_answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of each description the factors that determine it most, and what all of a kind do together.

    Args:
        rows: records of variance rows.
    """
    chosen = [row for row in rows if row["models"] == ALL] or rows
    return [
        _variance_answer(
            description if scope == ALL else f"{description} ({scope})",
            [row["share"] for row in chosen if (row["models"], row["description"]) == (scope, description)],
        )
        for scope, description in dict.fromkeys((row["models"], row["description"]) for row in chosen)
    ]


def _target_verdicts(
    target: str, name: str, rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]
) -> list[Verdict]:
    who, subject = _LEARNED[name], readable(target).capitalize()
    subject = subject if name == OURS else f"{subject}, {who}"
    measure = _AUC if any(row["labels"] for row in (*rows, *baselines)) else _R2
    ours, others = ([row for row in side if row[measure.column] is not None] for side in (rows, baselines))
    if not ours or not others:
        return [Verdict(subject, "unclear", _alone(who, measure, rows, ours, others))]
    verdicts = []
    ridge = next((row for row in ours if row["estimator"] == "ridge"), None)
    bar = next((row for row in others if (row["representation"], row["estimator"]) == (BAR, "ridge")), None)
    if ridge is not None and bar is not None:
        numbers = (
            f"With ridge on both, {measure.name} is {measure.of(ridge)} for the {who}'s embedding and "
            f"{measure.of(bar)} for {BAR}."
        )
        outcome, finding = _compared(who, measure.of(ridge), measure.of(bar))
        verdicts.append(Verdict(subject, outcome, f"{numbers} {finding} {_after_permutation(measure, ridge)}"))
    best, other = _best(measure, ours), _best(measure, others)
    if best is not ridge or other is not bar:
        numbers = (
            f"With the best estimator of each, {measure.name} is {measure.of(best)} for the {who}'s embedding "
            f"({best['estimator']}) and {measure.of(other)} for {other['representation']} ({other['estimator']})."
        )
        outcome, finding = _compared(who, measure.of(best), measure.of(other))
        rest = "" if verdicts and best is ridge else f" {_after_permutation(measure, best)}"
        verdicts.append(Verdict(subject, outcome, f"{numbers} {finding}{rest}"))
    return verdicts


def _alone(
    who: str,
    measure: _Measure,
    rows: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> str:
    """Says what is known where one side of the comparison is missing."""
    if ours:
        best = _best(measure, ours)
        numbers = f"{measure.name} is {measure.of(best)} for the {who}'s embedding ({best['estimator']})"
        return f"{numbers}, with no baseline to compare it with. {_after_permutation(measure, best)}"
    why = f"{measure.name} is undefined for the {who}'s embedding" if rows else f"The {who}'s embedding was not probed"
    if not others:
        return f"{why}, nor is {measure.name} known for a baseline."
    best = _best(measure, others)
    return f"{why}; it is {measure.of(best)} for the best baseline, {best['representation']} ({best['estimator']})."


def _kept_verdict(subject: str, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    ours = next((row for row in rows if row["method"] == OURS), None)
    others = [row for row in rows if row["method"] != OURS]
    if ours is None:
        return Verdict(subject, "unclear", "What models keep that the autoencoder decoded is not known.")
    share = (
        f"Models decoded by the autoencoder from {ours['latent_size']:,.0f} numbers keep {_kept(ours)} of the accuracy"
    )
    if not others:
        return Verdict(subject, "unclear", f"{share}, with no other method to compare it with.")
    best = max(others, key=lambda row: float(row["kept"]))
    size = "as many" if best["latent_size"] == ours["latent_size"] else f"{best['latent_size']:,.0f}"
    outcome, finding = _compared(_LEARNED[OURS], _kept(ours), _kept(best))
    return Verdict(subject, outcome, f"{share}; {best['method']} with {size} keeps {_kept(best)}. {finding}")


def _sample_verdict(sampler: str, group: str, bars: Sequence[Mapping[str, Any]]) -> Verdict:
    told = {outcome: [_bar(bar) for bar in bars if bar["outcome"] == outcome] for outcome in _OUTCOMES}
    found = [outcome for outcome in _OUTCOMES if told[outcome]]
    text = " ".join(f"{outcome.capitalize()}: {'; '.join(told[outcome])}." for outcome in found)
    return Verdict(f"Samples of {sampler}, {group} datasets", found[0], text)


def _bar(bar: Mapping[str, Any]) -> str:
    subject = "" if bar["subject"] == SAMPLES else f", {told_difference(bar['subject'])}"
    found = _Estimate(_number(bar["value"]), _number(bar["low"]), _number(bar["high"]))
    return f"{bar['measure']}{subject} {found} ({bar['asked']})"


def told_difference(subject: str) -> str:
    """Sets a true minus sign between the models whose difference a record is about."""
    return subject.replace(" - ", " \N{MINUS SIGN} ")


def _clustering_answer(row: Mapping[str, Any]) -> str:
    across, estimate = row["models"] == ACROSS, row["estimate"]
    name = row["description"] if across else f"{row['description']} ({row['models']})"
    share = _Estimate(estimate["value"], estimate["low"], estimate["high"], percent=True)
    more = "more than chance" if estimate["low"] > estimate["null_high"] else "not shown to be more than chance"
    return (
        f"{name}: the nearest run{' of another architecture' if across else ''} was trained on the same dataset for "
        f"{share} of the runs, by chance {100 * estimate['null_mean']:.1f} %: {more}."
    )


def _variance_answer(name: str, shares: Sequence[Mapping[str, Any]]) -> str:
    factors = sorted((one for one in shares if one["part"] == "factor"), key=lambda one: -float(one["share"]["value"]))
    sums = [one for one in shares if one["part"] == "together"]
    largest = ", ".join(f"{readable(one['name'])} {_percent(one)}" for one in factors[:_SHOWN_FACTORS])
    together = "".join(f"; {one['name']} {_percent(one)}" for one in sums)
    return f"{name}: the largest factors are {largest}{together}."


def _percent(share: Mapping[str, Any]) -> str:
    return signed(f"{100 * share['share']['value']:.1f} %")


def _compared(who: str, ours: _Estimate, theirs: _Estimate) -> tuple[Outcome, str]:
    if math.isnan(ours.low + ours.high + theirs.low + theirs.high):
        return "unclear", "Without both intervals the difference cannot be judged."
    if ours.low > theirs.high:
        return "ahead", f"The {who} is ahead."
    if theirs.low > ours.high:
        return "behind", "The baseline wins."
    if ours.value == theirs.value:
        return "level", "The means are equal."
    higher = who if ours.value > theirs.value else "baseline"
    return "level", f"The {higher}'s mean is higher, but the intervals overlap."


def _after_permutation(measure: _Measure, row: Mapping[str, Any]) -> str:
    after = _number(row[f"permuted_{measure.column}"])
    before, left = measure.of(row).value - measure.nothing, after - measure.nothing
    if before <= 0:
        return f"The embedding does no better than {measure.idle}."
    if math.isnan(left):
        return f"What is left of the embedding's {measure.name} on neuron-permuted models is not known."
    if left <= 0:
        return f"On neuron-permuted models nothing of the embedding's {measure.gain} is left ({decimals(after)})."
    if before < measure.least:
        return "That is too little to say what a neuron permutation leaves of it."
    return f"On neuron-permuted models the embedding keeps {100 * left / before:.0f} % of its {measure.gain}."


def _best(measure: _Measure, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: float(row[measure.column]))


def _kept(row: Mapping[str, Any]) -> _Estimate:
    return _Estimate(_number(row["kept"]), _number(row["kept_low"]), _number(row["kept_high"]), percent=True)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
