"""The engine process and its client: streams, cancellation, every way of dying."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rvllm.config import EngineConfig
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.ipc.spawn import spawn
from rvllm.errors import EngineDeadError, RvllmError, UsageError
from support.doubles import engine_process
from support.doubles.engine import continuation

COMMAND = (sys.executable, engine_process.__file__)


@asynccontextmanager
async def engine(model: str = "double", step_ms: int = 0, **settings: Any) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(EngineConfig(model=model, seed=step_ms, **settings), command=COMMAND)
    try:
        yield client
    finally:
        await client.close()
    assert client.process.returncode is not None
    assert not Path(client.directory).exists()


def ask(name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> Generate:
    return Generate(name, prompt, Sampling(max_tokens=max_tokens, **sampling), arrival=time.time())


async def tokens_of(client: EngineClient, request: Generate) -> list[int]:
    tokens: list[int] = []
    async for output in client.generate(request):
        tokens += output.token_ids
    return tokens


async def test_streams() -> None:
    heard: list[str] = []
    config = EngineConfig(model="double", seed=0)
    client = await EngineClient.start(config, lambda _, text: heard.append(text), COMMAND)
    assert heard == ["pretending"]
    assert client.ready.backend == "double" and client.ready.facts.vocab_size == 97 and client.alive
    prompts = [[i % 90, i % 7, 3] * (1 + i % 5) for i in range(200)]
    got = await asyncio.gather(*(tokens_of(client, ask(f"{i}", p, 20)) for i, p in enumerate(prompts)))
    assert got == [continuation(p, 20) for p in prompts]
    stats = await client.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.generation_tokens == 4000 and stats.finished == {"length": 200}
    await client.close()
    await client.close()
    assert client.process.returncode == 0 and not client.alive
    assert not Path(client.directory).exists()


async def test_whoever_takes_lists_slowly_takes_longer_ones() -> None:
    async with engine(step_ms=10) as client:
        lists = client.generate_lists(ask("slow", [5, 9], 20))
        first = await anext(lists)
        arrived = client._streams["slow"]._queue  # type: ignore[attr-defined]
        while first[-1].finish_reason is None and (not arrived or arrived[-1].finish_reason is None):
            await asyncio.sleep(0.01)
        rest = [outputs async for outputs in lists]
        assert len(rest) == (first[-1].finish_reason is None)  # all that came since, in one
        tokens = [token for output in sum(rest, first) for token in output.token_ids]
        assert tokens == continuation([5, 9], 20)


async def test_idle_engine_sleeps() -> None:
    async with engine() as client:
        before, began = cpu_seconds(client.process.pid), time.perf_counter()
        await asyncio.sleep(1.0)
        stats = await client.stats()
        used = cpu_seconds(client.process.pid) - before
        assert used < 0.1 * (time.perf_counter() - began)
        assert stats.idle_seconds > 0.9


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_closing_the_iterator_aborts() -> None:
    async with engine(step_ms=5) as client:
        seen = 0
        async for _ in client.generate(ask("left", [1, 2, 3], 4000)):
            seen += 1
            if seen == 3:
                break
        task = asyncio.create_task(tokens_of(client, ask("cancelled", [1, 2, 3], 4000)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.1)
        stats = await client.stats()
        assert (stats.running, stats.blocks_used) == (0, 0)
        assert stats.finished == {"abort": 2}


async def test_abort_by_id() -> None:
    async with engine(step_ms=5) as client:
        reasons = []
        async for output in client.generate(ask("a", [1, 2, 3], 4000)):
            if len(reasons) == 2:
                client.abort(["a", "never heard of"])
            reasons.append(output.finish_reason)
        assert reasons[-1] == "abort" and set(reasons[:-1]) == {None}
        assert len(reasons) < 20, "cancellation takes a step, not longer"


async def test_refusals_name_the_reason() -> None:
    async with engine(num_blocks=4) as client:
        assert client.ready.limits.max_model_len == 64
        for prompt, word in (
            ([], "empty"),
            ([1] * 64, "64 tokens"),
            ([97], "vocabulary"),
            ([-1], "vocab"),
        ):
            outputs = [o async for o in client.generate(ask("bad", prompt, 4))]
            assert [o.finish_reason for o in outputs] == ["error"]
            assert word in (outputs[0].error or "")
        first = client.generate(ask("same", [1], 40))
        await anext(first)
        with pytest.raises(UsageError, match="same"):
            await anext(client.generate(ask("same", [2], 4)))
        assert len(await tokens_of(client, ask("good", [1], 4))) == 4


async def test_death_reaches_everyone() -> None:
    async with engine(step_ms=5) as client:
        tasks = [asyncio.create_task(tokens_of(client, ask(f"{i}", [i], 4000))) for i in range(20)]
        await asyncio.sleep(0.1)
        os.kill(client.process.pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDeadError) and "SIGKILL" in str(r) for r in results)
        assert "SIGKILL" in await client.wait_dead()
        assert not client.alive
        for late in (client.stats(), anext(client.generate(ask("late", [1], 1)))):
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await late


async def test_failing_step_is_reported() -> None:
    async with engine("double:fail-step") as client:
        with pytest.raises(EngineDeadError, match="told to fail here"):
            await tokens_of(client, ask("a", [1], 100))
        assert "RuntimeError" in await client.wait_dead()


@pytest.mark.parametrize(
    ("model", "kind", "word", "code"),
    [
        ("double:fail-load", RvllmError, "magic is wrong", 2),
        ("double:die", EngineDeadError, "exit code 3", 1),
    ],
)
async def test_failed_start(model: str, kind: type[RvllmError], word: str, code: int) -> None:
    with pytest.raises(kind, match=word) as caught:
        await EngineClient.start(EngineConfig(model=model), command=COMMAND)
    assert caught.value.exit_code == code


async def test_a_process_that_is_on_its_way_is_taken() -> None:
    spawned = spawn(COMMAND)
    client = await EngineClient.start(EngineConfig(model="double"), command=COMMAND, spawned=spawned)
    assert client.process is spawned.process
    assert await tokens_of(client, ask("a", [5, 6], 3)) == continuation([5, 6], 3)
    client.kill()
    await client.wait_dead()
    await client.restart()  # with a process of its own
    assert client.process is not spawned.process
    assert await tokens_of(client, ask("b", [5, 6], 3)) == continuation([5, 6], 3)
    await client.close()
    assert spawned.process.returncode == -signal.SIGKILL


async def test_socket_directory_is_private() -> None:
    async with engine() as client:
        assert Path(client.directory).stat().st_mode & 0o777 == 0o700


PARENT = """
import asyncio, sys, time
from rvllm.config import EngineConfig
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Generate, Sampling
async def main():
    client = await EngineClient.start(EngineConfig(model="double", seed=5), command=sys.argv[1:])
    stream = client.generate(Generate("a", [1], Sampling(max_tokens=4000)))
    await anext(stream)
    print(client.process.pid, client.directory, flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def test_engine_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *COMMAND], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid)), "an orphan"
    assert not Path(directory).exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_interrupt_goes_to_the_parent_only() -> None:
    async with engine(step_ms=2) as client:
        assert os.getsid(client.process.pid) != os.getsid(0)
        os.kill(client.process.pid, signal.SIGINT)
        assert len(await tokens_of(client, ask("a", [1], 50))) == 50


async def test_start_is_quick() -> None:
    began = time.perf_counter()
    async with engine():
        taken = time.perf_counter() - began
    assert taken < 5.0  # 0.4 s on an idle machine


async def test_a_cancelled_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    for moment in (0.0, 0.05):
        starting = asyncio.create_task(EngineClient.start(EngineConfig(model="double"), command=COMMAND))
        await asyncio.sleep(moment)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    with pytest.raises(FileNotFoundError):
        await EngineClient.start(EngineConfig(model="double"), command=("/no/such/python",))
    base.rmdir()  # fails unless empty
