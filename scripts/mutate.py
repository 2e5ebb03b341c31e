"""Which small faults no test notices: mutations of the source, each tried against the tests nearest to it.

    python scripts/mutate.py run RESULTS.tsv [--count 150] [--seed 1] [--files 4] [--only src/...]
    python scripts/mutate.py again RESULTS.tsv [--files 40]   # what survived, against more tests
    python scripts/mutate.py check RESULTS.tsv     # the tests that killed something, without a mutation
    python scripts/mutate.py table RESULTS.tsv

`run` draws places from all rooms, as many of a room as it has places, at least four, and appends a line to
the results for each; what is in there is not tried again, so a run may be stopped and goes on. It works on a
copy. The tests asked are files that import the mutated module, over others too: those first that name most of
what it defines; tests that start servers or draw thousands of inputs are asked last. A mutation is
killed when a test fails; tests that take more processor time than the limit are late, which says nothing yet:
`again` with a higher limit does, and an endless loop is late again.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/rvllm")
BUILD_TIME = str(PACKAGE / "backends/cpu/compiled/codegen")  # runs when the package is built
LEAST_OF_A_ROOM = 4
IDLE = 10  # times the limit that tests may wait, on a busy machine or for each other
CHEAP = "not emulated and not compile and not oracle and not models"
COSTLY = re.compile(
    r"/(hostile|clients|web|ray)/|_real|_fuzz|_gpu|_disk|test_source|core_properties|test_compile|soak"
)
DYNAMIC = {"rvllm.cli.main": "rvllm.cli.", "rvllm.models.registry": "rvllm.models.archs."}
WARM = ("numpy", "ml_dtypes", "hypothesis", "msgspec", "tokenizers", "httpx", "openai", "starlette", "jinja2")
SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "+"),
}


@dataclass(frozen=True)
class Mutation:
    """Source text [start, end) of a file replaced; `lines` of the statement whose tests are asked."""

    path: str
    lines: tuple[int, int]
    start: int
    end: int
    new: str
    what: str

    @property
    def room(self) -> str:
        """The top folder, or two of them where a room is large."""
        parts = Path(self.path).relative_to(PACKAGE).parts
        return "/".join(parts[: 2 if parts[0] in {"backends", "api"} else 1][: len(parts) - 1]) or "."

    @property
    def key(self) -> str:
        return f"{self.path}:{self.lines[0]}:{self.start}:{self.what}"


class Places(ast.NodeVisitor):
    """All mutations of one module."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.found: list[Mutation] = []
        self._starts = [0]
        for line in text.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._lines = (0, 0)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _source(self, start: int, end: int) -> str:
        return self.text.encode()[start:end].decode()

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _add(self, span: tuple[int, int], new: str) -> None:
        old = " ".join(self._source(*span).split())
        self.found.append(
            Mutation(self.path, self._lines, *span, new, f"{old[:60]} -> {' '.join(new.split())[:60]}")
        )

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if isinstance(body, list) else node.end_lineno
            self._lines = (node.lineno, max(node.lineno, last or node.lineno))
        super().visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages are not mutated."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Neither annotations nor decorators."""
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Nor what a class is made with: slots, frozen, keywords alone."""
        for statement in node.body:
            self.visit(statement)

    def visit_keyword(self, node: ast.keyword) -> None:
        """Lengths that are known to be the same stay so: strict=True of zip."""
        if node.arg != "strict":
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        self._operators(node.left, node.ops, node.comparators)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._operators(node.left, [node.op], [node.right])
        self.generic_visit(node)

    def _operators(
        self, left: ast.expr, ops: list[ast.cmpop] | list[ast.operator], rights: list[ast.expr]
    ) -> None:
        for op, right in zip(ops, rights, strict=True):
            between = (self._span(left)[1], self._span(right)[0])
            text = self._source(*between)
            old, new = SWAPS.get(type(op), ("", ""))
            if old and re.search(rf"(?<![\w*/=]){re.escape(old)}(?![\w*/=])", text):
                at = self._source(between[0], between[1]).index(old)
                start = between[0] + len(text[:at].encode())
                self._add((start, start + len(old)), new)
                spot = self.found.pop()
                around = self._source(self._span(left)[0], self._span(right)[1])
                what = f"{' '.join(around.split())[:70]}: {old} -> {new}"
                self.found.append(Mutation(spot.path, spot.lines, spot.start, spot.end, spot.new, what))
            left = right

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """One operand is left out."""
        for gone in range(len(node.values)):
            kept = [v for i, v in enumerate(node.values) if i != gone]
            word = " and " if isinstance(node.op, ast.And) else " or "
            self._add(self._span(node), "(" + word.join(ast.unparse(v) for v in kept) + ")")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(self._span(node), f"bool({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in {"max", "min"} and len(node.args) == 2:
            for kept in node.args if not any(isinstance(a, ast.Starred) for a in node.args) else ():
                self._add(self._span(node), f"({ast.unparse(kept)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(self._span(node), str(not node.value))
        elif isinstance(node.value, int):
            self._add(self._span(node), str(node.value + 1))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nor is text."""

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call | ast.Await):
            self._add(self._span(node), "None")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add(self._span(node), "pass")
        self.generic_visit(node)


