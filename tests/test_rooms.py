"""Imports point down only (docs/decisions/0001-rooms.md), and heavy or forbidden ones stay out."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rvllm"
ORDER = ["cli", "llm", "api", "web", "text", "engine", "models", "backends", "weights", "program",
         "kernels", "bench", "telemetry", "config", "errors", "version"]  # fmt: skip
FORBIDDEN = {"torch", "triton", "transformers", "pydantic", "fastapi"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "rvllm":
                found |= {f"rvllm.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        assert name.partition(".")[0] not in FORBIDDEN, f"{path} imports {name}"
        if room in ORDER and name.startswith("rvllm."):
            target = name.split(".")[1]
            if target in ORDER:
                assert ORDER.index(target) >= ORDER.index(room), f"{room} must not import {name}"
