"""The API process's end: starts the engine process and turns its messages into streams.

client = await EngineClient.start(config)
async for output in client.generate(request):
    ...
await client.close()
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import subprocess
import tempfile
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import (
    Abort,
    Embed,
    Failed,
    FromEngine,
    Generate,
    GetState,
    GetStats,
    Loading,
    Output,
    Outputs,
    Ready,
    Shutdown,
    Sleep,
    Slept,
    State,
    ToEngine,
    Vocabulary,
    embedding_of,
)
from rvllm.engine.ipc.process import Launch
from rvllm.engine.ipc.spawn import COMMAND, Spawned, spawn
from rvllm.errors import EngineDeadError, RvllmError, SlowClientError, UnavailableError, UsageError
from rvllm.telemetry.stats import Stats

QUESTION_SECONDS = 5.0  # for the engine to say how it is doing
LOOK_SECONDS = 1.0  # how often a silent engine is looked at, at least
CLOSE_SECONDS = 5.0  # for the step in progress; after that the process is killed

QUICK = (Stats, State)  # answers that come between two steps; a sleep may take long
MAX_UNREAD = 4096  # outputs of a request that may wait to be taken

T = TypeVar("T")


class Stream(asyncio.Queue[Output | EngineDeadError | SlowClientError]):
    """A request's outputs that nobody has taken yet. ended: called when the engine is done with it."""

    def __init__(self, ended: Callable[[], None] | None) -> None:
        super().__init__()
        self.ended = ended or (lambda: None)


