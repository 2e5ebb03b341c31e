"""A front end: HTTP application, tokenizer and templates of every model, and a router to its replicas."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rvllm.config import EngineConfig, SourceConfig
from rvllm.errors import RvllmError
from rvllm.ray.client import ReplicatedEngine
from rvllm.ray.config import ModelSpec, RayConfig, parse
from rvllm.ray.dispatch import Dispatcher
from rvllm.ray.fleet import HandleFleet
from rvllm.settings import build

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from rvllm.text.worker.pool import WorkerPool


class Frontend:
    """Serve makes as many of these as `frontends` says; each has every model."""

    async def __init__(self, values: dict[str, Any], *handles: Any) -> None:  # type: ignore[misc]
        """values: a RayConfig's. handles: of each model's replicas. Returns when one of each has loaded."""
        config = parse(values)
        self._closing: list[WorkerPool | ReplicatedEngine] = []
        apps = [
            await self._model(config, model, handle)
            for model, handle in zip(config.models, handles, strict=True)
        ]
        names = [model.name for model in config.models]
        server = config.server_config(config.models[0])
        self._app = Dispatcher(dict(zip(names, apps, strict=True)), server, config.stateful)

    def __serve_build_asgi_app__(self) -> Dispatcher:
        """Serve asks for the application once this is made."""
        return self._app

    async def _model(self, config: RayConfig, model: ModelSpec, handle: Any) -> ASGIApp:
        from rvllm.api.app import build_app
        from rvllm.api.assembly import (
            build_gate,
            check_chat_template,
            load_tokenizer,
            service_of,
            start_workers,
            template_text,
        )

        server = config.server_config(model)
        engine_config = await asyncio.to_thread(_resolved, model.engine_config())
        work = start_workers(engine_config, server)
        tokenizer = await asyncio.to_thread(load_tokenizer, engine_config)
        template = template_text(server.chat_template)
        if work is not None:
            self._closing.append(work)
            await check_chat_template(work, template, server.tool_call_parser)
        fleet = HandleFleet(handle)
        engine = ReplicatedEngine(fleet, await fleet.ready(), config.replays)
        self._closing.append(engine)
        service = service_of(engine, engine.ready, engine_config, server, tokenizer, work, template)
        return build_app(service, build_gate(server, [service]))

    async def check_health(self) -> None:
        """Ray asks every few seconds; an exception ends the front end."""
        if not self._closing:
            raise RvllmError("the front end is closed")

    def __del__(self) -> None:
        """Serve calls this when what ran has ended."""
        for one in getattr(self, "_closing", []):
            one.close()


def _resolved(config: EngineConfig) -> EngineConfig:
    """With folders instead of names; what is not here is fetched."""
    import dataclasses

    from rvllm.weights.fetch.source import resolve

    sources = build(SourceConfig, {})
    tokenizer = None if config.tokenizer is None else str(resolve(config.tokenizer, sources))
    return dataclasses.replace(config, model=str(resolve(config.model, sources)), tokenizer=tokenizer)
