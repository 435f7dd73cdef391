"""Model cards from measured facts."""

from __future__ import annotations

from weightspace.cards.encoder import EncoderFacts, Measurement, Score, TrainingZoo, write_encoder_card

__all__ = ["EncoderFacts", "Measurement", "Score", "TrainingZoo", "write_encoder_card"]
