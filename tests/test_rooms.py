"""Imports point down only (docs/decisions/0001-rooms.md), and heavy or forbidden ones stay out."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rvllm"
ORDER = ["__main__", "entrypoints", "v1", "utils", "distributed", "platforms", "inputs", "attention",
         "outputs", "sampling_params",
         "pooling_params", "cli", "ray", "llm", "offline", "api", "web", "text", "engine", "models",
         "backends", "weights", "program", "kernels", "bench", "telemetry", "vllm", "config",
         "settings", "errors", "extras", "version", "__init__"]  # fmt: skip
# Inside a room: its folders and modules, from the top down; those on one line do not order each other.
INSIDE = {
    "api": [
        "app assembly",
        "page docs",
        "operations",
        "system",
        "batches responses anthropic openai",
        "generate",
        "schemas",
        "http",
        "disk",
    ],
    "weights": [
        "formats",
        "open packing finite reading",
        "fetch",
        "safetensors",
        "gguf",
        "checkpoint",
        "mapped parallel",
    ],
    "program": ["builder cost memory", "ops", "formats rope dtypes"],
    "kernels": [
        "manifest",
        "encoder mamba2 mla moe decode",
        "gemm attention rowwise sampling loading common ptx",
        "build",
        "spec types external constants",
    ],
}
FORBIDDEN = {"torch", "triton", "transformers", "pydantic", "fastapi"}
FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n.removeprefix("rvllm.") in MODULES else node.module for n in names}
    return found


def ours(path: Path) -> set[str]:
    if path == SOURCE / "__init__.py":  # what it names is loaded on first use
        return set()
    return {n.removeprefix("rvllm.") for n in imports(path) if n.startswith("rvllm.")}


def rank(room: str, name: str) -> int:
    for place, line in enumerate(INSIDE[room]):
        if name in line.split():
            return place
    raise AssertionError(f"{room}.{name} has no place in INSIDE")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert not {name.partition(".")[0] for name in imports(path)} & FORBIDDEN
    for name in ours(path):
        target = name.split(".")[0]
        if target in {p.name.removesuffix(".py") for p in SOURCE.iterdir()}:
            assert ORDER.index(target) >= ORDER.index(room), f"{room} must not import {name}"


@pytest.mark.parametrize("room", INSIDE)
def test_imports_inside_a_room_point_down(room: str) -> None:
    for path in FILES:
        module = module_of(path)
        if not module.startswith(f"{room}."):
            continue
        here = rank(room, module.split(".")[1])
        for name in ours(path):
            if name.startswith(f"{room}."):
                assert rank(room, name.split(".")[1]) >= here, f"{module} must not import {name}"


def test_every_room_has_a_place() -> None:
    assert {p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.name != "__pycache__"} <= set(ORDER)


def test_no_folder_is_wide() -> None:
    """A folder is read as one list of names: about sixteen; architectures are one file each."""
    for folder in {path.parent for path in FILES} - {SOURCE / "models" / "archs"}:
        files = [
            p for p in folder.iterdir() if p.suffix in {".py", ".cu", ".cuh"} and p.name != "__init__.py"
        ]
        assert len(files) <= 16, f"{folder.relative_to(SOURCE)} has {len(files)} files"


def test_no_test_module_imports_another_one() -> None:
    """What tests share is in tests/support; there nothing is a test."""
    folder = Path(__file__).parent
    modules = {path.stem for path in folder.rglob("test_*.py")}
    assert not list((folder / "support").rglob("test_*.py"))
    for path in folder.rglob("*.py"):
        names = {part for name in imports(path) for part in name.split(".")}
        assert not names & modules, f"{path.relative_to(folder)} imports {names & modules}"
