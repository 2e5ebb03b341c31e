"""Browsers as attackers: any page that somebody opens can make their browser talk to this server.

The Host header must name this server, or else a name of the attacker's that resolves to our address (DNS
rebinding) would make his page same-origin with us. What changes state must not come from another site's
page; browsers send those requests without asking us (forms, sendBeacon, fetch without reading).
"""

from __future__ import annotations

import ipaddress
import re

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rvllm.api.http.errors import ApiError
from rvllm.config import ServerConfig

SAFE = ("GET", "HEAD", "OPTIONS")
# RFC 9110's: a URL built from another, as frameworks do, has another path than the request.
_ANY_HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::\d{0,5})?")
_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


class Guard:
    """An ASGI app around the others: refuses foreign hosts and pages, answers pages that are allowed."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._hosts = allowed_hosts(config)
        self._origins = frozenset(_names(config.allowed_origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        origin = headers.get(b"origin")
        allowed = origin is not None and self._allowed(origin)
        try:
            self._check_host(headers.get(b"host", b""))
            if scope["method"] not in SAFE and not allowed:
                check_origin(origin, headers.get(b"sec-fetch-site"), headers.get(b"host", b""))
        except ApiError as error:
            await _answer(send, error.status, msgspec.json.encode(error.body()))
            return
        if not allowed:
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await _answer(send, 204, b"", _permissions(origin, headers))
        else:
            await self._app(scope, receive, _with_origin(send, origin))

    def _check_host(self, host: bytes) -> None:
        if self._hosts is None:
            if not _ANY_HOST.fullmatch(host):
                raise ApiError(400, "the Host header is not a host name with or without a port")
            return
        found = _HOST.fullmatch(host)
        name = found[1].decode().lower().rstrip(".") if found else ""
        if name not in self._hosts and not _is_loopback(name):
            raise ApiError(
                403,
                f"the host {host[:100].decode('latin-1')!r} is not one of this server's (--allowed-hosts)",
            )

    def _allowed(self, origin: bytes) -> bool:
        return "*" in self._origins or origin.decode("latin-1").lower().rstrip("/") in self._origins


def allowed_hosts(config: ServerConfig) -> frozenset[str] | None:
    """The names that Host may have besides loopback's; None: any.

    Without the flag, a server that only this machine reaches takes loopback names and addresses only.
    """
    if config.allowed_hosts is not None:
        names = _names(config.allowed_hosts)
        return None if "*" in names else frozenset(names)
    return frozenset() if _is_loopback(config.host.strip("[]")) else None


def _names(text: str | None) -> list[str]:
    return [name.strip().lower().rstrip("/") for name in (text or "").split(",") if name.strip()]


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def check_origin(origin: bytes | None, site: bytes | None, host: bytes) -> None:
    """Raises a 403 for a request that a page of another site makes."""
    foreign = site not in (None, b"same-origin", b"none")
    if origin is not None and origin.lower().partition(b"://")[2] != host.lower():
        foreign = True
    if foreign:
        raise ApiError(403, "pages of other sites may not use this server (--allowed-origins)")


def _permissions(origin: bytes | None, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    asked = headers.get(b"access-control-request-headers", b"content-type, authorization, x-api-key")
    return [
        (b"access-control-allow-origin", origin or b""),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", asked if re.fullmatch(rb"[\w ,-]{1,1000}", asked) else b""),
        (b"access-control-max-age", b"600"),
        (b"vary", b"origin"),
    ]


def _with_origin(send: Send, origin: bytes | None) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(b"access-control-allow-origin", origin or b""), (b"vary", b"origin"),
                    (b"access-control-expose-headers", b"x-request-id")]  # fmt: skip
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sent


async def _answer(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    about = [] if status == 204 else [(b"content-type", b"application/json"),
                                      (b"content-length", str(len(body)).encode())]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": [*about, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
