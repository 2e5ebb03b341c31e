"""Every limit of the protocol, in one place: what a connection may send, take and cost.

Those that an operator may want to change are flags (`rvllm.config`); docs/security.md lists all of them
beside nginx's names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rvllm.api.http.errors import busy
from rvllm.config import ServerConfig

MAX_HEADERS = 256  # of a request
MAX_FRAMING = 16  # bytes of chunk sizes and extensions for each byte of body, beyond what a head may have
MAX_PIPELINED = 64  # requests that may wait on a connection for the one before them
LINGER_SECONDS = 5.0  # an answered request may go on sending its body for so long
BODY_RATE = 64 << 10  # a body has a second more for each so many bytes that have come
LOOK_SECONDS = 1.0  # how often connections that are being closed are looked at
HEADROOM_FILES = 128  # descriptors left for everything that is no connection


@dataclass(frozen=True)
class Limits:
    """The protocol's limits; bytes and seconds.

    head: of a request's line and headers, and again of a body's trailers or of a chunk's extensions without
    one byte of body.
    """

    head: int = 64 << 10
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0
    idle_seconds: float = 75.0
    connections: int = 4096
    connections_per_client: int = 2048

    @staticmethod
    def of(config: ServerConfig) -> Limits:
        """As the flags say, but no more connections than the system has descriptors for."""
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = config.max_connections
        if files != resource.RLIM_INFINITY:
            most = max(1, min(most, files - HEADROOM_FILES))
        return Limits(
            head=int(config.max_head_kb * 1024),
            head_seconds=config.header_timeout,
            body_seconds=config.body_timeout,
            write_seconds=config.write_timeout,
            idle_seconds=config.keep_alive_timeout,
            connections=most,
            connections_per_client=config.max_connections_per_client,
        )


class Connections:
    """Counts the open connections, in all and by client address."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.total = 0
        self._by_client: Counter[str] = Counter()

    def add(self, client: str) -> str | None:
        """Counts a connection; returns which limit it exceeds, if any. `remove` it in any case."""
        self.total += 1
        self._by_client[client] += 1
        if self.total > self._limits.connections:
            return "--max-connections"
        if self._by_client[client] > self._limits.connections_per_client:
            return "--max-connections-per-client"
        return None

    def remove(self, client: str) -> None:
        """A connection is gone."""
        self.total -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


class BodyBudget:
    """Bytes of the bodies that are being received or worked on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def check(self, more: int) -> None:
        """Raises a 503 when so many more bytes would be too many."""
        if self.used and self.used + more > self._limit:
            raise busy("the requests in work are too large together (--max-inflight-mb)")

    def take(self, count: int) -> None:
        """Books bytes that have come. Raises a 503 when they are too many."""
        self.check(count)
        self.used += count

    def give(self, count: int) -> None:
        """The bytes are forgotten."""
        self.used -= count
