"""Encoders and generators of weights as transformers models, and their registration with transformers' auto classes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CONFIG = ("transformers.models.auto.configuration_auto", "AutoConfig")
_AUTO_MODEL = ("transformers.models.auto.modeling_auto", "AutoModel")
_AUTO_EXTRACTOR = ("transformers.models.auto.feature_extraction_auto", "AutoFeatureExtractor")
_AUTO_PROCESSOR = ("transformers.models.auto.processing_auto", "AutoProcessor")


@dataclass(frozen=True)
class _Link:
    """An auto class and the class of this library that it must know for a config, each as its module and name."""

    auto: tuple[str, str]
    ours: tuple[str, str]
    config: tuple[str, str]

    def make(self) -> None:
        auto, ours, config = (
            getattr(importlib.import_module(module), name) for module, name in (self.auto, self.ours, self.config)
        )
        auto.register(config.model_type if ours is config else config, ours, exist_ok=True)


def _links(module: str, config: str, model: str, extractor: str, extractor_module: str = "") -> list[_Link]:
    """Names the modules of a model by what follows ``configuration_``, with the folder before it if that is another."""
    known_by = (_module("configuration", module), config)
    input_side = (_module("feature_extraction", extractor_module or module), extractor)
    return [
        _Link(_AUTO_CONFIG, known_by, known_by),
        _Link(_AUTO_MODEL, (_module("modeling", module), model), known_by),
        _Link(_AUTO_EXTRACTOR, input_side, known_by),
        _Link(_AUTO_PROCESSOR, input_side, known_by),
    ]


def _module(part: str, name: str) -> str:
    folder, _, own = name.rpartition("/")
    return f"{__name__}.{folder or own}.{part}_{own}"


_LINKS = (
    *_links("autoencoder", "WeightAutoencoderConfig", "WeightAutoencoderModel", "WeightFeatureExtractor"),
    *_links("joint", "JointConfig", "JointModel", "JointFeatureExtractor"),
    *_links("prior", "WeightPriorConfig", "WeightPriorModel", "WeightFeatureExtractor", "autoencoder"),
    *_links(
        "prior/code_prior", "WeightCodePriorConfig", "WeightCodePriorModel", "WeightFeatureExtractor", "autoencoder"
    ),
)


def register() -> None:
    """Makes ``AutoConfig``, ``AutoModel``, ``AutoFeatureExtractor`` and ``AutoProcessor`` know this library's models.

    Nothing heavy is imported for it: a class is registered right away if the module of its auto class is imported
    already, and otherwise as soon as that happens. Calling it again changes nothing.
    """
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        watch = _Watch()
        sys.meta_path.insert(0, watch)
        watch.make_links()


class _Watch(MetaPathFinder):
    """Leaves finding modules to the other finders, and makes the links when an import of auto classes is over.

    Our models import parts of transformers, some of which import the auto classes themselves. So links are not made
    while any module of either side is half imported, but when the outermost of them is complete.
    """

    def __init__(self) -> None:
        self._pending = set(_LINKS)
        self._running: set[str] = set()

    def make_links(self) -> None:
        """Registers every class whose auto class is there by now."""
        for link in tuple(self._pending):
            if link.auto[0] in sys.modules and not self._running:
                link.make()
                self._pending.discard(link)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds modules of transformers and of this package as usual, and has links made after they were executed."""
        if not self._pending or not fullname.startswith(("transformers.", f"{__name__}.")):
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._running.add(fullname)
            try:
                execute(module)
            finally:
                self._running.discard(fullname)
            self.make_links()

        # Only this loader's method changes; whoever asks it for source or resources gets the usual answers.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
