"""Writes the generated parts of the documentation: `python scripts/update_docs.py [--check]`.

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`; everything else is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from rvllm.config import EngineConfig, ServerConfig, SourceConfig
from rvllm.settings import markdown_table
from rvllm.telemetry.metrics import Metrics, metrics_page
from rvllm.telemetry.stats import Stats

DOCS = Path(__file__).parent.parent / "docs"


def metric_table() -> str:
    """Every metric that a server shows from its start, with its type and meaning."""
    page = metrics_page([(Metrics("MODEL", {}), Stats())]).decode()
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", page, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (\S+) (.*)$", page, re.MULTILINE))
    rows = [f"| `{name}` | {kinds[name]} | {helps[name]} |" for name in sorted(kinds)]
    return "\n".join(["| metric | type | what it tells |", "| --- | --- | --- |", *rows])


PARTS = {
    "flags.md": {
        "engine flags": partial(markdown_table, EngineConfig),
        "server flags": partial(markdown_table, ServerConfig),
        "source variables": partial(markdown_table, SourceConfig, flags=False),
    },
    "metrics.md": {"metrics": metric_table},
}


def updated(path: Path) -> str:
    """A page with its generated parts as they should be."""
    text = path.read_text(encoding="utf-8")
    for name, made in PARTS[path.name].items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{path}: {begin} ... {end} is missing")
        text = f"{head}{begin}\n{made()}\n{end}{tail}"
    return text


def main() -> int:
    """Updates the pages, or only says with 1 that they should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if not current")
    check, old = parser.parse_args().check, False
    for name in PARTS:
        path = DOCS / name
        new = updated(path)
        old |= new != path.read_text(encoding="utf-8")
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and old)


if __name__ == "__main__":
    sys.exit(main())
