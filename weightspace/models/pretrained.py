"""What all models share: initialisation, the card that a push writes, and loading that refuses missing weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from weightspace.cards.facts import EncoderFacts
from weightspace.cards.record import CARD, RECORD, CardRecord, parse_record, weights_digest, write_card
from weightspace.models.layers import initialize

_GENERATED = "This model card has been automatically generated"
"""Part of the card that transformers writes where there is none."""


class WeightspaceModel(PreTrainedModel):
    """A model on weight tokens whose ``push_to_hub`` writes the card of its recorded facts.

    The record of the folder or repository that the model was loaded from is copied if the pushed weights are still the
    same. A card that people have edited on the Hub stays.
    """

    input_modalities = "weight"
    _no_split_modules = ["TokenLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        return EncoderFacts(
            name=self.config.model_type.replace("_", " "),
            parameters=self.num_parameters(),
            config=self.config.to_diff_dict(),
        )

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *arguments: Any, **options: Any) -> Any:
        folder, token = Path(working_dir), options.get("token")
        published = _cached_record(repo_id, token=token)
        if published is not None:
            shutil.copyfile(published, folder / RECORD)
        if _GENERATED in (folder / CARD).read_text(encoding="utf-8"):
            (folder / CARD).unlink()
        facts, record = self.card_facts(), self._record(token)
        if record is not None and record.weights == weights_digest(folder) and isinstance(record.facts, EncoderFacts):
            facts = record.facts
        write_card(folder, replace(facts, name=repo_id.partition("/")[2], location=repo_id))
        return super()._upload_modified_files(working_dir, repo_id, *arguments, **options)

    def _record(self, token: str | bool | None) -> CardRecord | None:
        """Reads the record beside the weights that the model was loaded from."""
        if not self.name_or_path:
            return None
        revision = getattr(self.config, "_commit_hash", None)
        path = _cached_record(self.name_or_path, token=token, revision=revision)
        return None if path is None else parse_record(path.read_text(encoding="utf-8"), where=str(path))


def _cached_record(location: str, **options: Any) -> Path | None:
    """Finds ``card.json`` in a folder or a repository; None if it cannot be had."""
    errors = ("gated_repo", "missing_entries", "connection_errors")
    path = cached_file(location, RECORD, **options, **{f"_raise_exceptions_for_{error}": False for error in errors})
    return None if path is None else Path(path)


def load_complete(kind: Any, folder: str | Path) -> Any:
    """Loads a model in evaluation mode, and refuses a file without all of its weights.

    transformers only warns of missing weights and draws them at random: the model would then be used as if it had been
    trained.

    Args:
        kind: the class whose ``from_pretrained`` loads it, a model's own or ``AutoModel``.
        folder: what ``save_pretrained`` wrote.

    Raises:
        OSError: there is no model.
        ValueError: its file lacks weights, or its config is invalid.
    """
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its file lacks {len(missing)} of the tensors that its config asks for, e.g. {missing[0]}")
    return model.eval()
