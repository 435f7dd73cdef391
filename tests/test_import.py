from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import weightspace

HEAVY = ("accelerate", "datasets", "matplotlib", "numpy", "pandas", "sklearn", "torch", "transformers")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["weightspace", "weightspace.cli.main"])
def test_import_is_light(module: str) -> None:
    assert run(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_tokenizing_needs_no_heavy_library() -> None:
    heavy = [name for name in HEAVY if name not in ("numpy", "torch")]
    modules = "weightspace.io.checkpoint, weightspace.networks.infer, weightspace.tokenizers"
    assert run(f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.slow
def test_probing_needs_neither_transformers_nor_datasets() -> None:
    code = "import sys, weightspace.probes.probe; print({'datasets', 'transformers'} & set(sys.modules))"
    assert run(code) == "set()"


def test_every_public_name_is_there() -> None:
    for name in weightspace.__all__:
        assert getattr(weightspace, name) is not None
    assert set(weightspace.__all__) <= set(dir(weightspace))
    assert set(weightspace.__all__) == {*weightspace._HOMES, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = weightspace.no_such_name


@pytest.mark.parametrize(
    "imports",
    [
        "import weightspace, transformers",
        pytest.param("import transformers; transformers.AutoModel; import weightspace", marks=pytest.mark.slow),
        # modeling_layers imports the auto classes before it has defined anything.
        pytest.param("import weightspace, transformers.modeling_layers", marks=pytest.mark.slow),
        pytest.param("import weightspace.models.layers, transformers", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_our_models_in_either_order(imports: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "weight_autoencoder"}))
    code = f"""
{imports}
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
config = AutoConfig.from_pretrained({str(tmp_path)!r})
print(type(config).__name__)
print(AutoModel._model_mapping[type(config)].__name__)
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
print(FEATURE_EXTRACTOR_MAPPING[type(config)].__name__)
"""
    assert run(code).split() == ["WeightAutoencoderConfig", "WeightAutoencoderModel", "WeightFeatureExtractor"]


def test_registering_twice_changes_nothing() -> None:
    code = """
import sys, weightspace
from weightspace.models import register
count = len(sys.meta_path)
register()
print(len(sys.meta_path) - count, "transformers" in sys.modules)
"""
    assert run(code) == "0 False"


@pytest.mark.slow
def test_modules_of_the_auto_classes_still_show_their_source() -> None:
    code = """
import inspect, weightspace
import transformers.models.auto.configuration_auto as auto
print("class AutoConfig" in inspect.getsource(auto))
"""
    assert run(code) == "True"
