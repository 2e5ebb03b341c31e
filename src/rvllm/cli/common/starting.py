"""An engine process and, beside it, whatever else the command has to load."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from rvllm.config import EngineConfig
from rvllm.engine.ipc.client import EngineClient


async def start_engine(config: EngineConfig, *beside: Callable[[], Any]) -> tuple[EngineClient, list[Any]]:
    """Starts the engine process and runs `beside` in threads while it loads; (client, their results).

    Raises the first error of any of them, or CancelledError; the engine process is ended then.
    """
    with LoadingBar() as bar:
        starting = asyncio.ensure_future(EngineClient.start(config, bar.show))
        await asyncio.sleep(0)  # the engine process is on its way before this one does anything more
        try:
            results = await asyncio.gather(*(asyncio.to_thread(work) for work in beside))
            return await starting, results
        except BaseException:
            starting.cancel()
            (engine,) = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(engine, EngineClient):
                await engine.close()
            raise


class LoadingBar:
    """A progress line on a terminal while the model loads; silent elsewhere."""

    WIDTH = 30

    def __init__(self) -> None:
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> LoadingBar:
        return self

    def show(self, fraction: float, text: str) -> None:
        """Draws the bar at `fraction` (0 to 1)."""
        if self._terminal:
            done = round(self.WIDTH * min(max(fraction, 0.0), 1.0))
            bar = "━" * done + "·" * (self.WIDTH - done)
            print(f"\r\x1b[K{bar} {fraction:4.0%} {text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
