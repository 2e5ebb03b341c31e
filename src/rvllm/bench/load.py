"""Load on a server over HTTP: streamed requests at a rate, each timed token by token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rvllm.errors import RvllmError

_LINE = 1 << 24  # bytes of the longest line that is read
_DONE: dict[str, Any] = {"done": True}  # in place of the stream's last line
_BROKEN = "the answer broke off"


@dataclass
class Sent:
    """One request as its client saw it; times in seconds since the run began, 0 where nothing came.

    queued: seconds that it waited for its turn before `start`. gaps: seconds between what came of its text.
    error: why it failed.
    """

    prompt_tokens: int
    output_tokens: int = 0
    start: float = 0.0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""
    queued: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Target:
    """Where requests go: a URL, and the headers that each has.

    name: X-Request-Id of each begins so, and ends in its number; "": it has none. trusting: whatever
    certificate the server has. stall: seconds without an event after which a request has failed; None: any.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    name: str = ""
    trusting: bool = False
    stall: float | None = None


async def run(
    target: Target,
    bodies: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    arrivals: Sequence[float] | None = None,
    most: int | None = None,
) -> list[Sent]:
    """Sends the bodies in order and waits for all answers.

    arrivals: seconds from now at which each is sent, see `Traffic.arrivals`; None: at once. most: so many are
    under way together. lengths: each prompt's tokens, where the server does not say.
    """
    began = time.perf_counter()
    room = asyncio.Semaphore(most) if most else contextlib.nullcontext()
    sent = [Sent(length) for length in lengths]

    async def one(number: int, body: dict[str, Any], result: Sent) -> None:
        arrived = time.perf_counter()
        async with room:
            result.start = time.perf_counter() - began
            result.queued = result.start + began - arrived
            await _send(target, number, body, result, began)

    tasks = []
    for i, (body, result) in enumerate(zip(bodies, sent, strict=True)):
        if arrivals is not None and (wait := arrivals[i] + began - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(i, body, result)))
    await asyncio.gather(*tasks)
    return sent


async def _send(target: Target, number: int, body: dict[str, Any], result: Sent, began: float) -> None:
    try:
        async with asyncio.timeout(target.stall) as due, _events(target, number, body) as events:
            ended = False
            async for event in events:
                ended = _take(event, result, time.perf_counter() - began) or ended
                if target.stall is not None:
                    due.reschedule(asyncio.get_running_loop().time() + target.stall)
            if not ended:
                raise RvllmError(_BROKEN)
    except TimeoutError as error:
        result.error = str(error) or f"nothing came for {target.stall:g} s"
    except asyncio.IncompleteReadError:
        result.error = _BROKEN
    except (OSError, ValueError, RvllmError) as error:
        result.error = str(error) or type(error).__name__
    if not result.error and not result.first:
        result.error = "no text came"


def _take(event: Any, result: Sent, now: float) -> bool:
    """Whether the event says that the answer is complete. Raises RvllmError for errors and foreign events."""
    try:
        ended = bool(event.get("done"))
        if told := event.get("error"):
            raise RvllmError(str(told.get("message") if isinstance(told, dict) else told))
        if usage := event.get("usage"):
            result.prompt_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            ended = True
        for choice in event.get("choices") or ():
            ended = ended or choice.get("finish_reason") is not None
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning") or ""
            if not text and not delta.get("tool_calls"):
                continue
            result.text += text
            if result.first:
                result.gaps.append(now - result.last)
            else:
                result.first = now
            result.last = now
        return ended
    except (AttributeError, KeyError, TypeError):
        raise RvllmError(f"not an event of the API: {json.dumps(event)[:200]}") from None


@asynccontextmanager
async def _events(
    target: Target, number: int, body: dict[str, Any]
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of a streamed answer. Raises RvllmError when the server refuses."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), limit=_LINE,
        ssl=_context(target) if secure else None,
    )  # fmt: skip
    try:
        data = json.dumps(body).encode()
        named = {"x-request-id": f"{target.name}{number}"} if target.name else {}
        headers = {"content-type": "application/json", **{k.lower(): v for k, v in target.headers}, **named,
                   "content-length": str(len(data)), "connection": "close"}  # fmt: skip
        head = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}",
                *(f"{name}: {value}" for name, value in headers.items())]  # fmt: skip
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        status = (await reader.readline()).split(b" ", 2)
        answered = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.partition(b":")
            answered[name.lower()] = value.strip().lower()
        lines = _chunked(reader) if answered.get(b"transfer-encoding") == b"chunked" else _plain(reader)
        if len(status) < 2 or status[1] != b"200":
            text = b"".join([line async for line in lines])[:300].decode(errors="replace")
            raise RvllmError(f"{status[1].decode() if len(status) > 1 else 'no answer'}: {text}")
        yield _parsed(lines)
    finally:
        writer.close()


def _context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if target.trusting:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _parsed(lines: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith(b"data:") and (data := line[5:].strip()):
            yield _DONE if data == b"[DONE]" else json.loads(data)


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        yield line


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a body in HTTP/1.1's chunks."""
    held = b""
    while size := int((await reader.readuntil()).split(b";")[0], 16):
        held += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line
    if held:
        yield held
