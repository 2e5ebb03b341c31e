"""An engine process and, beside it, whatever else the command has to load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rvllm.config import EngineConfig
from rvllm.engine.ipc.client import EngineClient
from rvllm.offline.progress import LoadingBar


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
