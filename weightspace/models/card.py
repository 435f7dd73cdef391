"""The card that goes with a model when transformers pushes it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from weightspace.cards.facts import EncoderFacts
from weightspace.cards.record import CARD, RECORD, CardRecord, parse_record, weights_digest, write_card

_GENERAL = "This model card has been automatically generated"
"""Stands in the card that transformers makes where there is none."""


class PushedWithCard(PreTrainedModel):
    """A model whose ``push_to_hub`` writes the card of its recorded facts, where transformers writes a general one.

    What was recorded where the model was loaded from goes along if the pushed weights are still the same. A card that
    people have changed on the Hub stays.
    """

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        return EncoderFacts(
            name=self.config.model_type.replace("_", " "),
            parameters=self.num_parameters(),
            config=self.config.to_diff_dict(),
        )

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *arguments: Any, **options: Any) -> Any:
        folder, token = Path(working_dir), options.get("token")
        there = _fetched(repo_id, token=token)
        if there is not None:
            shutil.copyfile(there, folder / RECORD)
        if _GENERAL in (folder / CARD).read_text(encoding="utf-8"):
            (folder / CARD).unlink()
        facts, record = self.card_facts(), self._record(token)
        if record is not None and record.weights == weights_digest(folder) and isinstance(record.facts, EncoderFacts):
            facts = record.facts
        write_card(folder, replace(facts, name=repo_id.partition("/")[2], location=repo_id))
        return super()._upload_modified_files(working_dir, repo_id, *arguments, **options)

    def _record(self, token: str | bool | None) -> CardRecord | None:
        """Reads the facts that lie where the model was loaded from."""
        if not self.name_or_path:
            return None
        found = _fetched(self.name_or_path, token=token, revision=getattr(self.config, "_commit_hash", None))
        return None if found is None else parse_record(found.read_text(encoding="utf-8"), where=str(found))


def _fetched(location: str, **options: Any) -> Path | None:
    """Finds ``card.json`` in a folder or a repository."""
    quiet = dict.fromkeys(
        (
            "_raise_exceptions_for_gated_repo",
            "_raise_exceptions_for_missing_entries",
            "_raise_exceptions_for_connection_errors",
        ),
        False,
    )
    found = cached_file(location, RECORD, **options, **quiet)
    return None if found is None else Path(found)
