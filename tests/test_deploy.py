"""Deployment files: they parse, and every setting they name exists."""

import re
from pathlib import Path

import pytest

from rvllm.config import EngineConfig, ServerConfig, SourceConfig, markdown_table

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
DEPLOY = Path(__file__).parent.parent / "deploy"
FILES = sorted(p for p in DEPLOY.rglob("*") if p.is_file() and p.suffix not in {".json", ".lock"})
KNOWN = set(
    re.findall(r"RVLLM_\w+", "".join(map(markdown_table, (EngineConfig, ServerConfig, SourceConfig))))
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_settings_are_known(path: Path) -> None:
    assert set(re.findall(r"\bRVLLM_[A-Z_]+\b", path.read_text())) - {"RVLLM_PORT"} <= KNOWN


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda p: str(p.relative_to(DEPLOY)))
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))


def test_locked_requirements_have_hashes() -> None:
    for path in DEPLOY.glob("*.lock"):
        pins = re.findall(r"^\S+==[^\n]*(?:\n    --hash[^\n]*)*", path.read_text(), re.MULTILINE)
        assert pins and all("--hash=sha256:" in pin for pin in pins)
