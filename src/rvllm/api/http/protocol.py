"""uvicorn's HTTP/1.1 with a bound on every phase, and refusals in the shape of all others."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rvllm.api.http.errors import ApiError, busy
from rvllm.api.http.limits import (
    LINGER_SECONDS,
    LOOK_SECONDS,
    MAX_FRAMING,
    MAX_HEADERS,
    MAX_PIPELINED,
    Connections,
)
from rvllm.config import ServerConfig

_NOT_HTTP = "this is not a valid HTTP/1.1 request"


class BoundedHttp(HttpToolsProtocol):
    """One connection. Whoever sends too much, too slowly or what two readers could read differently is told
    so and hung up on; whoever does not read is hung up on."""

    def __init__(self, *args: Any, settings: ServerConfig, connections: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._settings, self._open = settings, connections
        # Bytes of a request's line and headers, and again of a body's trailers or of a chunk's extensions
        # without one byte of body.
        self._most_head = int(settings.max_head_kb * 1024)
        self._begun = False  # whether a byte of the request's head has come
        self._in_head = True
        self._head = 0  # bytes of it
        self._first_read = True  # the head's first bytes come with this read
        self._body = 0  # bytes of the body that have come
        self._around = 0  # bytes around them: sizes and extensions of chunks, trailers
        self._silent = 0  # of these, since the last byte of body
        self._complete = True  # whether the last request has come whole
        self._within_body = False  # whether all of this read belongs to a body already begun
        self._upgrading = False
        self._refusal: ApiError | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._from = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first request is due."""
        super().connection_made(transport)
        self._from = self.client[0] if self.client else "unix"
        exceeded = self._open.add(self._from)
        if exceeded is not None:
            self._refuse(busy(f"too many connections are open ({exceeded})"))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._open.remove(self._from)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        body, self._first_read = self._body, not self._begun
        self._within_body = not self._in_head and not self._complete
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_on(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError(400, _NOT_HTTP))
            return
        if self._in_head and self._begun:
            self._head += 0 if self._first_read else len(data)
            if self._head > self._most_head:
                self._refuse(self._too_large_head())
        elif self._within_body and not self._complete:  # a head's bytes do not count, nor the last request's
            self._count(len(data), self._body - body)

    def _count(self, came: int, of_body: int) -> None:
        """Bounds what stands around a body's bytes."""
        self._around += max(0, came - of_body)
        self._silent = 0 if of_body > 0 else self._silent + came
        most = self._most_head
        if self._silent > most or self._around > most + MAX_FRAMING * self._body:
            self._refuse(ApiError(431, f"chunk extensions or trailers are larger than {most} bytes"))

    def _read_on(self, rest: bytes) -> None:
        """Goes on with a request that asks for another protocol: we speak none, so it means nothing.

        The parser takes all that follows for that protocol. To read the body, as every other server on the
        way does (RFC 9110, 7.8), a fresh one gets the head without the wish.
        """
        self._upgrading = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(ApiError(405, "CONNECT is not taken"))
            return
        kept = [(n, v) for n, v in self.headers if n not in (b"upgrade", b"http2-settings", b"connection")]
        wishes = b",".join(v for n, v in self.headers if n == b"connection").lower().split(b",")
        if b"close" in (wish.strip() for wish in wishes):
            kept.append((b"connection", b"close"))
        version = self.parser.get_http_version().encode()
        lines = [method + b" " + self.url + b" HTTP/" + version, *(n + b": " + v for n, v in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as the first one
        self._begun = False
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._begun, self._in_head, self._complete, self._head = True, True, False, 0
        self._body = self._around = self._silent = 0
        self._within_body = False
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line has come, or a trailer: nobody asks for those, and they are no headers."""
        if not self._in_head:
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._wrong(ApiError(431, f"there are more than {MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        self._head_is_done()
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > self._most_head:
            self._wrong(self._too_large_head())
        self._check_framing()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._wrong(ApiError(429, "too many requests wait on this connection"))
        super().on_headers_complete()

    def _check_framing(self) -> None:
        """Refuses what the next hop could read differently, though the parser takes it."""
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        hosts = sum(1 for name, _ in self.headers if name == b"host")
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._wrong(ApiError(400, _NOT_HTTP))
        if codings and (codings != [b"chunked"] or version != "1.1"):
            self._wrong(ApiError(400, "the only Transfer-Encoding taken is chunked, in HTTP/1.1"))
        if hosts > 1 or (not hosts and version == "1.1"):
            self._wrong(ApiError(400, "a request has exactly one Host"))

    def _wrong(self, error: ApiError) -> None:
        """Ends the parser's work; `data_received` answers."""
        self._refusal = error
        raise error

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._complete, self._begun = True, False
        self._cancel("linger")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request has been answered; it may go on sending for a moment."""
        super().on_response_complete()
        if not self._complete and self.cycle.response_complete and not self.transport.is_closing():
            self._start("linger", LINGER_SECONDS, self.transport.close)
        self._look_whether_closed()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        self._look_whether_closed()

    def pause_writing(self) -> None:
        """The client has not read what was sent; it has a while."""
        super().pause_writing()
        self._start("write", self._settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel("write")
        super().resume_writing()

    def shutdown(self) -> None:
        super().shutdown()
        self._look_whether_closed()

    def _look_whether_closed(self) -> None:
        """A connection that is being closed stays until its client has read all, or has had its time."""
        if self.transport.is_closing():
            self._start("closing", max(LOOK_SECONDS, self._settings.write_timeout), self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What has come is no HTTP."""
        self._refuse(ApiError(400, _NOT_HTTP))

    def _too_large_head(self) -> ApiError:
        return ApiError(431, f"the headers are larger than {self._most_head} bytes")

    def _start(self, name: str, seconds: float, then: Any) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, then)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _expect_head(self) -> None:
        self._start("head", self._settings.header_timeout, self._late)

    def _head_is_done(self) -> None:
        self._in_head = False
        self._cancel("head")

    def _late(self) -> None:
        self._timers.pop("head", None)
        if self._begun:
            self._refuse(ApiError(408, "the headers did not arrive in time"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers with an error and hangs up; in the midst of another answer, only hangs up."""
        self._head_is_done()
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and self.cycle.response_started
        if not self.pipeline and not (answering and not self.cycle.response_complete):
            body = msgspec.json.encode(error.body())
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._look_whether_closed()
