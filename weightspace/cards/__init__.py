"""Model and dataset cards from recorded facts."""

from __future__ import annotations

from weightspace.cards.encoder import EncoderFacts, Measurement, Score, TrainingZoo
from weightspace.cards.models import ModelFacts, ModelsFacts, SamplingFacts
from weightspace.cards.record import render_card, write_card
from weightspace.cards.zoo import ArchitectureCount, LicenceCount, ResultSummary, ZooFacts

__all__ = [
    "ArchitectureCount",
    "EncoderFacts",
    "LicenceCount",
    "Measurement",
    "ModelFacts",
    "ModelsFacts",
    "ResultSummary",
    "SamplingFacts",
    "Score",
    "TrainingZoo",
    "ZooFacts",
    "render_card",
    "write_card",
]