class EngineClient:
    """Talks to one engine process; belongs to the event loop that started it. Make one with `start`."""

    def __init__(self, config: EngineConfig, progress: Callable[[float, str], None] | None = None) -> None:
        self.config = config
        self.ready: Ready  # set by `start`
        self.max_unread = MAX_UNREAD
        self.process: subprocess.Popen[bytes] | None = None
        self.stall_seconds = math.inf  # silence of so long, while there is work, is a stall
        self._progress = progress
        self._command: Sequence[str] = COMMAND
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._forget_process()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode

    def _forget_process(self) -> None:
        """There is no process yet, or none any more."""
        self._heard = self._loop.time()  # when the engine spoke last
        self._waiting_since: float | None = None  # since when it owes an answer
        self._streams: dict[str, Stream] = {}
        self._asked: defaultdict[type, deque[asyncio.Future[Any]]] = defaultdict(deque)  # by kind of answer
        self.sleep_level = 0  # 0: awake
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self._dead: asyncio.Future[str] = self._loop.create_future()
        self._failed: Failed | None = None
        self._burial: asyncio.Task[None] | None = None
        self._undo = ExitStack()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        progress: Callable[[float, str], None] | None = None,
        command: Sequence[str] = COMMAND,
        spawned: Spawned | None = None,
    ) -> EngineClient:
        """Starts the engine process and waits until it takes requests.

        progress is called with (fraction, text) while the model loads. spawned: a process of `command` that
        is on its way already. Raises the RvllmError that the
        engine failed with, or EngineDeadError when the process ended without a word.
        """
        client = cls(config, progress)
        client._command = tuple(command)
        try:
            client._spawn(spawned)
            client.ready = await client._started
        except BaseException:
            await client.close(0.0)
            raise
        client._watch = client._loop.create_task(client._look())
        return client

    async def restart(self) -> None:
        """Starts a new process in place of one that has died, and waits until it takes requests.

        Raises what `start` does; the client is dead then, as before.
        """
        assert self._dead.done()
        self._undo.close()
        self._forget_process()
        self._spawn(None)
        self.ready = await asyncio.shield(self._started)

    def kill(self) -> None:
        """Ends the process at once; the rest happens as when it dies by itself."""
        if self.process is not None:
            self.process.kill()

    @property
    def status(self) -> str:
        """starting, ready, stalled (silent for `stall_seconds` while it owes an answer) or failed."""
        if self._dead.done() or self._closing:
            return "failed"
        if not self._started.done():
            return "starting"
        return "stalled" if self._silence() > self.stall_seconds else "ready"

    def _silence(self) -> float:
        """Seconds for which the engine has owed an answer and said nothing."""
        if self._waiting_since is None:
            return 0.0
        return self._loop.time() - max(self._heard, self._waiting_since)

    async def _look(self) -> None:
        """Asks a silent engine with work how it is: a step may take long, but between steps it answers."""
        while not self._closing:
            await asyncio.sleep(min(LOOK_SECONDS, self.stall_seconds / 4))
            silent = self._loop.time() - self._heard > min(LOOK_SECONDS, self.stall_seconds / 4)
            if self.alive and self._started.done() and self._streams and silent and not self._asked[Stats]:
                self._ask(GetStats(), Stats)

    def _ask(self, message: ToEngine, kind: type[T]) -> asyncio.Future[T]:
        """Sends a message that is answered by one of a kind; answers come in the order of the messages."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self._asked[kind].append(answer)
        if kind in QUICK and self._waiting_since is None:
            self._waiting_since = self._loop.time()
        self._send(message)
        return answer

    def _spawn(self, spawned: Spawned | None) -> None:
        """Starts the process, or takes this one, and registers, step by step, how to undo each step."""
        undo, loop = self._undo, self._loop
        self.directory = _private_directory()
        undo.callback(shutil.rmtree, self.directory, ignore_errors=True)
        address = f"ipc://{self.directory}/engine"
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        undo.callback(context.term)
        self._socket = context.socket(zmq.DEALER)
        undo.callback(self._socket.close, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        spawned = spawned or spawn(self._command)
        self.process, self._life = spawned.process, spawned.life
        undo.callback(self._life.close)
        launch = self._encode(Launch(self.directory, address, self.config))
        self._life.sendall(len(launch).to_bytes(4, "little") + launch)
        for source, heard in (
            (int(self._socket.get(zmq.FD)), self._drain),
            (self._life.fileno(), self._on_life),
        ):
            loop.add_reader(source, heard)
            undo.callback(loop.remove_reader, source)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._started.done() and not self._dead.done() and not self._closing

    async def wait_dead(self) -> str:
        """Waits for the engine's end and returns why, in one line."""
        return await asyncio.shield(self._dead)

    async def embed(self, request: Embed) -> NDArray[np.float32]:
        """The text's vector, float32 [embedding size], or of each token [tokens, embedding size].

        Being cancelled aborts the request.

        Raises UsageError when the text cannot be encoded, EngineDeadError when the engine ends first.
        """
        return await embedding_of(request, self.generate(request))

    async def generate(
        self, request: Generate | Embed, ended: Callable[[], None] | None = None
    ) -> AsyncGenerator[Output, None]:
        """The request's outputs up to the one with a finish reason.

        ended: called as soon as the engine has nothing more to do for it, though outputs may be yet to be
        taken. Closing the iterator early aborts the request. Raises EngineDeadError when the engine ends
        first, UsageError when a living request has the same id.
        """
        async with aclosing(self.generate_lists(request, ended)) as lists:
            async for outputs in lists:
                for output in outputs:
                    yield output

    async def generate_lists(
        self, request: Generate | Embed, ended: Callable[[], None] | None = None
    ) -> AsyncGenerator[list[Output], None]:
        """As `generate`: each list has what has arrived since the last one was taken, one output or more."""
        self._check_alive()
        if request.request_id in self._streams:
            raise UsageError(f"request_id {request.request_id!r} is in use by a request that has not ended")
        stream = Stream(ended)
        self._streams[request.request_id] = stream
        finished = False
        try:
            self._send(request)
            while not finished:
                items = [await stream.get()]
                while not stream.empty():
                    items.append(stream.get_nowait())
                if outputs := [item for item in items if isinstance(item, Output)]:
                    finished = outputs[-1].finish_reason is not None
                    yield outputs
                for item in items:  # an error is the last that comes
                    if not isinstance(item, Output):
                        raise item
        finally:
            if self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]
            if not finished and self.alive:
                self._send(Abort([request.request_id]))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; their streams close with an "abort" output. Unknown ids are ignored."""
        if self.alive:
            self._send(Abort(list(request_ids)))

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Must be called before the first request with a grammar."""
        if self.alive:
            self._send(vocabulary)

    async def stats(self) -> Stats:
        """A snapshot of the engine. Raises EngineDeadError, or UnavailableError when it does not answer."""
        self._check_alive()
        return await self._in_time(self._ask(GetStats(), Stats))

    async def state(self, asked: GetState | None = None) -> State:
        """What the engine is doing, for people who watch. Raises as `stats` does."""
        self._check_alive()
        return await self._in_time(self._ask(asked or GetState(), State))

    async def sleep(self, level: int, keep_kv: bool = False) -> float:
        """Gives the engine's memory back (1: KV blocks, 2: weights as well) or, with 0, takes it again.

        Returns the seconds it took. Raises EngineDeadError, and UsageError where KV blocks cannot be kept, or
        memory is not to be had; nothing has happened then.
        """
        self._check_alive()
        slept = await asyncio.shield(self._ask(Sleep(level, keep_kv), Slept))
        if slept.refused is not None:
            raise UsageError(slept.refused)
        return slept.seconds

    async def _in_time(self, answer: asyncio.Future[T]) -> T:
        """The answer. Raises UnavailableError when the engine is too busy, or stalled."""
        try:
            async with asyncio.timeout(QUESTION_SECONDS):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise UnavailableError(f"the engine has not answered for {QUESTION_SECONDS:g} s") from None

    async def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Ends the engine process and cleans up; requests still open get EngineDeadError."""
        if self._closing:
            return
        if self._watch is not None:
            self._watch.cancel()
        if self.process is not None:
            if self.alive and timeout:
                self._send(Shutdown())
            self._closing = True
            await self._end_process(timeout)
        if self._burial is not None:
            await self._burial
        self._closing = True
        self._bury("the engine was closed")
        self._undo.close()

    async def _end_process(self, timeout: float) -> int:
        """The process's exit code; it is killed when it still runs after `timeout` seconds."""
        assert self.process is not None
        try:
            return await asyncio.to_thread(self.process.wait, timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return await asyncio.to_thread(self.process.wait)

    def _check_alive(self) -> None:
        if not self.alive and self.status == "starting":
            raise UnavailableError("the engine starts again")
        if not self.alive:
            raise EngineDeadError(self._dead.result() if self._dead.done() else "the engine was closed")

    def _send(self, message: ToEngine) -> None:
        self._socket.send(self._encode(message), zmq.NOBLOCK)
        # The socket's descriptor signals changes only, and sending may swallow one.
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Hands on every message that has come."""
        while not self._socket.closed:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard = self._loop.time()
            self._handle(self._decode(data))
            if not any(self._asked[kind] for kind in QUICK):
                self._waiting_since = None

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    self._hand_on(stream, output)
        elif isinstance(message, Stats | State | Slept):
            if isinstance(message, Slept):
                self.sleep_level = message.level
            answer = self._asked[type(message)].popleft()
            if not answer.done():
                answer.set_result(message)
        elif isinstance(message, Loading):
            if self._progress is not None:
                self._progress(message.fraction, message.text)
        elif isinstance(message, Ready):
            if not self._started.done():
                self._started.set_result(message)
        else:
            self._failed = message

    def _hand_on(self, stream: Stream, output: Output) -> None:
        """Puts an output where its reader finds it; one that has left too many there gets no more."""
        if stream.qsize() < self.max_unread:
            stream.put_nowait(output)
            if output.finish_reason is not None:
                stream.ended()
            return
        while not stream.empty():
            stream.get_nowait()
        stream.put_nowait(SlowClientError("the answer was not read as fast as it came (--max-unread-tokens)"))
        del self._streams[output.request_id]
        if self.alive and output.finish_reason is None:
            self._send(Abort([output.request_id]))
        stream.ended()

    def _on_life(self) -> None:
        """The process's end of the socket is closed: it has ended, or is about to."""
        self._loop.remove_reader(self._life)
        if not self._closing:
            self._burial = self._loop.create_task(self._find_cause())

    async def _find_cause(self) -> None:
        code = await self._end_process(CLOSE_SECONDS)
        for _ in range(50):  # its last message may still be on the way
            self._drain()
            if self._failed is not None or code <= 0:
                break
            await asyncio.sleep(0.01)
        if self._failed is not None:
            self._bury(self._failed.message)
        elif code < 0:
            self._bury(f"the engine process was killed by {_signal_name(-code)}")
        else:
            self._bury(f"the engine process ended with exit code {code}")

    def _bury(self, cause: str) -> None:
        """Tells everyone who waits."""
        if self._dead.done():
            return
        self._dead.set_result(cause)
        if not self._started.done():
            self._started.set_exception(_start_error(cause, self._failed))
        for stream in self._streams.values():
            stream.put_nowait(EngineDeadError(cause))
            stream.ended()
        for answer in chain(*self._asked.values()):
            if not answer.done():
                answer.set_exception(EngineDeadError(cause))
        self._asked.clear()


def _private_directory() -> str:
    """A new directory that only this user can enter, with a path short enough for a socket in it."""
    directory = tempfile.mkdtemp(prefix="rvllm-")
    if len(directory) > 80:  # a socket's path holds 107 bytes
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="rvllm-", dir="/tmp")
    return directory


def _start_error(cause: str, failed: Failed | None) -> RvllmError:
    if failed is None:
        return EngineDeadError(cause)
    error = RvllmError(failed.message)
    error.exit_code = failed.exit_code
    return error


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