def places(root: Path) -> list[Mutation]:
    """All mutations of all modules, in the order of the source."""
    found: list[Mutation] = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        text = path.read_text()
        visitor = Places(str(path.relative_to(root)), text)
        visitor.visit(ast.parse(text))
        found += visitor.found
    return found


def draw(all_places: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """About `count`: of each room as many as it has places, and four at least; in random order."""
    rng = random.Random(seed)
    rooms: dict[str, list[Mutation]] = defaultdict(list)
    for place in all_places:
        rooms[place.room].append(place)
    drawn: list[Mutation] = []
    for _, of in sorted(rooms.items()):
        rng.shuffle(of)
        drawn += of[: max(LEAST_OF_A_ROOM, round(count * len(of) / len(all_places)))]
    rng.shuffle(drawn)
    return [place for place in drawn if not place.path.startswith(BUILD_TIME)]


def copy_tree(to: Path) -> None:
    """What the tests need, as it is now."""
    kept = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "dist", ".venv")
    shutil.copytree(ROOT, to, ignore=kept, symlinks=True)


# --- which tests to ask ---


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours and of tests/support that a module imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules.keys()


class Reach:
    """Who imports whom."""

    def __init__(self, root: Path) -> None:
        folders = [(root / "src", "rvllm"), (root / "tests", "support")]
        files = [(base, path) for base, name in folders for path in sorted((base / name).rglob("*.py"))]
        self.modules = {_name(path.relative_to(base)): path for base, path in files}
        tests = {str(path.relative_to(root)): path for path in sorted((root / "tests").rglob("test_*.py"))}
        self.imports = {n: imported(p, self.modules) for n, p in [*self.modules.items(), *tests.items()]}
        for name, below in DYNAMIC.items():
            self.imports[name] |= {other for other in self.modules if other.startswith(below)}
        self.importers: dict[str, set[str]] = defaultdict(set)
        for name, of in self.imports.items():
            for other in of:
                self.importers[other].add(name)
        self.tests = set(tests)
        self.texts = {name: path.read_text() for name, path in tests.items()}

    def nearest(self, path: str) -> list[str]:
        """Test files that import a source file, at least over others, as they are asked."""
        start = _name(Path(path).relative_to("src"))
        distance, front = {start: 0}, [start]
        for name in front:
            for other in sorted(self.importers[name] - distance.keys()):
                distance[other] = distance[name] + 1
                front.append(other)
        words = {word for part in start.split(".")[1:] for word in part.split("_") if len(word) > 2}
        names = _defined(self.modules[start])

        def order(test: str) -> tuple[bool, int, int, int]:
            told = sum(name in self.texts[test] for name in names) + 2 * sum(word in test for word in words)
            return bool(COSTLY.search(test)), -told, distance[test], len(self.imports[test])

        return sorted(self.tests & distance.keys(), key=order)


