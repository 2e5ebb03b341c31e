"""In which order sequences are served: the policies' ranks, and fair shares among clients.

A rank is a tuple that never changes while a sequence waits or runs; the lower is served first, and the
highest gives up its place when blocks run out. Waiting counts without any clock: all that wait grow older at
the same rate, so the order of `priority - waited / aging` is that of `priority + arrival / aging`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvllm.engine.sequence import Rank, Sequence

AGING_TOKENS = 1024  # under sjf: tokens of a job that weigh as much as one level of priority
KEPT_CLIENTS = 1024  # without requests, before those are forgotten that have no advance over the others


@dataclass(frozen=True)
class Policy:
    """How waiting requests are ordered.

    name: fcfs (by arrival), priority (lower first, then by arrival) or sjf (fewest tokens left to compute
    first). aging: seconds of waiting that outweigh one level of priority, or AGING_TOKENS under sjf; 0:
    waiting outweighs nothing, so that a steady stream of better requests keeps the others out.
    """

    name: str = "priority"
    aging: float = 0.0

    def rank(self, seq: Sequence) -> Rank:
        """The place of a sequence that begins to wait."""
        if self.name == "fcfs":
            return 0.0, seq.number
        waited = seq.arrival / self.aging if self.aging else 0.0
        if self.name == "priority":
            return seq.priority + waited, seq.number
        left = seq.max_length - (len(seq.tokens) - seq.prompt_len)  # of prompt and output, at most
        return left / AGING_TOKENS + waited, seq.number

    @property
    def preempts(self) -> bool:
        """Whether a waiting sequence of higher priority takes the place of a running one."""
        return self.name == "priority"


class FairShares:
    """Tokens served to each client, so that the one that had least is next.

    The virtual token counter of Sheng et al. (OSDI 2024): what a client is given is added to its count; one
    that comes back is lifted to the least count of those that have requests, so that nobody saves up time.
    """

    def __init__(self) -> None:
        self._served: Counter[str] = Counter()
        self._alive: Counter[str] = Counter()  # requests that wait or run, by client

    def joined(self, client: str) -> None:
        """A client has one more request."""
        if not self._alive[client]:
            self._served[client] = max(self._served[client], self._least())
        self._alive[client] += 1

    def left(self, client: str) -> None:
        """A client has one request less; one without any is forgotten once the others have had as much."""
        self._alive[client] -= 1
        if not self._alive[client]:
            del self._alive[client]
        if len(self._served) > 2 * len(self._alive) + KEPT_CLIENTS or not self._alive:
            least = self._least()
            for name in [n for n in self._served if n not in self._alive]:
                if not self._alive or self._served[name] <= least:
                    del self._served[name]

    def _least(self) -> int:
        """The least that a client with requests was served."""
        return min((self._served[name] for name, count in self._alive.items() if count), default=0)

    def charge(self, client: str, tokens: int) -> None:
        """A client was given so many tokens of computation."""
        self._served[client] += tokens

    def order(self, waiting: list[Sequence]) -> Iterator[Sequence]:
        """Waiting sequences, the next one always of the client that has been served least so far."""
        queues: dict[str, deque[Sequence]] = {}
        for seq in waiting:
            queues.setdefault(seq.client, deque()).append(seq)
        while queues:
            client = min(queues, key=lambda name: self._served[name])
            queue = queues[client]
            yield queue.popleft()
            if not queue:
                del queues[client]
