"""What all models share: initialisation, the card that a push writes, and loading that refuses missing weights."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from weightspace.cards.facts import EncoderFacts
from weightspace.cards.record import CARD, RECORD, CardRecord, parse_record, weights_digest, write_card
from weightspace.errors import CheckpointError
from weightspace.io.catalogue import MAX_SHARDS
from weightspace.io.checkpoint import Checkpoint, open_checkpoint
from weightspace.io.folders import Folder, LocalFolder
from weightspace.io.header import shown
from weightspace.models.configuration import FIX
from weightspace.models.layers import initialize

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"[\w.-]+\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OURS = ("_from_auto", "_from_pipeline", "adapter_kwargs", "trust_remote_code", "use_safetensors", "weights_only")
"""Options of transformers that the models of this library leave no choice in."""


class WeightspaceModel(PreTrainedModel):
    """A model on weight tokens whose ``push_to_hub`` writes the card of its recorded facts.

    The record of the folder or repository that the model was loaded from is copied if the pushed weights are still the
    same. A card that people have edited on the Hub stays.
    """

    input_modalities = "weight"
    _no_split_modules = ["TokenLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        complete: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads what `save_pretrained` wrote, which may be anyone's.

        Weights are read from safetensors alone, after their names and shapes were compared with what the config
        describes. Adapters, code and weights in other formats beside them are not looked at. As in transformers,
        missing tensors are drawn with a warning, but never more than are stored; with ``complete`` they are refused.

        Raises:
            SettingsError: the config has an unknown field or an impossible value.
            CheckpointError: the weights are missing, damaged or those of another config.
            OSError: there is no such folder or repository.
        """
        location = str(pretrained_model_name_or_path)
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        for name in _OURS:
            kwargs.pop(name, None)
        if not isinstance(config, PreTrainedConfig):
            assert cls.config_class is not None
            kinds: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config or location, return_unused_kwargs=True, **hub, **kwargs
            )
            kwargs |= kinds
        checkpoint = _open_weights(location, hub)
        _ensure_fits(cls, config, checkpoint, complete)
        tensors = {name: value.clone() for name, value in checkpoint.tensors().items()}
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise CheckpointError(f"{checkpoint.where}: tensor {name} holds numbers that are not finite; {FIX}")
        # Without a location, transformers cannot look for anything beside the weights.
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = location
        return loaded

    def card_facts(self) -> EncoderFacts:
        """Returns what the model itself knows."""
        return EncoderFacts(
            name=self.config.model_type.replace("_", " "),
            parameters=self.num_parameters(),
            config=self.config.to_diff_dict(),
        )

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)

    def push_to_hub(  # type: ignore[override]  # transformers declares no parameters
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> str:
        """Publishes the model with its card; the arguments are those of transformers."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            for present in (CARD, RECORD):
                published = _cached(api, repo_id, present)
                if published is not None:
                    shutil.copyfile(published, folder / present)
            facts, record = self.card_facts(), self._record(api)
            if record is not None and record.weights == weights_digest(folder):
                facts = record.facts if isinstance(record.facts, EncoderFacts) else facts
            facts = replace(facts, name=repo_id.partition("/")[2], location=repo_id, tags=(*facts.tags, *(tags or ())))
            write_card(folder, facts)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
            )

    def _record(self, api: HfApi) -> CardRecord | None:
        """Reads the record beside the weights that the model was loaded from."""
        path = _cached(api, self.name_or_path or "", RECORD, getattr(self.config, "_commit_hash", None))
        return None if path is None else parse_record(path.read_text(encoding="utf-8"), where=str(path))


def _cached(api: HfApi, location: str, name: str, revision: str | None = None) -> Path | None:
    """Finds a file of a folder or a repository; None if it cannot be had."""
    local = Path(location, name)
    if local.parent.is_dir():
        return local if location and local.is_file() else None
    try:
        return Path(api.hf_hub_download(location, name, revision=revision))
    except (OSError, HFValidationError):
        return None


def weight_files(folder: Folder) -> tuple[str, ...]:
    """Lists the files that hold the weights of a model: one, or an index and its shards.

    Raises:
        CheckpointError: there are none, or the index names what is no shard.
    """
    if folder.has(WEIGHTS):
        return (WEIGHTS,)
    files = (folder.read_json(WEIGHTS_INDEX) or {}).get("weight_map", {})
    shards = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not shards:
        raise CheckpointError(f"{folder.where}: no {WEIGHTS}; {FIX}")
    if len(shards) > MAX_SHARDS or (strange := [name for name in shards if not _SHARD.fullmatch(name)]):
        raise CheckpointError(f"{folder.where}: {WEIGHTS_INDEX} names {shown(strange or len(shards))} as shards; {FIX}")
    return (WEIGHTS_INDEX, *shards)


def _open_weights(location: str, hub: Mapping[str, Any]) -> Checkpoint:
    """Opens the weights of a folder or a repository, after they are fetched.

    Raises:
        CheckpointError: there are none, or they are damaged.
        OSError: the repository cannot be had.
    """
    find: Callable[[str], str | None] = partial(
        cached_file, location, **hub, _raise_exceptions_for_missing_entries=False
    )
    file = find(WEIGHTS) or find(WEIGHTS_INDEX)
    if file is None:
        raise CheckpointError(f"{location}: no {WEIGHTS}; {FIX}")
    for name in weight_files(LocalFolder(Path(file).parent))[1:]:
        find(name)
    return open_checkpoint(Path(file))


def _ensure_fits(cls: type[PreTrainedModel], config: PreTrainedConfig, checkpoint: Checkpoint, complete: bool) -> None:
    """Refuses weights of other names, shapes or kinds than a config describes, before anything of it is allocated.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    where = checkpoint.where
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in cls(config).state_dict().items()}
    missing = sorted(expected.keys() - checkpoint.specs.keys())
    lacking, stored = (
        sum(math.prod(expected[name]) for name in missing),
        sum(s.numel for s in checkpoint.specs.values()),
    )
    if missing and (complete or lacking > stored):
        raise CheckpointError(
            f"{where}: its file lacks {len(missing)} of the tensors that its config asks for, e.g. {missing[0]}; {FIX}"
        )
    if unknown := sorted(checkpoint.specs.keys() - expected.keys()):
        raise CheckpointError(
            f"{where}: its config describes none of {len(unknown)} tensors of its file, e.g. {shown(unknown[0])}; {FIX}"
        )
    for name, spec in checkpoint.specs.items():
        if spec.shape != expected[name]:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {shown(spec.shape)}, its config asks for {shown(expected[name])}; "
                f"{FIX}"
            )
        if spec.dtype not in _FLOATS:
            raise CheckpointError(f"{where}: tensor {name} is stored as {spec.dtype}; use one of {', '.join(_FLOATS)}")
