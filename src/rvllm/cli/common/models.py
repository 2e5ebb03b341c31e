"""The models that commands are about: fetched, with a bar that shows how far, read, and started."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.config import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from rvllm.engine.ipc.client import EngineClient
    from rvllm.engine.ipc.spawn import Spawned
    from rvllm.models.config import ModelConfig
    from rvllm.program.dtypes import DType
    from rvllm.program.ops.dense import Program
    from rvllm.weights.checkpoint import Checkpoint


def fetch(name: str) -> Path:
    """Where a model is on the disk; one that is not there is fetched. Raises RvllmError."""
    from rvllm.weights.fetch.progress import ProgressBar
    from rvllm.weights.fetch.source import resolve

    with ProgressBar() as progress:
        return resolve(name, progress=progress)


def fetched(config: EngineConfig) -> EngineConfig:
    """With the model and the tokenizer where they are on the disk."""
    from rvllm.weights.fetch.source import resolve

    path = fetch(config.model)
    tokenizer = None if config.tokenizer is None else str(resolve(config.tokenizer))
    return replace(config, model=str(path), tokenizer=tokenizer)


@dataclass(frozen=True)
class Read:
    """A model's files but for its weights, and the program that they make. stored: None without weights."""

    config: ModelConfig
    checkpoint: Checkpoint
    program: Program
    stored: Checkpoint | None


def read(config: EngineConfig, choose: Callable[[EngineConfig, Checkpoint], DType] | None = None) -> Read:
    """The model that `config` names. choose: its element type; None: as a start would.

    Raises RvllmError: what is wrong with its files, or that there is no GPU.
    """
    from rvllm.backends.load import choose_dtype
    from rvllm.models.kv_cache import with_kv_cache
    from rvllm.models.overrides import read_config
    from rvllm.models.registry import build_program
    from rvllm.weights.fetch.source import resolve
    from rvllm.weights.open import open_checkpoint

    checkpoint = open_checkpoint(resolve(config.model))
    model = read_config(checkpoint, config)
    program = build_program(model, (choose or choose_dtype)(config, checkpoint))
    stored = checkpoint if checkpoint.tensors else None
    return Read(model, checkpoint, with_kv_cache(program, config.kv_cache_dtype), stored)


async def start_engine(
    config: EngineConfig, *beside: Callable[[], Any], spawned: Spawned | None = None
) -> tuple[EngineClient, list[Any]]:
    """Starts the engine process and runs `beside` in threads while it loads; (client, their results).

    spawned: a process that is on its way already.
    Raises the first error of any of them, or CancelledError; the engine process is ended then.
    """
    from rvllm.engine.ipc.spawn import spawn

    spawned = spawned or spawn()  # comes up while this process imports
    from rvllm.engine.ipc.client import EngineClient
    from rvllm.offline.progress import loading_bar

    with loading_bar() as show:
        starting = asyncio.ensure_future(EngineClient.start(config, show, spawned=spawned))
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
