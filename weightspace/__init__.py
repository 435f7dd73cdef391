"""Trained models as data: checkpoints become tokens, tokens become embeddings, and embeddings answer questions.

Importing the package is fast: no torch and no transformers. Public names are loaded when they are first used, and
``transformers.AutoModel`` knows this library's models as soon as it is imported, before or after this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightspace.models import register

if TYPE_CHECKING:
    from weightspace.encoder import embed
    from weightspace.errors import WeightspaceError
    from weightspace.inspection import inspect_location
    from weightspace.io.checkpoint import open_checkpoint
    from weightspace.io.writing import save_checkpoint
    from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
    from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
    from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
    from weightspace.models.joint.configuration_joint import JointConfig
    from weightspace.models.joint.feature_extraction_joint import JointFeatureExtractor
    from weightspace.models.joint.modeling_joint import JointModel
    from weightspace.models.prior.configuration_prior import WeightCodePriorConfig, WeightPriorConfig
    from weightspace.models.prior.modeling_code_prior import WeightCodePriorModel
    from weightspace.models.prior.modeling_prior import WeightPriorModel
    from weightspace.networks.infer import infer_architecture
    from weightspace.publishing import push_folder
    from weightspace.search.index import EmbeddingIndex
    from weightspace.tokenizers import get_tokenizer
    from weightspace.training.autoencoder import train_autoencoder
    from weightspace.training.joint import train_joint
    from weightspace.training.prior import train_prior
    from weightspace.zoo.dataset import load_zoo
    from weightspace.zoo.importing import import_folder
    from weightspace.zoo.training import train_zoo
    from weightspace.zoo.transfer import export_folder

__version__ = "0.1.0"

_HOMES = {
    "EmbeddingIndex": "weightspace.search.index",
    "JointConfig": "weightspace.models.joint.configuration_joint",
    "JointFeatureExtractor": "weightspace.models.joint.feature_extraction_joint",
    "JointModel": "weightspace.models.joint.modeling_joint",
    "WeightAutoencoderConfig": "weightspace.models.autoencoder.configuration_autoencoder",
    "WeightAutoencoderModel": "weightspace.models.autoencoder.modeling_autoencoder",
    "WeightCodePriorConfig": "weightspace.models.prior.configuration_prior",
    "WeightCodePriorModel": "weightspace.models.prior.modeling_code_prior",
    "WeightFeatureExtractor": "weightspace.models.autoencoder.feature_extraction_autoencoder",
    "WeightPriorConfig": "weightspace.models.prior.configuration_prior",
    "WeightPriorModel": "weightspace.models.prior.modeling_prior",
    "WeightspaceError": "weightspace.errors",
    "embed": "weightspace.encoder",
    "export_folder": "weightspace.zoo.transfer",
    "get_tokenizer": "weightspace.tokenizers",
    "import_folder": "weightspace.zoo.importing",
    "infer_architecture": "weightspace.networks.infer",
    "inspect_location": "weightspace.inspection",
    "load_zoo": "weightspace.zoo.dataset",
    "open_checkpoint": "weightspace.io.checkpoint",
    "push_folder": "weightspace.publishing",
    "save_checkpoint": "weightspace.io.writing",
    "train_autoencoder": "weightspace.training.autoencoder",
    "train_joint": "weightspace.training.joint",
    "train_prior": "weightspace.training.prior",
    "train_zoo": "weightspace.zoo.training",
}

__all__ = [
    "EmbeddingIndex",
    "JointConfig",
    "JointFeatureExtractor",
    "JointModel",
    "WeightAutoencoderConfig",
    "WeightAutoencoderModel",
    "WeightCodePriorConfig",
    "WeightCodePriorModel",
    "WeightFeatureExtractor",
    "WeightPriorConfig",
    "WeightPriorModel",
    "WeightspaceError",
    "__version__",
    "embed",
    "export_folder",
    "get_tokenizer",
    "import_folder",
    "infer_architecture",
    "inspect_location",
    "load_zoo",
    "open_checkpoint",
    "push_folder",
    "save_checkpoint",
    "train_autoencoder",
    "train_joint",
    "train_prior",
    "train_zoo",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted({*globals(), *__all__})


register()
