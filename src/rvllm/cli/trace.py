"""`rvllm trace`: where the time of a finished request, or of an engine's steps, went."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rvllm.cli.common.remote import add_server, ask_json
from rvllm.cli.common.tables import human_seconds

WIDTH = 40  # characters of the longest bar
_SUMMED = {"detokenize": "turning tokens into text, in all", "stream": "handing it to the client, in all"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "trace", help="where the time of a request or of an engine went", allow_abbrev=False
    )
    parser.add_argument(
        "id", help="a request's X-Request-Id or the id in its answer (chatcmpl-…), or a file of --trace-steps"
    )
    add_server(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the phases of a request, or what a file's steps add up to.

    Raises RvllmError when the server does not know the request, or the file holds no steps.
    """
    if Path(args.id).is_file():
        return _steps(Path(args.id))
    key = args.api_key or os.environ.get("RVLLM_API_KEY")
    found = ask_json(args.url, f"/rvllm/requests/{quote(args.id, safe='')}", key)
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["arrived"]))
    print(f"{found['id']}  {found['path']}  {found['status']}  {moment}  {human_seconds(found['seconds'])}")
    for choice in found["choices"]:
        print(
            f"\n{choice['id']}: {choice['prompt_tokens']} prompt tokens ({choice['cached_tokens']} cached), "
            f"{choice['output_tokens']} generated, {choice['finish_reason']}"
        )
        for line in bars(choice["phases"], found["seconds"]):
            print(line)
        for line in chunk_lines(choice["chunks"]):
            print(line)
    return 0


def _steps(path: Path) -> int:
    from rvllm.bench.steps import periods, tables
    from rvllm.telemetry.step_trace import read_steps

    found = periods(read_steps(path))
    for number, steps in enumerate(found, 1):
        print(f"--- {path}, period {number} of {len(found)}")
        print("\n".join(tables(steps)))
    return 0


def chunk_lines(chunks: list[dict[str, Any]]) -> list[str]:
    """One line for each part of a prompt that took several steps."""
    if len(chunks) < 2:
        return []
    lines = []
    for chunk in chunks:
        what = f"{chunk['tokens']} prompt tokens in step {chunk['step']}"
        lines.append(f"  {'':<10}  {human_seconds(chunk['seconds']):>9}  {what}")
    return lines


def bars(phases: dict[str, float], total: float) -> list[str]:
    """One line a phase: its name, how long it took, and where it lies in the request."""
    lines, begin = [], 0.0
    scale = WIDTH / total if total > 0 else 0.0
    for name, seconds in phases.items():
        if name in _SUMMED:
            picture = _SUMMED[name]
        else:
            picture = " " * int(begin * scale) + "█" * max(1, round(seconds * scale))
            begin += seconds
        lines.append(f"  {name:<10}  {human_seconds(seconds):>9}  {picture}")
    return lines
