"""Every limit of the protocol, in one place: what a connection may send, take and cost.

Those that an operator may want to change are flags (`rvllm.config`); docs/security.md lists all of them
beside nginx's names.
"""

from __future__ import annotations

from collections import Counter

from rvllm.api.http.errors import busy
from rvllm.config import ServerConfig

MAX_HEADERS = 256  # of a request
MAX_FRAMING = 16  # bytes of chunk sizes and extensions for each byte of body, beyond what a head may have
MAX_PIPELINED = 64  # requests that may wait on a connection for the one before them
LINGER_SECONDS = 5.0  # an answered request may go on sending its body for so long
BODY_RATE = 64 << 10  # a body has a second more for each so many bytes that have come
LOOK_SECONDS = 1.0  # how often connections that are being closed are looked at
HEADROOM_FILES = 128  # descriptors left for everything that is no connection


class Connections:
    """Counts the open connections, in all and by client address."""

    def __init__(self, config: ServerConfig) -> None:
        """As the flags say, but no more connections than the system has descriptors for."""
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most, self._of_one = config.max_connections, config.max_connections_per_client
        if files != resource.RLIM_INFINITY:
            self._most = max(1, min(self._most, files - HEADROOM_FILES))
        self.total = 0
        self._by_client: Counter[str] = Counter()

    def add(self, client: str) -> str | None:
        """Counts a connection; returns which limit it exceeds, if any. `remove` it in any case."""
        self.total += 1
        self._by_client[client] += 1
        if self.total > self._most:
            return "--max-connections"
        if self._by_client[client] > self._of_one:
            return "--max-connections-per-client"
        return None

    def remove(self, client: str) -> None:
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
        self.used -= count
