"""Real models for tests: `model_path(name)`, fetched when absent, skipped when that is not possible."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "fetch_test_models.py"


@cache
def fetch_script() -> ModuleType:
    """scripts/fetch_test_models.py as a module."""
    spec = importlib.util.spec_from_file_location("fetch_test_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def _path_or_reason(name: str) -> Path | str:
    from rvllm.errors import CapacityError
    from rvllm.weights.fetch.cache import FetchError

    try:
        path: Path = fetch_script().fetch(name)
        return path
    except (FetchError, CapacityError) as error:
        return str(error)


def model_path(name: str) -> Path:
    """The path of `smollm2-135m`, `qwen2.5-coder-0.5b` or `minilm-l6-v2`.

    Skips the test, with the reason, when the model is neither in the cache nor to be had. A wrong hash is
    not a reason to skip: it fails.
    """
    found = _path_or_reason(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found
