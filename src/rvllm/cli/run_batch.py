"""`rvllm run-batch`: answers the requests of a JSONL file without a server, over restarts if need be."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.api.assembly import load_tokenizer, service_of, template_text
from rvllm.cli.common.models import fetched, start_engine
from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import add_flags, build

if TYPE_CHECKING:
    from rvllm.api.batches.lines import Answering, BatchLine

_SERVER_FLAGS = (
    "served_model_name", "chat_template", "tool_call_parser", "reasoning_parser", "batch_concurrency",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("run-batch", help="answer the requests of a file", allow_abbrev=False)
    parser.add_argument(
        "-i", "--input-file", required=True, help="JSONL file of requests, as for /v1/batches"
    )
    parser.add_argument("-o", "--output-file", required=True, help="where to write the answers, line by line")
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "requests", _SERVER_FLAGS)


def main(args: argparse.Namespace) -> int:
    """Answers all lines and writes the output; returns the exit code."""
    engine_config, config = build(EngineConfig, vars(args)), build(ServerConfig, vars(args))
    template = template_text(config.chat_template)
    source, target = Path(args.input_file), Path(args.output_file)
    try:
        data = source.read_bytes()
        journal = Journal(target, hashlib.sha256(data).hexdigest())
    except OSError as error:
        raise UsageError(f"cannot use {error.filename}: {error.strerror}") from None
    with contextlib.closing(journal):
        lines = _requests(data, source)
        name, engine_config = engine_config.model, fetched(engine_config)
        config = dataclasses.replace(config, served_model_name=config.served_model_name or name)
        began = time.perf_counter()
        asyncio.run(_run(engine_config, config, template, lines, journal))
        failed = journal.finish()
    seconds = time.perf_counter() - began
    print(f"{len(lines)} requests in {seconds:.1f} s, {failed} of them failed: {target}", file=sys.stderr)
    return 0


class Journal:
    """The answers so far, beside the output file: what is in it is not asked again after a kill."""

    def __init__(self, target: Path, digest: str) -> None:
        """digest: of the input; the journal of another input is thrown away. Raises OSError.

        done: (whether it failed, result) by line number.
        """
        self._target, self._path = target, target.with_name(target.name + ".part")
        self.done: dict[int, tuple[bool, bytes]] = {}
        head = f"rvllm run-batch {digest}\n".encode()
        known = self._path.read_bytes() if self._path.exists() else b""
        if known.startswith(head):
            whole = known[: known.rfind(b"\n") + 1]  # a kill may have cut the last line
            for line in whole.splitlines()[1:]:
                number, failed, result = line.split(b" ", 2)
                self.done[int(number)] = (failed == b"1", result)
        else:
            whole = head
        if whole != known:
            self._path.write_bytes(whole)
        self._file = self._path.open("ab")

    def add(self, number: int, failed: bool, result: bytes) -> None:
        """Notes the answer to a line."""
        self.done[number] = (failed, result)
        self._file.write(b"%d %d %s\n" % (number, failed, result))
        self._file.flush()

    def finish(self) -> int:
        """Writes the output file in the input's order and drops the journal; the number of failures."""
        part = self._target.with_name(self._target.name + ".tmp")
        with part.open("wb") as file:
            file.writelines(self.done[number][1] + b"\n" for number in sorted(self.done))
        part.replace(self._target)
        self._path.unlink()
        return sum(failed for failed, _ in self.done.values())

    def close(self) -> None:
        """Closes the journal; unfinished, it stays for the next run."""
        self._file.close()


def _requests(data: bytes, source: Path) -> dict[int, BatchLine]:
    """The requests by line number. Raises UsageError naming the first wrong line."""
    from rvllm.api.batches.lines import STATELESS, parse_line, read_lines
    from rvllm.api.http.errors import ApiError

    found, names = {}, set[str]()
    for number, line in read_lines(data.splitlines()):
        try:
            request = parse_line(line, STATELESS)
        except ApiError as error:
            raise UsageError(f"{source}, line {number}: {error}") from None
        if request.custom_id in names:
            raise UsageError(f"{source}, line {number}: custom_id {request.custom_id!r} is not the first")
        names.add(request.custom_id)
        found[number] = request
    if not found:
        raise UsageError(f"{source} holds no requests")
    return found


async def _run(
    engine_config: EngineConfig,
    config: ServerConfig,
    template: str | None,
    lines: Mapping[int, BatchLine],
    journal: Journal,
) -> None:
    """Starts the engine and answers the lines that have no answer yet."""
    from rvllm.api.app import answering as handlers

    if all(number in journal.done for number in lines):
        return
    engine, (tokenizer,) = await start_engine(engine_config, partial(load_tokenizer, engine_config))
    try:
        service = service_of(engine, engine.ready, engine_config, config, tokenizer, None, template)
        waiting = iter([(number, line) for number, line in lines.items() if number not in journal.done])
        answering = handlers(service)
        at_once = config.batch_concurrency or engine.ready.limits.max_num_seqs
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(_worker(waiting, answering, journal))
    except ExceptionGroup as failures:  # of a task group; the first one is what went wrong
        raise failures.exceptions[0] from None
    finally:
        await engine.close()


async def _worker(waiting: Any, answering: Mapping[str, Answering], journal: Journal) -> None:
    from rvllm.api.batches.lines import answer_line

    for number, line in waiting:
        journal.add(number, *await answer_line(line, answering[line.url]))
