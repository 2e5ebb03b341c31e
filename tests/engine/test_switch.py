"""Several engines on one device: whose turn it is, and that turns change no token."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rvllm.config import EngineConfig
from rvllm.engine.ipc import switch as switching
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.ipc.switch import ModelSwitch, SwitchedEngine
from rvllm.errors import UsageError
from support.doubles import engine_process
from support.doubles.engine import continuation

COMMAND = (sys.executable, engine_process.__file__)


@asynccontextmanager
async def switched(
    count: int, turn: float, step_ms: int = 0, **settings: Any
) -> AsyncIterator[tuple[ModelSwitch, list[SwitchedEngine]]]:
    config = EngineConfig(model="double", seed=step_ms, enable_sleep_mode=True, **settings)
    engines = await asyncio.gather(*(EngineClient.start(config, command=COMMAND) for _ in range(count)))
    for engine in engines[1:]:
        await engine.sleep(1)
    switch = ModelSwitch(engines, turn)
    try:
        yield switch, [SwitchedEngine(switch, i) for i in range(count)]
    finally:
        await switch.close()


def ask(name: str, prompt: list[int], count: int) -> Generate:
    return Generate(name, prompt, Sampling(max_tokens=count), arrival=time.time())


async def tokens_of(engine: SwitchedEngine, request: Generate) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


async def test_one_after_the_other() -> None:
    async with switched(3, turn=5.0) as (switch, engines):
        for number in range(50):
            prompt = [number % 90, 5, 3]
            got = await tokens_of(engines[number % 3], ask(f"{number}", prompt, 4))
            assert got == continuation(prompt, 4)
            levels = [engine.sleep_level for engine in engines]
            assert sorted(levels) == [0, 1, 1] and levels[number % 3] == 0
        async with asyncio.timeout(60):  # the last tokens may be here before the swap is booked
            while switch.swaps < 49:
                await asyncio.sleep(0.01)
        assert switch.swaps == 49 and switch.status == "ready"
        assert (await engines[1].stats()).backend["rvllm:model_swaps_total"] == 49


async def test_turns_end_and_whoever_runs_finishes_first() -> None:
    async with switched(2, turn=0.1, step_ms=4) as (switch, engines):
        first = asyncio.ensure_future(tokens_of(engines[0], ask("a", [1, 2], 60)))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(tokens_of(engines[1], ask("b", [3], 5)))
        await asyncio.sleep(0.12)  # the first one's turn is over, and it is not done
        third = asyncio.ensure_future(tokens_of(engines[0], ask("c", [4], 5)))
        done: list[str] = []
        for name, task in (("a", first), ("b", second), ("c", third)):
            task.add_done_callback(lambda _, name=name: done.append(name))
        assert await asyncio.gather(first, second, third) == [
            continuation([1, 2], 60), continuation([3], 5), continuation([4], 5)
        ]  # fmt: skip
        assert done == ["a", "b", "c"] and switch.swaps == 2


async def test_an_answer_that_nobody_reads_does_not_keep_the_device() -> None:
    async with switched(2, turn=60.0) as (_, engines):
        unread = engines[0].generate(ask("a", [1, 2], 5))
        got = list((await anext(unread)).token_ids)
        async with asyncio.timeout(60):
            assert await tokens_of(engines[1], ask("b", [3], 5)) == continuation([3], 5)
        assert [engine.sleep_level for engine in engines] == [1, 0]
        got += [token async for output in unread for token in output.token_ids]
        assert got == continuation([1, 2], 5)


async def test_a_model_without_room_is_woken_as_soon_as_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switching, "RETRY_SECONDS", 0.02)
    async with switched(2, turn=60.0) as (switch, engines):
        woken, refusals = switch.engines[1].sleep, [UsageError("no memory")] * 3

        async def sleep(level: int, keep_kv: bool = False) -> float:
            if not level and refusals:
                raise refusals.pop()
            return await woken(level, keep_kv)

        monkeypatch.setattr(switch.engines[1], "sleep", sleep)
        asked = [tokens_of(engines[i], ask(f"{n}", [i + 1], 5)) for n, i in enumerate((1, 0, 1))]
        assert await asyncio.gather(*asked) == [continuation([i + 1], 5) for i in (1, 0, 1)]
        assert not refusals


async def test_many_at_once() -> None:
    async with switched(3, turn=0.01, step_ms=1) as (switch, engines):
        asked = [(i, [i + 7, 3] * (1 + i), i % 7 + 1) for i in range(40)]

        async def late(i: int, prompt: list[int], count: int) -> list[int]:
            await asyncio.sleep(0.004 * i)
            return await tokens_of(engines[i % 3], ask(f"{i}", prompt, count))

        got = await asyncio.gather(*(late(*one) for one in asked))
        assert got == [continuation(prompt, count) for _, prompt, count in asked]
        assert switch.swaps > 2


async def test_who_waits_for_a_sleeper_is_told_after_max_queue_seconds() -> None:
    async with switched(2, turn=60.0, step_ms=2, max_queue_seconds=0.3) as (_, engines):
        first = asyncio.ensure_future(tokens_of(engines[0], ask("a", [1, 2], 2000)))
        await asyncio.sleep(0.02)
        outputs = [output async for output in engines[1].generate(ask("b", [3], 5))]
        assert outputs[-1].waited_too_long and not first.done()
        first.cancel()


async def test_an_engine_that_died_takes_the_device_when_it_starts_again() -> None:
    async with switched(2, turn=60.0) as (switch, engines):
        dead = switch.engines[1]
        dead.kill()
        assert "double: the engine process was killed" in await switch.wait_dead()
        assert switch.status == "failed"
        await switch.restart()
        assert [engine.sleep_level for engine in engines] == [1, 0] and switch.status == "ready"
        for engine in engines:
            assert await tokens_of(engine, ask("a", [4], 6)) == continuation([4], 6)
