"""Deployment files: they parse, and every setting they name exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from rvllm.config import EngineConfig, ServerConfig, SourceConfig
from rvllm.settings import markdown_table

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "rvllm"
FILES = sorted(p for p in DEPLOY.rglob("*") if p.is_file() and p.suffix not in {".json", ".lock", ".pyc"})
YAML = sorted(p for p in DEPLOY.rglob("*.y*ml") if p.parent != CHART / "templates")  # those are Go templates
KNOWN = set(
    re.findall(r"RVLLM_\w+", "".join(map(markdown_table, (EngineConfig, ServerConfig, SourceConfig))))
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_settings_are_known(path: Path) -> None:
    assert set(re.findall(r"\bRVLLM_[A-Z_]+\b", path.read_text())) - {"RVLLM_PORT"} <= KNOWN


@pytest.mark.parametrize("path", YAML, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, (dict, list)) for document in yaml.safe_load_all(path.read_text()))


def test_the_charts_values_are_those_of_its_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert set(values) == set(schema["properties"]) - {"global"}
    used = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    for name, value in values.items():
        keys = [f"{name}.{key}" for key in value] if isinstance(value, dict) and value else [name]
        whole = re.search(rf"\.Values\.{name}\b(?!\.)", used)  # given to the pod as it is
        assert whole or all(f".Values.{key}" in used for key in keys), name


def test_everything_is_linted() -> None:
    pytest.importorskip("helm_python", reason="needs the deploy extra")
    script = DEPLOY.parent / "scripts" / "lint_deploy.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_locked_requirements_have_hashes() -> None:
    for path in DEPLOY.glob("*.lock"):
        pins = re.findall(r"^\S+==[^\n]*(?:\n    --hash[^\n]*)*", path.read_text(), re.MULTILINE)
        assert pins and all("--hash=sha256:" in pin for pin in pins)
