"""uvicorn's HTTP/1.1 with bounds on what comes before a body, and refusals in the shape of all others."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rvllm.api.http.errors import ApiError

MAX_HEAD = 64 << 10  # bytes of a request line with its headers, behind the first read of the socket
HEAD_SECONDS = 30.0  # a client has so long for them


class BoundedHttp(HttpToolsProtocol):
    """One connection. Whoever sends endless or endlessly slow headers is told so and hung up on."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first request is due."""
        super().connection_made(transport)
        self._begun = False  # whether a byte of the request's head has come
        self._in_head = True
        self._head = 0  # bytes of it beyond the first read
        self._due: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._head_is_done()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        super().on_message_begin()
        self._begun, self._in_head, self._head = True, True, -1
        self._expect_head()

    def on_headers_complete(self) -> None:
        """The request line and all headers have come."""
        self._head_is_done()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """The next bytes have come."""
        super().data_received(data)
        if self._in_head and self._begun:
            self._head = 0 if self._head < 0 else self._head + len(data)
            if self._head > MAX_HEAD:
                self._refuse(ApiError(431, f"the headers are larger than {MAX_HEAD} bytes"))

    def send_400_response(self, msg: str) -> None:
        """What has come is no HTTP."""
        self._refuse(ApiError(400, "this is not a valid HTTP/1.1 request"))

    def _expect_head(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(HEAD_SECONDS, self._late)

    def _head_is_done(self) -> None:
        self._in_head = False
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        self._due = None
        if self._begun:
            self._refuse(ApiError(408, "the headers did not arrive in time"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers with an error and hangs up."""
        self._head_is_done()
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
