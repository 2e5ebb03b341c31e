"""Several engines on one device: one is awake, the others sleep until it is their turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Embed, Generate, Output, State, Vocabulary
from rvllm.errors import EngineDeadError, UnavailableError, UsageError
from rvllm.telemetry.logs import event
from rvllm.telemetry.stats import Stats

RETRY_SECONDS = 1.0  # until memory that was lacking is asked for again
_STATUSES = ("failed", "starting", "stalled")  # the worst first; else all are ready


class ModelSwitch:
    """Gives the device to one engine after the other, as requests want them.

    The engine that is awake keeps the device as long as nobody wants another one. Then it is the turn of the
    engine whose requests have waited longest: as soon as the one that is awake has nothing to do, and when
    its own turn has lasted `turn_seconds`, it is given nothing more to do. So nothing is computed twice. A
    sleeping engine takes requests and lets them wait. Belongs to the event loop that made it; the first
    engine must be awake, and all others asleep.
    """

    def __init__(self, engines: Sequence[EngineClient], turn_seconds: float) -> None:
        self.engines = tuple(engines)
        self.swaps = 0
        self.swap_seconds = 0.0
        self._turn_seconds = turn_seconds
        self._loop = asyncio.get_running_loop()
        self._awake, self._began = 0, self._loop.time()
        self._wanted = [0] * len(self.engines)  # requests that wait or run
        self._wanted_since = [0.0] * len(self.engines)  # where requests wait for a sleeping engine
        self._given = [0] * len(self.engines)  # of the requests, those that the engine has
        self._doors = [asyncio.Event() for _ in self.engines]  # shut while an engine finishes what it has
        for door in self._doors:
            door.set()
        self._changed = asyncio.Event()
        self._moving = asyncio.Lock()
        self._turns = self._loop.create_task(self._give_turns())

    @asynccontextmanager
    async def admitted(self, index: int) -> AsyncIterator[Callable[[], None]]:
        """A request wants an engine for as long as this lasts, and may be given to it within.

        Yields what is to be called when the engine has done its part before: whoever reads an answer slowly
        must not keep the device from others.
        """
        if not self._wanted[index]:
            self._wanted_since[index] = self._loop.time()
        self._wanted[index] += 1
        counted = [self._wanted]

        def let_go() -> None:
            while counted:
                counted.pop()[index] -= 1
            self._changed.set()

        self._changed.set()
        try:
            await self._doors[index].wait()
            self._given[index] += 1
            counted.append(self._given)
            yield let_go
        finally:
            let_go()

    async def _give_turns(self) -> None:
        while True:
            self._changed.clear()
            awake, rest = self._awake, None
            waiting = [i for i, count in enumerate(self._wanted) if count and i != awake]
            if not waiting:
                self._doors[awake].set()
            elif not self._given[awake]:
                try:
                    await self._wake(min(waiting, key=self._wanted_since.__getitem__))
                    continue
                except (EngineDeadError, UnavailableError):  # told by `wait_dead`; a restart is a change
                    self._doors[awake].set()
            elif (rest := self._began + self._turn_seconds - self._loop.time()) <= 0:
                rest = None
                self._doors[awake].clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._changed.wait()

    async def _wake(self, index: int) -> None:
        async with self._moving:
            began, before = self._loop.time(), self._awake
            await self.engines[before].sleep(1)
            while not await self._woken(index):
                await asyncio.sleep(RETRY_SECONDS)
            self._awake, self._began = index, self._loop.time()
            self._wanted_since[before] = self._began
            self._doors[before].set()
        self.swaps += 1
        self.swap_seconds += self._began - began
        name = self.engines[index].config.model
        event(logging.INFO, "another model's turn", model=name, seconds=self._began - began)

    async def _woken(self, index: int) -> bool:
        """Wakes an engine; False when another process has taken some of the memory meanwhile."""
        try:
            await self.engines[index].sleep(0)
        except UsageError as error:
            name = self.engines[index].config.model
            event(logging.WARNING, "a model waits for memory", model=name, cause=str(error))
            return False
        return True

    @property
    def status(self) -> str:
        """The worst that an engine is in: failed, starting, stalled; or ready."""
        found = {engine.status for engine in self.engines}
        return next((status for status in _STATUSES if status in found), "ready")

    async def wait_dead(self) -> str:
        """Waits for the end of one of the engines and returns which and why, in one line."""
        waits = [asyncio.ensure_future(engine.wait_dead()) for engine in self.engines]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            ended = next(i for i, wait in enumerate(waits) if wait.done())
            return f"{self.engines[ended].config.model}: {waits[ended].result()}"
        finally:
            for wait in waits:
                wait.cancel()

    async def restart(self) -> None:
        """Starts the engines that have died; the last one of them is awake then. Raises what a start does."""
        async with self._moving:
            for index, engine in enumerate(self.engines):
                if engine.status == "failed":
                    awake = self.engines[self._awake]
                    if awake.alive:
                        await awake.sleep(1)
                    await engine.restart()
                    self._awake, self._began = index, self._loop.time()
        self._changed.set()

    def kill(self) -> None:
        """Ends the engines that have stalled at once."""
        for engine in self.engines:
            if engine.status == "stalled":
                engine.kill()

    async def close(self) -> None:
        self._turns.cancel()
        await asyncio.gather(self._turns, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))


class SwitchedEngine:
    """One of a ModelSwitch's engines, as `EngineClient` has it: a request makes it its turn."""

    def __init__(self, switch: ModelSwitch, index: int) -> None:
        self._switch, self._index, self._client = switch, index, switch.engines[index]

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        async with (
            self._switch.admitted(self._index) as let_go,
            aclosing(self._client.generate(request, let_go)) as outputs,
        ):
            async for output in outputs:
                yield output

    async def embed(self, request: Embed) -> NDArray[np.float32]:
        async with self._switch.admitted(self._index):
            return await self._client.embed(request)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self._client.set_vocabulary(vocabulary)

    async def stats(self) -> Stats:
        """The engine's, and how often models were swapped."""
        stats = await self._client.stats()
        stats.backend["rvllm:model_swaps_total"] = self._switch.swaps
        stats.backend["rvllm:model_swap_seconds_total"] = self._switch.swap_seconds
        return stats

    async def state(self) -> State:
        return await self._client.state()

    @property
    def alive(self) -> bool:
        return self._client.alive

    @property
    def status(self) -> str:
        """That of all engines together."""
        return self._switch.status

    @property
    def sleep_level(self) -> int:
        return self._client.sleep_level

    async def sleep(self, level: int, keep_kv: bool = False) -> float:
        """Raises UsageError: the engines' turns decide."""
        raise UsageError("this server has several models, and puts them to sleep and wakes them by itself")

    async def wait_dead(self) -> str:
        """Waits for the end of any of the engines."""
        return await self._switch.wait_dead()
