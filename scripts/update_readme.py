"""Writes the generated parts of the README: `python scripts/update_readme.py [--check]`.

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`; everything else is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rvllm.config import EngineConfig, ServerConfig, SourceConfig, markdown_table

README = Path(__file__).parent.parent / "README.md"
PARTS = {"engine flags": EngineConfig, "server flags": ServerConfig, "source variables": SourceConfig}


def updated(text: str) -> str:
    """The README with its generated parts as they should be."""
    for name, config in PARTS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{README}: {begin} ... {end} is missing")
        text = f"{head}{begin}\n{markdown_table(config)}\n{end}{tail}"
    return text


def main() -> int:
    """Updates the file, or only says with 1 that it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if not current")
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if parser.parse_args().check:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
