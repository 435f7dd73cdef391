"""Sentences that say what the measured numbers support, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

OURS = "autoencoder"
JOINT = "joint"
BAR = "s(W)"
_LEARNED = {OURS: OURS, JOINT: "joint model"}
# Below this R2, the share that is left after a permutation is a ratio of two noises.
_LEAST_R2 = 0.05
# From here on three decimals say nothing; a probe of raw weights can be off by powers of ten.
_MANY = 100
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Outcome = Literal["ahead", "level", "behind", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """One comparison of the autoencoder or the joint model with a baseline, or with chance.

    Attributes:
        subject: what was predicted, reconstructed or found.
        outcome: of ours; ``"level"`` where the intervals overlap, ``"unclear"`` where something is missing.
        text: one or two sentences with the numbers.
    """

    subject: str
    outcome: Outcome
    text: str


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
        return signed(f"{value:.3f}")
    mantissa, exponent = f"{value:.1e}".split("e")
    return signed(f"{mantissa}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_RAISED)}")


def signed(text: str) -> str:
    """Sets true minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def readable(name: str) -> str:
    """Turns ``test_accuracy`` into ``test accuracy``."""
    return name.replace("_", " ")


def probe_verdicts(probes: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Compares the autoencoder, and the joint model where it was probed, with the baselines, target by target.

    First like with like: ridge on the embedding against ridge on the weight statistics s(W), and what the embedding's
    R2 becomes on neuron-permuted test models. Then the best estimator on the embedding against the best baseline,
    where that is another pair. A lead counts where the 95 % intervals do not overlap.

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


def _target_verdicts(
    target: str, name: str, rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]
) -> list[Verdict]:
    who, subject = _LEARNED[name], readable(target).capitalize()
    subject = subject if name == OURS else f"{subject}, {who}"
    ours, others = ([row for row in side if row["r2"] is not None] for side in (rows, baselines))
    if not ours or not others:
        return [Verdict(subject, "unclear", _alone(who, rows, ours, others))]
    verdicts = []
    ridge = next((row for row in ours if row["estimator"] == "ridge"), None)
    bar = next((row for row in others if (row["representation"], row["estimator"]) == (BAR, "ridge")), None)
    if ridge is not None and bar is not None:
        numbers = f"With ridge on both, R² is {_r2(ridge)} for the {who}'s embedding and {_r2(bar)} for {BAR}."
        outcome, finding = _compared(who, _r2(ridge), _r2(bar))
        verdicts.append(Verdict(subject, outcome, f"{numbers} {finding} {_after_permutation(ridge)}"))
    best, other = _best(ours), _best(others)
    if best is not ridge or other is not bar:
        numbers = (
            f"With the best estimator of each, R² is {_r2(best)} for the {who}'s embedding ({best['estimator']}) "
            f"and {_r2(other)} for {other['representation']} ({other['estimator']})."
        )
        outcome, finding = _compared(who, _r2(best), _r2(other))
        rest = "" if verdicts and best is ridge else f" {_after_permutation(best)}"
        verdicts.append(Verdict(subject, outcome, f"{numbers} {finding}{rest}"))
    return verdicts


def _alone(
    who: str,
    rows: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> str:
    """Says what is known where one side of the comparison is missing."""
    if ours:
        best = _best(ours)
        numbers = f"R² is {_r2(best)} for the {who}'s embedding ({best['estimator']})"
        return f"{numbers}, with no baseline to compare it with. {_after_permutation(best)}"
    why = f"R² is undefined for the {who}'s embedding" if rows else f"The {who}'s embedding was not probed"
    if not others:
        return f"{why}, nor is R² known for a baseline."
    best = _best(others)
    return f"{why}; it is {_r2(best)} for the best baseline, {best['representation']} ({best['estimator']})."


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


def _after_permutation(row: Mapping[str, Any]) -> str:
    before, after = _number(row["r2"]), _number(row["permuted_r2"])
    if before <= 0:
        return "The embedding does no better than predicting the mean."
    if math.isnan(after):
        return "What is left of the embedding's R² on neuron-permuted models is not known."
    if after <= 0:
        return f"On neuron-permuted models nothing of the embedding's R² is left ({decimals(after)})."
    if before < _LEAST_R2:
        return "That is too little to say what a neuron permutation leaves of it."
    return f"On neuron-permuted models the embedding keeps {100 * after / before:.0f} % of its R²."


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: float(row["r2"]))


def _r2(row: Mapping[str, Any]) -> _Estimate:
    return _Estimate(_number(row["r2"]), _number(row["r2_low"]), _number(row["r2_high"]))


def _kept(row: Mapping[str, Any]) -> _Estimate:
    return _Estimate(_number(row["kept"]), _number(row["kept_low"]), _number(row["kept_high"]), percent=True)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
