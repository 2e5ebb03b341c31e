"""How the source hangs together: circles of imports, long functions and kernels, wide folders, lines.

    python scripts/structure.py [SOURCE]

Imports count wherever they stand: at the top, within functions, and for types alone. A circle is a strongly
connected set of modules (Tarjan, "Depth-first search and linear graph algorithms", 1972).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

_KERNEL = re.compile(r"__global__\s+void\s+(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\(")
SOURCE = Path(__file__).parent.parent / "src" / "rvllm"


def module_of(path: Path, source: Path) -> str:
    """`rvllm.engine.core` of its file."""
    return ".".join((source.name, *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__")


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of ours that a module names in any import."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of more than one module that all reach each other, the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=lambda c: (-len(c), c))


def functions(tree: ast.Module) -> list[tuple[int, str]]:
    """(lines, name) of every function."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        ((n.end_lineno or n.lineno) - n.lineno + 1, n.name) for n in ast.walk(tree) if isinstance(n, kinds)
    ]


def kernels(text: str) -> list[tuple[int, str]]:
    """(lines of the body, name) of every kernel of a CUDA source."""
    found = []
    for head in _KERNEL.finditer(text):
        at = text.index("{", head.end()) + 1
        start, depth = at, 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.append((text.count("\n", start, at), head[1]))
    return found


def main() -> int:
    """Prints the account."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE
    sys.setrecursionlimit(10_000)
    files = sorted(source.rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    modules = {module_of(path, source) for path in files}
    graph = {
        module_of(path, source): imports(tree, modules) - {module_of(path, source)}
        for path, tree in trees.items()
    }
    print("circles of imports, lazy and type-only ones counted:")
    for circle in circles(graph):
        print(f"  {len(circle)}: {', '.join(circle)}")
    print("longest functions:")
    long = [(n, path, name) for path, tree in trees.items() for n, name in functions(tree)]
    for lines, path, name in sorted(long, key=lambda entry: -entry[0])[:15]:
        print(f"  {lines} {path.relative_to(source)} {name}")
    print("longest kernel bodies:")
    bodies = [(n, path, name) for path in source.rglob("*.cu*") for n, name in kernels(path.read_text())]
    for lines, path, name in sorted(bodies, key=lambda entry: -entry[0])[:8]:
        print(f"  {lines} {path.relative_to(source)} {name}")
    suffixes = {".py", ".cu", ".cuh"}
    code = [p for p in source.rglob("*") if p.suffix in suffixes and p.name != "__init__.py"]
    print("widest folders:")
    for folder, count in Counter(p.parent for p in code).most_common(5):
        print(f"  {count} {folder.relative_to(source)}")
    python = sum(len(path.read_text().splitlines()) for path in files)
    print(f"lines of Python: {python} in {len(files)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
