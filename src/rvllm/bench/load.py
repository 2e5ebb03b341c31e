"""Load on a server over HTTP: streamed requests at a rate, each timed token by token."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rvllm.errors import RvllmError

_LINE = 1 << 24  # bytes of the longest line that is read


@dataclass
class Sent:
    """One request as its client saw it; times in seconds since the run began, 0 where nothing came.

    gaps: seconds between what came of its text. error: why it failed.
    """

    prompt_tokens: int
    output_tokens: int = 0
    start: float = 0.0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Target:
    """Where requests go: a URL, and the headers that each has."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()


async def run(
    target: Target,
    bodies: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    *,
    rate: float,
    burstiness: float,
    most: int | None,
    seed: int,
) -> list[Sent]:
    """Sends the bodies in order and waits for all answers.

    rate: requests a second, inf: all at once; burstiness: 1 is a Poisson process, more is steadier (the
    shape of the gamma distribution that waits are drawn from). most: so many are under way at once.
    lengths: each prompt's tokens, where the server does not say.
    """
    source, began = random.Random(seed), time.perf_counter()
    room = asyncio.Semaphore(most) if most else None
    sent = [Sent(length) for length in lengths]

    async def one(body: dict[str, Any], result: Sent) -> None:
        if room is None:
            await _send(target, body, result, began)
        else:
            async with room:
                await _send(target, body, result, began)

    tasks = []
    for body, result in zip(bodies, sent, strict=True):
        tasks.append(asyncio.create_task(one(body, result)))
        if rate != float("inf"):
            await asyncio.sleep(source.gammavariate(burstiness, 1.0 / (rate * burstiness)))
    await asyncio.gather(*tasks)
    return sent


async def _send(target: Target, body: dict[str, Any], result: Sent, began: float) -> None:
    result.start = time.perf_counter() - began
    try:
        async with _events(target, body) as events:
            async for event in events:
                _take(event, result, time.perf_counter() - began)
    except (OSError, ValueError, RvllmError, asyncio.IncompleteReadError) as error:
        result.error = str(error) or type(error).__name__
    if not result.error and not result.first:
        result.error = "no text came"


def _take(event: dict[str, Any], result: Sent, now: float) -> None:
    if "error" in event:
        raise RvllmError(str(event["error"].get("message")))
    usage = event.get("usage")
    if usage:
        result.prompt_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        if not any(
            (choice.get("text"), delta.get("content"), delta.get("reasoning"), delta.get("tool_calls"))
        ):
            continue
        if result.first:
            result.gaps.append(now - result.last)
        else:
            result.first = now
        result.last = now


@asynccontextmanager
async def _events(target: Target, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of a streamed answer. Raises RvllmError when the server refuses."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), limit=_LINE,
        ssl=ssl.create_default_context() if secure else None,
    )  # fmt: skip
    try:
        data = json.dumps(body).encode()
        head = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json",
                f"Content-Length: {len(data)}", "Connection: close",
                *(f"{name}: {value}" for name, value in target.headers)]  # fmt: skip
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        status = (await reader.readline()).split(b" ", 2)
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip().lower()
        lines = _chunked(reader) if headers.get(b"transfer-encoding") == b"chunked" else _plain(reader)
        if len(status) < 2 or status[1] != b"200":
            text = b"".join([line async for line in lines])[:300].decode(errors="replace")
            raise RvllmError(f"{status[1].decode() if len(status) > 1 else 'no answer'}: {text}")
        yield _parsed(lines)
    finally:
        writer.close()


async def _parsed(lines: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith(b"data:") and line[5:].strip() not in (b"", b"[DONE]"):
            yield json.loads(line[5:])


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        yield line


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a body in HTTP/1.1's chunks."""
    held = b""
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        held += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line
    if held:
        yield held
