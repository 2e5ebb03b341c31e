"""Workers for texts that clients sent: processes with limits, killed when they exceed them."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import msgspec

from rvllm.errors import LimitError, UnavailableError, UsageError
from rvllm.text.worker.process import (
    BROKEN,
    DONE,
    EXCEEDED,
    FORK,
    HEAD,
    KILL,
    ORDER,
    READY,
    REFUSED,
    REPORT,
    Launch,
)
from rvllm.text.worker.work import LARGE, Task, asking

P = ParamSpec("P")
T = TypeVar("T")

COMMAND = (sys.executable, "-m", "rvllm.text.worker.process")
WAIT_SECONDS = 30.0  # for a worker to be free
STACK = 4 << 20  # bytes; the engine's own threads have more, so what passed here passes there
START_SECONDS = 60.0  # for the tokenizer to load
PATIENCE = 4  # times the limit of a task's own time, for a machine that is busy with other things


_Turn = tuple[int, int, asyncio.Future[None]]  # rank, number, what its owner waits for


@dataclass
class _Worker:
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class WorkerPool:
    """Does tasks (see `work.TextWork`) in up to `count` processes; belongs to one event loop.

    Whoever is cancelled while a worker is busy with it has that worker killed: the next is there in
    milliseconds. Large work never takes the last worker, and clients are given turns at it: however much
    one asks for, another waits for one piece of it. Of the rest the smallest goes first.
    """

    def __init__(self, model: str, *, count: int, seconds: float, memory: int) -> None:
        """model: whose tokenizer to load; seconds (of a processor), memory (bytes): what a task may take."""
        self._launch = Launch(model, memory, STACK, seconds)
        self._count, self._seconds, self._memory = max(2, count), seconds, memory
        self._numbers = itertools.count()
        self._idle: list[_Worker] = []
        self._busy = self._large = 0
        self._small_waiting: list[_Turn] = []
        self._large_waiting: list[_Turn] = []
        self._asked: Counter[str] = Counter()  # large work that waits or runs, by client
        self._forker: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._closed = False
        self.killed = 0  # workers that exceeded their limits or whose client left

    def start(self) -> None:
        """Begins to load; `run` waits for it. Also called when the loading process has died."""
        loop = asyncio.get_running_loop()
        self._stop_forker()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._forker = subprocess.Popen(COMMAND, stdin=theirs.fileno(), start_new_session=True)
        ours.setblocking(False)
        self._control, self._ready = ours, loop.create_future()
        ours.send(msgspec.msgpack.encode(self._launch))
        loop.add_reader(ours.fileno(), self._report, ours)

    async def run(self, task: Task[P, T], what: str, size: int, /, *args: P.args, **options: P.kwargs) -> T:
        data = pickle.dumps((task, args, options), pickle.HIGHEST_PROTOCOL)
        large = size >= LARGE
        async with self._turn(size, large):
            return cast(T, await self._done(data, what))

    @contextlib.asynccontextmanager
    async def _turn(self, size: int, large: bool) -> AsyncIterator[None]:
        """Waits for a turn and holds it. Raises UnavailableError where it does not come in time."""
        client, rank = asking.get(), size
        if large:
            rank = self._asked[client]
            self._asked[client] += 1
        try:
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._admitted(rank, large)
            except TimeoutError:
                raise UnavailableError(f"all workers for texts are busy since {WAIT_SECONDS:g} s") from None
            try:
                yield
            finally:
                self._end(large)
        finally:
            if large:
                self._asked[client] -= 1
                if not self._asked[client]:
                    del self._asked[client]

    async def _done(self, data: bytes, what: str) -> Any:
        """What a worker makes of a pickled task."""
        worker: _Worker | None = None
        try:
            worker, used = await self._take()
            try:
                kind, value, leaves = await self._ask(worker, data)
            except TimeoutError:  # an OSError too
                raise
            except (OSError, EOFError):
                if not used:
                    raise
                # It may have died before, of something else: only a fresh one's end is this task's fault.
                self._kill(worker)
                worker = None
                worker = await self._fork()
                kind, value, leaves = await self._ask(worker, data)
        except TimeoutError:
            raise LimitError(f"{what}: takes longer than {self._seconds:g} s (--worker-timeout)") from None
        except (OSError, EOFError):
            raise LimitError(
                f"{what}: too large or too deeply nested, a worker's memory or stack does not hold it "
                "(--worker-memory-mb)"
            ) from None
        else:
            if not leaves:
                self._idle.append(worker)
                worker = None
        finally:
            if worker is not None:
                self._kill(worker)
        if kind == DONE:
            return value
        raise self._error(kind, value, what)

    async def _ask(self, worker: _Worker, data: bytes) -> tuple[int, Any, bool]:
        """(kind, result or what is wrong, whether the worker ends now).

        Raises TimeoutError for a task that takes too long: the system ends a worker that has had its time.
        """
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._seconds * PATIENCE):
                worker.writer.write(HEAD.pack(len(data)))
                worker.writer.write(data)
                await worker.writer.drain()
                (length,) = HEAD.unpack(await worker.reader.readexactly(HEAD.size))
                answer = await worker.reader.readexactly(length)
        except (EOFError, ConnectionError):
            if asyncio.get_running_loop().time() - began >= 0.95 * self._seconds:
                raise TimeoutError from None
            raise
        kind, value, leaves = msgspec.msgpack.decode(answer)
        return kind, value, leaves

    def _error(self, kind: int, value: Any, what: str) -> Exception:
        if kind == REFUSED:
            return UsageError(value)
        if kind == EXCEEDED:
            return LimitError(f"{what}: needs more {value} than a worker has (--worker-memory-mb)")
        assert kind == BROKEN
        return RuntimeError(f"{what}: {value}")

    async def _admitted(self, rank: int, large: bool) -> None:
        queue = self._large_waiting if large else self._small_waiting
        if self._may_begin(large) and not queue:
            self._begin(large)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(queue, (rank, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just begun
                self._end(large)
            raise

    def _may_begin(self, large: bool) -> bool:
        return self._busy < self._count and (not large or self._large < self._count - 1)

    def _begin(self, large: bool) -> None:
        self._busy += 1
        self._large += large

    def _end(self, large: bool) -> None:
        self._busy -= 1
        self._large -= large
        for queue, of_large in ((self._small_waiting, False), (self._large_waiting, True)):
            while queue and (queue[0][2].done() or self._may_begin(of_large)):
                _, _, turn = heapq.heappop(queue)
                if not turn.done():
                    self._begin(of_large)
                    turn.set_result(None)

    async def _take(self) -> tuple[_Worker, bool]:
        """A worker that waits for a task, and whether it has done one before."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.reader.at_eof():
                return worker, True
            self._kill(worker)
        return await self._fork(), False

    async def _fork(self) -> _Worker:
        await self._loaded()
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        try:
            assert self._control is not None
            with theirs:
                socket.send_fds(self._control, [ORDER.pack(FORK, number)], [theirs.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise UnavailableError("no worker for texts could be started") from None
            raise
        return _Worker(number, reader, writer)

    async def _loaded(self) -> None:
        if self._closed:
            raise UnavailableError("the server is shutting down")
        if self._ready is None or (self._ready.done() and self._forker is None):
            self.start()
        assert self._ready is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self._stop_forker()
            raise UnavailableError("the workers for texts do not start") from None

    def _kill(self, worker: _Worker) -> None:
        worker.writer.close()
        self.killed += 1
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(ORDER.pack(KILL, worker.number))

    def _report(self, control: socket.socket) -> None:
        """The process that forks has said something, or has ended."""
        try:
            data = control.recv(REPORT.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if control is self._control:
                self._stop_forker()
            return
        number, code = REPORT.unpack(data)
        if number == READY:
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif code not in (0, -signal.SIGKILL):
            logging.getLogger("rvllm").warning("a worker for texts ended with %d", code)

    def _stop_forker(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._forker is not None:
            self._forker.kill()
            self._forker.wait()
            self._forker = None
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(UnavailableError("the workers for texts have died"))
            self._ready.exception()  # nobody may be waiting
        for worker in self._idle:
            worker.writer.close()
        self._idle.clear()

    def close(self) -> None:
        """Ends all processes; what runs fails."""
        self._closed = True
        self._stop_forker()


def worker_count(given: int | None) -> int:
    """`--workers`, or by the cores: two to four."""
    return given or max(2, min(4, (os.cpu_count() or 2) // 2))
