"""Encoders and generators of weights as transformers models, and their registration with transformers' auto classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPES = {
    "weight_autoencoder": ("WeightAutoencoderConfig", "WeightAutoencoderModel", "WeightFeatureExtractor"),
    "weightspace_joint": ("JointConfig", "JointModel", "JointFeatureExtractor"),
    "weight_prior": ("WeightPriorConfig", "WeightPriorModel", "WeightFeatureExtractor"),
    "weight_code_prior": ("WeightCodePriorConfig", "WeightCodePriorModel", "WeightFeatureExtractor"),
}
"""Public names of the config, the model and the feature extractor of each model type."""

_AUTO_MAPPINGS = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING", 0),
    "transformers.models.auto.modeling_auto": ("MODEL_MAPPING", 1),
    "transformers.models.auto.feature_extraction_auto": ("FEATURE_EXTRACTOR_MAPPING", 2),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING", 2),
}
"""The mapping behind each auto class by its module, and which of the names of a model type belongs in it."""


def register() -> None:
    """Registers this library's models with ``AutoConfig``, ``AutoModel``, ``AutoFeatureExtractor``, ``AutoProcessor``.

    They are registered by name, as transformers registers its own models: a class is imported when it is first used.
    Neither torch nor transformers is imported; auto classes that are not loaded yet learn the names when they are.
    """
    for model_type in MODEL_TYPES:
        # Where the auto classes look for a model's classes. The package loads its public names on first use.
        sys.modules[f"transformers.models.{model_type}"] = sys.modules["weightspace"]
    for name in _AUTO_MAPPINGS:
        if name in sys.modules:
            _add_names(sys.modules[name])
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())


def _add_names(module: ModuleType) -> None:
    """Adds the names of the models to the mapping of an auto class."""
    mapping, column = _AUTO_MAPPINGS[module.__name__]
    getattr(module, f"{mapping}_NAMES").update({key: names[column] for key, names in MODEL_TYPES.items()})
    if column:  # keyed by the class of a config
        types = {config: key for key, (config, *_) in MODEL_TYPES.items()}
        getattr(module, mapping)._reverse_config_mapping.update(types)


class _AutoFinder(MetaPathFinder):
    """Finds the modules of the auto classes as usual, and adds the names once a module was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None for any other module, which leaves it to the other finders."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _AUTO_MAPPINGS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add_names(module)

        # Only this loader's method changes, so that asking it for source or resources still works.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