def _defined(path: Path) -> set[str]:
    """The functions, classes and methods of a module that others may call by name."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}
    return {name for name in names if len(name) > 4 and not name.startswith("_")}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


# --- the run ---


def outcome(root: Path, mutation: Mutation, tests: list[str], limit: float) -> tuple[str, str]:
    """("killed" | "survived" | "unreached" | "late", the test that told, or how many files were asked)."""
    if not tests:
        return "unreached", ""
    file = root / mutation.path
    text = file.read_bytes()
    file.write_bytes(text[: mutation.start] + mutation.new.encode() + text[mutation.end :])
    try:
        return ask(root, tests, limit)
    finally:
        file.write_bytes(text)


def ask(root: Path, tests: list[str], limit: float, *options: str) -> tuple[str, str]:
    """Runs tests in a child of this process, which has imported what they need from elsewhere already."""
    log = root / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(root)
        resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit) + 5))
        os.environ["PYTHONPATH"] = str(root / "src")
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path[:] = [str(root / "src"), *sys.path[1:]]
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 99
        try:
            code = int(
                pytest.main(
                    [
                        "-x",
                        "--no-header",
                        "--tb=line",
                        "-p",
                        "no:cacheprovider",
                        "-m",
                        CHEAP,
                        *options,
                        *tests,
                    ]
                )
            )
        finally:
            sys.stdout.flush()
            os._exit(code)
    until = time.monotonic() + IDLE * limit
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.killpg(child, 9)
            os.waitpid(child, 0)
            return "late", f"{limit:.0f} s"
        time.sleep(0.05)
    if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGXCPU:
        return "late", f"{limit:.0f} s"
    code, text = os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")
    told = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    if code in {0, 5}:  # 5: all of them are skipped here
        return ("unreached" if code else "survived"), f"{len(tests)} files"
    return "killed", told[0] if told else (text.strip().splitlines() or [f"exit {code}"])[-1][:80]


def run(results: Path, drawn: list[Mutation], files: slice, limit: float, again: bool = False) -> None:
    """Tries all that the results do not hold yet; `again`: those that they hold as survivors."""
    rows = [line.split("\t") for line in results.read_text().splitlines()] if results.exists() else []
    done = {row[1]: row[0] for row in rows}
    todo = [
        m
        for m in drawn
        if (done.get(m.key) in {"survived", "unreached", "late"} if again else m.key not in done)
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        copy_tree(root)
        for name in WARM:
            __import__(name)
        reach = Reach(root)
        for number, mutation in enumerate(todo, 1):
            began = time.monotonic()
            found, by = outcome(root, mutation, reach.nearest(mutation.path)[files], limit)
            took = time.monotonic() - began
            with results.open("a") as file:
                file.write(f"{found}\t{mutation.key}\t{mutation.room}\t{by}\t{took:.1f}\n")
            print(f"{number}/{len(todo)} {found:9} {took:5.1f} s  {mutation.key}  {by}", flush=True)


def read(results: Path) -> list[list[str]]:
    """The last line of each mutation."""
    return list(
        {row[1]: row for row in (line.split("\t") for line in results.read_text().splitlines())}.values()
    )


def check(results: Path) -> None:
    """Tests that killed something must pass on the tree as it is: prints those that do not."""
    killers = sorted({row[3] for row in read(results) if row[0] == "killed" and "::" in row[3]})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        copy_tree(root)
        print(ask(root, killers, 3600, "--maxfail=1000"), (root / "log").read_text()[-3000:])


def table(results: Path) -> Iterator[str]:
    """Figures by room, and what survived."""
    rows = read(results)
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        rooms[row[2]][row[0]] += 1
        rooms["all"][row[0]] += 1
    yield "| room | mutations | killed | late | survived | no test near |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for room, of in sorted(rooms.items(), key=lambda item: (item[0] == "all", item[0])):
        counts = (of.total(), of["killed"], of["late"], of["survived"], of["unreached"])
        yield f"| {room} | {' | '.join(map(str, counts))} |"
    yield ""
    yield from (f"{row[0]}: {row[1]}" for row in sorted(rows) if row[0] != "killed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "again", "check", "table"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", type=int, default=4, help="test files to ask about a mutation at most")
    parser.add_argument("--skip", type=int, default=0, help="how many of them to leave out, asked before")
    parser.add_argument("--limit", type=float, default=30, help="processor seconds for all of them")
    parser.add_argument("--part", default="0/1", help="which part of them: 0/2 and 1/2 may run side by side")
    parser.add_argument("--only", default="", help="files whose path begins so")
    args = parser.parse_args()
    if args.command == "check":
        check(args.results)
    elif args.command == "table":
        print("\n".join(table(args.results)))
    else:
        drawn = draw([p for p in places(ROOT) if p.path.startswith(args.only)], args.count, args.seed)
        part, parts = map(int, args.part.split("/"))
        files = slice(args.skip, args.skip + args.files)
        run(args.results, drawn[part::parts], files, args.limit, args.command == "again")


if __name__ == "__main__":
    main()
