"""Reads every command line of vLLM's documentation with our parser, and prints what becomes of each.

    pip download --no-deps --no-binary vllm vllm==0.13.0   # its source package holds the documentation
    python scripts/vllm_commands.py vllm-0.13.0.tar.gz [--all]

Nothing is loaded or started. A line is accepted, refused with what to use instead, or not understood.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
import tarfile
from collections import Counter
from pathlib import Path

from rvllm.bench.datasets import check_name
from rvllm.cli.bench import _ELSEWHERE
from rvllm.cli.common import load
from rvllm.cli.main import COMMANDS, INSTEAD, TAKE_VLLM_FLAGS, OneLineParser
from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import RvllmError
from rvllm.settings import build, settings_of
from rvllm.vllm.words import own_words

_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.S)


def commands_of(package: Path) -> list[str]:
    """The command lines in fenced blocks of the documentation, each once, continuation lines joined."""
    found: dict[str, None] = {}
    with tarfile.open(package) as tar:
        for member in tar:
            if not re.search(r"/docs/.*\.md$", member.name):
                continue
            file = tar.extractfile(member)
            text = "" if file is None else file.read().decode("utf-8", "replace")
            for block in _FENCE.findall(text):
                for line in _lines(block):
                    line = re.sub(r"^\s*(\$\s+)?((export\s+)?[A-Z_0-9]+=\S+\s+)*", "", line).strip()
                    if re.match(r"vllm [a-z-]", line) and "{latency" not in line:
                        found[re.sub(r"\s+", " ", line)] = None
    return list(found)


def _lines(block: str) -> list[str]:
    """A block's lines, those that go on in the next one joined, by a backslash or within quotes."""
    joined = re.sub(r"\\(\s*#[^\n]*)?\s*\n\s*", " ", block)
    found: list[str] = []
    for line in joined.splitlines():
        if found and found[-1].count("'") % 2 and "vllm " in found[-1]:
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    return found


def outcome(line: str) -> tuple[str, str]:
    """("accepted", "refused" or "unknown", what was said) of one command line."""
    try:
        plain = re.sub(r"\s+(&|\||>|2>).*$", "", line).replace("$'", "'")
        plain = re.sub(r"\$\([^)]*\)", "1", plain).replace("server-port", "8000")  # what a shell fills in
        words = shlex.split(plain, comments=True)[1:]
    except ValueError as error:
        return "unknown", f"no shell line: {error}"
    name = words[0]
    if name == "--help":
        return "accepted", ""
    if name in INSTEAD:
        return "refused", f"{name} is vLLM's; here it is {INSTEAD[name]}"
    if name not in COMMANDS:
        return "unknown", f"no command {name}"
    parser = OneLineParser(prog="rvllm")
    subparsers = parser.add_subparsers(dest="command")
    importlib.import_module(f"rvllm.cli.{name.replace('-', '_')}").add_parser(subparsers)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if name in TAKE_VLLM_FLAGS:
                words = [name, *own_words(words[1:])]
            if any(word.startswith("--help") for word in words):
                return "accepted", ""
            args, unknown = parser.parse_known_args(words)
            if name == "bench":
                if args.kind in _ELSEWHERE:
                    return "refused", _ELSEWHERE[args.kind]
                check_name(getattr(args, "dataset_name", None) or "random")
                if args.kind == "serve":
                    load.check_load(args)
                    load.traffic_of(args)
                    load.metrics_of(args)
            for cls in (EngineConfig, ServerConfig):
                names = [f.name for f, _ in settings_of(cls)]
                build(cls, {n: getattr(args, n, None) for n in names}, {})
    except RvllmError as error:
        return "refused", str(error)
    except SystemExit:
        last = said.getvalue().strip().splitlines()
        return "unknown", last[-1] if last else "refused by the parser"
    return ("unknown", f"unknown: {' '.join(unknown)}") if unknown else ("accepted", "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="vLLM's source package (.tar.gz)")
    parser.add_argument("--all", action="store_true", help="print the accepted lines too")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for line in commands_of(args.package):
        what, said = outcome(line)
        counts[what] += 1
        if args.all or what != "accepted":
            print(f"{what:8}  {line[:100]}\n          {said[:150]}")
    total = sum(counts.values())
    understood = counts["accepted"] + counts["refused"]
    print(
        f"{understood} of {total}: {counts['accepted']} accepted, {counts['refused']} refused with a reason"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
