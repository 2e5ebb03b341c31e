"""The lines of a batch: read and checked, answered by the endpoint they name, written as results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any
from uuid import uuid4

import msgspec

from rvllm.api.generate.job import BATCH_PRIORITY
from rvllm.api.http.body import check_structure
from rvllm.api.http.errors import ApiError, from_rvllm, invalid
from rvllm.api.http.exchange import Exchange
from rvllm.errors import EngineDeadError, RvllmError

MAX_LINES = 50_000  # OpenAI's limit for one batch
MAX_READ = 2 * MAX_LINES  # with empty ones
BUSY_SECONDS = 0.25  # before a line is tried again for which the queue had no room

# What a batch may ask for; the routes answer it. Without a server nothing is kept, so no responses.
STATELESS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
ENDPOINTS = (*STATELESS, "/v1/responses")

Answering = Callable[[Exchange, bytes], Awaitable[None]]
_encode = msgspec.json.Encoder().encode


class BatchLine(msgspec.Struct, kw_only=True):
    """A request in a batch's input."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class LineExchange(Exchange):
    """A request that did not come over the wire: its whole answer is kept in `answer`."""

    def __init__(self, request_id: str) -> None:
        super().__init__({"type": "http", "method": "POST", "headers": []}, _nothing, _nowhere)
        self.request_id = request_id
        self.answer: Any = None

    async def json(self, value: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.answer, self.status = value, 200


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


async def _nowhere(message: Any) -> None:
    pass


BOM = b"\xef\xbb\xbf"  # what some editors put in front of a file


def read_lines(data: Iterable[bytes], most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of all lines that are not empty.

    Raises ApiError when there are more than `most` lines, empty ones among them.
    """
    for number, line in enumerate(data, 1):
        if most is not None and number > most:
            raise invalid(f"more than {most} lines, empty ones among them", None, "too_many_lines")
        text = line.removeprefix(BOM).strip() if number == 1 else line.strip()
        if text:
            yield number, text


def parse_line(line: bytes, urls: Iterable[str]) -> BatchLine:
    """The request in a line. Raises ApiError when it is none, or not for one of `urls`."""
    try:
        check_structure(line)
        request = msgspec.json.decode(line, type=BatchLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        code = "invalid_request" if isinstance(error, msgspec.ValidationError) else "invalid_json_line"
        raise invalid(f"the line is no request: {error}", None, code) from None
    if request.method != "POST":
        raise invalid("method must be POST", "method", "invalid_method")
    if request.url not in urls:
        raise invalid(f"url must be {' or '.join(urls)}, got {request.url[:80]!r}", "url", "invalid_url")
    if request.body.get("stream") or request.body.get("background"):
        raise invalid("a batch takes neither stream nor background", "body.stream", "invalid_request")
    return request


async def answer_line(request: BatchLine, answering: Answering) -> tuple[bool, bytes]:
    """(whether it failed, the line of the result). Waits while the server is busy.

    Raises EngineDeadError when there is nobody left to answer.
    """
    given = request.body.get("priority")
    priority = max(BATCH_PRIORITY, given) if isinstance(given, int) else BATCH_PRIORITY
    body = _encode({**request.body, "priority": priority})
    while True:
        exchange = LineExchange(uuid4().hex)
        exchange.body_bytes = len(body)
        status, answer = 200, None
        try:
            await answering(exchange, body)
            answer = exchange.answer
        except EngineDeadError:
            raise
        except RvllmError as error:
            wrong = from_rvllm(error, tuple(request.body))
            status, answer = wrong.status, wrong.body()
        except ApiError as error:
            if error.status in (429, 503):
                await asyncio.sleep(BUSY_SECONDS)
                continue
            status, answer = error.status, error.body()
        except Exception:
            logging.getLogger("rvllm").exception("a batch's request %s failed", request.custom_id)
            status, answer = 500, ApiError(500, "internal error, see the server's log").body()
        response = {"status_code": status, "request_id": exchange.request_id, "body": answer}
        return status != 200, result_line(request.custom_id, response, None)


def result_line(
    custom_id: str | None, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None
) -> bytes:
    """A line of an output or error file."""
    return _encode(
        {"id": f"batch_req_{uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    )
