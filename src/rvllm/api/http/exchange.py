"""One HTTP request and its answer, straight on ASGI: body limits, the client going away, errors, SSE."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rvllm.api.disk import is_full
from rvllm.api.http.errors import ApiError, busy, from_rvllm, invalid
from rvllm.api.http.keys import current_key, load_keys
from rvllm.api.http.limits import BODY_RATE, BodyBudget
from rvllm.api.http.multipart import Form
from rvllm.config import ServerConfig
from rvllm.errors import RvllmError
from rvllm.telemetry.logs import event
from rvllm.telemetry.metrics import Metrics
from rvllm.telemetry.timing import RecentTimings, RequestTiming, current
from rvllm.telemetry.tracing import Tracer
from rvllm.text.worker.work import asking

FILE_CHUNK = 1 << 20  # bytes of a file that are sent at a time
TIMING = b"x-rvllm-timing"  # a request with this header is told where its time went
TIMEOUT_HEADER = b"x-request-timeout"  # a request with it is cancelled after so many seconds
ERROR_SECONDS = 5.0  # and so long to take an error from us
_ENCODER = msgspec.json.Encoder()
_CLOSE = ((b"connection", b"close"),)
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Exchange:
    """A request being answered: once, by `json`, `respond` or a stream of events."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.request_id = uuid4().hex
        self.status = 0  # 0 until the answer has begun
        self.streaming = self._lines = False
        self.failure: Failure = openai_failure
        self.budget = BodyBudget(1 << 62)
        self.body_seconds = 60.0
        self.body_bytes = 0  # that have come
        self.held_bytes = 0  # of them that are still counted as held
        self.form: Form | None = None  # the body, where it is one
        self._receive, self._send = receive, send
        given = self.header(b"x-request-id")
        # In the response's X-Request-Id header and in the logs: the client's own if it sent one.
        self.shown_id = given.decode() if given and _CLIENT_ID.fullmatch(given) else self.request_id

    def header(self, name: bytes) -> bytes | None:
        """A request header's value; `name` in lower case."""
        found: bytes | None = next((value for key, value in self.scope["headers"] if key == name), None)
        return found

    async def body(self, limit: int) -> bytes:
        """The whole body, JSON of at most `limit` bytes (--max-body-mb). Raises ApiError as `chunks` does."""
        length = self._given_length()
        if length is not None and length <= limit:
            self.budget.check(length)
        return b"".join([c async for c in self.chunks(limit, b"application/json", "--max-body-mb")])

    async def receive_form(self, form: Form, limit: int, flag: str) -> None:
        """Reads the body into a form; no more than a chunk of it is held at a time.

        Raises ApiError as `chunks` does, and 400 for what is no form.
        """
        self.form = form
        async for chunk in self.chunks(limit, b"multipart/form-data", flag):
            await asyncio.to_thread(form.feed, chunk)
            self.budget.give(len(chunk))
            self.held_bytes -= len(chunk)
        form.finish()

    async def chunks(self, limit: int, kind: bytes, flag: str) -> AsyncIterator[bytes]:
        """The body as it comes, counted as held; `flag` is the setting behind the limit, for errors.

        Raises ApiError: 413 beyond `limit` bytes, 415 when it is of another kind, 408 when it stalls.
        """
        given = (self.header(b"content-type") or b"application/json").partition(b";")[0].strip().lower()
        if given != kind:
            raise ApiError(415, f"the body must be sent with Content-Type: {kind.decode()}")
        packed = (self.header(b"content-encoding") or b"identity").strip().lower()
        if packed != b"identity":
            raise ApiError(415, f"the body must be sent as it is, not {packed[:40].decode('latin-1')}")
        too_large = f"the body is larger than {limit} bytes ({flag})"
        if (self._given_length() or 0) > limit:
            raise ApiError(413, too_large, headers=_CLOSE)
        began = asyncio.get_running_loop().time()
        more = True
        while more:
            try:
                async with asyncio.timeout_at(began + self.body_seconds + self.body_bytes / BODY_RATE):
                    message = await self._receive()
            except TimeoutError:
                late = "the body did not arrive in time (--body-timeout)"
                raise ApiError(408, late, headers=_CLOSE) from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            if self.body_bytes + len(chunk) > limit:
                raise ApiError(413, too_large, headers=_CLOSE)
            self.budget.take(len(chunk))
            self.held_bytes += len(chunk)
            self.body_bytes += len(chunk)
            more = message.get("more_body", False)
            yield chunk

    def _given_length(self) -> int | None:
        length = self.header(b"content-length")
        return int(length[:18]) if length is not None and length.isdigit() else None

    async def gone(self) -> None:
        """Returns when the client has closed the connection (after the body has been read)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def json(self, value: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        await self.respond(_ENCODER.encode(value), b"application/json", headers=headers)

    async def respond(
        self,
        body: bytes,
        content_type: bytes,
        status: int = 200,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        *,
        unread_body: bool = False,
    ) -> None:
        """Answers with a whole body.

        unread_body: the client may still be sending, and many read nothing before they have sent all; closing
        on them would reset the connection and lose the answer. So what comes is thrown away, for a while.
        """
        self.status = status
        length = (b"content-length", str(len(body)).encode())
        await self._start([(b"content-type", content_type), length, *headers])
        await self._send({"type": "http.response.body", "body": body, "more_body": unread_body})
        if unread_body:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ERROR_SECONDS / 2):
                    while (await self._receive()).get("more_body", False):
                        pass
            await self._send({"type": "http.response.body", "body": b""})

    async def send_file(self, path: Path, content_type: bytes) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.status = 200
            await self._start([(b"content-type", content_type), (b"content-length", str(size).encode())])
            while chunk := await asyncio.to_thread(file.read, FILE_CHUNK):
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def open_stream(self, lines: bool = False) -> None:
        """Begins a stream of server-sent events; lines: of JSON, one a line, and nothing else."""
        self.status, self.streaming, self._lines = 200, True, lines
        kind = b"application/x-ndjson" if lines else b"text/event-stream; charset=utf-8"
        await self._start(
            [(b"content-type", kind), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        )

    async def event(self, value: Any, name: str | None = None) -> None:
        """Sends one event with a struct as its JSON data; waits while the client reads slowly."""
        head = b"" if name is None else b"event: " + name.encode() + b"\n"
        data = head + b"data: " + _ENCODER.encode(value) + b"\n\n"
        if self._lines:
            data = _ENCODER.encode(value) + b"\n"
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        """Ends a stream whose last event says that it is the last."""
        await self._send({"type": "http.response.body", "body": b""})

    async def close_stream(self) -> None:
        """Ends the stream as OpenAI does, with `[DONE]`; a comment before it tells the times if asked for."""
        if self._lines:
            await self.end_stream()
            return
        if self._wants_timing() and (timing := current.get()) is not None:
            comment = f": {TIMING.decode()} {timing.line()}\n\n".encode()
            await self._send({"type": "http.response.body", "body": comment, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def fail(self, error: ApiError) -> None:
        """Answers with an error: an error object, or as the last event of a stream that has begun."""
        if self.streaming:
            self.status = error.status  # for logs and metrics; the wire has said 200
            name, body = self.failure(error)
            await self.event(body, name)
            await (self.close_stream() if name is None else self.end_stream())
        elif not self.status:
            await self.respond(
                _ENCODER.encode(self.failure(error)[1]),
                b"application/json",
                error.status,
                error.headers,
                unread_body=error.status == 413,
            )

    def _wants_timing(self) -> bool:
        return self.header(TIMING) is not None

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((b"x-request-id", self.shown_id.encode()))
        if self._wants_timing() and (timing := current.get()) is not None:
            headers.append((TIMING, timing.line().encode()))
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})


Failure = Callable[[ApiError], tuple[str | None, Any]]
"""An error as (name of the event that carries it in a stream, body)."""


def openai_failure(error: ApiError) -> tuple[str | None, Any]:
    """OpenAI's error object; in a stream it comes as an event without a name, and `[DONE]` follows."""
    return None, error.body()


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass
class Gate:
    """What every endpoint shares: settings, metrics, and the requests being worked on."""

    config: ServerConfig
    metrics: Metrics
    draining: bool = False
    timings: RecentTimings = field(default_factory=RecentTimings)
    tracer: Tracer | None = None
    working: set[asyncio.Task[Any]] = field(default_factory=set)
    restarted: list[Callable[[], None]] = field(default_factory=list)  # what to do with a new engine
    closing: list[Callable[[], None]] = field(default_factory=list)  # what to do once nothing works any more

    def __post_init__(self) -> None:
        self.budget = BodyBudget(int(self.config.max_inflight_mb * 1e6))
        self.keys = load_keys(self.config)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts work that is no part of the request which asks for it, and so has a context of its own."""
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self.working.add(task)
        task.add_done_callback(self.working.discard)
        return task

    async def close(self, seconds: float) -> None:
        """Waits that long for what was cancelled, then closes what was opened for all requests."""
        if self.working:
            await asyncio.wait(tuple(self.working), timeout=seconds)
        for close in self.closing:
            close()


Handler = Callable[[Exchange, bytes], Coroutine[Any, Any, None]]
Receiver = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI app around a handler: checks the key, reads the body, ends the handler with the client."""

    def __init__(
        self,
        gate: Gate,
        path: str,
        handler: Handler,
        fields: tuple[str, ...] = (),
        *,
        open: bool = False,
        failure: Failure = openai_failure,
        receive: Receiver | None = None,
    ) -> None:
        """path: as routes have it. fields: the request's parameters, for errors; open: needs no key, answers
        in a drain; receive: reads a body that is not JSON; the handler is then given none.
        """
        self._gate, self._route, self._handler, self._fields, self._open = gate, path, handler, fields, open
        self._failure, self._receive = failure, receive
        self._path = re.sub(r"{(\w+)[^}]*}", lambda found: found[1].upper(), path)  # in logs and metrics

    def route(self, method: str) -> Route:
        return Route(self._route, self, methods=[method])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; never raises but for cancellation by the HTTP server."""
        exchange = Exchange(scope, receive, send)
        exchange.failure = self._failure
        exchange.budget, exchange.body_seconds = self._gate.budget, self._gate.config.body_timeout
        timing = RequestTiming(exchange.shown_id, self._path)
        current.set(timing)  # the server runs each request in a context of its own
        try:
            error = await self._answer(exchange)
        except ClientGoneError:
            error = None
            exchange.status = 499  # nginx's word for it, in logs and metrics
        except ApiError as refused:
            error = _bare(refused)
        finally:
            self._gate.budget.give(exchange.held_bytes)
            if exchange.form is not None:
                exchange.form.discard()
        if error is not None:
            with contextlib.suppress(TimeoutError):  # a client that does not read is hung up on
                async with asyncio.timeout(ERROR_SECONDS):
                    await exchange.fail(error)
        self._finished(exchange, timing)

    def _finished(self, exchange: Exchange, timing: RequestTiming) -> None:
        timing.status, timing.seconds = exchange.status, timing.since()
        if timing.choices:
            self._gate.timings.add(timing)
            if self._gate.tracer is not None:
                timing.traceparent = (exchange.header(b"traceparent") or b"").decode("latin-1")
                timing.tracestate = (exchange.header(b"tracestate") or b"").decode("latin-1")
                self._gate.tracer.record(timing)
        self._gate.metrics.response(self._path, exchange.status)
        level = logging.INFO if self._gate.config.access_log else logging.DEBUG
        event(level, "request", id=exchange.shown_id, path=self._path, status=exchange.status,
              seconds=timing.seconds)  # fmt: skip

    async def _answer(self, exchange: Exchange) -> ApiError | None:
        """Answers; returns the error with which the work ended."""
        if not self._open:
            self._check_key(exchange)
            if self._gate.draining:
                raise busy("the server is shutting down")
        asking.set(current_key.get() + str((exchange.scope.get("client") or ("",))[0]))
        body = b""
        if exchange.scope["method"] == "POST":
            body = await self._body(exchange)
        limit, bound = self._deadline(exchange)
        work = asyncio.ensure_future(self._handle(exchange, body))
        del body
        gone = asyncio.ensure_future(exchange.gone())
        self._gate.working.add(work)
        try:
            await asyncio.wait(
                (work, gone),
                timeout=None if limit == math.inf else limit,
                return_when=asyncio.FIRST_COMPLETED,
            )
            timed_out = not (work.done() or gone.done())
        finally:
            self._gate.working.discard(work)
            gone.cancel()
            cancelled = work.cancelled() or work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # its end, whatever it is
        if timed_out:
            raise ApiError(408, f"the request took longer than {limit:g} s ({bound})")
        if gone.done() and not gone.cancelled() and cancelled:
            raise ClientGoneError
        if work.cancelled():
            raise busy("the server is shutting down")
        return work.result()

    def _deadline(self, exchange: Exchange) -> tuple[float, str]:
        """Seconds that the answer may take, infinite for no limit, and what sets them: --request-timeout, or
        the request for less."""
        flag, given = self._gate.config.request_timeout or math.inf, exchange.header(TIMEOUT_HEADER)
        if given is None:
            return flag, "--request-timeout"
        try:
            asked = float(given)
        except ValueError:
            asked = math.nan
        if not 0 < asked < math.inf:
            raise invalid("x-request-timeout must be a number of seconds above 0", "x-request-timeout")
        return (flag, "--request-timeout") if flag <= asked else (asked, "x-request-timeout")

    async def _body(self, exchange: Exchange) -> bytes:
        if self._receive is not None:
            try:
                await self._receive(exchange)
            except OSError as error:
                if not is_full(error):
                    raise
                raise self._no_room(exchange) from None
            return b""
        return await exchange.body(int(self._gate.config.max_body_mb * 1e6))

    async def _handle(self, exchange: Exchange, body: bytes) -> ApiError | None:
        """Runs the handler; returns its error bare of frames.

        A task, its exception and the frames in between form a cycle, which keeps the body and all that was
        parsed from it until Python looks for cycles: refusals would cost more memory than answers.
        """
        try:
            await self._handler(exchange, body)
        except RvllmError as error:
            return from_rvllm(error, self._fields)
        except ApiError as error:
            return _bare(error)
        except Exception as error:
            if is_full(error):
                return self._no_room(exchange)
            logging.getLogger("rvllm").exception("request %s failed", exchange.shown_id)
            return ApiError(500, f"internal error, see the server's log for {exchange.shown_id}")
        return None

    def _no_room(self, exchange: Exchange) -> ApiError:
        event(logging.WARNING, "the disk is full", id=exchange.shown_id, path=self._path)
        return ApiError(507, "the server has no room on its disk for this", code="storage_full")

    def _check_key(self, exchange: Exchange) -> None:
        if not self._gate.keys:
            return
        scheme, _, given = (exchange.header(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = exchange.header(b"x-api-key") or b""  # Anthropic's clients
        if not self._gate.keys.accept(given.strip()):
            raise ApiError(
                401,
                "a valid key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )


def _bare(error: ApiError) -> ApiError:
    """The error without the frames that it came through."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def check_model(asked: str | None, served: Sequence[str]) -> None:
    """Raises a 404 when a request names another model than the one served, which may have several names."""
    if asked is not None and asked not in served:
        raise ApiError(
            404,
            f"the model {asked[:200]!r} is not served here; this server has {' or '.join(map(repr, served))}",
            param="model",
            code="model_not_found",
        )
