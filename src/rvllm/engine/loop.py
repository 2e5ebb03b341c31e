"""The engine process's main loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import (
    Abort,
    Embed,
    Generate,
    GetState,
    GetStats,
    Outputs,
    Shutdown,
    Sleep,
    Slept,
    ToEngine,
    Vocabulary,
)
from rvllm.engine.state import complete, snapshot
from rvllm.errors import UsageError
from rvllm.telemetry.stats import Stats

if TYPE_CHECKING:
    from rvllm.engine.ipc.process import ZmqLink


class EngineLoop:
    """Takes in what has come, computes a step, hands out what it gave. With nothing to do it prepares steps
    that may come, then sleeps."""

    def __init__(self, core: EngineCore, link: ZmqLink) -> None:
        self._core = core
        self._link = link
        self._idle_seconds = 0.0

    def run(self) -> None:
        """Runs until a Shutdown message; an error of a step is raised."""
        core, link = self._core, self._link
        while True:
            for message in self._receive():
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            outputs = core.step()
            if outputs:
                link.send(Outputs(outputs))

    def _receive(self) -> list[ToEngine]:
        if self._core.has_work():
            return self._link.receive(wait=False)
        began = time.perf_counter()
        messages = self._link.receive(wait=False)
        while not messages and self._core.prepare():
            messages = self._link.receive(wait=False)
        if not messages:
            messages = self._link.receive(wait=True)
        self._idle_seconds += time.perf_counter() - began
        return messages

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Generate):
            self._core.add_request(message)
        elif isinstance(message, Embed):
            self._core.add_embed(message)
        elif isinstance(message, Abort):
            self._core.abort(message.request_ids)
        elif isinstance(message, Vocabulary):
            self._core.grammars.set_vocabulary(message)
        elif isinstance(message, Sleep):
            self._sleep(message)
        elif isinstance(message, GetStats):
            self._link.send(complete(self._core, self._stats()))
        elif isinstance(message, GetState):
            self._link.send(snapshot(self._core, self._stats(), message))

    def _sleep(self, message: Sleep) -> None:
        began, refused = time.perf_counter(), None
        try:
            if message.level:
                self._core.sleep(message.level, message.keep_kv)
            else:
                self._core.wake_up()
        except UsageError as error:
            refused = str(error)
        self._link.send(Slept(self._core.sleep_level, time.perf_counter() - began, refused))

    def _stats(self) -> Stats:
        stats = self._core.stats()
        stats.idle_seconds = self._idle_seconds
        return stats
