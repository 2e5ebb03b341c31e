"""The HTTP server's life: bind, serve, drain on SIGTERM, end when the engine has died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from rvllm.api.http.exchange import Gate
from rvllm.api.http.limits import Connections
from rvllm.api.http.listen import StopSignals, url_of
from rvllm.api.http.protocol import BoundedHttp
from rvllm.errors import UsageError
from rvllm.telemetry.logs import event

CANCEL_SECONDS = 2.0  # cancelled requests have this long to tell their clients
MAX_RESTARTS, RESTART_WINDOW = 3, 600.0  # of the engine: so many within so many seconds
STALL_REST = 5.0  # a killed engine's end is noticed within so many seconds
FAILED = 1  # the exit code when the engine has died, or uvicorn ended by itself


class DyingEngine(Protocol):
    """The part of the engine's client that tells of its life."""

    @property
    def status(self) -> str:
        """starting, ready, stalled or failed."""

    async def wait_dead(self) -> str:
        """Returns, with the reason, when the engine process has ended."""

    async def restart(self) -> None:
        """Starts a new process in place of the dead one."""

    def kill(self) -> None:
        """Ends the process at once."""


class _Uvicorn(uvicorn.Server):
    """uvicorn, leaving signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def serve(
    app: ASGIApp,
    gate: Gate,
    sock: socket.socket,
    engine: DyingEngine,
    stop: StopSignals,
    started: Callable[[], None],
) -> int:
    """Serves `app` on `sock` until a signal or the engine's death; returns the process's exit code.

    started: called once connections are accepted. Raises UsageError when another process has begun to
    listen on the port meanwhile.
    """
    config = uvicorn.Config(
        app,
        http=partial(BoundedHttp, settings=gate.config, connections=Connections(gate.config)),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(gate.config.keep_alive_timeout),
    )
    server, url = _Uvicorn(config), url_of(sock)
    serving = asyncio.ensure_future(server.serve([sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.002)
    if serving.done():
        try:
            serving.result()
        except OSError as error:
            raise UsageError(f"cannot listen on {url}: {error.strerror or error}") from None
    started()
    first = asyncio.ensure_future(stop.first.wait())
    watching = asyncio.ensure_future(_kill_when_stalled(engine, gate)) if gate.config.restart_engine else None
    dead = await _served(gate, engine, first, serving)
    if first.done():
        await _drain(server, gate, stop, serving, dead)
    elif dead.done():
        seconds = gate.config.dead_engine_timeout
        event(logging.ERROR, "the engine has died", cause=dead.result(), seconds_until_exit=seconds)
        await asyncio.wait((first,), timeout=seconds)
    asked_to = first.done() and not dead.done()
    gate.draining = server.should_exit = True
    for task in gate.working:  # their clients get an error
        task.cancel()
    await asyncio.wait((serving,), timeout=CANCEL_SECONDS)
    server.force_exit = True
    others = [task for task in (first, dead, watching) if task is not None]
    for other in others:
        other.cancel()
    await asyncio.gather(serving, *others, return_exceptions=True)
    await gate.close(CANCEL_SECONDS)
    return stop.exit_code if asked_to else FAILED


async def _served(
    gate: Gate, engine: DyingEngine, first: asyncio.Future[Any], serving: asyncio.Future[None]
) -> asyncio.Future[str]:
    """Returns, with the wait for the engine's death, when the server is to end: a signal came, uvicorn has
    ended, or the engine died and is not to be started again, or too often."""
    restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
    while True:
        dead = asyncio.ensure_future(engine.wait_dead())
        await asyncio.wait((serving, first, dead), return_when=asyncio.FIRST_COMPLETED)
        now = time.monotonic()
        often = len(restarts) == MAX_RESTARTS and now - restarts[0] < RESTART_WINDOW
        if first.done() or serving.done() or not gate.config.restart_engine or often:
            return dead
        restarts.append(now)
        event(logging.ERROR, "the engine has died and is started again", cause=dead.result())
        starting = asyncio.ensure_future(engine.restart())
        await asyncio.wait((serving, first, starting), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return dead
        if (error := starting.exception()) is not None:
            event(logging.ERROR, "the engine could not be started again", cause=str(error))
            return dead
        event(logging.WARNING, "the engine runs again", seconds=time.monotonic() - now)
        for again in gate.restarted:
            again()


async def _kill_when_stalled(engine: DyingEngine, gate: Gate) -> None:
    """Ends an engine that has stalled, so that it is started again."""
    while True:
        await asyncio.sleep(min(1.0, gate.config.engine_stall_seconds / 4))
        if engine.status == "stalled":
            event(logging.ERROR, "the engine has stalled and is killed")
            engine.kill()
            await asyncio.sleep(STALL_REST)


async def _drain(
    server: uvicorn.Server,
    gate: Gate,
    stop: StopSignals,
    serving: asyncio.Future[None],
    dead: asyncio.Future[str],
) -> None:
    """Stops accepting and waits for what runs: until it is done, time is up, or a second signal comes."""
    event(logging.INFO, "draining", requests=len(gate.working), at_most_seconds=gate.config.drain_timeout)
    gate.draining = server.should_exit = True
    second = asyncio.ensure_future(stop.second.wait())
    await asyncio.wait(
        (serving, second, dead), timeout=gate.config.drain_timeout, return_when=asyncio.FIRST_COMPLETED
    )
    second.cancel()
    if dead.done():  # what runs is about to end with the reason
        await asyncio.wait((serving,), timeout=CANCEL_SECONDS)
    if gate.working:
        event(logging.WARNING, "cancelling what still runs", requests=len(gate.working))
