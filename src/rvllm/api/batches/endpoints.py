"""OpenAI's `/v1/batches`: many requests out of a file, answered while nobody else needs the engine."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from uuid import uuid4

import msgspec

from rvllm.api.batches.lines import (
    MAX_LINES,
    MAX_READ,
    Answering,
    BatchLine,
    answer_line,
    parse_line,
    read_lines,
    result_line,
)
from rvllm.api.batches.store import Batch, BatchError, BatchErrors, BatchStore, RequestCounts
from rvllm.api.disk import is_full
from rvllm.api.http.errors import ApiError, invalid, unknown
from rvllm.api.http.exchange import Exchange, Gate
from rvllm.api.http.pagination import Query, page
from rvllm.api.schemas.responses import check_metadata
from rvllm.errors import EngineDeadError
from rvllm.telemetry.logs import event

WINDOW_SECONDS = 24 * 3600
MAX_TRIES = 3  # servers may end so often while a line runs; then it is not tried again
ROOM_SECONDS = 2.0  # how often a batch looks whether the disk has room again
MAX_ERRORS = 100  # of a wrong input, so many lines are told


class BatchRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class Batches:
    """The endpoints, and the task that works batches off in the order they came."""

    def __init__(
        self, store: BatchStore, gate: Gate, answering: Mapping[str, Answering], concurrency: int
    ) -> None:
        self._store, self._gate, self._answering, self._concurrency = store, gate, answering, concurrency
        self._batches = {batch.id: batch for batch in store.batches()}
        self._task: asyncio.Task[None] | None = None
        self._working: tuple[str, Sequence[asyncio.Task[None]]] | None = None  # the batch whose lines run
        gate.restarted.append(self.resume)
        self.resume()

    def resume(self) -> None:
        """Goes on with batches that have not ended; called at the start and for new ones."""
        if self._unfinished() is not None and (self._task is None or self._task.done()):
            self._task = self._gate.start(self._work())

    async def create(self, exchange: Exchange, request: BatchRequest) -> None:
        check_metadata(request.metadata)
        if request.completion_window != "24h":
            raise invalid("completion_window must be 24h", "completion_window")
        if request.endpoint not in self._answering:
            raise invalid(f"endpoint must be one of {', '.join(self._answering)}", "endpoint")
        file = self._store.file(request.input_file_id)
        if file is None or file.purpose != "batch":
            raise invalid("input_file_id must name a file uploaded with purpose batch", "input_file_id")
        now = int(time.time())
        batch = Batch(
            id=f"batch_{uuid4().hex}", endpoint=request.endpoint, input_file_id=file.id,
            completion_window="24h", created_at=now, expires_at=now + WINDOW_SECONDS,
            metadata=request.metadata,
        )  # fmt: skip
        self._store.add_batch(batch)
        self._batches[batch.id] = batch
        self.resume()
        await exchange.json(batch)

    async def retrieve(self, exchange: Exchange, request: None) -> None:
        await exchange.json(self._found(exchange))

    async def list_all(self, exchange: Exchange, request: None) -> None:
        """`GET /v1/batches`, newest first."""
        await exchange.json(page(list(self._batches.values()), lambda batch: batch.id, Query(exchange)))

    async def cancel(self, exchange: Exchange, request: None) -> None:
        """`POST /v1/batches/{id}/cancel`: what has been answered is kept."""
        batch = self._found(exchange)
        if batch.status not in ("validating", "in_progress"):
            raise invalid(f"the batch is {batch.status} and cannot be cancelled", "batch_id")
        changed = msgspec.structs.replace(batch)
        changed.enter("cancelling")
        self._store.put_batch(changed)
        batch.enter("cancelling")
        if self._working is not None and self._working[0] == batch.id:
            for task in self._working[1]:
                task.cancel()
        self.resume()
        await exchange.json(batch)

    async def delete(self, exchange: Exchange, request: None) -> None:
        """`DELETE /v1/batches/{id}`: forgets one that has ended; its files stay."""
        batch = self._found(exchange)
        if batch.status in _UNFINISHED:
            raise invalid(f"the batch is {batch.status}: cancel it first", "batch_id")
        self._store.delete_batch(batch.id)
        del self._batches[batch.id]
        await exchange.json({"id": batch.id, "object": "batch", "deleted": True})

    def _found(self, exchange: Exchange) -> Batch:
        name = exchange.scope["path_params"]["id"]
        batch = self._batches.get(name)
        if batch is None:
            raise unknown("batch", name)
        return batch

    def _unfinished(self) -> Batch | None:
        return next((b for b in self._batches.values() if b.status in _UNFINISHED), None)

    async def _work(self) -> None:
        """Works off all batches. Cancelled or without an engine, it leaves the rest for the next start."""
        while (batch := self._unfinished()) is not None:
            try:
                await self._advance(batch)
            except EngineDeadError:
                return
            except Exception as error:
                if is_full(error):  # what has been answered is kept; the rest waits
                    event(logging.WARNING, "a batch waits for room on the disk", id=batch.id)
                    await asyncio.sleep(ROOM_SECONDS)
                    continue
                logging.getLogger("rvllm").exception("batch %s failed", batch.id)
                batch.errors = BatchErrors([BatchError(code="server_error", message="see the server's log")])
                batch.enter("failed")
                self._store.put_batch(batch)

    async def _advance(self, batch: Batch) -> None:
        """Takes a batch through its life, from wherever it stands."""
        if batch.status == "validating":
            await self._validate(batch)
        if batch.status == "in_progress":
            await self._answer(batch)
        if batch.status in ("cancelling", "finalizing"):
            end = "cancelled" if batch.status == "cancelling" else _end_of(batch)
            await asyncio.to_thread(self._store.finish_batch, batch, end)
            event(logging.INFO, "batch ended", id=batch.id, status=batch.status,
                  completed=batch.request_counts.completed, failed=batch.request_counts.failed)  # fmt: skip

    async def _validate(self, batch: Batch) -> None:
        total, errors = await asyncio.to_thread(self._check_lines, batch)
        if batch.status != "validating":  # cancelled meanwhile
            return
        batch.request_counts = RequestCounts(total)
        if errors:
            batch.errors = BatchErrors(errors)
            batch.enter("failed")
        else:
            batch.enter("in_progress")
        self._store.put_batch(batch)

    def _check_lines(self, batch: Batch) -> tuple[int, list[BatchError]]:
        total, errors, names = 0, list[BatchError](), set[str]()

        def wrong(code: str, message: str, line: int | None, param: str | None = None) -> None:
            errors.append(BatchError(code=code, message=message, line=line, param=param))

        try:
            with self._store.path(batch.input_file_id).open("rb") as file:
                for number, line in read_lines(file, MAX_READ):
                    total += 1
                    try:
                        name = parse_line(line, (batch.endpoint,)).custom_id
                        if name in names:
                            raise invalid(
                                f"custom_id {name[:80]!r} is not the first", None, "duplicate_custom_id"
                            )
                        names.add(name)
                    except ApiError as error:
                        wrong(error.code or "invalid_request", str(error), number, error.param)
                    if len(errors) >= MAX_ERRORS or total > MAX_LINES:
                        break
        except ApiError as error:
            wrong(
                error.code or "invalid_request", f"a batch holds at most {MAX_LINES} requests: {error}", None
            )
        except FileNotFoundError:
            wrong("missing_input", "the input file has been deleted", None, "input_file_id")
        if total > MAX_LINES:
            wrong("too_many_lines", f"a batch holds at most {MAX_LINES} requests", None)
        if not (total or errors):
            wrong("empty_file", "the input file holds no requests", None)
        return total, errors

    async def _answer(self, batch: Batch) -> None:
        """Answers all lines that have no answer yet, several at a time."""
        done = self._store.lines_done(batch.id)
        failed = sum(done.values())
        batch.request_counts.completed, batch.request_counts.failed = len(done) - failed, failed
        tries = self._store.tries(batch.id)
        with self._store.path(batch.input_file_id).open("rb") as file:
            suspects = [
                entry for entry in read_lines(file, MAX_READ) if entry[0] in tries and entry[0] not in done
            ]
        # Servers have ended while these ran. Each runs alone, so that the next end tells which it was.
        await self._through(batch, iter(suspects), tries, 1)
        with self._store.path(batch.input_file_id).open("rb") as file:
            rest = (
                entry
                for entry in read_lines(file, MAX_READ)
                if entry[0] not in done and entry[0] not in tries
            )
            await self._through(batch, rest, {}, self._concurrency)
        if batch.status == "in_progress":
            batch.enter("finalizing")
            self._store.put_batch(batch)

    async def _through(
        self, batch: Batch, lines: Iterator[tuple[int, bytes]], tries: Mapping[int, int], at_once: int
    ) -> None:
        """Answers these lines, so many at once."""
        tasks = [asyncio.ensure_future(self._worker(batch, lines.__next__, tries)) for _ in range(at_once)]
        self._working = (batch.id, tasks)
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if batch.status != "cancelling":  # the server stops; the next one goes on
                raise
        finally:
            self._working = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _worker(
        self, batch: Batch, following: Callable[[], tuple[int, bytes]], tries: Mapping[int, int]
    ) -> None:
        answering = self._answering[batch.endpoint]
        while batch.status == "in_progress":
            try:
                number, line = following()
            except StopIteration:
                return
            await asyncio.sleep(0)  # lines that are refused at once must not hold up everybody else
            request = parse_line(line, (batch.endpoint,))
            if time.time() > batch.expires_at:
                failed, result = True, _unanswered(request, "batch_expired", _EXPIRED)
            elif tries.get(number, 0) >= MAX_TRIES:
                failed, result = True, _unanswered(request, "server_error", _DEADLY)
            else:
                await self._when_there_is_room(partial(self._store.begin_line, batch.id, number))
                try:
                    failed, result = await answer_line(request, answering)
                except BaseException:
                    self._store.spare_line(batch.id, number)
                    raise
            await self._when_there_is_room(
                partial(self._store.add_result, batch.id, number, failed, result), len(result)
            )
            self._store.spare_line(batch.id, number)
            if failed:
                batch.request_counts.failed += 1
            else:
                batch.request_counts.completed += 1

    async def _when_there_is_room(self, write: Callable[[], None], size: int = 0) -> None:
        """Writes, as soon as the disk and --files-max-mb have room for it."""
        waits = False
        while True:
            try:
                if self._store.has_room(size):
                    write()
                    return
            except (OSError, sqlite3.Error) as error:
                if not is_full(error):
                    raise
            if not waits:
                event(logging.WARNING, "a batch waits for room for its answers")
            waits = True
            await asyncio.sleep(ROOM_SECONDS)


_EXPIRED = "the batch's completion window ended before this request"
_DEADLY = f"{MAX_TRIES} servers have ended while they answered this request"
_UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


def _end_of(batch: Batch) -> str:
    return "expired" if (batch.finalizing_at or 0) > batch.expires_at else "completed"


def _unanswered(request: BatchLine, code: str, message: str) -> bytes:
    return result_line(request.custom_id, None, {"code": code, "message": message})
