"""A replica: one engine process, its messages as methods that cross Ray."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rvllm.config import EngineConfig, SourceConfig
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Embed, Generate, Output, Ready, State
from rvllm.errors import RvllmError
from rvllm.ray.scaling import KV_USE
from rvllm.settings import build
from rvllm.telemetry.stats import Stats
from rvllm.weights.fetch.source import resolve

DIED = 70  # the exit code of a replica whose engine has died


class EngineReplica:
    """Serve makes as many of these as there are replicas, each where there is room for an engine."""

    async def __init__(self, settings: dict[str, Any], stall_seconds: float) -> None:  # type: ignore[misc]
        """settings: an EngineConfig's. stall_seconds: see --engine-stall-seconds. Returns once loaded."""
        config = EngineConfig(**settings)
        path = await asyncio.to_thread(resolve, config.model, build(SourceConfig, {}))
        self._config = EngineConfig(**{**settings, "model": str(path)})
        self._engine = await EngineClient.start(self._config)
        self._engine.stall_seconds = stall_seconds
        self._vocabulary: asyncio.Task[None] | None = None
        self._watch = asyncio.ensure_future(self._end_with_the_engine())
        self._closing = False

    async def _end_with_the_engine(self) -> None:
        """Ends this process when the engine has died: a replica without one would have the shortest queue and
        draw every request to itself until Ray looks at its health."""
        cause = await self._engine.wait_dead()
        if not self._closing:
            print(f"rvllm: {cause}; the replica ends", file=sys.stderr, flush=True)
            os._exit(DIED)

    async def ready(self) -> Ready:
        """What the loaded engine says of itself."""
        return self._engine.ready

    async def generate(
        self, request: Generate | Embed, session: str | None = None
    ) -> AsyncGenerator[list[Output], None]:
        """A request's outputs; `session` is for the router.

        A list has all that came while Ray handed on the one before: what Ray takes for a list bounds how many
        lists there are in a second, not how many tokens. Errors of ours come as an Output, so that no
        traceback leaves this process.
        """
        try:
            if isinstance(request, Generate) and request.sampling.grammar is not None:
                await self._prepare_grammars()
            async with aclosing(self._engine.generate_lists(request)) as lists:
                async for outputs in lists:
                    yield outputs
        except RvllmError as error:
            if not self._engine.alive:  # the process is about to end: another replica takes over
                await asyncio.sleep(60)
            yield [Output(request.request_id, [], finish_reason="error", error=str(error))]

    async def _prepare_grammars(self) -> None:
        """The vocabulary goes to the engine before the first grammar."""
        if self._vocabulary is None or (self._vocabulary.done() and self._vocabulary.exception()):
            self._vocabulary = asyncio.create_task(self._send_vocabulary())
        await asyncio.shield(self._vocabulary)

    async def _send_vocabulary(self) -> None:
        from rvllm.text.grammar.grammar import vocabulary_of
        from rvllm.text.tokenizers.tokenizer import Tokenizer

        def vocabulary() -> Any:
            return vocabulary_of(Tokenizer.load(Path(self._config.tokenizer or self._config.model)))

        self._engine.set_vocabulary(await asyncio.to_thread(vocabulary))

    async def stats(self) -> Stats:
        return await self._engine.stats()

    async def state(self) -> State:
        return await self._engine.state()

    async def pids(self) -> tuple[int, int]:
        """(this process, its engine's), for tests of what happens when one is killed."""
        assert self._engine.process is not None
        return os.getpid(), self._engine.process.pid

    async def check_health(self) -> None:
        """Ray asks every few seconds; an exception ends the replica."""
        if self._engine.status != "ready":
            raise RvllmError(f"the engine is {self._engine.status}")

    async def record_routing_stats(self) -> dict[str, int]:
        """What routers are told."""
        return {"blocks_total": self._engine.ready.limits.num_blocks}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is decided from, beside the requests that Ray counts itself."""
        stats = await self._engine.stats()
        return {KV_USE: stats.blocks_used / max(1, stats.blocks_total)}

    async def __del__(self) -> None:
        """Serve calls and awaits this when what ran has ended."""
        self._closing = True
        self._watch.cancel()
        await self._engine.close()
